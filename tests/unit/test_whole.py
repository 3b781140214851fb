"""The benchmark of the whole language model, on a data set and models that are small enough for a test."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import whole
from llmrec_lib.recommender import PHASES
from tests.checkerboard import write_checkerboard
from tests.unit.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer


def test_scores_that_were_computed_before_stand_in_the_rows_of_their_users(checkerboard_split):
    n_items = checkerboard_split.dataset.n_items
    users = {"valid": np.array([2, 5]), "test": np.array([1, 5, 9])}
    tables = {phase: torch.rand(len(users[phase]), n_items) for phase in PHASES}
    arm = whole.Scored(checkerboard_split, "LM", tables, users)
    assert torch.equal(arm.at("valid").score(torch.tensor([5, 2])), tables["valid"][[1, 0]])
    assert torch.equal(arm.at("test").score(torch.tensor([9, 1, 5])), tables["test"][[2, 0, 1]])
    with pytest.raises(KeyError, match="user 2"):
        arm.at("test").score(torch.tensor([5, 2]))


@pytest.mark.slow
def test_trainings_in_processes_of_their_own_and_fusions_from_what_they_left(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    for name, model in (("llm", tiny_llama(seed=7)), ("encoder", tiny_bert())):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    write_checkerboard(tmp_path)
    options = {"llm": str(tmp_path / "llm"), "epochs": 1, "dataset": "checkerboard", "data_dir": str(tmp_path)}
    options |= {"max_users": 0, "dtype": "float32"}
    whole.make_scores(1, 2, options)
    kept = list((tmp_path / "cache" / "whole").glob("*.safetensors"))
    assert len(kept) == len(whole.CONDITIONS)
    with monkeypatch.context() as nothing_is_trained_again:
        nothing_is_trained_again.setattr(whole, "finetune_shortened", None)
        by_condition = {condition: whole.scores(condition, 0, **options) for condition in whole.CONDITIONS}
    assert [whole._record(found)["condition"] for found in by_condition.values()] == list(whole.CONDITIONS)
    tables = [found["test"] for found in by_condition.values()]
    assert not any(torch.equal(tables[a], tables[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    for condition in whole.CONDITIONS[::2]:
        assert not torch.equal(by_condition[condition]["valid"], by_condition[condition]["test"])  # another history

    monkeypatch.setattr(whole, "PATH", tmp_path / "whole.json")
    monkeypatch.setattr(whole, "TRIALS", 2)
    found = whole.measure(1, str(tmp_path / "encoder"), options)
    json.dumps(found, default=str)
    means = {row["method"]: row["value"] for row in found["means"]}
    values = np.load(tmp_path / "whole.npz")
    assert set(values) == set(means)
    assert all(values[name].mean() == pytest.approx(mean, abs=1e-6) for name, mean in means.items())
    assert {(row["a"], row["b"]) for row in found["compared"]} == set(whole.FAMILY)
