"""Fine-tuning: every training event once and no other, the loss by hand, adapters that are the model, exact resumption."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrec_lib.evaluation import evaluate
from llmrec_lib.language_models import finetune as module
from llmrec_lib.language_models.compress import compress, keep_layers, shorten, transformer_layers
from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.language_models.finetune import finetune
from llmrec_lib.language_models.low_rank import add_low_rank, merge_low_rank
from llmrec_lib.llm_based import TitleLikelihoodRecommender, catalogue_likelihood, finetune_shortened
from llmrec_lib.prompts import get_template, item_titles, user_prompts
from llmrec_lib.splits import LeakError
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer

SMALL = {"window_tokens": 54, "batch_tokens": 192, "dtype": "float32", "device": "cpu", "progress": False}


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3)).eval()


def scaled_logits():
    """A model whose logits are not the output embedding of its last hidden state."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return CohereForCausalLM(CohereConfig(**size, **heads, initializer_range=0.3, logit_scale=0.3)).eval()


MODELS = {"llama": tiny_llama, "untied": lambda: tiny_llama(tied=False), "gpt2": tiny_gpt2, "cohere": scaled_logits}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def prepare(split, model, tokenizer, titles=None, augmentation=None, **other):
    titles = titles or item_titles(split.dataset.titles)[1:]
    scorer = module._Scorer(model, tokenizer, titles, ";", torch.device("cpu"))
    settings = {"window_tokens": 96, "train_users": 0} | other
    return scorer, module._Texts(split, scorer, get_template("history"), settings, augmentation)


def told(texts, items):
    """The window of these items, all of them predicted."""
    return texts.window(items, [True] * len(items))


def events_of(windows, split, preamble, title_tokens):
    """Users and items told by windows, from the token ids alone."""
    found = []
    for ids, _, n, _ in windows:
        assert ids[: len(preamble)] == preamble
        rest, items = ids[len(preamble) :], []
        while rest:
            item = next(i for i, title in enumerate(title_tokens, 1) if rest[: len(title)] == title)
            items.append(item)
            rest = rest[len(title_tokens[item - 1]) :]
        assert len(items) == n
        found.append(items)
    return found


@pytest.mark.parametrize("window_tokens", [46, 54, 64])
def test_each_training_event_is_a_target_once_per_epoch(checkerboard_split, tokenizer, window_tokens):
    split = checkerboard_split
    scorer, texts = prepare(split, tiny_llama(), tokenizer, window_tokens=window_tokens)
    cuts = []
    for epoch in range(3):
        batches = texts.batches(7, epoch, 2 * window_tokens)
        windows = [window for batch in batches for window in batch]
        assert all(len(ids) <= window_tokens for ids, *_ in windows)
        assert all(len(batch) * max(len(ids) for ids, *_ in batch) <= 2 * window_tokens for batch in batches)
        told = events_of(windows, split, texts.preamble, scorer.title_tokens)
        assert sorted(item for items in told for item in items) == sorted(split.pairs("train")[1])
        histories = [list(history) for history in split.histories(range(1, split.dataset.n_users), "train")]
        assert all(any(items == h[i : i + len(items)] for h in histories for i in range(len(h))) for items in told)
        for ids, nodes, *_ in windows:  # the words before the titles are not predicted
            assert nodes[: len(texts.preamble) - 1] == [module._NONE] * (len(texts.preamble) - 1)
            assert nodes[-1] == module._NONE
            assert len(nodes) == len(ids)
        cuts.append(sorted(map(tuple, told)))
        again = texts.batches(7, epoch, 2 * window_tokens)
        assert again == batches
    fits = window_tokens == 64
    assert (cuts[0] == cuts[1] == cuts[2]) == fits  # drawn anew, where there is something to cut
    assert fits == (len(cuts[0]) == 24)


def test_tokens_are_those_of_prompts_and_titles(checkerboard_split, tokenizer):
    split, model = checkerboard_split, tiny_llama()
    likelihood = catalogue_likelihood(split, (model, tokenizer), dtype="float32")
    scorer, texts = prepare(split, model, tokenizer)
    assert scorer.title_tokens == likelihood.title_tokens
    for user, prompt in enumerate(user_prompts(split, range(1, 5), "train"), 1):
        ids, *_ = told(texts, split.histories([user], "train")[0])
        assert ids == likelihood.prompt_tokens(prompt)


