"""Layers that are kept compute what they computed before; influence is what the paper's equation says."""

import copy
import json

import pytest
import torch

from llmrec_lib.language_models import catalog, compress
from llmrec_lib.language_models.compress import keep_layers, layer_influence, shorten, transformer_layers
from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.language_models.likelihood import TitleLikelihood
from tests.unit.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer


def llama(n_layers=4):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": n_layers}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, initializer_range=0.3)).eval()


def gpt2(n_layers=4):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"vocab_size": 50, "n_embd": 32, "n_layer": n_layers, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3)).eval()


def gemma(n_layers=4):
    """Every other layer sees a window only, which its configuration says per layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": n_layers, "head_dim": 8}
    kinds = [("sliding_attention", "full_attention")[place % 2] for place in range(n_layers)]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "layer_types": kinds}
    return Gemma3ForCausalLM(Gemma3TextConfig(**size, **heads, initializer_range=0.3)).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "gemma": gemma}
IDS = torch.arange(3, 23)[None]


def by_skipping(model, kept):
    """The reference: the whole model, in which the other layers hand on what they get."""
    model = copy.deepcopy(model)
    for place, layer in enumerate(transformer_layers(model)):
        if place not in kept:
            as_tuple = type(layer).__name__ == "GPT2Block" and isinstance(layer(torch.zeros(1, 1, 32)), tuple)
            layer.forward = lambda x, *_, as_tuple=as_tuple, **__: (x,) if as_tuple else x
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("layers", "kept"), [([0, 1], [0, 1]), ([0, 3], [0, 3]), ([3, 1], [1, 3]), (range(4), [0, 1, 2, 3])]
)
def test_kept_layers_compute_what_they_did(kind, layers, kept, tmp_path):
    whole = MODELS[kind]()
    before = copy.deepcopy(whole.state_dict())
    small = keep_layers(whole, layers)
    with torch.no_grad():
        assert torch.allclose(small(IDS, use_cache=False).logits, by_skipping(whole, kept), atol=1e-5)
        # One token at a time, with the cache of keys and values, which counts the layers.
        cache, steps = None, []
        for token in IDS[0]:
            outputs = small(token[None, None], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            steps.append(outputs.logits[0, -1])
        assert torch.allclose(torch.stack(steps), small(IDS, use_cache=False).logits[0], atol=1e-4)
        assert small.num_parameters() < whole.num_parameters() or len(kept) == 4
        assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
        # What is written to a folder and read again is the same model.
        small.save_pretrained(tmp_path)
        again = type(small).from_pretrained(tmp_path)
        assert torch.allclose(again(IDS).logits, small(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("layers", [range(5), [], [0, 0], [4], [-1]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match=r"layers is .*; LlamaForCausalLM has 4, numbered from 0"):
        keep_layers(llama(), layers)


@pytest.mark.parametrize("kind", MODELS)
def test_influence_is_one_minus_the_cosine(kind):
    model = MODELS[kind]()
    texts = [[3, 4, 5, 6], [7, 8], [9] * 7]
    expected = []
    for place, layer in enumerate(transformer_layers(model)):
        seen = []
        hook = layer.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append(
                torch.stack([inputs[0][0], (output[0] if isinstance(output, tuple) else output)[0]])
            )
        )
        with torch.no_grad():
            for ids in texts:
                model(torch.tensor([ids]))
        hook.remove()
        before, after = torch.cat(seen, dim=1)
        cosines = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
        expected.append(1 - cosines.mean().item())
        assert len(cosines) == 13, place
    influence = layer_influence(model, texts)
    assert influence.tolist() == pytest.approx(expected, abs=1e-5)
    assert not any(layer._forward_hooks for layer in transformer_layers(model))


def test_a_layer_that_does_nothing_has_no_influence():
    model = llama()
    idle = transformer_layers(model)[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    influence = layer_influence(model, [[3, 4, 5]])
    assert influence.argmin() == 2
    assert influence[2] == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        assert torch.allclose(keep_layers(model, [0, 1, 3])(IDS).logits, model(IDS).logits, atol=1e-5)


def test_models_of_any_kind():
    assert len(transformer_layers(tiny_bert())) == 2
    assert len(transformer_layers(tiny_llama())) == 2
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        transformer_layers(torch.nn.Linear(2, 2))


def test_shortened_model_keeps_what_matters_most():
    model = llama()

    def tokenizer(texts):
        return {"input_ids": [[ord(character) % 50 for character in text] for text in texts]}

    texts = ["a prompt", "another one"]
    (small, same), influence = shorten((model, tokenizer), texts, 2)
    assert same is tokenizer
    assert torch.equal(influence, layer_influence(model, tokenizer(texts)["input_ids"]))
    kept = sorted(influence.topk(2).indices.tolist())
    with torch.no_grad():
        assert torch.equal(small(IDS).logits, keep_layers(model, kept)(IDS).logits)
        whole, _ = shorten((model, tokenizer), texts, 9)
        assert torch.equal(whole[0](IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="keep one or more"):
        shorten((model, tokenizer), texts, 0)


# Recipes

TINY = {"llama": tiny_llama, "bert": tiny_bert}


def smaller(model, recipe, **options):
    return compress.compress((model, tiny_tokenizer()), recipe, **options)[0]


def run(model):
    with torch.no_grad():
        return model.base_model(IDS).last_hidden_state.float()


def outputs_of(layer):
    """Output matrix of the attention and of the feed-forward block."""
    linears = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    return linears[3], linears[-1]


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("recipe", "place", "unit"), [("heads2", 0, 8), ("neurons50", 1, 1)])
def test_pruned_is_the_same_as_zeroed(kind, recipe, place, unit):
    """In each layer other units are made important by large columns; without the rest nothing else changes."""
    model = TINY[kind]().double()
    before = copy.deepcopy(model.state_dict())
    kept = [[2, 3], [0, 1]] if place == 0 else [list(range(1, 64, 2)), list(range(32))]
    zeroed = copy.deepcopy(model)
    for layer, twin, units in zip(transformer_layers(model), transformer_layers(zeroed), kept, strict=True):
        with torch.no_grad():
            for number in range(4 if place == 0 else 64):
                columns = slice(number * unit, (number + 1) * unit)
                outputs_of(layer)[place].weight[:, columns] *= 1.0 if number in units else 1e-4
                outputs_of(twin)[place].weight[:, columns] *= float(number in units)
    small = smaller(model, recipe)
    assert torch.allclose(run(small), run(zeroed), atol=1e-5)
    assert not torch.allclose(run(small), run(TINY[kind]()), atol=1e-3)
    shapes = [tuple(part.weight.shape) for part in outputs_of(transformer_layers(small)[0])]
    assert shapes == ([(32, 16), (32, 64)] if place == 0 else [(32, 32), (32, 32)])
    assert compress.size(small)["weights"] < compress.size(model)["weights"]
    assert compress.size(small)["bytes"] < compress.size(model)["bytes"]
    assert [tensor.shape for tensor in before.values()] == [tensor.shape for tensor in model.state_dict().values()]


def test_importance_is_mean_input_times_column_norm():
    model = tiny_llama()
    part, seen = outputs_of(transformer_layers(model)[1])[1], []
    hook = part.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids in ([3, 4, 5], [6, 7]):
            model(torch.tensor([ids]))
    hook.remove()
    expected = torch.cat(seen).abs().mean(0) * part.weight.norm(dim=0)
    found = compress.feature_importance(model, [[3, 4, 5], [6, 7]], [part])
    assert torch.allclose(found[0], expected.double(), rtol=1e-5)
    assert not part._forward_hooks


def test_texts_decide_what_is_kept():
    model = tiny_bert()
    chosen = [smaller(model, "neurons50", texts=[text]).state_dict() for text in ("toy story", "alien night")]
    assert any(not torch.equal(a, b) for a, b in zip(*(each.values() for each in chosen), strict=True))


def test_magnitude_makes_zeros_of_the_smallest():
    model = tiny_bert()
    small = smaller(model, "magnitude25")
    for old, new in zip(
        outputs_of(transformer_layers(model)[0]), outputs_of(transformer_layers(small)[0]), strict=True
    ):
        gone = new.weight == 0
        assert gone.float().mean() == pytest.approx(0.25)
        assert old.weight[gone].abs().max() <= old.weight[~gone].abs().min()
        assert torch.equal(old.weight[~gone], new.weight[~gone])
    sizes, whole = compress.size(small), compress.size(model)
    assert sizes["not zero"] < whole["not zero"]
    assert sizes["bytes"] == whole["bytes"]
    assert torch.equal(small.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


def test_layers_of_an_encoder():
    model = tiny_bert()
    small = smaller(model, "layers1")
    assert len(transformer_layers(small)) == small.config.num_hidden_layers == 1
    with torch.no_grad():
        expected = transformer_layers(model)[1](model.embeddings(IDS))
        expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.allclose(run(keep_layers(model, [1])), expected, atol=1e-6)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("recipe", "least"), [("int8", 0.999), ("int8-weights", 0.999), ("int4-weights", 0.85)])
def test_integers_are_close_and_small(kind, recipe, least):
    model = TINY[kind]()
    small = smaller(model, recipe)
    cosine = torch.nn.functional.cosine_similarity(run(model), run(small), dim=-1)
    assert least < cosine.mean() < 1 - 1e-7
    linears = [part for part in transformer_layers(model).modules() if isinstance(part, torch.nn.Linear)]
    n_outputs, n_weights = sum(part.out_features for part in linears), sum(part.weight.numel() for part in linears)
    saved = 3.5 * n_weights - 4 * n_weights / 32 if "4" in recipe else 3 * n_weights - 4 * n_outputs
    assert compress.size(model)["bytes"] - compress.size(small)["bytes"] == saved
    # Copies, state dicts and `to` keep integers and scales.
    assert torch.equal(run(copy.deepcopy(small)), run(small))
    other = smaller(TINY[kind](seed=1), recipe)
    other.load_state_dict(small.state_dict())
    assert torch.equal(run(other), run(small))
    moved = copy.deepcopy(small).bfloat16()
    for name, tensor in small.state_dict().items():
        if not tensor.is_floating_point() or name.endswith(".scale"):
            assert torch.equal(moved.state_dict()[name], tensor)
    assert torch.nn.functional.cosine_similarity(run(moved), run(small), dim=-1).min() > 0.99


@pytest.mark.parametrize("vnni", [True, False])
def test_rows_are_rounded_each_by_itself(vnni, monkeypatch):
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no instructions for it")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    torch.manual_seed(0)
    plain, rows = torch.nn.Linear(64, 32), torch.randn(3, 5, 64)
    part = compress.QuantisedLinear(plain, "int8")
    with torch.no_grad():
        together = part(rows)
        single = torch.stack([part(row[None])[0] for row in rows.flatten(0, 1)]).view(3, 5, 32)
        assert torch.allclose(together, single, atol=1e-6)  # nothing of the rest of the batch
        assert part(torch.zeros(1, 64)).allclose(part.bias)
    # The definition: integers times integers, then the scales.
    weight, step = part.weight.double() * part.scale.double(), rows.double().abs().amax(-1, keepdim=True) / 127
    expected = (rows.double() / step).round() * step @ weight.T + part.bias.double()
    assert torch.allclose(together.double(), expected, atol=1e-5)
    assert 0 < (together - plain(rows)).abs().max() < 0.05


@pytest.mark.parametrize("n_inputs", [64, 48, 7])
def test_four_bits_are_packed_without_loss(n_inputs):
    """Two weights in a byte, a scale for every 32 (or what they can be divided into): read back, each within half a step."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(n_inputs, 5)
    part = compress.QuantisedLinear(plain, "int4-weights")
    with torch.no_grad():
        weight = part(torch.eye(n_inputs)).sub(part.bias).T
    groups = {64: 2, 48: 3, 7: 7}[n_inputs]
    assert part.scale.shape == (5, groups) and part.weight.numel() == -(-5 * n_inputs // 2)
    blocks = plain.weight.detach().unflatten(1, (groups, -1))
    assert torch.allclose(blocks.abs().amax(2) / 7, part.scale)
    steps = weight.unflatten(1, (groups, -1)) / part.scale[:, :, None]
    assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.abs().max() < 7.001
    assert ((blocks / part.scale[:, :, None] - steps).abs() <= 0.501).all()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "is no recipe"),
        ("int9", "'int9' is no recipe: join layersN"),
        ("heads", "is no recipe"),
        ("heads0", "is no recipe"),
        ("int8+heads2", "is no recipe.*end, if you like, with int8"),
        ("int8+int8", "is no recipe"),
        ("neurons101", "65 cannot be kept"),
        ("magnitude101", r"amount=1.01 should either be a float in the range \[0, 1\]"),
        ("heads3", "3 cannot be kept; LlamaForCausalLM has 4 heads per layer, 2 of them share keys and values"),
        ("heads6", "has 4 heads per layer"),
        ("layers3", "LlamaForCausalLM has 2, numbered from 0"),
    ],
)
def test_what_is_no_recipe(recipe, message):
    with pytest.raises(ValueError, match=message):
        smaller(tiny_llama(), recipe)


