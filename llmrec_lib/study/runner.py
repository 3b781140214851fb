"""Execute chapters with papermill: check everything first, skip what is up to date, keep nothing that is half done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec_lib.cache import atomic_write, content_key, file_sha256
from llmrec_lib.study import provenance
from llmrec_lib.study.parameters import (
    ParameterError,
    Value,
    check_parameters,
    declared_parameters,
    profile_values,
    unknown_parameter,
)

HEARTBEAT_SECONDS = 60


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

    source: Path
    target: Path
    parameters: dict[str, Value]
    changed: dict[str, Value]
    stamp: dict[str, str | None]
    threads: dict[str, str]
    folder: Path
    cell_timeout: int

    @property
    def chapter(self) -> str:
        return self.source.stem

    def record(self) -> dict[str, Any]:
        """What the chapter noted of its own run: machine, versions, memory."""
        where = (self.parameters.get("results_dir"), self.parameters.get("dataset"), self.chapter, "run.json")
        path = self.folder.joinpath(*where) if where[0] and where[1] else None
        record = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
        return {name: record[name] for name in ("machine", "versions", "peak_memory_mb") if name in record}

    def results(self) -> dict[str, str]:
        """File name -> hash of what the chapter has written to its results folder."""
        where = (self.parameters.get("results_dir"), self.parameters.get("dataset"), self.chapter)
        if not where[0] or not where[1]:
            return {}
        files = self.folder.joinpath(*where).glob("*.*")
        return {file.name: file_sha256(file) for file in sorted(files) if file.is_file() and file.name[0] != "."}


def run(
    chapters: Sequence[str] = (),
    profile: str = "quick",
    parameters: Mapping[str, Any] | None = None,
    engine: str = "local",
    scheduler: str | None = None,
    results_dir: str | Path | None = None,
    notebooks_dir: str | Path = "notebooks",
    executed_dir: str | Path = "_build/executed",
    force: bool = False,
    cell_timeout: int = 7200,
    report: Callable[[str], None] = print,
) -> list[ChapterOutcome]:
    """Execute chapters in the current folder, one kernel at a time; what is up to date is skipped.

    Parameters
    ----------
    chapters : names such as "06", "6", "fusion" or "06_fusion"; none means all.
    profile : an entry of ``profiles.yaml`` in the notebooks' folder.
    parameters : given by name; a name goes to each chapter that declares it, at least one has to.
    engine, scheduler : "local", or "dask" with the address of a running scheduler (none: a cluster of one worker is
        started). A scheduler's workers must see the same folders and have the same environment.
    results_dir : shorthand for the parameter of this name.
    executed_dir : where ``NN_name.ipynb`` goes when complete, and ``NN_name.failed.ipynb`` when not.
    force : execute also what is up to date. Units that were kept are read back all the same.
    cell_timeout : seconds that one cell may take.
    report : receives one line of progress at a time.

    Raises
    ------
    ParameterError, DataError
        Before anything is executed: an unknown chapter, profile or parameter, a wrong type or value, unusable data.
    """
    if engine not in ("local", "dask"):
        raise ParameterError(f"engine {engine!r} is not one of local, dask")
    if scheduler and engine != "dask":
        raise ParameterError(f"a scheduler ({scheduler}) needs the engine dask")
    given = dict(parameters or {}) | ({"results_dir": str(results_dir)} if results_dir is not None else {})
    jobs = _plan(chapters, profile, given, Path(notebooks_dir), Path(executed_dir), cell_timeout)
    outcomes: dict[str, ChapterOutcome] = {}
    waiting = []
    for job in jobs:
        reason = "asked for" if force else _out_of_date(job)
        if reason:
            report(f"{job.chapter}: to be executed ({reason})")
            waiting.append(job)
        else:
            outcomes[job.chapter] = ChapterOutcome(job.chapter, "up to date", 0.0, job.target)
            report(f"{job.chapter}: up to date")
    finished = (
        map(lambda job: _execute(job, report), waiting) if engine == "local" else _execute_on_dask(waiting, scheduler)
    )
    for outcome in finished:
        outcomes[outcome.chapter] = outcome
        report(
            f"{outcome.chapter}: {outcome.status} after {_clock(outcome.seconds)}"
            + (f"\n{outcome.error}" if outcome.error else "")
        )
    return [outcomes[job.chapter] for job in jobs]


def find_chapters(names: Sequence[str], notebooks_dir: Path) -> list[Path]:
    """Notebooks of the named chapters (all, if none is named) in the order of their numbers.

    Raises
    ------
    ParameterError
        A name that fits no notebook, with the list of those that there are; or a folder without chapters.
    """
    there = sorted(path for path in notebooks_dir.glob("*.ipynb") if re.match(r"\d\d_", path.name))
    if not there:
        raise ParameterError(f"{notebooks_dir} holds no chapters (NN_name.ipynb): start in the project's folder")
    asked = set()
    for name in names:
        found = [
            path
            for path in there
            if name in (path.stem, path.stem[3:], path.stem[:2], path.stem[:2].lstrip("0")) and name
        ]
        if not found:
            raise ParameterError(f"there is no chapter {name!r}; there are {', '.join(path.stem for path in there)}")
        asked.update(found)
    return [path for path in there if path in asked or not names]


def _plan(
    names: Sequence[str],
    profile: str,
    given: dict[str, Any],
    notebooks_dir: Path,
    executed_dir: Path,
    cell_timeout: int,
) -> list[_Job]:
    chapters = find_chapters(names, notebooks_dir)
    known = {path.stem: declared_parameters(path) for path in find_chapters((), notebooks_dir)}
    scaled = profile_values(notebooks_dir / "profiles.yaml", profile, known)
    declared = {name: value for path in chapters for name, value in known[path.stem].items()}
    for name in given:
        if name not in declared:
            raise unknown_parameter(name, declared, ", ".join(path.stem for path in chapters))
    effective = {}
    for path in chapters:
        own = {name: value for name, value in given.items() if name in known[path.stem]}
        effective[path] = check_parameters(path, scaled[path.stem] | own)
    lock = notebooks_dir.absolute().parent / "requirements.lock"
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    environment = {
        name: os.environ.get(name) or threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    fingerprints: dict[tuple, str] = {}
    return [
        _Job(
            source=path.absolute(),
            target=executed_dir.absolute() / path.name,
            parameters=values,
            changed={name: value for name, value in values.items() if value != known[path.stem][name]},
            stamp={
                "notebook": _source_hash(path),
                "parameters": content_key(values),
                "library": provenance.library_hash(),
                "lock": file_sha256(lock) if lock.exists() else None,
                "data": _data_fingerprint(values, fingerprints),
                "versions": content_key(provenance.versions()),
            },
            threads=environment,
            folder=Path.cwd(),
            cell_timeout=cell_timeout,
        )
        for path, values in effective.items()
    ]


def _source_hash(notebook: Path) -> str:
    """Hash of what a notebook says, without outputs and execution counts."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return content_key(
        [(cell["cell_type"], "".join(cell["source"]), cell.get("metadata", {}).get("tags", [])) for cell in cells]
    )