def test_a_held_out_event_is_not_read(checkerboard_split, tokenizer):
    leaky = dataclasses.replace(checkerboard_split)
    leaky._kept["pairs", "train"] = checkerboard_split.pairs("train+valid")
    with pytest.raises(LeakError, match="fine-tuning texts.*24 held-out valid"):
        finetune(leaky, (tiny_llama(), tokenizer), **SMALL)


def slow_loss(model, window, title_tokens):
    """Nats of a window from the model's logits and the list of titles, token by token."""
    ids, *_ = window
    logits = model(torch.tensor([ids])).logits[0].double()
    place, nats = len(ids), 0.0
    titles = {tuple(title) for title in title_tokens}
    while place > 0:  # titles from the end: they close with the suffix, so the split is unique
        title = next((t for t in titles if tuple(ids[place - len(t) : place]) == t), None)
        if title is None:
            break
        for depth, token in enumerate(title):
            row = logits[place - len(title) + depth - 1]
            allowed = sorted({t[depth] for t in titles if t[:depth] == title[:depth]})
            nats += float(row[allowed].logsumexp(0) - row[token])
        place -= len(title)
    return nats


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_loss_is_the_slow_one(checkerboard_split, tokenizer, name, monkeypatch):
    monkeypatch.setattr(module, "HEAD_ROWS", 5)
    model = MODELS[name]()
    scorer, texts = prepare(checkerboard_split, model, tokenizer)
    head = module._Head(scorer, torch.float32)
    assert head.plain == (name != "cohere")
    batch = texts.batches(0, 0, 400)[0]
    assert len({len(ids) for ids, *_ in batch}) > 1  # padded
    found, _ = module._loss(model, head, batch, torch.float32, train=False)
    assert found == pytest.approx(sum(slow_loss(model, w, scorer.title_tokens) for w in batch), rel=1e-5)


def test_gradient_is_that_of_the_mean_per_prediction(checkerboard_split, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "HEAD_ROWS", 5)
    model = tiny_llama()
    scorer, texts = prepare(checkerboard_split, model, tokenizer)
    batch = texts.batches(0, 0, 400)[0]
    trainable = module._trainable(model, "full", 1, 0)
    module._loss(model, module._Head(scorer, torch.float32), batch, torch.float32, train=True)
    found = {name: parameter.grad.clone() for name, parameter in trainable.items()}
    assert not any("embed" in name or "lm_head" in name for name in found)
    model.zero_grad()
    losses = []
    for ids, nodes, *_ in batch:
        logits = model(torch.tensor([ids])).logits[0]
        for place, node in enumerate(nodes):
            if node != module._NONE:
                allowed = scorer._tree.tokens[scorer._tree.children[node]]
                losses.append(logits[place, allowed].logsumexp(0) - logits[place, ids[place + 1]])
    torch.stack(losses).mean().backward()
    for name, parameter in trainable.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_catalogue_objective_is_a_distribution_over_distinct_titles(checkerboard_split, tokenizer):
    split, model = checkerboard_split, tiny_llama()
    scorer, texts = prepare(split, model, tokenizer)
    head = module._Head(scorer, torch.float32)
    windows = [texts.window([3, 4, item], [False, False, True]) for item in range(1, split.dataset.n_items)]
    p = [math.exp(-module._loss(model, head, [window], torch.float32, train=False)[0]) for window in windows]
    assert sum(p) == pytest.approx(1, abs=1e-5)
    assert min(p) > 0


