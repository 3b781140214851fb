"""RecBole's own `Trainer.evaluate` and ours give the same numbers for the same recommender."""

from __future__ import annotations

import pytest

from llmrec_lib.baselines import train
from llmrec_lib.evaluation import evaluate
from llmrec_lib.recommender import evaluate_by_recbole

KS = (5, 10)
NAMES = {  # RecBole's name: ours
    "recall": "recall",
    "precision": "precision",
    "ndcg": "ndcg",
    "map": "map",
    "mrr": "mrr",
    "hit": "hit",
    "averagepopularity": "popularity",
    "itemcoverage": "coverage",
    "giniindex": "gini",
}
METRICS = ["Recall", "Precision", "NDCG", "MAP", "MRR", "Hit", "AveragePopularity", "ItemCoverage", "GiniIndex"]


def as_recbole_counts(name: str, value: float, n_items: int) -> float:
    """RecBole counts PAD among the items: one more item, which nobody is ever shown.

    Coverage: the same items out of n + 1. Gini: sorting puts the extra zero first, so each other place moves up by one.
    With c_i ascending and C their sum, G = Σ (2i − n − 1) c_i / (n C) becomes
    Σ (2(i + 1) − (n + 1) − 1) c_i / ((n + 1) C) = (n G + 1) / (n + 1).
    """
    if name == "itemcoverage":
        return value * n_items / (n_items + 1)
    if name == "giniindex":
        return (n_items * value + 1) / (n_items + 1)
    return value


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_numbers_of_ease_on_ml100k(ml100k_split, phase):
    """EASE scores do not tie, so that RecBole's `torch.topk`, which breaks ties as it likes, has nothing to break."""
    ease = train("ease", ml100k_split, progress=False)
    ours = evaluate(ease, ml100k_split, phase, ks=KS)
    theirs = evaluate_by_recbole(ease, METRICS, KS, phase)
    assert set(theirs) == {f"{name}@{k}" for name in NAMES for k in KS}
    n_items = ml100k_split.dataset.n_items - 1
    for name, own in NAMES.items():
        for k in KS:
            expected = as_recbole_counts(name, ours.mean(f"{own}@{k}"), n_items)
            assert theirs[f"{name}@{k}"] == pytest.approx(expected, abs=1e-6), (name, k)
    assert 0.05 < ours.mean("ndcg@10") < 0.2  # neither side is empty


def test_numbers_of_a_sequential_model(checkerboard_split):
    """Handed back to RecBole, a sequential model is masked like all others."""
    sasrec = train("sasrec", checkerboard_split, progress=False, epochs=1)
    for phase in ("valid", "test"):
        ours = evaluate(sasrec, checkerboard_split, phase, ks=(2, 5))
        theirs = evaluate_by_recbole(sasrec, METRICS[:6], [2, 5], phase)
        for name in list(NAMES)[:6]:
            for k in (2, 5):
                assert theirs[f"{name}@{k}"] == pytest.approx(ours.mean(f"{NAMES[name]}@{k}"), abs=1e-6)
