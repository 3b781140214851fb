"""Continued training of a causal language model on the study's own texts: the training part's histories, as titles."""

import copy
import itertools
import json
import math
import operator
import shutil
import sys
import time
import timeit
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm

from llmrec_lib.augment import Augmentation, contrast, with_copies
from llmrec_lib.cache import atomic_write, cache_dir, cached_tensors, content_key, versions
from llmrec_lib.language_models import catalog, low_rank
from llmrec_lib.language_models.compress import transformer_layers
from llmrec_lib.language_models.encoder import choose_device, choose_dtype, pad_right
from llmrec_lib.language_models.likelihood import TitleLikelihood, _Tree
from llmrec_lib.prompts import Template, get_template, item_titles, render
from llmrec_lib.splits import Split

CHECKPOINT_SECONDS = 60.0  # between checkpoints; more where writing one would take over 5 % of the time
HEAD_ROWS = 512  # predictions per product with the output embedding, which bounds the memory of the logits
WEIGHT_DECAY, CLIP, WARM_UP = 0.01, 1.0, 0.1
_GROUP = 32  # batches that are made together of windows of similar length
_NONE = -1  # at a position, in the place of a node: no loss
# Token ids; for each, the node whose children may follow; titles to predict; token ids of its views, if asked for.
Window = tuple[list[int], list[int], int, list[list[int]]]


@dataclass
class FineTuned:
    """A fine-tuned model and the record of its training.

    `model` is float32 and in evaluation mode, adapters merged: ``(model, tokenizer)`` is what `TitleLikelihood` takes,
    ``(model.base_model, tokenizer)`` what `TextEncoder` takes. Both move it to their own dtype in place.
    """

    model: nn.Module
    tokenizer: Any
    curve: pd.DataFrame
    """One row per step: step, epoch (1.5: half of the second is done), tokens and seconds so far (seconds of training
    alone), loss of the batch before the step and valid_loss after it (both nats per title), valid_ndcg after it. NaN where
    not measured. Row 0 is the model before the first step, if validation was asked for."""
    tokens_per_second: float
    """Tokens of the windows, without padding, per second of training."""
    share_of_roof: float
    """Model FLOPs per second of training / FLOPs per second of a square matrix product in the same dtype, best of eight,
    timed when training ended. A multiply-add is 2 FLOPs. With N weights in the matrices of the layers, A in adapters and
    T trained in either, a token counts 4 (N + A) + 2 T (forward, gradient of inputs, gradient of what is trained), a
    prediction 4 d V, with width d and V rows of the output embedding. Attention products and padding are not counted."""
    adapter: dict[str, Tensor] | None
    """Method "lora": bfloat16 A [rank, inputs] and B [outputs, rank] of each matrix, from which the model is merged. To share
    them, ``safetensors.torch.save_file`` them; to use them, ``add_low_rank(transformer_layers(base), rank)``,
    ``base.load_state_dict(adapter, strict=False)``, ``merge_low_rank(base)`` on the model that was given, in float32."""
    settings: dict[str, Any]


