"""Metrics against an independent implementation, written with loops, and against sklearn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from llmrec_lib.evaluation.metrics import PER_USER, catalogue_metrics, per_user_metrics


def of_one_user(ranking: list[int], relevant: set[int], counts: list[int], k: int) -> dict[str, float]:
    """The textbook, one user at a time."""
    top = ranking[:k]
    found = [item for item in top if item in relevant]
    dcg = sum(1 / math.log2(place + 2) for place, item in enumerate(top) if item in relevant)
    ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(relevant))))
    precisions = [
        len([i for i in top[: place + 1] if i in relevant]) / (place + 1)
        for place, item in enumerate(top)
        if item in relevant
    ]
    first = next((place + 1 for place, item in enumerate(top) if item in relevant), None)
    precision, recall = len(found) / k, len(found) / len(relevant)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        "ndcg": dcg / ideal,
        "map": sum(precisions) / min(k, len(relevant)),
        "mrr": 1 / first if first else 0.0,
        "hit": 1.0 if found else 0.0,
        "popularity": sum(counts[item] for item in top) / k,
    }


def gini_by_pairs(counts: list[int]) -> float:
    """Mean absolute difference of all pairs, over twice the mean (the definition of the Gini index)."""
    n = len(counts)
    return sum(abs(a - b) for a in counts for b in counts) / (2 * n * n * (sum(counts) / n))


def ours(rankings, relevant, counts, ks):
    lists = np.array(rankings)
    hits = np.array([[item in wanted for item in ranking] for ranking, wanted in zip(rankings, relevant, strict=True)])
    n_targets = np.array([len(wanted) for wanted in relevant])
    return per_user_metrics(hits, n_targets, np.array(counts)[lists], ks)


@st.composite
def judged_lists(draw):
    n_items = draw(st.integers(5, 25))
    n_users = draw(st.integers(1, 6))
    ids = list(range(1, n_items + 1))
    rankings = [draw(st.permutations(ids)) for _ in range(n_users)]
    relevant = [set(draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))) for _ in range(n_users)]
    counts = [0, *draw(st.lists(st.integers(0, 99), min_size=n_items, max_size=n_items))]
    ks = draw(st.lists(st.integers(1, n_items), min_size=1, max_size=3, unique=True))
    return rankings, relevant, counts, ks, n_items


@given(judged_lists())
@settings(max_examples=150, deadline=None)
def test_per_user_values_are_those_of_the_textbook(case):
    rankings, relevant, counts, ks, n_items = case
    values = ours([ranking[: max(ks)] for ranking in rankings], relevant, counts, ks)
    assert set(values) == {f"{metric}@{k}" for metric in PER_USER for k in ks}
    for user, (ranking, wanted) in enumerate(zip(rankings, relevant, strict=True)):
        for k in ks:
            for metric, value in of_one_user(ranking, wanted, counts, k).items():
                assert values[f"{metric}@{k}"][user] == pytest.approx(value, abs=1e-9), (metric, k)
            truth = np.array([[item in wanted for item in range(1, n_items + 1)]], dtype=float)
            score = np.array([[-ranking.index(item) for item in range(1, n_items + 1)]], dtype=float)
            assert values[f"ndcg@{k}"][user] == pytest.approx(ndcg_score(truth, score, k=k), abs=1e-9)


@given(judged_lists())
@settings(max_examples=100, deadline=None)
def test_catalogue_values_are_those_of_the_textbook(case):
    rankings, _, _, ks, n_items = case
    values = catalogue_metrics(np.array(rankings), n_items, ks)
    assert set(values) == {f"{metric}@{k}" for metric in ("coverage", "gini") for k in ks}
    for k in ks:
        shown = [item for ranking in rankings for item in ranking[:k]]
        counts = [shown.count(item) for item in range(1, n_items + 1)]
        assert values[f"coverage@{k}"] == pytest.approx(len(set(shown)) / n_items, abs=1e-12)
        assert values[f"gini@{k}"] == pytest.approx(gini_by_pairs(counts), abs=1e-9)


def test_an_example_by_hand():
    """Six items; ranking 3 1 6 2; wanted 1, 2 and 5; training events 10, 20, …, 60."""
    values = ours([[3, 1, 6, 2]], [{1, 2, 5}], [0, 10, 20, 30, 40, 50, 60], [1, 2, 4])
    at = {name: float(column[0]) for name, column in values.items()}
    assert [at[f"precision@{k}"] for k in (1, 2, 4)] == [0, 1 / 2, 2 / 4]
    assert [at[f"recall@{k}"] for k in (1, 2, 4)] == [0, 1 / 3, 2 / 3]
    assert [at[f"f1@{k}"] for k in (1, 2, 4)] == pytest.approx([0, 2 / 5, 4 / 7])
    assert [at[f"hit@{k}"] for k in (1, 2, 4)] == [0, 1, 1]
    assert [at[f"mrr@{k}"] for k in (1, 2, 4)] == [0, 1 / 2, 1 / 2]
    assert [at[f"map@{k}"] for k in (1, 2, 4)] == pytest.approx([0, (1 / 2) / 2, (1 / 2 + 2 / 4) / 3])
    # DCG@4 = 1/log2(3) + 1/log2(5) = 0.63093 + 0.43068; three wanted items: ideal 1 + 0.63093 + 0.5
    assert at["ndcg@4"] == pytest.approx((0.6309298 + 0.4306766) / 2.1309298, abs=1e-6)
    assert at["ndcg@2"] == pytest.approx(0.6309298 / 1.6309298, abs=1e-6)
    assert [at[f"popularity@{k}"] for k in (1, 2, 4)] == [30, 20, 30]


def test_extremes():
    perfect = ours([[1, 2, 3, 4]], [{1, 2}], [0, 1, 1, 1, 1], [2, 4])
    for metric in ("precision", "recall", "f1", "ndcg", "map", "mrr", "hit"):
        assert perfect[f"{metric}@2"][0] == pytest.approx(1.0), metric
    assert perfect["precision@4"][0] == 0.5
    nothing = ours([[3, 4]], [{1, 2}], [0, 1, 1, 1, 1], [2])
    for metric in ("precision", "recall", "f1", "ndcg", "map", "mrr", "hit"):
        assert nothing[f"{metric}@2"][0] == 0.0, metric
    everyone_the_same = catalogue_metrics(np.array([[1], [1], [1]]), 10, [1])
    assert everyone_the_same == pytest.approx({"coverage@1": 0.1, "gini@1": 0.9})
    all_alike = catalogue_metrics(np.array([[1, 2], [3, 4]]), 4, [2])
    assert all_alike == pytest.approx({"coverage@2": 1.0, "gini@2": 0.0})
