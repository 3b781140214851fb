"""What goes wrong outside of the library: a full disk, a folder that takes no files, no memory, a cell that hangs, a killed kernel.

Each is named with chapter and cell, the other chapters run, the exit status is not 0, and what was finished is kept.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from llmrec_lib.study import run
from tests.unit.test_runner import statuses, write_notebook

PARAMETERS = 'dataset = "ml-100k"\nresults_dir = "results"\nseeds = 1\n'
STUDY = """
import pandas as pd
from llmrec_lib.study import Study
study = Study({chapter!r}, dataset=dataset, results_dir=results_dir, seeds=seeds)
"""
SMALL = 'study.table(pd.DataFrame({"a": range(10)}), "small.csv")'
LARGE = 'study.table(pd.DataFrame({"a": range(200_000)}), "large.csv")'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Chapters that write a small table, and then do what a test says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "profiles.yaml").write_text("quick: {}\n")

    def make(**cells):
        for number, (name, cell) in enumerate(cells.items(), 1):
            chapter = f"{number:02}_{name}"
            own = [STUDY.format(chapter=chapter), SMALL] if cell else []
            path = tmp_path / "notebooks" / f"{chapter}.ipynb"
            write_notebook(path, *own, cell or "print(seeds)", parameters=PARAMETERS)
        return tmp_path

    return make


# What a chapter does, and what is said about it.
TROUBLES = {
    "disk": (LARGE, "OSError: .*File too large"),
    "memory": ("import numpy as np\nnp.ones(2**44)", ".*MemoryError: Unable to allocate"),
    "killed": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "DeadKernelError"),
    "hung": ("import time\nwhile True: time.sleep(1)", "CellTimeoutError: .*10 seconds"),
}
# A limit on the size of files stands for a full disk: the write fails in the middle.
LIMIT = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))\n"


@pytest.mark.slow
def test_each_trouble_is_named_with_its_cell_and_the_other_chapters_run(project):
    folder = project(**{name: cell for name, (cell, _) in TROUBLES.items()}, good="")
    command = [sys.executable, "-c", f"{LIMIT}from llmrec_lib.cli import main\nmain()", "run", "--cell-timeout", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "05_good: done" in done.stdout
    assert "4 of 5 chapters failed: 01_disk, 02_memory, 03_killed, 04_hung" in done.stderr
    for number, (name, (_, problem)) in enumerate(TROUBLES.items(), 1):
        chapter = f"{number:02}_{name}"
        assert re.search(rf"{chapter} failed in cell 5 with {problem}", done.stdout), done.stdout
        assert (folder / "_build" / "executed" / f"{chapter}.failed.ipynb").exists()
        assert not (folder / "_build" / "executed" / f"{chapter}.ipynb").exists()
        kept = folder / "results" / "ml-100k" / chapter  # what was finished is whole, the rest is not there
        assert [path.name for path in kept.iterdir()] == ["small.csv"]
        assert (kept / "small.csv").read_text().split() == ["a", *map(str, range(10))]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can create files")
def test_a_folder_that_takes_no_files(project):
    project(first=SMALL, second="")
    outcomes = run(results_dir="/proc/self/nowhere")
    assert statuses(outcomes) == [("01_first", "failed"), ("02_second", "done")]
    wrong = "(FileNotFoundError|PermissionError|OSError): .*/proc/self/nowhere"
    assert re.search(rf"01_first failed in cell 4 with {wrong}", outcomes[0].error)
    (outcome,) = run(["1"], executed_dir="/proc/self/nowhere")
    assert outcome.status == "failed"
    assert "01_first failed before its first cell" in outcome.error
    assert "/nowhere" in outcome.error


def test_a_table_in_the_place_of_a_folder(project):
    folder = project(first=SMALL)
    (folder / "results").write_text("a file\n")
    (outcome,) = run()
    assert outcome.status == "failed"
    assert "cell 4" in outcome.error and "results" in outcome.error
    assert (folder / "results").read_text() == "a file\n"


def test_after_the_cause_is_gone_only_what_failed_runs(project):
    folder = project(first="import os\nif not os.path.exists('room'): raise OSError(28, 'No space left')", second="")
    assert statuses(run()) == [("01_first", "failed"), ("02_second", "done")]
    (folder / "room").touch()
    assert statuses(run()) == [("01_first", "done"), ("02_second", "up to date")]
    assert json.loads((folder / "_build" / "executed" / "01_first.ipynb").read_text())["metadata"]["llmrec"]
