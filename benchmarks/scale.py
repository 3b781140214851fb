"""``python -m benchmarks.scale``: what the study's steps take up to 50,000 users × 17,000 items, into ``benchmarks/scale.json``.

The interactions are made up, so this says what things cost and nothing about quality. Each step runs in a process of its own,
on the cores that torch takes by itself, and is measured at a sixteenth, a quarter and the whole of users and items.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import empty_cache
from llmrec_lib.cache import atomic_write
from llmrec_lib.datasets import Dataset, load_dataset
from llmrec_lib.study.provenance import machine, peak_memory_mb

USERS, ITEMS, EVENTS = 50_000, 17_000, 40  # events of each user
SHARES = (1 / 16, 1 / 4, 1.0)
STEPS = ("split", "encode", "text similarity", "EASE with text", "evaluate EASE + text", "likelihood of one user")


def made_up(n_users: int, n_items: int) -> Dataset:
    """Users draw items by a Zipf-like popularity; a title is half of one of ml-100k's and half of another."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(10, n_items + 10)
    drawn = rng.choice(n_items, (n_users, 2 * EVENTS), p=popularity / popularity.sum()) + 1
    events = pd.DataFrame({"user": np.repeat(np.arange(1, n_users + 1), 2 * EVENTS), "item": drawn.ravel()})
    events = events.drop_duplicates().groupby("user").head(EVENTS).reset_index(drop=True)
    events["timestamp"] = rng.integers(0, 10**8, len(events))
    words = [title.split() for title in load_dataset().titles[1:]]
    pairs = rng.integers(len(words), size=(n_items, 2))
    halves = [(words[a][: -(-len(words[a]) // 2)], words[b][len(words[b]) // 2 :]) for a, b in pairs]
    names = ["", *(" ".join(first + last) for first, last in halves)]
    ids = [np.arange(n + 1).astype(str).astype(object) for n in (n_users, n_items)]
    tables = pd.DataFrame(index=range(n_users + 1)), pd.DataFrame({"title": names})
    about = ({}, {"title": "token_seq"}, *ids, "timestamp", f"made up {n_users} {n_items}")
    return Dataset("made-up", events, *tables, *about)


def one(step: str, share: float) -> dict:
    """Seconds and peak MB of one step in this process, without what it is given; the peak is that of the whole process."""
    import torch

    from llmrec_lib.evaluation import evaluate
    from llmrec_lib.fusion import HybridFusion
    from llmrec_lib.language_models.encoder import TextEncoder
    from llmrec_lib.llm_based import catalogue_likelihood
    from llmrec_lib.prs_based import ease_with_text, text_similarity
    from llmrec_lib.splits import split

    dataset = made_up(round(share * USERS), round(share * ITEMS))
    random = torch.randn(dataset.n_items, 384, generator=torch.Generator().manual_seed(0))
    parts = split(dataset) if step != "split" else None
    if step == "split":
        work = lambda: split(dataset)  # noqa: E731
    elif step == "encode":
        encoder = TextEncoder("minilm")
        ids = encoder._tokenize(dataset.item_text)
        work = lambda: encoder._embed(ids, progress=False)  # noqa: E731
    elif step == "text similarity":
        work = lambda: text_similarity(parts, random)  # noqa: E731
    elif step == "EASE with text":
        work = lambda: ease_with_text(parts, random)  # noqa: E731
    elif step == "evaluate EASE + text":
        arms = ease_with_text(parts, random), text_similarity(parts, random)
        fused = HybridFusion(arms, [1.0, 0.2])
        work = lambda: evaluate(fused, parts)  # noqa: E731
    else:
        likelihood = catalogue_likelihood(parts, "smollm2-135m")
        work = lambda: likelihood.log_likelihood("A user chose Alien (1979);", over="catalogue")  # noqa: E731
    before, begin = peak_memory_mb(), time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    size = {"users": dataset.n_users - 1, "items": dataset.n_items - 1, "events": len(dataset.interactions)}
    size["threads"] = torch.get_num_threads()
    return {"step": step, **size, "seconds": seconds, "peak MB before": before, "peak MB": peak_memory_mb()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", help=f"all by default: {', '.join(STEPS)}")
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}")
    path = Path(__file__).with_name("scale.json")
    kept = {(row["step"], row["users"]): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for step in options.steps or STEPS:
        for share in SHARES:
            command = [sys.executable, "-c", "import sys, json; from benchmarks.scale import one"]
            command[-1] += "; print(json.dumps(one(sys.argv[1], float(sys.argv[2]))))"
            with empty_cache() as cache:
                environment = os.environ | cache
                done = subprocess.run(
                    [*command, step, str(share)], check=True, stdout=subprocess.PIPE, text=True, env=environment
                )
            row = json.loads(done.stdout.splitlines()[-1])
            kept[row["step"], row["users"]] = row
            print("{step}: {users:,} × {items:,}: {seconds:.1f} s, {peak MB:,.0f} MB".format(**row), flush=True)
            ordered = sorted(kept.values(), key=lambda row: (STEPS.index(row["step"]), row["users"]))
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps({"rows": ordered, "machine": machine()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
