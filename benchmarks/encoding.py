"""Embeddings of all item texts of ml-100k, against sentence-transformers as it comes (float32, batches of 32, padded).

sentence-transformers is no dependency of this project. Where the pinned version is not installed, its wheel (pure Python)
is put into a temporary folder for this process, ``pip install --no-deps --target``: what it imports is here already.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks import seconds_of
from llmrec_lib.datasets import load_dataset
from llmrec_lib.evaluation import Evaluation, compare, evaluate
from llmrec_lib.language_models import catalog
from llmrec_lib.language_models.encoder import BATCH_TOKENS, TextEncoder, Whitening, choose_dtype
from llmrec_lib.prs_based import text_similarity
from llmrec_lib.splits import Split, split

PEER, VERSION = "sentence-transformers", "6.2.0"


def measure(model: str = "minilm", repeats: int = 3) -> list[dict]:
    """A row for float32 and, where the processor has instructions for it, one for bfloat16; the cache is left out.

    ``error`` is 1 - the lowest cosine of all texts; 0.001 is the most that counts as the same output. ``ndcg_difference`` is
    ours minus the peer's NDCG@10 of the text recommender at test time, with its paired 95 % interval. ``floor`` is the
    seconds that the operations of the linear layers alone (attention not counted, nothing padded) take at the best rate
    that the largest of them reached by itself, and ``ratio_at_floor`` what the ratio to the peer's fastest run would be
    then: more is not to be had in this dtype on this machine.
    """
    parts = split(load_dataset("ml-100k"), "temporal_ratio", 0)
    texts = list(dict.fromkeys(parts.dataset.item_text))  # that equal texts are embedded once is not the claim
    rows_of = torch.tensor([texts.index(text) for text in parts.dataset.item_text])
    encoders = [TextEncoder(model, device="cpu", dtype="float32")]
    if choose_dtype("auto", torch.device("cpu")) is torch.bfloat16:
        encoders.append(TextEncoder(model, device="cpu", dtype="bfloat16"))
    with _sentence_transformers() as library:
        peer = library.SentenceTransformer(str(catalog.fetch(model)), device="cpu")
        jobs = {"peer": lambda: peer.encode(texts, show_progress_bar=False, convert_to_tensor=True)}
        for encoder in encoders:
            name = str(encoder.dtype).removeprefix("torch.")
            jobs[name] = lambda encoder=encoder: encoder._embed(encoder._tokenize(texts), progress=False)
        found = {name: job() for name, job in jobs.items()}
        runs = [{name: seconds_of(job) for name, job in jobs.items()} for _ in range(repeats)]  # a busy minute hits all
        floors = [_floor(encoder, texts) for encoder in encoders]
    seconds = {name: statistics.median(run[name] for run in runs) for name in jobs}
    fastest = min(run["peer"] for run in runs)
    judged = {name: _judge(parts, rows[rows_of], name) for name, rows in found.items()}
    rows = []
    for name, floor in zip(list(jobs)[1:], floors, strict=True):
        error = 1 - float(torch.cosine_similarity(found[name], found["peer"]).min())
        gain = compare(judged[name], judged["peer"])
        row = {"name": f"encoding, {name}", "ours": len(texts) / seconds[name], "peer": len(texts) / seconds["peer"]}
        row |= {"unit": "items/s", "ratio": seconds["peer"] / seconds[name]}
        row |= {"same_output": error <= 1e-3, "error": error}
        row |= {f"ndcg_{key}": float(gain[key]) for key in ("difference", "low", "high")}
        rows.append(row | {"seconds": seconds[name], "floor": floor, "ratio_at_floor": fastest / floor})
    return rows


@contextlib.contextmanager
def _sentence_transformers() -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            ready = metadata.version(PEER) == VERSION
        except metadata.PackageNotFoundError:
            ready = False
        if not ready:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--target", folder, f"{PEER}=={VERSION}"], check=True)
            sys.path.insert(0, folder)
            stack.callback(sys.path.remove, folder)
        import sentence_transformers

        yield sentence_transformers


def _judge(parts: Split, embeddings: Tensor, name: str) -> Evaluation:
    """As `prs_based.embed_items`: rows of length 1, whitened with what the items of the training part show."""
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    white = Whitening().fit(unit[torch.from_numpy(parts.item_counts > 0)]).transform(unit)
    return evaluate(text_similarity(parts, white), parts, method=f"text, {name}")


@torch.inference_mode()
def _floor(encoder: TextEncoder, texts: list[str]) -> float:
    linears = [part for part in encoder.model.encoder.modules() if isinstance(part, torch.nn.Linear)]
    largest = max(linears, key=lambda part: part.weight.numel())
    states = torch.randn(BATCH_TOKENS, largest.in_features).to(encoder.dtype)
    per_weight = min(seconds_of(lambda: largest(states)) for _ in range(200)) / largest.weight.numel() / BATCH_TOKENS
    return per_weight * sum(part.weight.numel() for part in linears) * sum(map(len, encoder._tokenize(texts)))
