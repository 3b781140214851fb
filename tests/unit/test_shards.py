"""Shards and chapters on a real Dask scheduler with two worker processes: the same results, also if a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.language_models.likelihood import TitleLikelihood
from llmrec_lib.shards import in_advance, in_shards
from llmrec_lib.study import run
from tests.unit.test_runner import PARAMETERS, statuses, write_notebook
from tests.unit.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer

TITLES = ["toy story", "toys", "alien", "aliens", "a night of toys", "the story", ""]
ROOT = Path(__file__).parents[2]
WAIT = 60  # seconds for what takes one or two


@pytest.fixture
def cluster(tmp_path_factory):
    """The address of a scheduler on the loopback device, and its two worker processes."""
    folder = tmp_path_factory.mktemp("cluster")
    file = folder / "scheduler.json"
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # they read functions of this file
    options = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": places}, "stdout": subprocess.DEVNULL}
    options["stderr"] = subprocess.DEVNULL
    dask = [sys.executable, "-m", "dask"]
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    started = [subprocess.Popen([*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *common], **options)]
    worker = [*dask, "worker", "--no-nanny", "--nthreads", "1", "--death-timeout", str(WAIT), *common]
    started += [subprocess.Popen(worker, **options) for _ in range(2)]
    try:
        until(file.exists)
        address = json.loads(file.read_text())["address"]
        from distributed import Client

        with Client(address) as client:
            client.wait_for_workers(2, timeout=WAIT)
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


def until(happened):
    for _ in range(10 * WAIT):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened in time")


def slow_square(folder, number):
    """Leaves a file with the number of the process that begins to compute it."""
    (folder / f"{number}.{os.getpid()}.begun").touch()
    time.sleep(0.3)
    return number**2, os.getpid()


def pids(folder):
    return {int(path.name.split(".")[1]) for path in folder.glob("*.begun")}


def test_shards_run_here_without_a_scheduler(tmp_path):
    shards = in_shards(slow_square, tmp_path, iter(range(3)))
    assert next(shards) == (0, os.getpid())
    assert len(list(tmp_path.iterdir())) == 1  # as soon as it is known, and not all at once
    assert [square for square, _ in shards] == [1, 4]


@pytest.mark.slow
def test_in_advance_the_workers_compute_and_without_a_scheduler_nobody(cluster, tmp_path, monkeypatch):
    address, workers = cluster
    in_advance(slow_square, tmp_path, range(4))
    assert not pids(tmp_path)
    monkeypatch.setenv("LLMREC_SCHEDULER", address)
    in_advance(slow_square, tmp_path, range(4))
    assert len(list(tmp_path.glob("*.begun"))) == 4
    assert pids(tmp_path) <= {worker.pid for worker in workers}


@pytest.mark.slow
def test_shards_survive_a_killed_worker(cluster, tmp_path, monkeypatch):
    address, workers = cluster
    monkeypatch.setenv("LLMREC_SCHEDULER", address)
    found = []
    for number, (square, _) in enumerate(in_shards(slow_square, tmp_path, range(12))):
        found.append(square)
        if number == 2:
            until(lambda: pids(tmp_path) == {worker.pid for worker in workers})
            workers[0].send_signal(signal.SIGKILL)
    assert found == [number**2 for number in range(12)]
    begun = [path.name.split(".")[0] for path in tmp_path.iterdir()]
    assert len(begun) > len(set(begun))  # what the killed worker had begun was begun again


@pytest.mark.slow
def test_encoder_and_likelihood_give_the_same_on_workers(cluster, tmp_path, monkeypatch):
    address, _ = cluster
    tokenizer, prompts = tiny_tokenizer(), ["a user chose toys;", "", "aliens; alien;"]

    def both(folder):
        monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / folder))
        encoder = TextEncoder((tiny_bert(), tokenizer), dtype="float32")
        likelihood = TitleLikelihood((tiny_llama(), tokenizer), TITLES, dtype="float32")
        return encoder.encode(TITLES, progress=False), likelihood.score_catalogue(prompts, progress=False)

    here = both("here")
    monkeypatch.setenv("LLMREC_SCHEDULER", address)
    there = both("there")
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


CHAPTER = """
import os, time
from pathlib import Path
from llmrec_lib.shards import in_shards
from tests.unit.test_shards import slow_square
Path(f"{word}.{os.getppid()}.begun").touch()
marks = Path(f"marks_{word}"); marks.mkdir(exist_ok=True)
done = [square for square, pid in in_shards(slow_square, marks.absolute(), range(4))]
folder = Path(results_dir) / dataset / f"0{number}_{word}"
folder.mkdir(parents=True, exist_ok=True)
(folder / "metrics.csv").write_text(f"{done}")
"""


@pytest.mark.slow
def test_chapters_on_two_workers_of_which_one_is_killed(cluster, tmp_path, monkeypatch):
    address, workers = cluster
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "profiles.yaml").write_text("quick: {}\n")
    for number, word in enumerate(("one", "two", "three"), 1):
        own = PARAMETERS.replace('word = "a"', f'word = "{word}"') + f'number = {number}\ndataset = "ml-100k"\n'
        write_notebook(tmp_path / "notebooks" / f"0{number}_{word}.ipynb", CHAPTER, parameters=own)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLER, str(tmp_path), str(workers[0].pid)], stdout=subprocess.DEVNULL
    )
    outcomes = run(engine="dask", scheduler=address, results_dir="there")
    assert killer.wait(timeout=WAIT) == 0
    assert workers[0].wait(timeout=WAIT) == -signal.SIGKILL
    assert [status for _, status in statuses(outcomes)] == ["done"] * 3, [outcome.error for outcome in outcomes]
    local = run(results_dir="here", executed_dir="_build/here")
    assert [status for _, status in statuses(local)] == ["done"] * 3
    for outcome in outcomes:
        written = [tmp_path / where / "ml-100k" / outcome.chapter / "metrics.csv" for where in ("here", "there")]
        assert written[0].read_text() == written[1].read_text() == "[0, 1, 4, 9]"
    computing = {pid for marks in tmp_path.glob("marks_*") for pid in pids(marks)}
    assert workers[1].pid in computing  # the shards of a chapter's kernel came back to the workers


# Kills a worker as soon as it has begun a chapter.
KILLER = """
import os, signal, sys, time
from pathlib import Path
folder, pid = Path(sys.argv[1]), sys.argv[2]
while not list(folder.glob(f"*.{pid}.begun")):
    time.sleep(0.05)
os.kill(int(pid), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_chapter_whose_seeds_are_trained_in_advance_gives_the_same_tables(cluster, tmp_path, monkeypatch):
    address, _ = cluster
    monkeypatch.chdir(tmp_path)
    scale = {"methods": ["pop", "sasrec"], "seeds": 2, "max_epochs": 1, "max_users": 40}
    places = {"profile": "test", "parameters": scale, "notebooks_dir": ROOT / "notebooks"}
    there = run(["02"], engine="dask", scheduler=address, results_dir="there", executed_dir="there", **places)
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    here = run(["02"], results_dir="here", executed_dir="here", **places)
    assert statuses(there) == statuses(here) == [("02_baselines", "done")], [
        outcome.error for outcome in (*there, *here)
    ]
    tables = [pd.read_csv(tmp_path / where / "ml-100k/02_baselines/metrics.csv") for where in ("there", "here")]
    assert set(tables[0]["seed"]) == {0, 1}
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in tables), rtol=1e-3)
