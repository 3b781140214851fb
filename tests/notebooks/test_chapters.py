"""Every chapter really runs: all of them on ml-100k at test scale, and one by plain papermill on data of one's own."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from llmrec_lib.study import run
from tests.checkerboard import write_checkerboard

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CHAPTERS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
COLUMNS = ["dataset", "protocol", "method", "family", "seed", "metric", "k", "value", "n_users", "seconds"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    places = {"notebooks_dir": NOTEBOOKS, "executed_dir": folder / "executed", "results_dir": folder / "results"}
    outcomes = run([], profile="test", **places)
    return folder, places, {outcome.chapter: outcome for outcome in outcomes}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs(study, chapter):
    folder, _, outcomes = study
    assert outcomes[chapter].status == "done", outcomes[chapter].error
    notebook = nbformat.read(folder / "executed" / f"{chapter}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a chapter without a figure"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_results_keep_the_contract(study, chapter):
    folder, _, _ = study
    results = folder / "results" / "ml-100k" / chapter
    metrics = pd.read_csv(results / "metrics.csv")
    assert list(metrics.columns[: len(COLUMNS)]) == COLUMNS
    assert set(metrics.family) <= {"id", "llm", "prs", "fusion", "control"}
    assert metrics.value.notna().all()
    per_user = pd.read_parquet(results / "per_user.parquet")
    assert {"method", "seed", "user", "metric", "k", "value"} <= set(per_user.columns)
    means = per_user.groupby(["protocol", "method", "seed", "metric", "k"])["value"].mean()
    table = metrics.set_index(["protocol", "method", "seed", "metric", "k"])["value"]
    assert (means - table.reindex(means.index)).abs().max() < 1e-3 * max(1.0, table.abs().max())
    record = json.loads((results / "run.json").read_text())
    assert record["parameters"]["seeds"] == 1 and record["data"]["fingerprint"] and record["peak_memory_mb"] > 0


def test_source_notebooks_have_no_outputs():
    for chapter in CHAPTERS:
        notebook = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells), chapter
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1, chapter


def test_second_run_does_nothing(study):
    _, places, _ = study
    assert {outcome.status for outcome in run([], profile="test", **places)} == {"up to date"}


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
    assert ndcg["text alone"] > ndcg["pop"]  # here the words say what a user likes
