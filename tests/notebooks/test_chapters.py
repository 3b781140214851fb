"""Every chapter really runs, on ml-100k at test scale."""

import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from llmrec_lib.study import run

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
