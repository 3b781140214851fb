"""Smaller language models: what matters most is kept (layers, heads, neurons, weights), and numbers take fewer bits.

A recipe says in one line what is done, from left to right, such as ``"layers12+heads6+neurons50+int8"``:

- ``layersN``: the N most influential Transformer layers are kept, see `layer_influence`;
- ``headsN``: the N most important attention heads of every layer, whole groups where heads share keys and values;
- ``neuronsP``: the P percent most important neurons of every feed-forward block;
- ``magnitudeP``: the smallest P percent of each matrix become zeros, which by itself saves neither time nor memory;
- ``int8``: matrices are kept and multiplied as 8-bit integers; ``int8-weights``, ``int4-weights``: only kept as integers,
  see `QuantisedLinear`.

Embeddings, norms and the output head stay as they are. After a name and @ a recipe is part of the name, ``minilm@int8``,
wherever an encoder or language model is asked for. What came out is saved by ``save_pretrained``, integers as integers, and
its folder is the name of a model like any other.
"""

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear
from torch.nn.utils import prune

from llmrec_lib.language_models import catalog

BITS = {"int8": 8, "int8-weights": 8, "int4-weights": 4}
GROUP = 32  # weights of a row that share a scale where they have 4 bits
STEP = re.compile(rf"(layers|heads|neurons|magnitude)([1-9]\d*)|({'|'.join(BITS)})")
CALIBRATION = yaml.safe_load(Path(__file__).with_name("compress.yaml").read_text(encoding="utf-8"))


def transformer_layers(model: nn.Module) -> nn.ModuleList:
    """The list of a model's Transformer layers: its longest ``nn.ModuleList``. Raises ValueError if there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"llm: {type(model).__name__} has no list of layers (nn.ModuleList)")
    return max(lists, key=len)


def keep_layers(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A copy of a model with only some of its Transformer layers, in their order: fewer weights, less time and memory.

    Parameters
    ----------
    layers : which ones, counted from 0.

    Raises
    ------
    ValueError
        No layer is left, or one that does not exist or is named twice.
    """
    n_layers = len(transformer_layers(model))
    kept = sorted(layers)
    if not kept or len(set(kept)) < len(kept) or not 0 <= kept[0] <= kept[-1] < n_layers:
        there = f"{type(model).__name__} has {n_layers}, numbered from 0"
        raise ValueError(f"layers is {[*layers]}; {there}: keep one or more")
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


def layer_influence(model: nn.Module, tokens: Sequence[Sequence[int]]) -> Tensor:
    """How much each layer changes what runs through it, float64 [n_layers]: 1 − the mean cosine of its input and output.

    The layers of least influence are those to leave out first.

    Parameters
    ----------
    tokens : token ids of texts such as the model will read, each read by itself.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", equation 1.
    """
    return _mean_of(lambda x, y: 1 - cosine_similarity(x, y, dim=-1), model, tokens, transformer_layers(model))


def feature_importance(model: nn.Module, tokens: Sequence[Sequence[int]], matrices: Iterable[nn.Linear]) -> Tensor:
    """Importance of each input of Linear layers of one shape, float64 [layers, inputs]: its mean size · norm of its column.

    Source: in the manner of Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda),
    whose score of a weight, its size · norm of its input, is taken of a whole column here.
    """
    inputs = _mean_of(lambda x, _: x.abs(), model, tokens, matrices)
    return inputs * torch.stack([part.weight.detach().double().norm(dim=0) for part in matrices])


@torch.inference_mode()
def _mean_of(what: Callable, model: nn.Module, tokens: Sequence[Sequence[int]], modules: Iterable[nn.Module]) -> Tensor:
    """Mean over all tokens of what is computed from the input and output of each module, float64 [modules, ...]."""
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen[module].append(what(inputs[0].double(), output.double())[0])

    with contextlib.ExitStack() as hooks:
        for module in seen:
            hooks.enter_context(module.register_forward_hook(note))
        for ids in tokens:
            model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return torch.stack([torch.cat(values).mean(0) for values in seen.values()])


def shorten(llm: str | catalog.LanguageModel, texts: Sequence[str], n_layers: int) -> tuple[tuple, Tensor]:
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