@pytest.mark.parametrize(("method", "epochs"), [("full", 12), ("lora", 30)])
def test_training_teaches_which_items_go_together(checkerboard_split, tokenizer, method, epochs):
    split, given = checkerboard_split, tiny_llama()
    before = {key: value.clone() for key, value in given.state_dict().items()}
    options = {**SMALL, "window_tokens": 128, "learning_rate": 1e-2, "valid_users": 24, "dtype": "float32"}
    tuned = finetune(split, (given, tokenizer), method=method, epochs=epochs, **options)
    assert all(torch.equal(before[key], value) for key, value in given.state_dict().items())
    curve = tuned.curve
    assert curve["step"].tolist() == list(range(len(curve)))
    assert curve["loss"].tail(10).mean() < 0.5 * curve["loss"][1:6].mean()
    valid = curve["valid_loss"].dropna()
    assert valid.index.tolist() == [*range(0, len(curve), (len(curve) - 1) // epochs)]
    assert valid.iloc[-1] < 0.5 * valid.iloc[0]
    assert valid.iloc[-1] < math.log(8)  # better than knowing the parity alone
    assert curve["epoch"].iloc[-1] == epochs
    assert 0 < tuned.tokens_per_second == pytest.approx(curve["tokens"].iloc[-1] / curve["seconds"].iloc[-1])
    assert 0 < tuned.share_of_roof < 1
    likelihood = catalogue_likelihood(split, (tuned.model, tuned.tokenizer), dtype="float32")
    method = TitleLikelihoodRecommender(split, likelihood, over="catalogue", progress=False)
    parity = np.array([title.split()[0] for title in split.dataset.titles[1:]])
    users, right = torch.arange(1, 25), []
    for user, row in zip(users.tolist(), method.at("valid").score(users), strict=True):
        own = parity[split.histories([user], "valid")[0][0] - 1]
        right.append(row[1:].softmax(0)[torch.tensor(parity == own)].sum().item())
    assert (
        np.mean(right) > 0.65
    )  # .5 is knowing nothing; which single users are missed depends on the processor's rounding
    vectors = TextEncoder((tuned.model.base_model, tokenizer), dtype="float32").encode(["even story 2"], progress=False)
    assert vectors.shape == (1, 32)


def test_recipe_of_the_study(checkerboard_split, tokenizer):
    """Most influential layers, then the very same training; the curve ends with the NDCG of the model that is given back."""
    given, options = (tiny_llama(), tokenizer), {"epochs": 2, "learning_rate": 1e-2, **SMALL}
    titles = ["", *checkerboard_split.dataset.titles[:0:-1]]
    tuned = finetune_shortened(checkerboard_split, given, 1, titles=titles, valid_users=6, **options)
    prompts = user_prompts(checkerboard_split, checkerboard_split.eval_users("valid", 20), "valid")
    small, _ = shorten(given, prompts, 1)
    plain = finetune(checkerboard_split, small, titles=titles, **options)
    pairs = zip(tuned.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert tuned.curve["valid_ndcg"].notna().sum() == tuned.curve["valid_loss"].notna().sum() == 3
    likelihood = catalogue_likelihood(checkerboard_split, (tuned.model, tokenizer), titles=titles)
    arm = TitleLikelihoodRecommender(checkerboard_split, likelihood, over="catalogue", progress=False)
    users = checkerboard_split.eval_users("valid", 6)
    ndcg = evaluate(arm, checkerboard_split, "valid", users=users, ks=[10]).mean("ndcg@10")
    assert tuned.curve["valid_ndcg"].iloc[-1] == pytest.approx(ndcg, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapter_is_the_model(checkerboard_split, tokenizer, name, tmp_path):
    model, ids = keep_layers(MODELS[name](), [0]), torch.arange(2, 40)[None]
    tuned = finetune(checkerboard_split, (model, tokenizer), method="lora", rank=3, epochs=2, **SMALL)
    assert {tensor.dtype for tensor in tuned.adapter.values()} == {torch.bfloat16}
    assert any(tensor.abs().max() > 0 for key, tensor in tuned.adapter.items() if key.endswith(".b"))
    save_file(tuned.adapter, tmp_path / "a.safetensors")
    loaded = copy.deepcopy(model).float()
    add_low_rank(transformer_layers(loaded), 3)
    loaded.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=False)
    merge_low_rank(loaded)
    assert torch.equal(loaded(ids).logits, tuned.model(ids).logits)
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in tuned.model.named_parameters()}
    assert not torch.allclose(tuned.model(ids).logits, model(ids).logits)
    assert finetune(checkerboard_split, (model, tokenizer), **SMALL).adapter is None


def weights(tuned):
    return torch.cat([parameter.flatten() for parameter in tuned.model.parameters()])


def losses(tuned):
    return tuned.curve[["step", "epoch", "tokens", "loss", "valid_loss"]]


RUN = {**SMALL, "epochs": 3, "valid_users": 6}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_same_seed_same_weights_and_stored_once(checkerboard_split, tokenizer, method, tmp_path, monkeypatch):
    model = (tiny_llama(), tokenizer)
    first = finetune(checkerboard_split, model, method=method, **RUN)
    assert len(list((tmp_path / "finetuned").glob("*.safetensors"))) == 1
    assert not [path for path in (tmp_path / "finetuned").iterdir() if path.is_dir()]  # no checkpoint left
    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
        stored = finetune(checkerboard_split, model, method=method, **RUN)
    assert torch.equal(weights(first), weights(stored))
    assert first.curve.equals(stored.curve)
    assert stored.share_of_roof == first.share_of_roof
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "other"))
    again = finetune(checkerboard_split, model, method=method, **RUN)
    assert torch.equal(weights(first), weights(again))
    assert losses(first).equals(losses(again))
    other = finetune(checkerboard_split, model, method=method, **RUN | {"seed": 1})
    assert not torch.equal(weights(first), weights(other))


