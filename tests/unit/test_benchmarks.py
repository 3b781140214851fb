"""What `make bench` calls still exists, and gives what it compares."""

from __future__ import annotations

from benchmarks import evaluation, likelihood
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