def parse(recipe: str) -> list[tuple[str, int]]:
    """The steps of a recipe, each with its number (0 where it has none). Raises ValueError for what is no recipe."""
    found = [STEP.fullmatch(step) for step in recipe.split("+")]
    if not all(found) or any(step[3] for step in found[:-1]):
        steps, end = "layersN, headsN, neuronsP, magnitudeP (N: how many are kept, P: percent)", " or ".join(BITS)
        raise ValueError(f"{recipe!r} is no recipe: join {steps} with +, and end, if you like, with {end}")
    return [(step[1] or step[3], int(step[2] or 0)) for step in found]


def compress(llm: catalog.LanguageModel, recipe: str, texts: Sequence[str] = CALIBRATION) -> tuple:
    """A smaller copy of a loaded model, made by a recipe (see the top of this file), and its tokenizer.

    What is pruned is a plain model of transformers again: fine-tune it, ``save_pretrained`` it, give the folder as a name.
    Integers are the last step, after training. What a plain configuration cannot tell (integers, and heads where it has no
    head_dim, as BERT's) is written to config.json, and read back by this library (`stored_form`).

    Parameters
    ----------
    texts : such as the model will read, on which importance is measured.

    Raises
    ------
    ValueError
        Not a recipe; more layers, heads or neurons than there are, or no whole groups of heads; a model of another build, or
        of integers already.
    """
    model, tokenizer = copy.deepcopy(llm[0]).eval(), llm[1]
    config, steps = model.config.get_text_config(), parse(recipe)
    if getattr(getattr(model.config, "quantization_config", None), "integers", ""):
        raise ValueError(f"{recipe}: the matrices of {type(model).__name__} are integers already: start from floats")
    tokens = [ids[: getattr(config, "max_position_embeddings", None)] for ids in tokenizer(list(texts))["input_ids"]]
    for step, number in steps:
        if step == "layers":
            order = layer_influence(model, tokens).argsort(descending=True).tolist()
            model = keep_layers(model, order[:number] if number <= len(order) else range(number))
        elif step in ("heads", "neurons"):
            _prune_features(model, tokens, step, number)
        elif step == "magnitude":
            for part in _matrices(model).values():
                prune.remove(prune.l1_unstructured(part, "weight", number / 100), "weight")
    integers, told = steps[-1][0] if steps[-1][0] in BITS else "", getattr(config, "head_dim", None)
    if integers or hasattr(model.config, "quantization_config") or "heads" in dict(steps) and not told:
        shapes = {name: [*part.weight.shape] for name, part in _matrices(model).items()}
        model.hf_quantizer = stored_form()(integers, shapes)
        model.config.quantization_config = model.hf_quantizer.quantization_config
        _quantise(model, integers)
    return model, tokenizer