def interrupted(split, tokenizer, n_steps, stop, method="full"):
    """Train, but call `stop` at the step after `n_steps`; for SIGKILL in a process of its own."""
    real, count = module._loss, 0

    def counted(*arguments, train, **keywords):
        nonlocal count
        count += train
        if count > n_steps:
            stop()
        return real(*arguments, train=train, **keywords)

    module._loss, module.CHECKPOINT_SECONDS = counted, 0.0
    try:
        return finetune(split, (tiny_llama(), tokenizer), method=method, **RUN), count
    finally:
        module._loss, module.CHECKPOINT_SECONDS = real, 60.0


class Stop(Exception):
    pass


def stop():
    raise Stop


@pytest.mark.parametrize("method", ["full", "lora"])
def test_interrupted_training_goes_on_exactly(checkerboard_split, tokenizer, method, tmp_path, monkeypatch):
    whole = finetune(checkerboard_split, (tiny_llama(), tokenizer), method=method, **RUN)
    n_steps = whole.curve["step"].iloc[-1]
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "other"))
    for after in (2, n_steps // 2):
        with pytest.raises(Stop):
            interrupted(checkerboard_split, tokenizer, after, stop, method)
    resumed, n_more = interrupted(checkerboard_split, tokenizer, math.inf, stop, method)
    assert n_more < n_steps
    assert torch.equal(weights(whole), weights(resumed))
    assert losses(whole).equals(losses(resumed))


def test_training_killed_by_the_system_goes_on_exactly(checkerboard_split, tokenizer, tmp_path, monkeypatch):
    whole = finetune(checkerboard_split, (tiny_llama(), tokenizer), **RUN)
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "other"))
    code = "from tests.unit.test_finetune import killed; killed()"
    folder = tmp_path / "data"
    environment = {**os.environ, "FOLDER": str(folder), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "other" / "finetuned").glob("*/checkpoint.safetensors"))) == 1
    resumed, n_more = interrupted(checkerboard_split, tokenizer, math.inf, stop)
    assert n_more < whole.curve["step"].iloc[-1]
    assert torch.equal(weights(whole), weights(resumed))
    assert losses(whole).equals(losses(resumed))
    assert not list((tmp_path / "other" / "finetuned").glob("*/*"))


