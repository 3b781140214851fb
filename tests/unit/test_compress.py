"""Layers that are kept compute what they computed before; influence is what the paper's equation says."""

import copy

import pytest
import torch

from llmrec_lib.language_models.compress import keep_layers, layer_influence, shorten, transformer_layers
from tests.unit.tiny_models import tiny_bert, tiny_llama


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
@pytest.mark.parametrize(("layers", "kept"), [(2, [0, 1]), ([0, 3], [0, 3]), ([3, 1], [1, 3]), (4, [0, 1, 2, 3])])
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


@pytest.mark.parametrize("layers", [0, 5, [], [0, 0], [4], [-1]])
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
