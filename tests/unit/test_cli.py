"""The command line: exit status 0 only when all was done, one clear message instead of a traceback."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from click.testing import CliRunner

from llmrec_lib.cli import main


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Run `llmrec` in a folder with the chapters 05_prs_based and 06_fusion; the latter needs a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "profiles.yaml").write_text("quick: {}\nfull: {}\n")
    for chapter in ("05_prs_based", "06_fusion"):
        notebook = nbformat.v4.new_notebook()
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook.cells = [
            nbformat.v4.new_code_cell('seeds = 5\nword = ""' + ("\ndepth = 3" if chapter == "06_fusion" else "")),
            nbformat.v4.new_code_cell("open(f'ran_{seeds}', 'w').close()\nif word: raise ValueError(word)"),
        ]
        notebook.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(notebook, tmp_path / "notebooks" / f"{chapter}.ipynb")
    return lambda *arguments: CliRunner().invoke(main, arguments)


def test_unknown_parameter_stops_before_the_start(invoke):
    result = invoke("run", "06", "-p", "sede", "3")
    assert result.exit_code == 1
    for part in ("'sede'", "did you mean 'seeds'", "depth = 3"):
        assert part in result.output
    assert "Traceback" not in result.output
    assert not list(Path().glob("ran_*"))


@pytest.mark.parametrize(
    ("arguments", "part", "status"),
    [
        (("run", "07"), "05_prs_based, 06_fusion", 1),
        (("run", "06", "-p", "seeds", "-1"), "at least 1", 1),
        (("run", "05", "-p", "depth", "2"), "'depth'", 1),
        (("run", "--profile", "slow"), "quick, full", 1),
        (("run", "--engine", "spark"), "'local', 'dask'", 2),
        (("run", "-p", "seeds", "1", "-p", "seeds", "2"), "more than once for seeds", 2),
        (("run", "--notebooks", "nowhere"), "no chapters", 1),
        (("data", "check", "nowhere"), "nowhere", 1),
    ],
)
def test_wrong_arguments(invoke, arguments, part, status):
    result = invoke(*arguments)
    assert (result.exit_code, part in result.output) == (status, True), result.output
    assert not list(Path().glob("ran_*"))


def test_run_and_fail(invoke):
    result = invoke("run", "fusion", "-p", "seeds", "3", "-p", "depth", "1", "--executed", "out")
    assert result.exit_code == 0, result.output
    assert Path("out/06_fusion.ipynb").exists()
    assert Path("ran_3").exists()
    result = invoke("run", "6", "-p", "word", "oops")
    assert result.exit_code == 1
    assert "06_fusion failed in cell 2 with ValueError: oops" in result.output
    assert "1 of 1 chapters failed" in result.output


def test_data_check(invoke):
    Path("tiny").mkdir()
    Path("tiny/tiny.inter").write_text("user_id:token\titem_id:token\nu\ti\nv\ti\n")
    result = invoke("data", "check", "tiny")
    assert result.exit_code == 0, result.output
    assert "interactions" in result.output


def test_models(invoke, monkeypatch):
    catalog = types.ModuleType("llmrec_lib.language_models.catalog")
    catalog.list_models = lambda: pd.DataFrame({"name": ["minilm"], "sha256": ["abc"]})
    catalog.fetch = lambda name: Path("cache") / name
    package = types.ModuleType("llmrec_lib.language_models")
    package.catalog = catalog
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, catalog.__name__, catalog)
    assert "minilm" in invoke("models", "list").output
    assert invoke("models", "fetch", "minilm").output == "minilm: cache/minilm\n"


def test_the_cache_is_shown_and_shrunk(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    assert "0.0 MB" in invoke("cache").output
    for kind, name in (("models", "a"), ("models", "b"), ("embeddings", "c")):
        (tmp_path / "cache" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / kind / name).write_bytes(b"0" * 300_000)
    shown = invoke("cache")
    assert shown.exit_code == 0
    assert [line.split()[:2] for line in shown.output.splitlines()[:2]] == [["embeddings", "1"], ["models", "2"]]
    assert "0.9 MB" in shown.output
    assert "0.6 MB deleted" in invoke("cache", "--shrink", "0.0004").output
    assert invoke("cache", "--shrink", "-1").exit_code == 2
    assert len(list((tmp_path / "cache").glob("*/[abc]"))) == 1
    monkeypatch.setenv("LLMREC_CACHE_GB", "0")
    assert invoke("run", "05", "-p", "seeds", "0").exit_code == 1  # wrong parameters: nothing is touched
    assert len(list((tmp_path / "cache").glob("*/[abc]"))) == 1
    monkeypatch.setenv("LLMREC_CACHE_GB", "much")
    refused = invoke("run", "05")
    assert (refused.exit_code, "'much'" in refused.output) == (2, True)
