"""Two runs agree where each row does; a row that differs or that one run lacks is named."""

import json

import pandas as pd
import pytest
import two_runs

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
