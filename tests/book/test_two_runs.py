"""Two runs agree where each row does; a row that differs or that one run lacks is named."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import two_runs

ROOT = Path(__file__).parents[2]

BASE = {"dataset": "d", "protocol": "leave_one_out", "method": "ease", "family": "id", "seed": 0, "n_users": 3}


def write(folder, rows):
    folder.mkdir(parents=True)
    rows = [{**BASE, "metric": metric, "k": k, "value": value, "seconds": 1.0} for metric, k, value in rows]
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)


@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        ([("ndcg", 10, 0.2003), ("popularity", 10, 150.1)], 0, "agrees, 2 rows, 0 in one run alone, largest 6.67e-04"),
        (
            [("ndcg", 10, 0.21), ("popularity", 10, 150.0)],
            1,
            "DIFFERS, 2 rows, 0 in one run alone, largest 1.00e-02 (ease",
        ),
        ([("ndcg", 10, 0.2)], 1, "DIFFERS, 2 rows, 1 in one run alone"),
    ],
)
def test_what_is_said(rows, status, said, tmp_path, capsys):
    write(tmp_path / "a/d/02_baselines", [("ndcg", 10, 0.2), ("popularity", 10, 150.0)])
    write(tmp_path / "a/d/03_other", [("ndcg", 10, 0.2)])  # only one run has it: not compared
    write(tmp_path / "b/d/02_baselines", rows)
    assert two_runs.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "found.json")]) == status
    assert f"d/02_baselines: {said}" in capsys.readouterr().out
    chapters = json.loads((tmp_path / "found.json").read_text())["chapters"]
    assert chapters.keys() == {"d/02_baselines"} and chapters["d/02_baselines"]["rows"] == 2


def test_nothing_to_compare(tmp_path, capsys):
    assert two_runs.main([str(tmp_path), str(tmp_path)]) == 1
    assert "share no chapter" in capsys.readouterr().err


def test_a_copied_chapter_is_not_a_second_run(tmp_path, capsys):
    for top in "ab":
        write(tmp_path / top / "d/02_baselines", [("ndcg", 10, 0.2)])
        (tmp_path / top / "d/02_baselines/run.json").write_text('{"started": "2026-01-01T00:00:00+00:00"}')
    assert two_runs.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "share no chapter that ran twice" in capsys.readouterr().err


def test_a_mean_over_seeds_and_a_verdict_that_changed_are_named(tmp_path, capsys):
    for top, second, p in (("a", 0.3, True), ("b", 0.32, False)):
        write(tmp_path / top / "d/02_baselines", [("ndcg", 10, 0.2), ("popularity", 5, 100.0 if p else 150.0)])
        table = pd.read_csv(tmp_path / top / "d/02_baselines/metrics.csv")
        other_seed = table.assign(seed=1, value=[second, 100.0])
        pd.concat([table, other_seed]).to_csv(tmp_path / top / "d/02_baselines/metrics.csv", index=False)
        compared = [("x over y", 0.1, p), ("x over z", 0.1, True), ("y over z", -0.1, True)]
        pd.DataFrame(compared, columns=["comparison", "difference", "significant"]).to_csv(
            tmp_path / top / "d/02_baselines/comparisons.csv", index=False
        )
    two_runs.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "found.json")])
    assert "verdicts that changed: x over y\n" in capsys.readouterr().out
    one = json.loads((tmp_path / "found.json").read_text())["chapters"]["d/02_baselines"]
    assert one["off"] == pytest.approx(0.5) and "popularity@5" in one["where"]  # in relation to its size
    assert one["mean_ndcg"]["off"] == pytest.approx(0.01)  # 0.25 and 0.26 over two seeds
    assert one["mean_ndcg"]["where"] == "ease, leave_one_out"
    assert one["verdicts"] == {"shared": 3, "changed": ["x over y"]}


def test_without_ndcg_or_comparisons_nothing_is_said_of_them(tmp_path):
    for top in "ab":
        write(tmp_path / top / "d/02_baselines", [("hit", 10, 0.2)])
    one = two_runs.compared(tmp_path / "a/d/02_baselines", tmp_path / "b/d/02_baselines")
    assert one["mean_ndcg"] is None and one["verdicts"] is None


def test_workflows_call_it_with_arguments_that_it_takes():
    calls = [
        call
        for path in (ROOT / ".github/workflows").glob("*.yml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "make agree" in line
        for call in re.findall(r'make agree\b[^;|&]*?ARGS="([^"]*)"', line)
    ]
    assert calls
    for call in calls:
        options = two_runs.argument_parser().parse_args(shlex.split(call))
        assert 0 < options.tolerance < 1, call
