"""Whoever has the published per-user values can check each published comparison."""

import shutil
from pathlib import Path

import comparisons
import pandas as pd

ROOT = Path(__file__).parents[2]


def test_every_published_comparison_can_be_computed_again(capsys):
    assert comparisons.main(str(ROOT / "results")) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "06_fusion/comparisons.csv" in said and "NOT" not in said


def test_a_changed_number_is_found(tmp_path, capsys):
    folder = tmp_path / "ml-100k" / "02_baselines"
    shutil.copytree(ROOT / "results/ml-100k/02_baselines", folder)
    table = pd.read_csv(folder / "comparisons.csv")
    table.loc[1, "p"] = 1 - table.loc[1, "p"]
    table.to_csv(folder / "comparisons.csv", index=False)
    assert comparisons.main(str(tmp_path)) == 1
    assert "NOT reproduced {'p'" in capsys.readouterr().out
    assert comparisons.main(str(tmp_path / "nothing")) == 1
