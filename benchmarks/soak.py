"""``make soak``: SIGKILL at random moments of ``llmrec run``, until it is believed that nothing is ever lost or half written.

A small study of two chapters (recommenders, a training of a language model with checkpoints, scores of a catalogue) is run on
a data set and models made on the spot, and killed again and again: the whole process group, or the runner alone, whose kernel
then has to notice. After each kill every file is opened. When a run gets through, it must equal an uninterrupted one, and a
new study begins. Then two runs at once work on the same folders. ``benchmarks/soak.json`` keeps what happened.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pandas as pd
import psutil
from safetensors import safe_open
from tqdm import tqdm

from llmrec_lib.cache import atomic_write, content_key
from llmrec_lib.study.provenance import machine

ROOT = Path(__file__).parents[1]
PATIENCE = 20.0  # seconds that an orphaned kernel may take to notice
COMMON = 'dataset = "board"\ndata_dir = "data"\nresults_dir = "results"\nseeds = 1\nprotocol = "leave_one_out"\n'
BEGIN = """from llmrec_lib.baselines import train
from llmrec_lib.evaluation import evaluate
from llmrec_lib.splits import split
from llmrec_lib.study import Study
study = Study({chapter!r}, dataset=dataset, data_dir=data_dir, results_dir=results_dir, seeds=seeds, protocol=protocol)
parts = split(study.data, protocol, 0)

def judge(method, family, arm):
    label = dict(family=family, method=method, seed=0)
    study.unit(method, family=family, seed=0, key=arm.describe(), compute=lambda: evaluate(arm, parts, **label))
"""
CHAPTERS = {
    "01_recommenders": [
        """for name, settings in [("pop", {}), ("itemknn", {}), ("ease", {}), ("tfidf", {}), ("bpr", {"epochs": 3}),
                       ("sasrec", {"epochs": 3}), ("gru4rec", {"epochs": 3})]:
    judge(name, "id", train(name, parts, progress=False, **settings))""",
        "print(study.finish().query('k == 10').drop(columns='seconds').round(6).to_string())",
    ],
    "02_language": [
        """from llmrec_lib.language_models import finetune as module
from llmrec_lib.llm_based import TitleLikelihoodRecommender, catalogue_likelihood
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer
module.CHECKPOINT_SECONDS = 0.0
options = dict(window_tokens=128, batch_tokens=256, dtype="float32", progress=False)
tuned = module.finetune(parts, (tiny_llama(), tiny_tokenizer()), epochs=4, **options)""",
        """likelihood = catalogue_likelihood(parts, (tuned.model, tuned.tokenizer), dtype="float32")
for rule in ("sum", "mean", "prior_corrected"):
    judge(rule, "llm", TitleLikelihoodRecommender(parts, likelihood, rule=rule, over="catalogue", progress=False))
study.table(tuned.curve[["step", "loss"]], "curve.csv")""",
        "print(study.finish().query('k == 10').drop(columns='seconds').round(6).to_string())",
    ],
}


class Broken(AssertionError):
    """A file that is not whole, a rerun that does not finish, or one that gives something else."""


def make_project(folder: Path) -> Path:
    """The small study: data set, two notebooks, profiles."""
    from tests.checkerboard import write_checkerboard

    board = write_checkerboard(folder / "made", n_users=60, n_items=40)
    target = folder / "data" / "board"
    target.mkdir(parents=True)
    for file in Path(board).iterdir():
        shutil.copy(file, target / f"board{file.suffix}")
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "profiles.yaml").write_text("quick: {}\n")
    for chapter, cells in CHAPTERS.items():
        notebook = nbformat.v4.new_notebook()
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        sources = [COMMON, BEGIN.format(chapter=chapter), *cells]
        notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(notebook, folder / "notebooks" / f"{chapter}.ipynb")
    return folder


def start(project: Path) -> subprocess.Popen:
    """``llmrec run`` as a process group of its own, on the project's own cache."""
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"LLMREC_CACHE": str(project / "cache"), "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from llmrec_lib.cli import main; main()", "run"]
    command += ["--results", "results", "--executed", "executed"]
    log = open(project / "log.txt", "ab")  # noqa: SIM115
    options = {"cwd": project, "env": os.environ | settings, "stdout": log, "stderr": log, "start_new_session": True}
    return subprocess.Popen(command, **options)


def look_at_all(project: Path) -> Counter:
    """Open every file that has its final name; raises Broken for one that is not whole. Counts them by kind."""
    found: Counter = Counter()
    for path in [path for place in ("results", "executed", "cache") for path in (project / place).rglob("*")]:
        if path.is_dir() or path.suffix == ".lock" or path.name.endswith(".failed.ipynb"):
            continue
        if path.name.startswith("."):
            found["left-over temporary files"] += 1
            continue
        try:
            if path.suffix == ".parquet":
                pd.read_parquet(path)
            elif path.suffix == ".csv":
                pd.read_csv(path)
            elif path.suffix in (".json", ".ipynb"):
                content = json.loads(path.read_text())
                assert path.suffix == ".json" or content["metadata"]["llmrec"]["stamp"]
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            else:
                raise ValueError("of a kind that nothing should write")
        except Exception as error:
            raise Broken(f"{path.relative_to(project)} is not whole: {error}") from error
        found[path.suffix] += 1
    return found


