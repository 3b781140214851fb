"""How time and memory grow with the data: encoding with more items, evaluation with more users and with more items."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor

from benchmarks import seconds_of
from llmrec_lib.datasets import Dataset, load_dataset
from llmrec_lib.evaluation import Evaluation, evaluate
from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.recommender import Recommender
from llmrec_lib.splits import Split, split

FACTORS = (1, 4, 16)
TEXTS, USERS, ITEMS, EVENTS = 1000, 1000, 2003, 40  # at factor 1; events of each user; ITEMS is a prime
KINDS = ("encoding, items", "evaluation, users", "evaluation, items")


def measure() -> list[dict]:
    """Seconds and MB at a factor; the peer is what they are at factor 1, times the factor.

    A ratio of 1 is linear growth, a ratio of the factor is none; ``exponent`` says the same, 1 and 0. MB are what a fresh
    process holds at its highest while it works, less what it held before and less the result. The output is the same if
    what the larger data share with the smaller comes out as there: embeddings of the first texts, NDCG@10 of the first
    users; items that are added score lowest, so that they change no list.
    """
    rows = []
    for kind in KINDS:
        for unit in ("seconds", "MB"):
            found = {factor: _in_process(kind, factor, unit) for factor in FACTORS}
            base = found[1]
            for factor, (ours, value) in found.items():
                peer = factor * base[0]
                error = float(np.abs(np.subtract(value, base[1])).max())
                row = {"name": f"growth of {kind} × {factor}, {unit}", "ours": ours, "peer": peer, "unit": unit}
                row |= {"ratio": peer / ours, "same_output": error <= 1e-3, "error": error, "factor": factor}
                rows.append(row | {"exponent": math.log(ours / base[0], factor) if factor > 1 else None})
    return rows


def _in_process(kind: str, factor: int, unit: str) -> tuple[float, list[float]]:
    # For MB, freed memory goes back at once (glibc), so that what is held is what is in use.
    setting = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if unit == "MB" else {}
    command = [sys.executable, "-m", "benchmarks.growth", kind, str(factor), unit]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | setting)
    return json.loads(done.stdout.splitlines()[-1])


class _Factors(Recommender):
    """Inner products of random vectors; items beyond the first `ITEMS` come last for everybody."""

    def __init__(self, parts: Split) -> None:
        super().__init__(parts, "factors")
        draw = torch.Generator().manual_seed(0)
        self.of_users = torch.randn(max(FACTORS) * USERS + 1, 64, generator=draw)
        self.of_items = torch.randn(self.n_items, 64, generator=draw)
        self.offset = torch.where(torch.arange(self.n_items) > ITEMS, -1e3, 0.0)

    def score(self, users: torch.LongTensor) -> torch.FloatTensor:
        return torch.addmm(self.offset, self.of_users[users], self.of_items.T)


def _synthetic(n_users: int, n_items: int) -> Dataset:
    """Each user walks through the first `ITEMS` items in steps of an own length; the first users are always the same."""
    start, step = np.random.default_rng(0).integers(1, ITEMS, (max(FACTORS) * USERS, 2))[:n_users].T[:, :, None]
    items = (start + step * np.arange(EVENTS)) % ITEMS + 1
    users = np.repeat(np.arange(1, n_users + 1), EVENTS)
    times = np.tile(np.arange(EVENTS), n_users)
    events = pd.DataFrame({"user": users, "item": items.ravel(), "timestamp": times})
    ids = [np.arange(n + 1).astype(str).astype(object) for n in (n_users, n_items)]
    tables = [pd.DataFrame(index=range(len(names))) for names in ids]
    return Dataset("synthetic", events, *tables, {}, {}, *ids, "timestamp", f"synthetic {n_users} {n_items}")


def _one(kind: str, factor: int, unit: str) -> tuple[float, list[float]]:
    """Seconds (median) or MB, and what must not depend on the factor."""
    if kind == "encoding, items":
        encoder = TextEncoder("minilm", device="cpu")
        ids = encoder._tokenize(load_dataset("ml-100k").item_text[1 : TEXTS + 1]) * factor

        def work() -> Tensor:
            return encoder._embed(ids, progress=False)

        encoder._embed(ids[:8], progress=False)  # what is loaded or packed once is not growth
        found, megabytes = _memory(work)
        result, value, repeats = found.nbytes, found[:TEXTS].mean(0), 3
    else:
        more_users, more_items = (factor if kind.endswith(part) else 1 for part in ("users", "items"))
        parts = split(_synthetic(USERS * more_users, ITEMS * more_items))
        factors = _Factors(parts)

        def work() -> Evaluation:
            return evaluate(factors, parts)

        evaluate(factors, parts, users=[1])
        found, megabytes = _memory(work)
        result, value, repeats = found.per_user.memory_usage().sum(), found.per_user["ndcg@10"].iloc[:USERS], 9
    if unit == "MB":
        return megabytes - float(result) / 2**20, value.tolist()
    return statistics.median(seconds_of(work) for _ in range(repeats)), value.tolist()


def _memory(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and by how many MB the process grew at its highest, looked at every millisecond."""
    process, done = psutil.Process(), threading.Event()
    sizes = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.001):
            sizes.append(process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done.set()
    thread.join()
    return result, (max(sizes) - sizes[0]) / 2**20


if __name__ == "__main__":
    print(json.dumps(_one(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
