"""Texts to embeddings with a Transformer, and the whitening that makes their cosine similarity useful."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from tqdm import tqdm

from llmrec_lib.cache import cached_tensors, content_key, versions
from llmrec_lib.language_models import catalog
from llmrec_lib.language_models._packed import pack_linears
from llmrec_lib.shards import in_shards

BATCH_TOKENS = 2048  # per forward: enough to fill the cores, small enough for their caches; on a GPU 16 times as many


def choose_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one, else the CPU; everything else is torch's own name of a device.

    With a GPU, attention is no longer computed by cuDNN, in all of the process: it makes a plan for each new shape, and hardly
    two batches of texts have the same.
    """
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if chosen.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the processor has instructions for it (AMX, AVX-512 BF16, GPU), else float32."""
    chosen = dtype if dtype != "auto" else "bfloat16" if _bfloat16_pays(device) else "float32"
    if chosen not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} must be 'auto', 'float32' or 'bfloat16'")
    return getattr(torch, chosen)


def _bfloat16_pays(device: torch.device) -> bool:
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    # Asked of the processor and not timed: a busy machine must not decide which numbers come out.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check)


class TextEncoder:
    """Embeddings of texts, by a sentence encoder or by the body of a causal language model.

    Parameters
    ----------
    model : str or (model, tokenizer)
        A name for `catalog.fetch`, or a loaded model without head, such as an untrained one of the same shape.
    pooling : {"auto", "mean", "cls", "last"}
        "auto": what the model's ``1_Pooling/config.json`` says; without one, the last token for causal language
        models, the mean over tokens for all others.
    device, dtype : str
        See `choose_device` and `choose_dtype`.
    max_tokens : int
        Longer texts lose their end. Special tokens count.
    """

    def __init__(
        self, model: str | catalog.LanguageModel = "minilm", pooling: Literal["auto", "mean", "cls", "last"] = "auto",
        device: str = "auto", dtype: str = "auto", max_tokens: int = 128,
    ) -> None:  # fmt: skip
        if pooling not in ("auto", "mean", "cls", "last"):
            raise ValueError(f"pooling {pooling!r} must be 'auto', 'mean', 'cls' or 'last'")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; at least 1 is needed")
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        folder = catalog.fetch(model) if isinstance(model, str) else None
        loaded, self.tokenizer = catalog.load_encoder(model, self.dtype) if folder else model
        self._hash = catalog.name_hash(model) if folder else catalog.weights_hash(loaded)
        self.model = loaded.to(device=self.device, dtype=self.dtype).eval()
        pack_linears(self.model)
        self.pooling = _pooling_of(folder, self.model) if pooling == "auto" else pooling
        self.max_tokens = min(max_tokens, getattr(self.model.config, "max_position_embeddings", None) or max_tokens)

    def encode(self, texts: Sequence[str], normalize: bool = True, progress: bool = True) -> Tensor:
        """Embed texts; equal texts are embedded once, and results are kept on disk.

        Parameters
        ----------
        texts : sequence of str, length n
            An empty text is embedded as what the tokenizer makes of it (special tokens only), so it is finite.
        normalize : bool
            Scale each row to length 1.
        progress : bool
            Show a progress bar.

        Returns
        -------
        Tensor of float32 [n, d]
        """
        unique = list(dict.fromkeys(texts))
        rows = {text: row for row, text in enumerate(unique)}
        ids = self._tokenize(unique)
        key = content_key("encoder 2", versions(), self._hash, self.pooling, str(self.dtype), ids)
        stored = cached_tensors("embeddings", key, lambda: {"embeddings": self._embed(ids, progress)})
        embeddings = stored["embeddings"][[rows[text] for text in texts]]
        return torch.nn.functional.normalize(embeddings, dim=1) if normalize else embeddings

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"] if texts else []
        return [row or [first_token(self.tokenizer)] for row in ids]

    def _embed(self, ids: list[list[int]], progress: bool) -> Tensor:
        embeddings = torch.zeros(len(ids), self.model.config.hidden_size)
        budget = BATCH_TOKENS * (1 if self.device.type == "cpu" else 16)
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))  # what does not fit into memory fails at once
        batches = [
            batch
            for length, rows in itertools.groupby(order, key=lambda row: len(ids[row]))
            for batch in torch.tensor(list(rows)).split(max(1, budget // length))
        ]
        tokens = (torch.tensor([ids[row] for row in batch.tolist()]) for batch in batches)
        with tqdm(total=len(ids), desc="embedding", unit="text", disable=not progress) as bar:
            for batch, rows in zip(batches, in_shards(TextEncoder._forward, self, tokens), strict=True):
                embeddings[batch] = rows
                bar.update(len(batch))
        return embeddings

    @torch.inference_mode()
    def _forward(self, tokens: Tensor) -> Tensor:
        """Pooled states of texts of one length [n, length]: nothing is padded, so that attention needs no mask."""
        hidden = self.model(input_ids=tokens.to(self.device)).last_hidden_state
        if self.pooling == "mean":
            return hidden.float().mean(1).cpu()
        return hidden[:, 0 if self.pooling == "cls" else -1].float().cpu()


def pad_right(ids: list[list[int]], device: torch.device, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Token lists of any lengths as one LongTensor [n, longest], padded with `fill`, and its mask of real tokens."""
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [fill] * (longest - len(row)) for row in ids], device=device)
    return tokens, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)