def _data_fingerprint(parameters: dict[str, Value], known: dict[tuple, str]) -> str | None:
    if "dataset" not in parameters:
        return None
    from llmrec_lib.datasets import load_dataset

    place = (parameters["dataset"], parameters.get("data_dir", ""))
    if place not in known:
        known[place] = load_dataset(*place).fingerprint
    return known[place]


def _out_of_date(job: _Job) -> str:
    """Why a chapter has to be executed, or "" if its executed notebook and its results stand for the same sources."""
    try:
        record = json.loads(job.target.read_text(encoding="utf-8"))["metadata"]["llmrec"]
        if changed := [part for part, value in job.stamp.items() if record["stamp"].get(part) != value]:
            return f"{', '.join(changed)} changed"
        return "" if record["results"] == job.results() else "its results were changed or removed"
    except (OSError, ValueError, KeyError):
        return "not executed yet"


class _ChapterFailed(Exception):
    """Leaves the block that would put a complete notebook in place."""


def _execute(job: _Job, report: Callable[[str], None] = print) -> ChapterOutcome:
    """Execute one chapter; whatever goes wrong in it is in the outcome, so that the other chapters still run."""
    started = time.monotonic()
    failed = job.target.with_name(f"{job.chapter}.failed.ipynb")
    try:
        with _heartbeat(job.chapter, report), atomic_write(job.target) as temporary:
            try:
                _papermill(job, temporary)
            except Exception as error:
                message = _describe_failure(job.chapter, error, temporary)
                if temporary.stat().st_size:
                    with atomic_write(failed) as kept:
                        kept.write_bytes(temporary.read_bytes())
                    message += f"\nwhat was reached is in {failed}"
                raise _ChapterFailed(message) from error
            _stamp(job, temporary)
    except _ChapterFailed as failure:
        return ChapterOutcome(job.chapter, "failed", time.monotonic() - started, failed, str(failure))
    failed.unlink(missing_ok=True)
    return ChapterOutcome(job.chapter, "done", time.monotonic() - started, job.target)


