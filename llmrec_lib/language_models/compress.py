"""Smaller language models: the Transformer layers that matter most are kept, the others are taken out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from llmrec_lib.language_models import catalog

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def transformer_layers(model: nn.Module) -> nn.ModuleList:
    """The list of a model's Transformer layers: its longest ``nn.ModuleList``. Raises ValueError if there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"llm: {type(model).__name__} has no list of layers (nn.ModuleList)")
    return max(lists, key=len)


def keep_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A copy of a model with only some of its Transformer layers, in their order: fewer weights, less time and memory.

    Parameters
    ----------
    layers : int or sequence of int
        The first so many, or which ones, counted from 0.

    Raises
    ------
    ValueError
        No layer is left, or one that does not exist or is named twice.
    """
    n_layers = len(transformer_layers(model))
    kept = sorted(range(layers) if isinstance(layers, int) else layers)
    if not kept or len(set(kept)) < len(kept) or not 0 <= kept[0] <= kept[-1] < n_layers:
        asked = layers if isinstance(layers, int) else list(layers)
        raise ValueError(f"layers is {asked}; {type(model).__name__} has {n_layers}, numbered from 0: keep one or more")
    model = copy.deepcopy(model)
    own = transformer_layers(model)
    chosen = [own[place] for place in kept]
    del own[:]
    own.extend(chosen)
    for place, layer in enumerate(own):  # attention finds its keys and values in the cache by this number
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n_layers:  # such as layer_types
            setattr(config, name, [value[place] for place in kept])
    config.num_hidden_layers = len(kept)
    return model


@torch.inference_mode()
def layer_influence(model: PreTrainedModel, tokens: Sequence[Sequence[int]]) -> Tensor:
    """How much each layer changes what runs through it, float64 [n_layers]: 1 − the mean cosine of its input and output.

    The layers of least influence are those to leave out first.

    Parameters
    ----------
    tokens : token ids of texts such as the model will read, each read by itself.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", equation 1.
    """
    layers = list(transformer_layers(model))
    changes: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        output = output[0] if isinstance(output, tuple) else output
        changes[layer].append(1 - cosine_similarity(inputs[0].double(), output.double(), dim=-1).flatten())

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        for ids in tokens:
            model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(changes[layer]).mean() for layer in layers])


def shorten(
    llm: str | tuple[PreTrainedModel, PreTrainedTokenizerBase], texts: Sequence[str], n_layers: int
) -> tuple[tuple[PreTrainedModel, PreTrainedTokenizerBase], Tensor]:
    """A language model of its `n_layers` most influential layers (all, if it has fewer), and the influence of each layer.

    Parameters
    ----------
    llm : name for `catalog.fetch`, or a loaded model, which stays as it is, with its tokenizer.
    texts : such as the model will read; `layer_influence` is measured on them.

    Returns
    -------
    (model, tokenizer), influence float64 [layers of the whole model]
    """
    model, tokenizer = catalog.load_causal(llm) if isinstance(llm, str) else llm
    influence = layer_influence(model, tokenizer(list(texts))["input_ids"])
    kept = influence.argsort(descending=True)[: max(0, n_layers)].tolist()
    return (keep_layers(model, kept), tokenizer), influence