def first_token(tokenizer: Any) -> int:
    """The token that stands for "nothing yet": beginning of sequence, else end of sequence, else padding, else 0."""
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return next((token for token in special if token is not None), 0)


def _pooling_of(folder: Path | None, model: torch.nn.Module) -> str:
    settings = folder / "1_Pooling" / "config.json" if folder else None
    if settings and settings.is_file():
        modes = json.loads(settings.read_text(encoding="utf-8"))
        for name, pooling in (("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")):
            if modes.get(f"pooling_mode_{name}"):
                return pooling
        raise ValueError(f"{settings} asks for a pooling that is not mean, cls or last; give pooling= one of these")
    architectures = getattr(model.config, "architectures", None) or [type(model).__name__]
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, BertConfig

    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    body_of_causal = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING and not isinstance(model.config, BertConfig)
    return "last" if causal or body_of_causal else "mean"


class Whitening:
    """PCA whitening: zero mean, uncorrelated directions of equal variance, so that cosine similarity uses all of them.

    Source: Su et al. 2021, "Whitening Sentence Representations for Better Semantics and Faster Retrieval",
    W = U Λ^(-1/2) of the covariance, with shrinkage towards a multiple of the identity,
    Σ' = (1 − s) Σ + s tr(Σ)/d I, which also defines it for fewer rows than dimensions.
    """

    mean: Tensor
    matrix: Tensor

    def fit(self, embeddings: Tensor, shrinkage: float = 0.01) -> Self:
        """Learn mean and directions from these rows only: pass the items that training may know.

        Parameters
        ----------
        embeddings : Tensor [n, d]
        shrinkage : float in [0, 1]
            0 is plain whitening, for which directions without variance are dropped; 1 only centres and scales.
        """
        if embeddings.ndim != 2 or len(embeddings) < 2:
            raise ValueError(f"embeddings of shape {tuple(embeddings.shape)}: at least 2 rows [n, d] are needed")
        if not torch.isfinite(embeddings).all():
            raise ValueError("embeddings hold NaN or infinite values")
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage is {shrinkage}; it must lie in 0..1")
        rows = embeddings.double()
        self.mean = rows.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(rows.T).reshape(2 * rows.shape[1:]))
        variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
        shrunk = (1 - shrinkage) * variances + shrinkage * variances.mean()
        scale = torch.where(shrunk > 1e-12 * shrunk[0].clamp_min(1e-300), shrunk.rsqrt(), 0.0)
        self.matrix = directions * scale
        return self

    def transform(self, embeddings: Tensor) -> Tensor:
        """Whitened embeddings, float32 [n, d]."""
        return ((embeddings.double() - self.mean) @ self.matrix).float()
