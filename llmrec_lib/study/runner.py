"""Execute chapters with papermill: check everything first, skip what is up to date, keep nothing that is half done."""

import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from llmrec_lib.cache import atomic_write, content_key, file_sha256, shrink_cache
from llmrec_lib.datasets import load_dataset
from llmrec_lib.study import provenance
from llmrec_lib.study.parameters import ParameterError, Value, chapter_values, declared_parameters


@dataclass(frozen=True)
class ChapterOutcome:
    """What became of one chapter. `notebook` is the executed notebook, or for a failed chapter what was reached."""

    chapter: str
    status: str  # "done" | "up to date" | "failed"
    seconds: float
    notebook: Path
    error: str = ""


@dataclass(frozen=True)
class _Job:
    """Everything that one execution needs, so that it can be sent to another process."""

    chapter: str
    source: Path
    target: Path
    results: Path  # the folder that the chapter writes its tables to
    folder: Path  # where the kernel starts
    parameters: dict[str, Value]
    changed: dict[str, Value]  # those that differ from the notebook's defaults
    stamp: dict[str, str | None]  # what it is made from: part -> hash
    threads: str
    timeout: int  # seconds for one cell, 0 for no limit
    forced: bool

    def result_hashes(self) -> dict[str, str]:
        """File name -> hash of what the chapter has written to its results folder."""
        return {file.name: file_sha256(file) for file in sorted(self.results.glob("[!.]*.*")) if file.is_file()}


def run(
    chapters: Sequence[str] = (), profile: str = "quick", parameters: Mapping[str, Any] | None = None,
    engine: str = "local", scheduler: str | None = None, results_dir: str | Path | None = None,
    notebooks_dir: str | Path = "notebooks", executed_dir: str | Path = "_build/executed", force: bool = False,
    cell_timeout: int = 0, cache_gb: float | None = None, report: Callable[[str], None] = print, at_once: int = 1,
) -> list[ChapterOutcome]:  # fmt: skip
    """Execute chapters in the current folder; what is up to date is skipped.

    Parameters
    ----------
    chapters : names such as "06", "6", "fusion" or "06_fusion"; none means all.
    profile : an entry of ``profiles.yaml`` in the notebooks' folder.
    parameters : given by name; a name goes to each chapter that declares it, at least one has to. Anything unknown or
        of a wrong type or value is a ParameterError (unusable data: a DataError) before anything is executed.
    engine, scheduler : "local", or "dask" with the address of a scheduler whose workers see the same folders and have
        the same environment (none: one worker is started here).
    results_dir : the parameter of this name.
    executed_dir : where ``NN_name.ipynb`` goes when complete, and ``NN_name.failed.ipynb`` until then.
    force : execute also what is up to date. Units that were kept are read back all the same.
    cell_timeout : seconds after which a cell counts as hung and its chapter as failed; 0 for no limit.
    cache_gb : before anything is executed, delete what the cache has not used for longest until so many GB are left.
    report : receives one line of progress at a time.
    at_once : so many chapters side by side on this machine, each with its share of the cores (OMP_NUM_THREADS, if set,
        says how many), but the last one alone: it may read what the others wrote. With engine "local".
    """
    if engine not in ("local", "dask") or (scheduler and engine != "dask"):
        raise ParameterError(f"engine {engine!r}, scheduler {scheduler!r}: use local, dask, or dask with a scheduler")
    given = dict(parameters or {}) | ({} if results_dir is None else {"results_dir": str(results_dir)})
    jobs = _plan(chapters, profile, given, Path(notebooks_dir), Path(executed_dir), cell_timeout, force, at_once)
    if cache_gb is not None:
        shrink_cache(cache_gb)
    outcomes = {job.chapter: ChapterOutcome(job.chapter, "up to date", 0.0, job.target) for job in jobs}
    reasons = {job.chapter: _out_of_date(job) for job in jobs}
    for chapter, reason in reasons.items():
        report(f"{chapter}: " + (f"to be executed ({reason})" if reason else "up to date"))
    waiting = [job for job in jobs if reasons[job.chapter]]
    running = _execute_on_dask(waiting, scheduler) if engine == "dask" and waiting else _execute_here(waiting, at_once)
    for outcome in running:
        outcomes[outcome.chapter] = outcome
        report(f"{outcome.chapter}: {outcome.status} after {outcome.seconds:.0f} s\n{outcome.error}".rstrip())
    return list(outcomes.values())


