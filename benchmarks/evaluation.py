"""Full-ranking evaluation of EASE on ml-100k, against RecBole's own ``Trainer.evaluate`` of the same scores."""

from __future__ import annotations

import statistics

from benchmarks import seconds_of
from llmrec_lib._recbole import judge
from llmrec_lib.baselines import train
from llmrec_lib.datasets import load_dataset
from llmrec_lib.evaluation import evaluate
from llmrec_lib.recommender import to_recbole
from llmrec_lib.splits import split

METRICS = ["Recall", "Precision", "NDCG", "MAP", "MRR", "Hit"]


def measure(repeats: int = 5) -> list[dict]:
    """Seconds for all users. RecBole's time is of its ``evaluate`` call alone, without making its data sets."""
    parts = split(load_dataset("ml-100k"), "random_ratio", 0)
    ease = train("ease", parts)
    recbole = judge(to_recbole(ease), parts, METRICS, [5, 10, 20])
    ours, theirs = evaluate(ease, parts), recbole()
    times = []
    for _ in range(repeats):  # by turns: a busy moment hits both
        times.append((seconds_of(lambda: evaluate(ease, parts)), seconds_of(recbole)))
    seconds, peer = map(statistics.median, zip(*times, strict=True))
    error = max(abs(ours.mean(name) - value) for name, value in theirs.items())
    row = {
        "name": "full-ranking evaluation",
        "ours": seconds,
        "peer": peer,
        "unit": "seconds for 943 users × 1,682 items",
    }
    return [row | {"ratio": peer / seconds, "same_output": bool(error <= 1e-6), "error": float(error)}]