def _papermill(job: _Job, output: Path) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError

    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                str(job.source),
                str(output),
                parameters=job.changed,
                kernel_name="python3",
                language="python",
                kernel_manager_class=_this_python(job.threads),
                resources={
                    "metadata": {"path": str(job.folder)}
                },  # the kernel's folder; this process stays where it is
                execution_timeout=job.cell_timeout,
                progress_bar={"desc": job.chapter},
                log_output=False,
            )
            return
        except RuntimeError as error:
            # A kernel that dies before it answers has usually lost the race for a port; one that dies later has not.
            if attempt == 2 or isinstance(error, DeadKernelError) or _cells_started(output):
                raise


def _this_python(environment: dict[str, str]) -> type:
    """Kernel manager whose "python3" is the interpreter that runs this, whatever kernels are installed."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisPython(AsyncKernelManager):
        # The log level spares the reader a warning per chapter that a local kernel's traffic is not encrypted.
        kernel_spec = KernelSpec(**get_kernel_dict(["--log-level=40"]) | {"env": environment})

    return ThisPython


def _cells_started(notebook: Path) -> list[int]:
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (ValueError, OSError):
        return []
    return [index for index, cell in enumerate(cells) if cell["metadata"].get("papermill", {}).get("start_time")]


def _describe_failure(chapter: str, error: Exception, notebook: Path) -> str:
    """Chapter, cell (counted from 1 in the source notebook) and exception."""
    what = f"{type(error).__name__}: {error}"
    if hasattr(error, "ename"):
        what = f"{error.ename}: {error.evalue}"
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except ValueError:  # not a single cell was reached
        return f"{chapter} failed before its first cell with {what}"
    cells = [cell["metadata"] for cell in cells if "papermill-error-cell-tag" not in cell["metadata"].get("tags", [])]
    reached = [index for index, cell in enumerate(cells) if cell.get("papermill", {}).get("start_time")]
    if not reached:
        return f"{chapter} failed before its first cell with {what}"
    number = sum("injected-parameters" not in cell.get("tags", []) for cell in cells[: reached[-1] + 1])
    return f"{chapter} failed in cell {number} with {what}"


def _stamp(job: _Job, executed: Path) -> None:
    """Write into the executed notebook what it was made from, and take this machine's folders out of it."""
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    papermill = notebook["metadata"]["papermill"]
    papermill |= {"input_path": job.source.name, "output_path": job.target.name}
    if "parameters" in papermill:
        papermill["parameters"] = provenance.public_parameters(papermill["parameters"])
    notebook["metadata"]["llmrec"] = {
        "stamp": job.stamp,
        "parameters": provenance.public_parameters(job.parameters),
        "results": job.results(),
        "run": job.record(),
    }
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = _without_folders(output["text"], job.folder)
            for kind in output.get("data", {}):
                if kind.startswith("text/"):
                    output["data"][kind] = _without_folders(output["data"][kind], job.folder)
    executed.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_folders(text: str | list[str], folder: Path) -> str | list[str]:
    """Warnings quote file names; an executed notebook is published, so the folders in them go."""
    if isinstance(text, list):
        return [_without_folders(line, folder) for line in text]
    text = re.sub(r"\S*ipykernel_\d+[/\\]\d+\.py", "<cell>", text)
    places = {str(provenance.PACKAGE.parent): "", str(folder): "", sys.prefix: "<python>", sys.base_prefix: "<python>"}
    places[str(Path.home())] = "~"
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 4:
            text = re.sub(
                re.escape(place) + r"(?=[/\\])[/\\]" if not places[place] else re.escape(place), places[place], text
            )
    return text


@contextlib.contextmanager
def _heartbeat(chapter: str, report: Callable[[str], None]) -> Iterator[None]:
    """A line a minute: a cell may train for long, and papermill's bar moves only between cells."""
    stop, started = threading.Event(), time.monotonic()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            report(f"{chapter}: still running, {_clock(time.monotonic() - started)}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _execute_on_dask(jobs: Sequence[_Job], scheduler: str | None) -> Iterator[ChapterOutcome]:
    """Each chapter is one task; outcomes come back in the order in which the chapters finish."""
    if not jobs:
        return
    try:
        from distributed import Client, LocalCluster, as_completed
    except ImportError:
        raise ParameterError(
            "the engine dask needs the package distributed: install it, or use the engine local"
        ) from None
    with contextlib.ExitStack() as stack:
        cluster = scheduler
        if not scheduler:  # one worker: kernels that start at the same time race for ports and share the cores
            cluster = stack.enter_context(
                LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None)
            )
        client = stack.enter_context(Client(cluster))
        futures = {client.submit(_execute, job, pure=False, retries=0): job for job in jobs}
        for future in as_completed(futures):
            if future.status == "finished":
                yield future.result()
            else:
                job = futures[future]
                message = f"{job.chapter} was lost with its worker: {future.exception()}"
                yield ChapterOutcome(job.chapter, "failed", 0.0, job.target, message)
