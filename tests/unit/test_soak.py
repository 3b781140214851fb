"""A short soak (the long one is `make soak`), and that it would notice what it looks for."""

from __future__ import annotations

import os

import pytest

from benchmarks import soak as module


@pytest.mark.slow
def test_a_study_survives_being_killed():
    """Two random moments, then two runs at once on the same folders."""
    seed = int.from_bytes(os.urandom(4))
    try:
        found = module.soak(points=2, minutes=2, seed=seed, progress=False)
    except module.Broken as error:
        raise AssertionError(f"seed {seed}") from error
    assert found["kills"] == 2
    assert found["finished studies equal to the uninterrupted one"] >= 1
    assert found["pairs of runs at once, equal to the uninterrupted one"] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results/board/01_a/metrics.csv", b""),
        ("results/board/01_a/units/x.parquet", b"PAR1"),
        ("results/board/01_a/run.json", b'{"chapter": '),
        ("executed/01_a.ipynb", b'{"cells": [], "metadata": {}}'),
        ("cache/baselines/x.safetensors", b"\x08\0\0\0\0\0\0\0{}"),
        ("cache/baselines/x.pkl", b"what"),
    ],
)
def test_it_notices_what_is_not_whole(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(module.Broken, match="is not whole"):
        module.look_at_all(tmp_path)


def test_it_notices_another_result_and_passes_over_what_is_temporary(tmp_path):
    (tmp_path / "cache" / "x").mkdir(parents=True)
    (tmp_path / "cache" / "x" / ".half.safetensors").write_bytes(b"half")
    (tmp_path / "cache" / "x" / "a.lock").touch()
    assert module.look_at_all(tmp_path) == {"left-over temporary files": 1}
    with pytest.raises(module.Broken, match="uninterrupted run: b"):
        module.equal({"a": "1", "b": "2"}, {"a": "1", "b": "3"})