def finetune(
    split: Split, llm: str | catalog.LanguageModel = "smollm2-135m", *, template: str | Template = "history",
    method: str = "full", rank: int = 16, pretrained: bool = True, titles: Sequence[str] | None = None, epochs: int = 1,
    learning_rate: float = 5e-4, window_tokens: int = 256, batch_tokens: int = 2048, train_users: int = 0,
    augmentation: Augmentation | None = None, seed: int = 0, dtype: str = "auto", device: str = "auto",
    valid_users: int = 0, validate: Callable[[nn.Module, Any], float] | None = None, progress: bool = True,
) -> FineTuned:  # fmt: skip
    """Continue the training of a causal language model on the titles that each user chose in the training part.

    The text of a user is what prompts of `template` say, the titles spelled and tokenised as `TitleLikelihood` scores
    them: "A user chose these items, from oldest to newest: Alien; Aliens;". It is cut into windows between titles, each
    of which begins with the words before the titles. Where the cuts fall is drawn anew in each epoch, and each training
    event is predicted once per epoch. AdamW, learning rate up for 10 % of the training and down along a cosine.

    The loss is −log p of each token of a title among those that can follow in a title of the catalogue: exp(−loss) is a
    distribution over its distinct titles, and tokens without an alternative cost nothing. (Titles that were cut to half the
    context can break that: one may begin another.)

    The result is kept below ``cache_dir()/finetuned``. A training that was cut off, even by SIGKILL, goes on from its last
    checkpoint when called again, and gives the same weights on the CPU with the same number of threads.

    Parameters
    ----------
    llm : str or (model, tokenizer)
        A name for `catalog.fetch`, or a loaded model, of which a copy is trained; such as one from `keep_layers`.
    template : str or Template
        Its text must end with {history} and have no other field.
    method : {"full", "lora"}
        "full": all weights but embeddings and head. "lora": W + 2 B A beside each matrix of attention and MLP.
        Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    rank : int
        Rows of A, for "lora".
    pretrained : bool
        False: the same architecture from random weights (control).
    titles : sequence of str [n_items], optional
        Instead of the data set's; shuffled among the items, for example (control). Item 0 is PAD.
    window_tokens, batch_tokens : int
        Longest window, and padded tokens per step, which must hold one window.
    train_users : int
        Train on the histories of a sample of so many users; 0 for all.
    augmentation : Augmentation, optional
        Read augmented copies of the histories as well, drawn anew in each epoch; what was put in is never predicted. With
        `views`, read two augmented views of each window instead: `contrast` of their last hidden states is added to the loss.
    dtype, device : str
        See `choose_dtype` and `choose_device`. bfloat16 is autocast: weights and moments stay float32.
    valid_users : int
        Users whose validation events, each given the training history, make valid_loss; 0 for none.
    validate : callable, optional
        (model, tokenizer) -> NDCG for the curve, called before training and after each epoch with a copy of the model. As it
        cannot change the weights, a stored result is returned whatever function made its curve.

    Raises
    ------
    LeakError
        If a validation or test event is among the texts.
    ValueError
        Names the parameter and what it may be.
    """
    settings = {n: v for n, v in locals().items() if v is None or isinstance(v, str | int | float | np.integer)}
    least = {"rank": 1, "epochs": 1, "window_tokens": 1, "batch_tokens": window_tokens, "seed": 0}
    least |= {"train_users": 0, "valid_users": 0}
    for name, smallest in least.items():
        settings[name] = operator.index(settings[name])  # numpy's whole numbers too
        if settings[name] < smallest:
            raise ValueError(f"{name} is {settings[name]}; it must be {smallest} or more")
    if method not in ("full", "lora"):
        raise ValueError(f"method {method!r} must be one of 'full', 'lora'")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; it must be more than 0")
    template = get_template(template)
    if not template.text.endswith("{history}") or template.text.count("{") != 1:
        raise ValueError(f"template {template.name!r} must end with {{history}} and have no other field")
    titles = split.dataset.titles if titles is None else list(titles)
    if len(titles) != split.dataset.n_items:
        raise ValueError(f"titles has {len(titles)} entries for {split.dataset.n_items} items (item 0 is PAD)")
    rank, seed = settings["rank"], settings["seed"]
    on_device = choose_device(device)
    computed_in = choose_dtype(dtype, on_device)
    loaded, tokenizer = catalog.load_causal(llm) if isinstance(llm, str) else llm
    model = _base_model(loaded, pretrained, seed).to(on_device)
    del settings["progress"]
    settings |= {"dtype": str(computed_in), "device": on_device.type, "validate": validate is not None}
    settings |= {"llm": llm if isinstance(llm, str) else type(model).__name__, "template": template.name}
    settings["base"] = catalog.weights_hash(model)
    scorer = _Scorer(model, tokenizer, item_titles(titles, template)[1:], template.suffix, on_device)
    settings["augmentation"] = augmentation and augmentation.fingerprint
    texts = _Texts(split, scorer, template, settings, augmentation)
    made_of = (split.fingerprint, scorer.title_tokens, texts.preamble)
    key = content_key(settings, *made_of, versions(), sys.modules[__name__], low_rank)
    checkpoint = cache_dir() / "finetuned" / key / "checkpoint.safetensors"
    trainable = _trainable(model, method, rank, seed)

    def compute() -> dict[str, Tensor]:
        head = _Head(scorer, computed_in)
        windows = texts.validation(split, valid_users) if valid_users else []
        valid_batches = list(_batched(windows, batch_tokens))

        def measure() -> tuple[float, float]:
            nats = sum(_loss(model, head, batch, computed_in, train=False)[0] for batch in valid_batches)
            # A copy, because whoever scores with the model may move it to another dtype.
            ndcg = float(validate(low_rank.merge_low_rank(copy.deepcopy(model)), tokenizer)) if validate else math.nan
            return nats / len(windows) if windows else math.nan, ndcg

        asked = measure if windows or validate else None
        report = _train(model, head, trainable, texts, settings, checkpoint, computed_in, asked, progress)
        report["roof"] = gemm_rate(computed_in, on_device)
        kept = torch.bfloat16 if method == "lora" else torch.float32
        weights = {name: parameter.detach().to(kept) for name, parameter in trainable.items()}
        return {**weights, "report": torch.tensor(list(json.dumps(report).encode()), dtype=torch.uint8)}

    stored = cached_tensors("finetuned", key, compute)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    report = json.loads(bytes(stored.pop("report").tolist()))
    model.load_state_dict(stored, strict=False)
    merged = low_rank.merge_low_rank(model).requires_grad_(False)
    curve = pd.DataFrame(report["curve"], columns=_CURVE)
    share_of_roof = report["flops"] / report["seconds"] / report["roof"]
    adapter = stored if method == "lora" else None
    return FineTuned(merged, tokenizer, curve, report["tokens"] / report["seconds"], share_of_roof, adapter, settings)