def find_chapters(names: Sequence[str], notebooks_dir: Path) -> list[Path]:
    """Notebooks of the named chapters (none: of all), in order; ParameterError for a name that fits no notebook."""
    there = sorted(notebooks_dir.glob("[0-9][0-9]_*.ipynb"))
    if not there:
        raise ParameterError(f"{notebooks_dir} holds no chapters (NN_name.ipynb): start in the project's folder")
    by_name = {}
    for path in there:
        number, _, title = path.stem.partition("_")
        by_name |= dict.fromkeys((path.stem, title, number, number.lstrip("0")), path)
    for name in names:
        if not name or name not in by_name:
            raise ParameterError(f"there is no chapter {name!r}; there are {', '.join(path.stem for path in there)}")
    return sorted({by_name[name] for name in names}) or there


def _plan(
    names: Sequence[str], profile: str, given: dict[str, Any], notebooks_dir: Path, executed_dir: Path,
    timeout: int, forced: bool, at_once: int,
) -> list[_Job]:  # fmt: skip
    chapters = find_chapters(names, notebooks_dir)
    known = {path.stem: declared_parameters(path) for path in find_chapters((), notebooks_dir)}
    names = [path.stem for path in chapters]
    effective = chapter_values(notebooks_dir / "profiles.yaml", profile, given, names, known)
    lock = notebooks_dir.absolute().parent / "requirements.lock"
    places = [(values.get("dataset", ""), values.get("data_dir", "")) for values in effective]
    data = {place: load_dataset(*place).fingerprint for place in set(places) if place[0]}
    return [
        _Job(
            chapter=path.stem,
            source=path.absolute(),
            target=executed_dir.absolute() / path.name,
            results=Path.cwd() / values.get("results_dir", "results") / place[0] / path.stem,
            folder=Path.cwd(),
            parameters=values,
            changed={name: value for name, value in values.items() if value != known[path.stem][name]},
            stamp={
                "notebook": content_key(_cells(path)),
                "parameters": content_key(values),
                "library": provenance.library_hash(used_by="\n".join(source for _, source, _ in _cells(path))),
                "lock": file_sha256(lock) if lock.exists() else None,
                "data": data.get(place),
                "models": {role: provenance.model_hash(values[role]) for role in ("encoder", "llm") if role in values},
                "versions": content_key(provenance.versions()),
            },
            threads=os.environ.get("OMP_NUM_THREADS") or str(max(1, os.cpu_count() // at_once)),
            timeout=timeout,
            forced=forced,
        )
        for path, values, place in zip(chapters, effective, places, strict=True)
    ]


def _cells(notebook: Path) -> list[tuple]:
    """What a notebook says, without outputs and execution counts: kind, source and tags of each cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in cells]


def _out_of_date(job: _Job) -> str:
    """Why a chapter has to be executed, or "" if its executed notebook and its results stand for the same sources."""
    if job.forced:
        return "asked for"
    try:
        record = json.loads(job.target.read_text(encoding="utf-8"))["metadata"]["llmrec"]
        if changed := [part for part, value in job.stamp.items() if record["stamp"].get(part) != value]:
            return f"{', '.join(changed)} changed"
        return "" if record["results"] == job.result_hashes() else "its results were changed or removed"
    except (OSError, ValueError, KeyError):
        return "not executed yet"


def _execute(job: _Job) -> ChapterOutcome:
    """Execute one chapter; whatever goes wrong in it is in the outcome, so that the other chapters still run."""
    started = time.monotonic()
    unfinished, lock = (job.target.with_name(name.format(job.chapter)) for name in ("{}.failed.ipynb", ".{}.lock"))
    try:
        with FileLock(lock):  # of another run on the same folders, which may have done it meanwhile
            if not _out_of_date(job):
                return ChapterOutcome(job.chapter, "up to date", time.monotonic() - started, job.target)
            unfinished.unlink(missing_ok=True)
            _papermill(job, unfinished)
            _stamp(job, unfinished)
            unfinished.unlink()
    except Exception as error:
        message = _describe_failure(job.chapter, error, unfinished)
        return ChapterOutcome(job.chapter, "failed", time.monotonic() - started, unfinished, message)
    return ChapterOutcome(job.chapter, "done", time.monotonic() - started, job.target)


def _execute_here(jobs: Sequence[_Job], at_once: int) -> Iterator[ChapterOutcome]:
    """In processes of their own, if several at once: a kernel's client wants the main thread."""
    import joblib

    side_by_side = jobs[:-1] if at_once > 1 else []
    yield from joblib.Parallel(at_once, return_as="generator_unordered")(map(joblib.delayed(_execute), side_by_side))
    yield from map(_execute, jobs[len(side_by_side) :])


def _papermill(job: _Job, output: Path) -> None:
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient.exceptions import DeadKernelError

    class ThisPython(AsyncKernelManager):  # the interpreter that runs this, whatever kernels are installed
        # Threads that wait without spinning leave the cores to whatever else computes there.
        env = {"OMP_NUM_THREADS": job.threads, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
        # The log level spares the reader a warning per chapter that a local kernel's traffic is not encrypted.
        kernel_spec = KernelSpec(**get_kernel_dict(["--log-level=40"]) | {"env": env})

    about = {"kernel_name": "python3", "language": "python", "kernel_manager_class": ThisPython}
    about |= {"progress_bar": {"desc": job.chapter}, "execution_timeout": job.timeout or None}
    about |= {"resources": {"metadata": {"path": str(job.folder)}}}  # this process stays where it is
    execute = functools.partial(papermill.execute_notebook, job.source, output, parameters=job.changed, **about)
    try:
        execute()
    except DeadKernelError:
        raise
    except RuntimeError:  # a kernel that dies before it answers has usually lost the race for a port
        execute()


def _describe_failure(chapter: str, error: Exception, notebook: Path) -> str:
    """Chapter, cell (counted from 1 in the source notebook), exception, and where to look at what was reached."""
    what = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else f"{type(error).__name__}: {error}"
    if not notebook.exists():
        return f"{chapter} failed before its first cell with {what}"
    cells = [cell["metadata"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    added = {"injected-parameters", "papermill-error-cell-tag"}
    own = [cell for cell in cells if not added.intersection(cell.get("tags", []))]
    reached = [number for number, cell in enumerate(own, 1) if cell.get("papermill", {}).get("start_time")]
    place = f"in cell {reached[-1]}" if reached else "before its first cell"
    return f"{chapter} failed {place} with {what}\nwhat was reached is in {notebook}"


def _stamp(job: _Job, executed: Path) -> None:
    """Put the executed notebook in place, with what it was made from and without this machine's folders."""
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    notebook["metadata"]["papermill"] |= {"input_path": job.source.name, "output_path": job.target.name}
    notebook["metadata"]["papermill"]["parameters"] = provenance.public_parameters(job.changed)
    record = job.results / "run.json"
    run = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    notebook["metadata"]["llmrec"] = {
        "stamp": job.stamp,
        "parameters": provenance.public_parameters(job.parameters),
        "results": job.result_hashes(),
        "run": {name: run[name] for name in ("machine", "versions", "peak_memory_mb") if name in run},
    }
    for cell in [cell for cell in notebook["cells"] if "outputs" in cell]:
        cell["outputs"] = _without_folders(cell["outputs"], job.folder)
    with atomic_write(job.target) as temporary:
        temporary.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_folders(content: Any, folder: Path) -> Any:
    """Outputs quote file names (in warnings, say); an executed notebook is published, so the folders in them go."""
    if isinstance(content, list):
        return [_without_folders(part, folder) for part in content]
    if isinstance(content, dict):
        return {name: part if "image/" in name else _without_folders(part, folder) for name, part in content.items()}
    if not isinstance(content, str):
        return content
    places = {str(Path.home()): "~", sys.prefix: "<python>", sys.base_prefix: "<python>"}
    places |= {str(provenance.PACKAGE.parent): ".", str(folder): "."}
    pattern = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True) if len(place) > 4)
    content = re.sub(r"\S*ipykernel_\d+[/\\]\d+\.py", "<cell>", content)
    return re.sub(pattern, lambda found: places[found[0]], content)


def _execute_on_dask(jobs: Sequence[_Job], scheduler: str | None) -> Iterator[ChapterOutcome]:
    """Each chapter is one task, one per worker at a time; outcomes come in the order in which the chapters finish."""
    from distributed import Client, as_completed

    # One worker: kernels that start at the same time race for ports and share the cores.
    local = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with Client(scheduler) if scheduler else Client(**local) as client:
        waiting, url, futures = list(jobs), client.scheduler.address, {}
        running = as_completed()

        def submit() -> None:
            job = waiting.pop(0)
            future = client.submit(_execute_on_worker, job, url, pure=False, retries=0)
            futures[future] = job
            running.add(future)

        for _ in range(min(len(waiting), max(1, len(client.scheduler_info(n_workers=-1)["workers"])))):
            submit()
        for future in running:
            job, error = futures[future], future.exception()
            lost = f"{job.chapter} was lost with its worker: {error}"
            yield ChapterOutcome(job.chapter, "failed", 0.0, job.target, lost) if error else future.result()
            if waiting:
                submit()


def _execute_on_worker(job: _Job, scheduler: str) -> ChapterOutcome:
    """A chapter waits for its kernel outside of the worker's threads: they are free for the kernel's own shards."""
    from distributed import secede

    os.environ["LLMREC_SCHEDULER"] = scheduler
    secede()
    return _execute(job)
