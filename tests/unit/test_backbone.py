"""A language model's body as sequence model: loss, what is trained, padding, control, cache, errors."""

from __future__ import annotations

import copy

import pytest
import torch

from llmrec_lib import _recbole
from llmrec_lib.baselines import train
from llmrec_lib.evaluation import evaluate
from llmrec_lib.language_models import backbone
from llmrec_lib.language_models.backbone import DEFAULTS, causal_body, train_backbone
from llmrec_lib.language_models.compress import compress, keep_layers
from llmrec_lib.language_models.low_rank import LowRank, add_low_rank
from tests.contract.test_recommenders import item_embeddings
from tests.unit.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer

USERS = torch.tensor([5, 1, 24, 2])


def tiny_gpt2(seed: int = 0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
SMALL = {"MAX_ITEM_LIST_LENGTH": 6, "out_size": 16, "epochs": 2, "eval_step": 1, "train_batch_size": 8}


def settings(kind="llama", parts=None, **changes):
    own = {"tuning": "frozen", "pretrained": True, "rank": 3, "item_input": "text+id"}
    embeddings = _recbole.unit_rows(item_embeddings(parts.dataset), parts.dataset.n_items)
    objects = {"language_model": MODELS[kind](), "item_embeddings": embeddings}
    made = {**DEFAULTS, **SMALL, **own, **objects, **changes}
    return made if made["item_input"] != "id" else {**made, "item_embeddings": None}


def built(parts, *args, **changes):
    with _recbole.contained(0):
        return _recbole.build(backbone.model_class(), parts, settings(*args, parts=parts, **changes), 0)


def tiny(parts, kind="llama", **changes):
    embeddings = item_embeddings(parts.dataset)
    return train_backbone(parts, embeddings, (MODELS[kind](), None), **{"progress": False, **SMALL, **changes})


@pytest.mark.parametrize("item_input", ["text", "id", "text+id"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_at_every_position(checkerboard_split, kind, item_input):
    """The mean cross entropy over all prefixes, one at a time and without padding, by the language model's own layers."""
    made = built(checkerboard_split, kind, item_input=item_input)
    net, batch, lm = made.model.eval(), next(iter(made.loader)), MODELS[kind]()
    texts, table, state = made.config["item_embeddings"], lm.get_input_embeddings().weight, net.state_dict()
    losses = []
    with torch.no_grad():
        vectors, outputs = 0.0, state["item_embedding.ids.weight"]
        if "text" in item_input:
            vectors = texts @ state["input_table.project.weight"].T + state["input_table.project.bias"]
            outputs = outputs + texts @ state["item_embedding.project.weight"].T
            outputs = outputs + state["item_embedding.project.bias"]
        if "id" in item_input:
            vectors = vectors + state["input_table.ids.weight"]
        vectors = vectors / vectors.norm(dim=1, keepdim=True) * table.norm(dim=1).mean()
        loss = net.calculate_loss(batch)
        for sequence, length, last in zip(batch["item_id_list"], batch["item_length"], batch["item_id"], strict=True):
            events = [*sequence[:length].tolist(), int(last)]
            for end in range(1, len(events)):
                hidden = lm.base_model(inputs_embeds=vectors[events[:end]][None]).last_hidden_state[0, -1]
                logits = outputs @ (state["project.weight"] @ hidden + state["project.bias"])
                losses.append(torch.logsumexp(logits, 0) - logits[events[end]])
    assert len(losses) > 20
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_body_of_fewer_layers(kind):
    model = MODELS[kind]()
    before = copy.deepcopy(model.state_dict())
    body, length = causal_body(keep_layers(model, [0]))
    x = torch.randn(1, 5, 32)
    hidden = []
    layers = next(child for child in model.base_model.children() if isinstance(child, torch.nn.ModuleList))
    layers[0].register_forward_hook(lambda layer, inputs, output: hidden.append(output))
    with torch.no_grad():
        model.base_model(inputs_embeds=x)
        norm = model.base_model.norm if kind == "llama" else model.base_model.ln_f
        first = hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0]
        assert torch.allclose(body(inputs_embeds=x).last_hidden_state, norm(first), atol=1e-5)
    assert length == pytest.approx(model.get_input_embeddings().weight.norm(dim=1).mean().item(), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(len(parameter) == 320 for parameter in body.parameters())  # no vocabulary of words


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_what_is_trained(checkerboard_split, kind, tuning):
    made = built(checkerboard_split, kind, tuning=tuning, body_learning_rate=0.01, epochs=1)
    net = made.model
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with _recbole.contained(0):
        trainer = _recbole.make_trainer(made, "LanguageModelBackbone", lambda: 0.0)
        for epoch in range(2):  # A of an adapter has a gradient once B is no longer zero
            trainer._train_epoch(made.loader, epoch)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.001, 0.01]
    changed = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    body = {name for name in before if name.startswith("body.")}
    adapters = {name for name in body if name.endswith((".a", ".b"))}
    assert (len(adapters) > 0) == (tuning == "lora")
    assert changed & body == {"frozen": set(), "lora": adapters, "full": body}[tuning]
    assert before.keys() - body <= changed
    assert net.train().body.training == (tuning != "frozen")
    assert set(net.state_dict()) == before.keys() - body | (changed & body)  # what is stored


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_start_as_nothing_and_have_their_rank(kind):
    body, _ = causal_body(MODELS[kind]())
    x = torch.randn(2, 4, 32)
    with torch.no_grad():
        plain = body(inputs_embeds=x).last_hidden_state
        parameters = add_low_rank(body, 3)
        assert torch.equal(body(inputs_embeds=x).last_hidden_state, plain)
    per_layer = {"llama": 7, "gpt2": 4}[kind]  # q, k, v, o, gate, up, down; qkv, proj, fc, proj
    assert len(parameters) == 2 * 2 * per_layer
    assert {id(p) for p in parameters} == {id(p) for p in body.parameters() if p.requires_grad}
    adapter = next(module for module in body.modules() if isinstance(module, LowRank))
    torch.nn.init.normal_(adapter.b)
    with torch.no_grad():
        update = adapter(torch.eye(32)) - adapter.base(torch.eye(32))
        assert torch.allclose(update, 2 * (adapter.b @ adapter.a).T, atol=1e-5)
        assert torch.linalg.matrix_rank(update, tol=1e-4) == 3


@pytest.mark.parametrize("kind", MODELS)
def test_padding_changes_nothing(checkerboard_split, kind):
    net = built(checkerboard_split, kind).model.eval()
    histories = [[3, 8, 1, 4, 6], [7], [2, 9]]
    padded = torch.zeros(3, 6, dtype=torch.long)
    for row, history in enumerate(histories):
        padded[row, : len(history)] = torch.tensor(history)
    lengths = torch.tensor([len(history) for history in histories])
    with torch.no_grad():
        together = net.full_sort_predict({"item_id_list": padded, "item_length": lengths})
        for row, history in enumerate(histories):
            alone = {"item_id_list": torch.tensor([history]), "item_length": lengths[[row]]}
            assert torch.allclose(together[row], net.full_sort_predict(alone)[0], atol=1e-5)
    assert together.shape == (3, 17)


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
@pytest.mark.parametrize("kind", MODELS)
def test_learns_the_right_ranking(checkerboard_split, kind, tuning):
    learned = tiny(checkerboard_split, kind, tuning=tuning, epochs=30, eval_step=5, learning_rate=0.005)
    popular = train("pop", checkerboard_split, progress=False)
    found, base = (evaluate(arm, checkerboard_split, "valid", ks=(3,)).mean("ndcg@3") for arm in (learned, popular))
    assert found > base + 0.15
    assert learned.name == f"backbone, {tuning}"


def test_the_control_has_other_weights(checkerboard_split):
    arms = {}
    for case, changes in {"pre-trained": {}, "random": {"pretrained": False}}.items():
        arms[case] = tiny(checkerboard_split, seed=1, **changes)  # the tiny model is itself random, from seed 0
    weights = {case: dict(arm.model.body.named_parameters()) for case, arm in arms.items()}
    source = dict(tiny_llama().base_model.named_parameters())
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights["pre-trained"][name].cpu(), source[name])
    assert weights["random"].keys() == weights["pre-trained"].keys()
    assert not torch.allclose(weights["random"][name].cpu(), source[name])
    assert not torch.allclose(*(arm.score(USERS) for arm in arms.values()))
    assert arms["random"].describe() != arms["pre-trained"].describe()
    other = tiny(checkerboard_split, pretrained=False, seed=2)
    assert not torch.equal(dict(other.model.body.named_parameters())[name], weights["random"][name])


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_a_second_call_does_not_train(checkerboard_split, monkeypatch, tmp_path, tuning):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    first = tiny(checkerboard_split, tuning=tuning)
    monkeypatch.setattr(_recbole, "fit", lambda *args, **kwargs: pytest.fail("trained again"))
    second = tiny(checkerboard_split, tuning=tuning)
    assert torch.equal(first.score(USERS), second.score(USERS))
    assert first.describe() == second.describe()
    monkeypatch.undo()
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    embeddings = item_embeddings(checkerboard_split.dataset)
    options = {"progress": False, "tuning": tuning, **SMALL}
    train_backbone(checkerboard_split, embeddings, (tiny_llama(1), None), **options)  # other weights
    train_backbone(checkerboard_split, embeddings.flip(1), (tiny_llama(), None), **options)  # other texts
    assert len(list((tmp_path / "backbones").glob("*.safetensors"))) == 3


def test_training_is_decided_by_the_seed_and_leaves_the_process_alone(checkerboard_split, monkeypatch, tmp_path):
    scores = []
    for run in range(2):
        monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / str(run)))
        torch.manual_seed(run)
        model = tiny_llama(), None
        before = torch.get_rng_state()
        options = {"tuning": "lora", "progress": False, **SMALL}
        arm = train_backbone(checkerboard_split, item_embeddings(checkerboard_split.dataset), model, **options)
        assert torch.equal(torch.get_rng_state(), before)
        scores.append(arm.score(USERS))
    assert torch.equal(*scores)


