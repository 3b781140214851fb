"""What `make bench` calls still exists, and gives what it compares."""

from __future__ import annotations

import json

import pytest

from benchmarks import evaluation, likelihood, sasrec
from llmrec_lib import _recbole
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer


def test_the_likelihood_and_its_peer_say_the_same(monkeypatch):
    """With a tiny model, and a peer that reads a few of the titles."""
    monkeypatch.setattr(likelihood, "PEER_TITLES", 24)
    monkeypatch.setattr(likelihood, "PROMPT_TOKENS", 40)
    rows = likelihood.measure((tiny_llama(), tiny_tokenizer()), repeats=1)
    assert [row["name"].split(", ")[1] for row in rows] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert all(row["same_output"] and row["error"] <= 2e-4 for row in rows[:2])
    assert all(row["rank_correlation"] > 0.99 and row["prompt_tokens"] > 20 for row in rows)


def test_the_evaluation_and_recboles_say_the_same():
    rows = evaluation.measure()
    assert rows and all(row["same_output"] and row["error"] <= 1e-6 for row in rows)


def test_recboles_rows_and_our_windows_ask_for_the_same_events(ml100k_split):
    def asked(rows):
        events = zip(rows[_recbole.UID], rows[_recbole.TARGETS], strict=True)
        return sorted((user, item) for user, items in events for item in items if item)

    ours, recboles = _recbole.windows(ml100k_split, 50), sasrec.prefixes(ml100k_split, 50)
    one_each = recboles.assign(**{_recbole.TARGETS: [[item] for item in recboles[_recbole.IID]]})
    assert len(recboles) > 20 * len(ours)
    assert asked(ours) == asked(one_each)


def test_both_sasrecs_are_trained_on_one_split_and_compared(checkerboard_split):
    """With a tiny model: the even users like the even items, so both must find some of them."""
    small = {"epochs": 3, "hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1, "MAX_ITEM_LIST_LENGTH": 8}
    result = sasrec.measure_trained(checkerboard_split, **small)
    ours, recboles = (result["models"][name] for name in ("ours", "RecBole's"))
    assert ours["ndcg@10"] > 0 and recboles["ndcg@10"] > 0
    pair = result["ours less RecBole's"]
    assert pair["difference"] == pytest.approx(ours["ndcg@10"] - recboles["ndcg@10"], abs=1e-6)
    assert pair["low"] <= pair["difference"] <= pair["high"] and pair["n_users"] > 5
    assert ours["epochs"] == recboles["epochs"] == 3 and json.loads(json.dumps(result)) == result