# The model: what is kept of it, what is trained in it


def _base_model(model: nn.Module, pretrained: bool, seed: int) -> nn.Module:
    if pretrained:
        model = copy.deepcopy(model)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(model)(copy.deepcopy(model.config))
    return model.float().eval()  # evaluation mode also while training: no dropout


def _trainable(model: nn.Module, method: str, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Prepare the model for training in place; the parameters that will be trained, by name."""
    if whole := [name for name, t in model.named_buffers() if t.dtype in (torch.int8, torch.uint8)]:
        raise ValueError(f"{whole[0]} holds integers: fine-tune the model in full precision and quantise it afterwards")
    model.requires_grad_(method == "full")
    for module in (*(m for m in model.modules() if isinstance(m, nn.Embedding)), model.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(False)
    if method == "lora":
        low_rank.add_low_rank(transformer_layers(model), rank, torch.Generator().manual_seed(seed))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# The texts


class _Scorer(TitleLikelihood):
    """Tokens and tree of the titles exactly as they are scored later, without moving or trying the model."""

    def __init__(self, model: Any, tokenizer: Any, titles: list[str], suffix: str, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self._read_titles(titles, suffix)


class _Texts:
    """Windows and batches; those of an epoch depend on the seed and the number of the epoch alone."""

    def __init__(
        self, split: Split, scorer: _Scorer, template: Template, settings: dict, augmentation: Augmentation | None
    ) -> None:
        train_users, window_tokens = settings["train_users"], settings["window_tokens"]
        split.guard(*split.pairs("train"), "train", "fine-tuning texts")
        self.histories = split.histories(np.flatnonzero(split.user_counts), "train")  # oldest first
        self.augmentation = augmentation
        if 0 < train_users < len(self.histories):
            sample = np.random.default_rng(0).permutation(len(self.histories))[:train_users]
            self.histories = [self.histories[place] for place in np.sort(sample)]
        self.items = np.unique(np.concatenate(self.histories))
        self.template, self.window_tokens = template, window_tokens
        self.preamble = scorer.prompt_tokens(render(template, []))
        self.tokens = [[], *scorer.title_tokens]  # of item 0, PAD, nothing
        self.nodes = [[], *(_path(scorer._tree, end) for end in scorer._tree.ends.tolist())]
        least = len(self.preamble) + max(map(len, self.tokens))
        if not least <= window_tokens <= (scorer.context or math.inf):
            most = f"{scorer.context}, the model's context" if scorer.context else "any number"
            raise ValueError(f"window_tokens is {window_tokens}; it must lie in {least} (longest title) to {most}")
        self.room = window_tokens - len(self.preamble)

    def window(self, items: Sequence[int], predicted: Sequence[bool], views: Sequence[Sequence[int]] = ()) -> Window:
        """The titles of these items, and of views of them; those that are not `predicted` are read."""
        nodes = [_NONE] * (len(self.preamble) - 1)
        for item, asked in zip(items, predicted, strict=True):
            nodes += self.nodes[item] if asked else [_NONE] * len(self.tokens[item])
        ids, *seen = ([token for item in row for token in self.tokens[item]] for row in (items, *views))
        seen = [self.preamble + view[-self.room :] for view in seen]
        return self.preamble + ids, [*nodes, _NONE], int(sum(predicted)), seen  # nothing follows the last token

    def windows(self, rng: np.random.Generator) -> list[Window]:
        """All windows of an epoch. Only histories that do not fit are cut, the first time anywhere, then where full."""
        change, windows = self.augmentation, []
        viewed = 2 if change and change.views else 0
        for history, real in with_copies(self.histories, change, rng)[0]:
            cuts = [0]
            sizes = [len(self.tokens[item]) for item in history]
            room = int(rng.integers(1, self.room + 1)) if sum(sizes) > self.room else self.room
            used = 0
            for place, size in enumerate(sizes):
                if place > cuts[-1] and used + size > room:
                    cuts.append(place)
                    used, room = 0, self.room
                used += size
            for start, end in itertools.pairwise([*cuts, len(history)]):
                items = history[start:end]
                views = [change(items, rng, self.items)[0] for _ in range(viewed)]
                windows.append(self.window(items, real[start:end], views))
        return windows

    def batches(self, seed: int, epoch: int, batch_tokens: int) -> list[list[Window]]:
        rng = np.random.default_rng([seed, epoch])
        windows = self.windows(rng)
        order = rng.permutation(len(windows))
        size = _GROUP * max(1, batch_tokens // self.window_tokens)
        batches: list[list[Window]] = []
        for start in range(0, len(order), size):
            batches += _batched([windows[place] for place in order[start : start + size]], batch_tokens)
        return [batches[place] for place in rng.permutation(len(batches))]

    def validation(self, split: Split, n_users: int) -> list[Window]:
        """For each validation event its title after the newest titles of the training history that fit."""
        users = split.eval_users("valid", n_users)
        histories = split.histories(users, "valid")
        owners = np.repeat(users, [len(history) for history in histories])
        split.guard(owners, np.concatenate([[], *histories]), "valid", "fine-tuning validation prompts")
        windows = []
        for user, history in zip(users, histories, strict=True):
            for item in split.targets("valid")[user].indices:
                newest = list(history[max(0, len(history) - self.template.max_items) :])
                while sum(len(self.tokens[each]) for each in (*newest, item)) > self.room:
                    newest.pop(0)
                windows.append(self.window([*newest, item], [False] * len(newest) + [True]))
        return windows


def _path(tree: _Tree, end: int) -> list[int]:
    """At which node each token of a title is chosen; _NONE where the catalogue leaves no choice."""
    nodes = []
    while end:
        end = tree.parents[end]
        nodes.append(end if len(tree.children[end]) > 1 else _NONE)
    return nodes[::-1]


def _batched(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows of similar length, the longest first, with at most `batch_tokens` tokens when padded."""
    windows = sorted(windows, key=lambda window: -len(window[0]))
    while windows:
        size = max(1, batch_tokens // len(windows[0][0]))
        yield windows[:size]
        windows = windows[size:]


# The loss


class _Head:
    """−log p of the next token among the children of a node of the catalogue's tree."""

    def __init__(self, scorer: _Scorer, dtype: torch.dtype) -> None:
        children = scorer._tree.children
        flat = scorer._tree.tokens[[child for ids in children for child in ids]]
        self.counts = torch.tensor([len(ids) for ids in children], device=scorer.device)
        self.starts = self.counts.cumsum(0) - self.counts
        self.vocabulary, self.columns = flat.to(scorer.device).unique(return_inverse=True)
        self.plain = scorer._has_plain_head()  # else the model makes its own logits, of all tokens
        self.flops = 4.0 * scorer.model.config.get_text_config().hidden_size * len(self.vocabulary)  # of one prediction
        if self.plain:
            output = scorer.model.get_output_embeddings()
            bias = getattr(output, "bias", None)
            self.output = [
                None if part is None else part.detach().to(dtype)[self.vocabulary] for part in (output.weight, bias)
            ]

    def nats(self, states: Tensor, nodes: Tensor, targets: Tensor) -> Tensor:
        """[n] for hidden states or logits [n, width] at nodes of the tree."""
        logits = (linear(states, *self.output) if self.plain else states[:, self.vocabulary]).float()
        counts = self.counts[nodes]
        rows = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        first = (self.starts[nodes] - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        excluded = torch.ones_like(logits, dtype=torch.bool)
        excluded[rows, self.columns[first + torch.arange(len(rows), device=nodes.device)]] = False
        chosen = torch.searchsorted(self.vocabulary, targets)
        return cross_entropy(logits.masked_fill(excluded, -torch.inf), chosen, reduction="none")


def _loss(
    model: nn.Module, head: _Head, batch: list[Window], dtype: torch.dtype, train: bool, views_weight: float = 0.0
) -> tuple[float, float]:
    """Nats of all titles of a batch, and the FLOPs of its head; with `train`, gradients of the mean per prediction, and of
    the contrast of the views."""
    device = next(model.parameters()).device
    tokens, _ = pad_right([ids for ids, *_ in batch], device)  # a causal model needs no mask for what comes after
    nodes, _ = pad_right([own for _, own, *_ in batch], device, _NONE)
    places = nodes != _NONE
    targets, nodes = tokens.roll(-1, 1)[places], nodes[places]
    total = torch.zeros((), dtype=torch.float64, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16)
    with torch.set_grad_enabled(train):
        with autocast:
            outputs = (model.base_model if head.plain else model)(input_ids=tokens, use_cache=False)
        states = (outputs.last_hidden_state if head.plain else outputs.logits)[places]
        leaf = states.detach().requires_grad_(train)  # so that no more than a block of logits is ever kept
        for rows in torch.arange(len(nodes)).split(HEAD_ROWS) if len(nodes) else ():
            with autocast:
                nats = head.nats(leaf[rows], nodes[rows], targets[rows])
            total += nats.detach().double().sum()
            if train:
                (nats.sum() / len(nodes)).backward()
    if train and leaf.grad is not None:
        states.backward(leaf.grad)
    if train and views_weight:
        ends = []
        for views in zip(*(views for *_, views in batch), strict=True):
            tokens, mask = pad_right(list(views), device)
            with autocast:
                states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            ends.append(states[torch.arange(len(states)), mask.sum(1) - 1].float())
        (views_weight * contrast(*ends)).backward()
    return total.item(), head.flops * len(nodes)


# The training

_CURVE = ["step", "epoch", "tokens", "seconds", "loss", "valid_loss", "valid_ndcg"]


def _train(
    model: nn.Module, head: _Head, trainable: dict[str, nn.Parameter], texts: _Texts, settings: dict[str, Any],
    checkpoint: Path, dtype: torch.dtype, measure: Callable[[], tuple[float, float]] | None, progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """Train from the checkpoint, or from the beginning, to the end; tokens, seconds, FLOPs and the curve."""
    epochs, views_weight = settings["epochs"], texts.augmentation.views if texts.augmentation else 0.0
    optimizer = torch.optim.AdamW(trainable.values(), weight_decay=WEIGHT_DECAY, fused=True)
    weights = [part.weight for part in low_rank.matrices(transformer_layers(model)).values()]
    weights += trainable.values() if settings["method"] == "lora" else []
    token_flops = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights)
    if (state := _load(checkpoint, trainable, optimizer)) is None:
        state = {"epoch": 0, "batch": 0, "step": 0, "tokens": 0, "seconds": 0.0, "flops": 0.0, "curve": []}
        state["curve"] += [[0, 0.0, 0, 0.0, math.nan, *measure()]] if measure else []
    due = time.monotonic() + CHECKPOINT_SECONDS
    for epoch in range(state["epoch"], epochs):
        batches = texts.batches(settings["seed"], epoch, settings["batch_tokens"])
        title = f"fine-tuning, epoch {epoch + 1} of {epochs}"
        left, about = batches[state["batch"] :], {"total": len(batches), "initial": state["batch"], "desc": title}
        for batch in (bar := tqdm(left, **about, unit="step", disable=not progress)):
            begin = time.perf_counter()
            optimizer.zero_grad()
            nats, head_flops = _loss(model, head, batch, dtype, train=True, views_weight=views_weight)
            nn.utils.clip_grad_norm_(trainable.values(), CLIP)
            done = (epoch + (state["batch"] + 0.5) / len(batches)) / epochs  # of the training, halfway in this step
            falling = (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
            optimizer.param_groups[0]["lr"] = settings["learning_rate"] * min(done / WARM_UP, falling)
            optimizer.step()
            state["seconds"] += time.perf_counter() - begin
            n_tokens = sum(len(ids) for row, *_, views in batch for ids in (row, *views))
            n_titles = sum(n for _, _, n, _ in batch)
            state["tokens"] += n_tokens
            state["flops"] += head_flops + n_tokens * token_flops
            state["step"] += 1
            at = epoch + (state["batch"] + 1) / len(batches)
            state["epoch"], state["batch"] = (epoch, state["batch"] + 1) if at < epoch + 1 else (epoch + 1, 0)
            measured = measure() if measure and state["batch"] == 0 else (math.nan, math.nan)
            loss = nats / n_titles if n_titles else math.nan
            state["curve"].append([state["step"], at, state["tokens"], state["seconds"], loss, *measured])
            bar.set_postfix_str(f"{loss:.3f} nats, {state['tokens'] / state['seconds']:,.0f} tokens/s", refresh=False)
            if time.monotonic() >= due or at == epochs:
                due = time.monotonic() + max(CHECKPOINT_SECONDS, 20 * _save(checkpoint, trainable, optimizer, state))
    return state


def _save(path: Path, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict) -> float:
    """Write the checkpoint; how many seconds that took."""
    begin = time.monotonic()
    tensors: dict[str, Tensor] = dict(trainable)
    for name, parameter in trainable.items():
        tensors |= {f"{name} {moment}": value for moment, value in optimizer.state[parameter].items()}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(whole, temporary, metadata={"state": json.dumps(state)})
    return time.monotonic() - begin


def _load(path: Path, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict | None:
    if not path.exists():
        return None
    try:
        with torch.no_grad(), safe_open(path, "pt") as file:
            for stored in file.keys():  # noqa: SIM118
                name, _, moment = stored.partition(" ")
                parameter, tensor = trainable[name], file.get_tensor(stored)
                if moment:
                    optimizer.state[parameter][moment] = tensor.to(parameter.device)
                else:
                    parameter.copy_(tensor)
            return json.loads(file.metadata()["state"])
    except SafetensorError as error:  # damaged from outside; it is written whole or not at all
        warnings.warn(f"{path} cannot be read ({error}): training starts anew", stacklevel=2)
        return None


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a square matrix product, best of eight."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seconds = timeit.repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=8)  # item() waits for the device
    return 2 * size**3 / min(seconds)