def test_ids_need_no_texts(checkerboard_split):
    options = {"item_input": "id", "progress": False, **SMALL}
    arms = [
        train_backbone(checkerboard_split, embeddings, (tiny_llama(), None), **options)
        for embeddings in (None, item_embeddings(checkerboard_split.dataset))
    ]
    assert torch.equal(*(arm.score(USERS) for arm in arms))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": "all"}, "tuning is 'all'.*frozen.*lora.*full"),
        ({"item_input": "ids"}, "item_input is 'ids'.*text"),
        ({"tuning": "lora", "rank": 0}, "rank is 0"),
        ({"MAX_ITEM_LIST_LENGTH": 300}, "MAX_ITEM_LIST_LENGTH is 300; the language model reads 256"),
    ],
)
def test_errors(checkerboard_split, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(checkerboard_split, **changes)


def test_wrong_embeddings_are_refused(checkerboard_split):
    right = item_embeddings(checkerboard_split.dataset)
    infinite = right.clone()
    infinite[3, 0] = float("inf")
    cases = [(right[1:], r"\(16, 6\).*\(17, d\)"), (None, "None.*item_input='id'"), (infinite, "infinite")]
    for embeddings, message in cases:
        with pytest.raises(ValueError, match=message):
            train_backbone(checkerboard_split, embeddings, (tiny_llama(), None), progress=False)
    padded = right.clone()
    padded[0] = float("nan")
    assert torch.equal(_recbole.unit_rows(padded, 17), _recbole.unit_rows(right, 17))


def test_wrong_models_are_refused():
    with pytest.raises(ValueError, match="BertModel sees later positions"):
        causal_body(tiny_bert())
    adapted = tiny_llama()
    add_low_rank(adapted.base_model, 2)
    integers, _ = compress((tiny_llama(), tiny_tokenizer()), "int8")
    for model in (adapted, integers):
        with pytest.raises(
            ValueError, match=r"layers.0.* is not of a plain model: merge adapters first, quantise after"
        ):
            causal_body(model)