def killed():
    from llmrec_lib.datasets import load_folder
    from llmrec_lib.splits import split
    from tests.checkerboard import write_checkerboard

    data = split(load_folder(write_checkerboard(os.environ["FOLDER"])))
    interrupted(data, tiny_tokenizer(), 9, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_damaged_checkpoint_is_left_aside(checkerboard_split, tokenizer, tmp_path):
    with pytest.raises(Stop):
        interrupted(checkerboard_split, tokenizer, 3, stop)
    (checkpoint,) = (tmp_path / "finetuned").glob("*/checkpoint.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.warns(UserWarning, match="training starts anew"):
        finetune(checkerboard_split, (tiny_llama(), tokenizer), **RUN)


def test_untrained_model_of_the_same_shape(checkerboard_split, tokenizer):
    model = tiny_llama(seed=3)
    options = {**SMALL, "learning_rate": 1e-12, "epochs": 1}
    kept = finetune(checkerboard_split, (model, tokenizer), **options)
    untrained = finetune(checkerboard_split, (model, tokenizer), pretrained=False, **options)
    other = finetune(checkerboard_split, (model, tokenizer), pretrained=False, **options | {"seed": 1})
    original = torch.cat([parameter.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(weights(kept), original, atol=1e-6, rtol=0)
    assert (weights(untrained) - original).abs().max() > 0.1
    assert (weights(untrained) - weights(other)).abs().max() > 0.1
    assert weights(untrained).shape == original.shape


def test_shuffled_titles_are_what_is_read(checkerboard_split, tokenizer):
    titles = checkerboard_split.dataset.titles
    shuffled = [titles[0], *titles[:0:-1]]
    _, texts = prepare(checkerboard_split, tiny_llama(), tokenizer, titles=item_titles(shuffled)[1:])
    _, plain = prepare(checkerboard_split, tiny_llama(), tokenizer)
    assert told(texts, [1]) == told(plain, [16])
    tuned = finetune(checkerboard_split, (tiny_llama(), tokenizer), titles=shuffled, **SMALL)
    assert not torch.equal(weights(tuned), weights(finetune(checkerboard_split, (tiny_llama(), tokenizer), **SMALL)))


def test_validation_reads_the_training_history(checkerboard_split, tokenizer):
    split = checkerboard_split
    scorer, texts = prepare(split, tiny_llama(), tokenizer, window_tokens=256)
    windows = texts.validation(split, 5)
    users = split.eval_users("valid", 5)
    assert len(windows) == len(users) == 5
    for user, (ids, nodes, n, _) in zip(users, windows, strict=True):
        target = scorer.title_tokens[split.targets("valid")[user].indices[0] - 1]
        prompt = scorer.prompt_tokens(user_prompts(split, [user], "valid")[0])
        assert ids == [*prompt, *target]
        assert n == 1
        assert set(nodes[: len(prompt) - 1]) == {module._NONE}


def test_callback_gets_a_copy(checkerboard_split, tokenizer):
    seen = []

    def validate(model, given):
        assert given is tokenizer
        model.to(torch.bfloat16)  # as a scorer may do
        seen.append(model)
        return len(seen) / 10

    options = {**SMALL, "method": "lora", "epochs": 2}
    tuned = finetune(checkerboard_split, (tiny_llama(), tokenizer), validate=validate, **options)
    assert tuned.curve["valid_ndcg"].dropna().tolist() == [0.1, 0.2, 0.3]
    assert tuned.curve["valid_loss"].isna().all()
    without = finetune(checkerboard_split, (tiny_llama(), tokenizer), **options)
    assert torch.equal(weights(tuned), weights(without))


def test_bfloat16_keeps_float32_weights(checkerboard_split, tokenizer):
    tuned = finetune(checkerboard_split, (tiny_llama(), tokenizer), **SMALL | {"dtype": "bfloat16", "epochs": 3})
    exact = finetune(checkerboard_split, (tiny_llama(), tokenizer), **SMALL | {"epochs": 3})
    assert {parameter.dtype for parameter in tuned.model.parameters()} == {torch.float32}
    assert tuned.curve["loss"].to_numpy() == pytest.approx(exact.curve["loss"].to_numpy(), rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prefix"}, "method 'prefix' must be one of 'full', 'lora'"),
        ({"template": "need"}, "template 'need' must end with {history}"),
        ({"rank": 0}, "rank is 0; it must be 1 or more"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"train_users": -1}, "train_users is -1; it must be 0 or more"),
        ({"valid_users": -1}, "valid_users is -1; it must be 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be more than 0"),
        ({"window_tokens": 8}, "window_tokens is 8; it must lie in"),
        ({"window_tokens": 512, "batch_tokens": 512}, "window_tokens is 512; it must lie in .* to 256"),
        ({"batch_tokens": 50}, "batch_tokens is 50; it must be 54 or more"),
        ({"titles": ["a"]}, "titles has 1 entries for 17 items"),
        ({"dtype": "float16"}, "dtype 'float16' must be"),
    ],
)
def test_bad_parameters(checkerboard_split, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(checkerboard_split, (tiny_llama(), tokenizer), **SMALL | options)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("integers", ["int8", "int4-weights"])
def test_integers_cannot_be_trained(checkerboard_split, tokenizer, method, integers):
    whole = compress((tiny_llama(), tokenizer), integers)
    with pytest.raises(ValueError, match="holds integers: fine-tune the model in full precision"):
        finetune(checkerboard_split, whole, **SMALL | {"method": method})


def test_numpy_numbers_are_numbers(checkerboard_split, tokenizer):
    """They come out of ranges and tables, and must be in the key of what is stored like any other number."""
    options = {**SMALL, "method": "lora"}
    two, three = (
        finetune(checkerboard_split, (tiny_llama(), tokenizer), **{**options, "rank": np.int64(rank)})
        for rank in (2, 3)
    )
    assert (two.settings["rank"], three.settings["rank"]) == (2, 3)
    with pytest.raises(TypeError, match="integer"):
        finetune(checkerboard_split, (tiny_llama(), tokenizer), **{**options, "epochs": 1.5})


def test_a_sample_of_users_is_read(checkerboard_split, tokenizer):
    whole, some = (prepare(checkerboard_split, tiny_llama(), tokenizer, train_users=n)[1].histories for n in (0, 5))
    assert (len(whole), len(some)) == (24, 5)
    assert all(any(np.array_equal(one, other) for other in whole) for one in some)
