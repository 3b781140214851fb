"""A chapter really runs by plain papermill on data of one's own, and finds what is to be found there."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

from tests.checkerboard import write_checkerboard

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_own_data_by_plain_papermill(tmp_path):
    write_checkerboard(tmp_path, n_users=40, n_items=48)
    given = {
        "dataset": "checkerboard",
        "data_dir": str(tmp_path),
        "protocol": "leave_one_out",
        "seeds": 1,
        "llm_users": 2,
        "max_epochs": 1,
        "trials": 1,
        "results_dir": str(tmp_path / "results"),
    }
    flags = [part for name, value in given.items() for part in ("-p", name, str(value))]
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(NOTEBOOKS / "06_fusion.ipynb"),
        str(tmp_path / "out.ipynb"),
        *flags,
        "-y",
        "{protocols: [random_ratio], language_arms: [LM]}",  # lists: -p of papermill passes them as text
    ]
    done = subprocess.run(
        [*command, "-k", "python3", "--no-progress-bar"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = pd.read_csv(tmp_path / "results" / "checkerboard" / "06_fusion" / "metrics.csv")
    assert set(metrics.protocol) == {"leave_one_out", "random_ratio"}
    at_10 = metrics[(metrics.metric == "ndcg") & (metrics.k == 10) & (metrics.protocol == "leave_one_out")]
    ndcg = at_10.set_index("method")["value"]
    assert ndcg["best text arm"] > ndcg["pop"]  # here the words say what a user likes