def outcome(project: Path) -> dict[str, str]:
    """Hash of everything that a finished run leaves: tables without times, values per user, what the notebooks print."""
    hashes = {}
    for path in sorted((project / "results").rglob("[!.]*.*")):
        name = str(path.relative_to(project))
        if "units" in path.parts or path.name == "run.json":
            continue
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        hashes[name] = content_key(table.drop(columns="seconds", errors="ignore").to_csv(index=False))
    for path in sorted((project / "executed").glob("[!.]*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        printed = [cell.get("outputs") for cell in cells]
        streams = [[out.get("text") for out in outs if out.get("name") == "stdout"] for outs in printed if outs]
        hashes[path.name] = content_key(streams)
    return hashes


def through(project: Path) -> float:
    """Let a run go to its end; seconds."""
    begin = time.monotonic()
    if status := start(project).wait(timeout=600):
        raise Broken(f"a run that nobody killed ended with {status}:\n{(project / 'log.txt').read_text()[-3000:]}")
    return time.monotonic() - begin


def equal(found: dict[str, str], expected: dict[str, str]) -> None:
    if found != expected:
        other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise Broken(f"another result than that of an uninterrupted run: {', '.join(other)}")


def kernels_of(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen, whole_group: bool) -> None:
    """SIGKILL; of the runner alone, its kernel has to end by itself."""
    kernels = kernels_of(process)
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(kernels, timeout=PATIENCE)
    if alive:
        for kernel in alive:
            kernel.kill()
        raise Broken(f"a kernel went on for {PATIENCE:.0f} s after its runner was killed")


def soak(points: int, minutes: float, seed: int, progress: bool = True) -> dict:
    """Kill `points` times, or as often as `minutes` allow; raises Broken at the first thing that is wrong."""
    draw, begin = random.Random(seed), time.monotonic()
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        whole = make_project(Path(work, "whole"))
        seconds = through(whole)
        expected = outcome(whole)
        if len(expected) != 7:  # two notebooks, two tables and per-user values of each, and a curve
            raise Broken(f"the uninterrupted run left something else than it should: {sorted(expected)}")
        project, kills_here = None, 0
        bar = tqdm(total=points, desc="kills", disable=not progress)
        while counts["kills"] < points and time.monotonic() - begin < 60 * minutes:
            if project is None:
                project, kills_here = make_project(Path(work, f"study-{counts['studies']}")), 0
                counts["studies"] += 1
            process, whole_group = start(project), draw.random() < 0.7
            try:
                # What was done is skipped, so that moments of every part are hit; the sixth run may get through.
                process.wait(timeout=draw.uniform(0.0, seconds / 2 if kills_here < 5 else 1.5 * seconds))
            except subprocess.TimeoutExpired:
                kill(process, whole_group)
                counts["kills"] += 1
                kills_here += 1
                counts["of the whole group" if whole_group else "of the runner alone"] += 1
                files = look_at_all(project)
                counts["files opened"] += sum(files.values()) - files["left-over temporary files"]
                counts["left-over temporary files"] += files["left-over temporary files"]
                bar.update()
                continue
            if process.returncode:
                raise Broken(f"a rerun ended with {process.returncode}:\n{(project / 'log.txt').read_text()[-3000:]}")
            equal(outcome(project), expected)
            counts["finished studies equal to the uninterrupted one"] += 1
            shutil.rmtree(project)
            project = None
        bar.close()
        if project is not None:
            through(project)
            equal(outcome(project), expected)
            counts["finished studies equal to the uninterrupted one"] += 1
        both = make_project(Path(work, "both"))
        statuses = [process.wait(timeout=600) for process in (start(both), start(both))]
        if any(statuses):
            raise Broken(f"of two runs at once one failed: {statuses}\n{(both / 'log.txt').read_text()[-3000:]}")
        look_at_all(both)
        equal(outcome(both), expected)
        counts["pairs of runs at once, equal to the uninterrupted one"] += 1
    return dict(counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=140, help="kills")
    parser.add_argument("--minutes", type=float, default=12.5, help="no new kill after that")
    parser.add_argument("--jobs", type=int, default=2, help="studies at a time, each on one core")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    begin, jobs = time.monotonic(), range(options.jobs)

    def share(job: int) -> dict:
        return soak(-(-options.points // options.jobs), options.minutes, options.seed + job, progress=job == 0)

    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            counts = sum((Counter(found) for found in pool.map(share, jobs)), Counter())
    except Broken as error:
        print(f"seed {options.seed}: {error}", file=sys.stderr)
        return 1
    minutes = round((time.monotonic() - begin) / 60, 1)
    result = {**counts, "minutes": minutes, "studies at a time": options.jobs, "seed": options.seed}
    result |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
    with atomic_write(Path(__file__).parent / "soak.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