def test_models_of_another_build():
    with pytest.raises(ValueError, match="heads2: the layers of GPT2LMHeadModel are not made of query, key"):
        smaller(gpt2(), "heads2")


def test_what_is_pruned_is_saved_and_read_as_any_model(tmp_path):
    model, tokenizer = compress.compress((tiny_llama(), tiny_tokenizer()), "layers1+heads2+neurons50")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = catalog.load_causal(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        integers, _ = catalog.load_causal(f"{tmp_path}@int8")
        assert torch.equal(integers(IDS).logits, smaller(model, "int8")(IDS).logits)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(
    "recipe", ["heads2", "int8", "int8-weights", "int4-weights", "layers1+heads2+int8", "heads2+layers1+int4-weights"]
)
def test_what_no_configuration_tells_is_saved_too(kind, recipe, tmp_path):
    load = {"llama": catalog.load_causal, "bert": catalog.load_encoder}[kind]
    model, tokenizer = compress.compress((TINY[kind](), tiny_tokenizer()), recipe)
    once, twice = tmp_path / "once", tmp_path / "twice"
    model.save_pretrained(once)
    tokenizer.save_pretrained(once)
    again, _ = load(str(once))
    assert torch.equal(run(again), run(model))
    assert compress.size(again) == compress.size(model)
    stored = (once / "model.safetensors").stat().st_size
    assert compress.size(model)["bytes"] <= stored < compress.size(model)["bytes"] + 20_000
    again.save_pretrained(twice)
    tokenizer.save_pretrained(twice)
    assert torch.equal(run(load(str(twice))[0]), run(model))
    if "int" in recipe:
        with pytest.raises(ValueError, match=f"int8: the matrices of {type(model).__name__} are integers already"):
            load(f"{once}@int8")
    else:
        assert torch.equal(run(load(f"{once}@int8")[0]), run(smaller(model, "int8")))


def test_stored_integers_are_used_by_name(tmp_path, monkeypatch):
    """A folder of integers as encoder, and as language model by likelihood: the same numbers as before it was saved."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    for kind in TINY:
        small, tokenizer = compress.compress((TINY[kind](), tiny_tokenizer()), "int8")
        small.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        named, loaded = str(tmp_path / kind), (copy.deepcopy(small), tokenizer)
        if kind == "bert":
            vectors = [TextEncoder(m, dtype="float32").encode(["toy story"], progress=False) for m in (named, loaded)]
        else:
            titles = ["toy story", "alien"]
            vectors = [TitleLikelihood(m, titles, dtype="float32").log_likelihood("a user") for m in (named, loaded)]
        assert torch.equal(*vectors)


def test_names(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "a@b")
    tiny_tokenizer().save_pretrained(tmp_path / "a@b")
    folder = str(tmp_path / "a@b")
    assert catalog.split_name(folder) == (folder, "")
    assert catalog.split_name(f"{folder}@heads2+int8") == (folder, "heads2+int8")
    hub = f"organisation/model@{'0' * 40}"
    assert catalog.split_name(hub) == (hub, "")
    assert catalog.split_name(f"{hub}@int8") == (hub, "int8")
    assert catalog.fetch(f"{folder}@int8") == tmp_path / "a@b"
    hashes = [catalog.name_hash(name) for name in (folder, f"{folder}@int8", f"{folder}@heads2", f"{folder}@int8")]
    assert hashes[1] == hashes[3] and len(set(hashes)) == 3
    with pytest.raises(ValueError, match="'int9' is no recipe"):
        catalog.fetch(f"{folder}@int9")
    loaded, _ = catalog.load_encoder(f"{folder}@heads2+int8", torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    encoders = [TextEncoder(name, dtype="float32") for name in (folder, f"{folder}@int8", f"{folder}@layers1")]
    vectors = [encoder.encode(["a toy story", "night"], progress=False) for encoder in encoders]
    assert torch.allclose(vectors[0], vectors[1], atol=0.05) and not torch.equal(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[2], atol=0.05)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no word of it", r"holds \d+ weights too many of the model in its config.json: encoder.layer.0"),
        (
            "other integers",
            "does not hold the whole model.*: 'int3'",
        ),
        ("another library", "does not hold the whole model"),
        ("no shapes", "does not hold the whole model"),
        ("other shapes", "does not hold the whole model|lacks [0-9]+ weights"),
    ],
)
def test_damaged_integers(damage, message, tmp_path):
    small, tokenizer = compress.compress((tiny_bert(), tiny_tokenizer()), "int8")
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    told = config["quantization_config"]
    if damage == "no word of it":
        del config["quantization_config"]
    elif damage == "other integers":
        told["integers"] = "int3"
    elif damage == "another library":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif damage == "no shapes":
        told["shapes"] = {}
    else:
        told["shapes"] = {name: [16, shape[1]] for name, shape in told["shapes"].items()}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        catalog.load_encoder(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "foreign", "lacking"])
def test_damaged_folders(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_bert().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "foreign":
        tiny_llama().save_pretrained(tmp_path / "other")
        file.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file({name: tensors[name] for name in tensors if "layer.1.output.dense.weight" not in name}, file)
    for name in (str(tmp_path), f"{tmp_path}@int8"):
        with pytest.raises(ValueError, match=f"{tmp_path} (does not hold the whole|lacks [0-9]+ weights of the) model"):
            catalog.load_encoder(name)


def test_likelihood_of_a_quantised_model(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    model = tiny_llama()
    titles = ["toy story", "alien", "aliens", "night of the toys"]
    whole, small = (
        TitleLikelihood((each, tiny_tokenizer()), titles, dtype="float32")
        for each in (copy.deepcopy(model), smaller(model, "int8"))
    )
    scores = [each.log_likelihood("a user chose alien;", over="catalogue") for each in (whole, small)]
    assert small.shares_prompt
    assert torch.allclose(*scores, atol=0.5) and not torch.equal(*scores)
    assert whole.fingerprint != small.fingerprint