def _matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers of the Transformer layers, by their names there."""
    return {name: part for name, part in transformer_layers(model).named_modules() if isinstance(part, nn.Linear)}


def _quantise(model: nn.Module, integers: str) -> None:
    layers = transformer_layers(model)
    for name, part in _matrices(model).items() if integers else ():
        layers.set_submodule(name, QuantisedLinear(part, integers))


@functools.cache
def stored_form() -> Callable:
    """Teach transformers to save and read what `compress` made; gives (integers, shapes) -> a model's ``hf_quantizer``.

    Its configuration stands in ``config.json``: ``integers``, a key of `BITS` or "", and the ``shapes`` of the matrices.
    """
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config("llmrec")
    class Compressed(QuantizationConfigMixin):
        def __init__(self, integers: str, shapes: dict[str, list[int]], **_: str) -> None:
            self.quant_method, self.integers, self.shapes = "llmrec", integers, shapes

    @register_quantizer("llmrec")
    class Maker(HfQuantizer):
        is_trainable = False

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: nn.Module, **_: object) -> None:
            for name, part in _matrices(model).items():
                weight = torch.empty(self.quantization_config.shapes[name], device="meta")
                _resize(part, weight, part.bias if part.bias is None else weight[:, 0])
            _quantise(model, self.quantization_config.integers)

    return lambda integers, shapes: Maker(Compressed(integers, shapes))


def _prune_features(model: nn.Module, tokens: Sequence[Sequence[int]], step: str, number: int) -> None:
    """Keep what feeds the most important inputs of each layer's attention output ("heads") or feed-forward output."""
    config = model.config.get_text_config()
    blocks = [[part for part in layer.modules() if isinstance(part, nn.Linear)] for layer in transformer_layers(model)]
    if any(len(parts) < 6 or parts[0].out_features != parts[3].in_features for parts in blocks):
        needed = "query, key, value, output and a feed-forward block, all of them nn.Linear"
        raise ValueError(f"{step}{number}: the layers of {type(model).__name__} are not made of {needed}")
    query, key, *_, last = blocks[0]
    if step == "heads":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        n, shared, target, feeding = query.out_features // size, query.out_features // key.out_features, 3, slice(3)
    else:
        n, shared, target, feeding = last.in_features, 1, -1, slice(4, -1)
        number = round(n * number / 100)
    if not 1 <= number <= n or number % shared:
        which = f"{n} {step} per layer" + (f", {shared} of them share keys and values" if shared > 1 else "")
        raise ValueError(f"{step}: {number} cannot be kept; {type(model).__name__} has {which}: keep whole groups")
    importance = feature_importance(model, tokens, [parts[target] for parts in blocks])
    chosen = importance.unflatten(1, (n // shared, -1)).sum(2).topk(number // shared).indices.sort().values
    for parts, groups in zip(blocks, chosen, strict=True):
        for part in parts[feeding]:
            rows = _features(groups, part.out_features * shared // n)
            _resize(part, part.weight[rows], None if part.bias is None else part.bias[rows])
        columns = _features(groups, parts[target].in_features * shared // n)
        _resize(parts[target], parts[target].weight[:, columns], parts[target].bias)
    if step == "neurons":
        config.intermediate_size = number
    elif getattr(config, "head_dim", None):
        config.num_attention_heads, config.num_key_value_heads = number, number // shared


def _features(groups: Tensor, size: int) -> Tensor:
    """Places of the features in groups of one size."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _resize(part: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    part.out_features, part.in_features = weight.shape
    part.weight = nn.Parameter(weight.detach().clone())
    part.bias = None if bias is None else nn.Parameter(bias.detach().clone())


class QuantisedLinear(nn.Module):
    """A Linear layer whose weights are kept as integers, a quarter or an eighth of the memory.

    "int8": one float32 scale for each output; each row that comes in is rounded to 8 bits as well, by its own largest value,
    so that no row depends on the rest of the batch, and the product is one of integers, where the processor has instructions
    for it (VNNI). "int8-weights": float weights are made again at each call: less memory, more time. "int4-weights": the
    same with two weights in a byte and a scale for every `GROUP` of a row. There are no gradients for the weights.
    """

    def __init__(self, plain: nn.Linear, integers: str) -> None:
        super().__init__()
        self.integers, self.shape = integers, plain.weight.shape
        size, limit = (math.gcd(GROUP, self.shape[1]), 7) if BITS[integers] == 4 else (self.shape[1], 127)
        groups = plain.weight.detach().float().unflatten(1, (-1, size))
        scale = groups.abs().amax(2).clamp_min(1e-12) / limit
        weight = (groups / scale[:, :, None]).round().to(torch.int8).flatten(1)
        if BITS[integers] == 4:
            low, high = nn.functional.pad(weight.flatten(), (0, weight.numel() % 2)).view(-1, 2).T
            weight = high << 4 | low & 15
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)  # [outputs, groups]
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach().clone(), requires_grad=False)

    def _floats(self) -> Tensor:
        weight = self.weight
        if BITS[self.integers] == 4:
            weight = torch.stack([weight << 4 >> 4, weight >> 4], 1).flatten()[: self.shape.numel()].view(self.shape)
        return (weight.unflatten(1, (self.scale.shape[1], -1)) * self.scale[:, :, None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.integers != "int8" or x.requires_grad:
            return linear(x, self._floats().to(x.dtype), self.bias)
        rows = x.flatten(0, -2).float()
        step = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        whole = (rows / step).round_()
        if x.device.type == "cpu" and torch.cpu._is_vnni_supported():
            sums = torch._int_mm(whole.char(), self.weight.T).float()
        else:
            sums = linear(whole, self.weight.float())
        products = (sums * self.scale.T).mul_(step)
        products = products if self.bias is None else products.add_(self.bias)
        return products.to(x.dtype).unflatten(0, x.shape[:-1])

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)  # `to(bfloat16)` is for inputs: scales keep their bits
        return self


def size(model: nn.Module) -> dict[str, int]:
    """Weights of a model, how many of them are not zero, and the bytes that they take."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
    nonzero = sum(int(tensor.count_nonzero()) for tensor in tensors)
    return {"weights": sum(map(torch.numel, tensors)), "not zero": nonzero, "bytes": sum(t.nbytes for t in tensors)}
