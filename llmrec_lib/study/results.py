"""What a notebook needs of the study: parameters checked once more, each unit kept at once, tidy tables at the end."""

from __future__ import annotations

import functools
import inspect
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from llmrec_lib.cache import atomic_write, content_key
from llmrec_lib.study import provenance
from llmrec_lib.study.parameters import ParameterError, check_values, convert, literals, unknown_parameter

if TYPE_CHECKING:
    from llmrec_lib.datasets import Dataset
    from llmrec_lib.evaluation import Evaluation

FAMILIES = ("id", "llm", "prs", "fusion", "control")
METRICS_ORDER = ["protocol", "method", "family", "seed", "metric", "k"]
# How often and where, not what: a unit is of one seed, and its data are known by their content.
NOT_IN_A_UNIT = ("seeds", "results_dir", "data_dir")
COMMON = {
    "dataset": "ml-100k",
    "data_dir": "",
    "protocol": "temporal_ratio",
    "seeds": 1,
    "max_users": 0,
    "encoder": "minilm",
    "llm": "smollm2-135m",
    "results_dir": "results",
}


class Study:
    """One chapter's run: hand it all parameters in the first code cell, each result as a `unit`, and `finish`.

    Parameters
    ----------
    chapter : str
        Such as "06_fusion".
    **parameters
        All of the chapter's parameters by name. Those left out of the common eight have their usual default.

    Raises
    ------
    ParameterError
        A wrong type or value, or (in a notebook started by papermill alone) a name that is not declared.
    """

    def __init__(self, chapter: str, **parameters: Any):
        if not re.fullmatch(r"[\w-]+", chapter):
            raise ParameterError(f"chapter {chapter!r} must be a notebook's name without folder and ending")
        _check_injected(chapter, _session_cells())
        self.parameters = COMMON | {
            name: convert(name, value, COMMON.get(name, value), f"{chapter}: ", text=False)
            for name, value in parameters.items()
        }
        check_values(self.parameters, f"{chapter}: ")
        self.chapter = chapter
        self.protocol: str = self.parameters["protocol"]
        self.folder = Path(self.parameters["results_dir"]) / self.parameters["dataset"] / chapter
        self.units: dict[tuple[str, str, int], Evaluation] = {}
        self._keys: dict[tuple[str, str, str, int], str] = {}
        self._notes: dict[str, Any] = {}
        self._computed = 0
        self._started = datetime.now(UTC)
        self._clock = time.perf_counter()
        public = provenance.public_parameters(self.parameters)
        print(f"{chapter}: " + ", ".join(f"{name}={value!r}" for name, value in public.items() if value != ""))

    @functools.cached_property
    def data(self) -> Dataset:
        """The chapter's data set, loaded once."""
        from llmrec_lib.datasets import load_dataset

        return load_dataset(self.parameters["dataset"], self.parameters["data_dir"])

    @functools.cached_property
    def models(self) -> dict[str, dict[str, str | None]]:
        """Name and hash of the models that the parameters encoder and llm stand for."""
        public = provenance.public_parameters(self.parameters)
        return {
            role: {"name": public[role], "sha256": _model_hash(self.parameters[role])} for role in ("encoder", "llm")
        }

    def unit(
        self,
        method: str,
        *,
        family: str,
        seed: int,
        compute: Callable[[], Evaluation],
        key: Any = (),
        protocol: str | None = None,
    ) -> Evaluation:
        """Result of one method × protocol × seed: read back if computed from the same things before, else computed.

        "The same things": method, family, seed, protocol, the study's parameters (without seeds, results_dir,
        data_dir), the content of data and models, the library's source, package versions, the source text of `compute`,
        and of the names in it the plain values, arrays and tables, the notebook's own functions (and theirs), the
        fingerprints of splits and the descriptions of recommenders. Whatever else decides the result, such as a fitted
        tensor inside a recommender, goes into `key`. A list or dict that grows with each call gives another key each
        time: do not name one in `compute`.

        Parameters
        ----------
        method : str
            Unique within protocol and seed: variants need names of their own.
        family : "id", "llm", "prs", "fusion" or "control"
        compute : callable without arguments that returns an Evaluation
        key : plain values, arrays or tensors
        protocol : the study's own, if not given

        Raises
        ------
        ValueError
            An unknown family, a name used twice for different things, or an Evaluation labelled as another unit.
        """
        protocol = protocol or self.protocol
        if family not in FAMILIES:
            raise ValueError(f"unit {method!r}: family {family!r} is not one of {', '.join(FAMILIES)}")
        matter = {n: v for n, v in self.parameters.items() if n not in NOT_IN_A_UNIT} | {"protocol": protocol}
        unit_key = content_key(
            method,
            family,
            seed,
            matter,
            self.data.fingerprint,
            self.models,
            provenance.library_hash(results_only=True),
            provenance.versions(),
            _what_it_uses(compute),
            key,
        )
        if self._keys.setdefault((protocol, method, seed), unit_key) != unit_key:
            raise ValueError(
                f"unit {method!r} ({protocol}, seed {seed}) was already given with other settings or another key: "
                "give the variant a method name of its own, or make a new Study after editing a cell"
            )
        name = re.sub(r"[^\w.+-]+", "-", f"{protocol}.{method}.{seed}")[:100]
        path = self.folder / "units" / f"{name}.{unit_key[:16]}.parquet"
        evaluation = _read_unit(path)
        if evaluation is None:
            evaluation = compute()
            given = (self.parameters["dataset"], protocol, method, family, seed)
            labelled = tuple(getattr(evaluation, n) for n in ("dataset", "protocol", "method", "family", "seed"))
            if given != labelled:
                raise ValueError(
                    f"unit {given} got an Evaluation labelled {labelled}: its rows would stand under a wrong name"
                )
            _write_unit(path, evaluation)
            self._computed += 1
        if evaluation.phase == "test":  # a validation unit is kept for resuming, but no result
            self.units[protocol, method, seed] = evaluation
        return evaluation

    def note(self, key: str, value: Any) -> None:
        """Add a fact (anything JSON can hold) to ``run.json`` under ``notes``."""
        json.dumps(value)
        self._notes[key] = value

    def table(self, frame: pd.DataFrame, name: str) -> pd.DataFrame:
        """Keep a further tidy table beside the metrics, as ``name`` (.csv or .parquet); the index is not written."""
        if Path(name).name != name or Path(name).suffix not in (".csv", ".parquet"):
            raise ValueError(f"table name {name!r} must be a file name that ends in .csv or .parquet")
        if name in ("metrics.csv", "per_user.parquet"):
            raise ValueError(f"{name} is written by finish() from the units; choose another name")
        with atomic_write(self.folder / name) as temporary:
            if name.endswith(".csv"):
                frame.to_csv(temporary, index=False, lineterminator="\n")
            else:
                frame.to_parquet(temporary, index=False, compression="zstd")
        return frame

    def finish(self) -> pd.DataFrame:
        """Write ``metrics.csv``, ``per_user.parquet`` and ``run.json`` of all units of this run; return the metrics.

        Returns
        -------
        DataFrame
            dataset, protocol, method, family, seed, metric, k, value, n_users, seconds; sorted.

        Raises
        ------
        ValueError
            Not one test unit was computed or read back.
        """
        import pyarrow
        import pyarrow.parquet

        if not self.units:
            raise ValueError(f"{self.chapter} has no test unit: nothing to write; call study.unit(...) before finish()")
        ordered = [self.units[label] for label in sorted(self.units)]
        metrics = pd.concat([unit.tidy() for unit in ordered], ignore_index=True)
        metrics = metrics.sort_values(METRICS_ORDER, kind="stable", ignore_index=True)
        with atomic_write(self.folder / "metrics.csv") as temporary:
            metrics.to_csv(temporary, index=False, lineterminator="\n")
        with atomic_write(self.folder / "per_user.parquet") as temporary:
            writer = None
            for unit in ordered:  # one unit at a time: all users × metrics × methods × seeds need not fit in memory
                rows = unit.per_user_tidy().sort_values(["metric", "k", "user"], kind="stable")
                rows = pyarrow.Table.from_pandas(rows.assign(protocol=unit.protocol), preserve_index=False)
                writer = writer or pyarrow.parquet.ParquetWriter(temporary, rows.schema, compression="zstd")
                writer.write_table(rows.cast(writer.schema))
            writer.close()
        record = {
            "chapter": self.chapter,
            "parameters": provenance.public_parameters(self.parameters),
            "protocols": sorted({unit.protocol for unit in ordered}),
            "data": {
                "name": self.parameters["dataset"],
                "fingerprint": self.data.fingerprint,
                "notes": list(self.data.notes),
            },
            "models": self.models,
            "versions": provenance.versions(),
            "library": provenance.library_hash(),
            "commit": provenance.git_commit(),
            "machine": provenance.machine(),
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": round(time.perf_counter() - self._clock, 1),
            "unit_seconds": round(sum(unit.seconds for unit in ordered), 1),
            "units": {"computed": self._computed, "read_back": len(self._keys) - self._computed},
            "peak_memory_mb": provenance.peak_memory_mb(),
            "notes": self._notes,
        }
        with atomic_write(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return metrics


def _write_unit(path: Path, evaluation: Evaluation) -> None:
    names = ("method", "family", "dataset", "protocol", "seed", "phase", "catalogue", "seconds")
    table = evaluation.per_user.copy()
    # pandas keeps attrs inside the parquet file: values and labels are one file, there whole or not at all
    table.attrs = {"evaluation": {name: getattr(evaluation, name) for name in names}}
    with atomic_write(path) as temporary:
        table.to_parquet(temporary)


def _read_unit(path: Path) -> Evaluation | None:
    """The unit stored at `path`; None if there is none, or one damaged from outside, which is then computed again."""
    from llmrec_lib.evaluation import Evaluation

    try:
        table = pd.read_parquet(path)
        fields = table.attrs.pop("evaluation")
    except (OSError, ValueError, KeyError):  # pyarrow's errors are ValueErrors
        return None
    return Evaluation(per_user=table, **fields)


def _what_it_uses(function: Callable, above: tuple = ()) -> list:
    """Content of a function that decides its result and can be read: its source, and what the names in it stand for."""
    used = inspect.getclosurevars(function)
    names = sorted({**used.globals, **used.nonlocals}.items())
    return [_source(function), [(name, _content(value, (*above, function))) for name, value in names]]


def _content(value: Any, above: tuple) -> Any:
    """What of a value goes into a unit's key; None where it cannot be read, as a model's: that belongs in `key`.

    `above` are the functions that use it; the notebook's own functions are followed, the library's have its hash.
    """
    if isinstance(value, list | tuple):
        return [_content(element, above) for element in value]
    if inspect.isfunction(value) and value.__module__ == above[0].__module__:
        return value.__name__ if value in above else _what_it_uses(value, above)
    if isinstance(fingerprint := getattr(value, "fingerprint", None), str):
        return fingerprint
    if isinstance(value, pd.DataFrame | pd.Series):
        return content_key(pd.util.hash_pandas_object(value).to_numpy())
    if type(value).__module__.startswith("llmrec_lib") and hasattr(value, "describe"):
        value = value.describe()
    try:
        return None if callable(value) or inspect.ismodule(value) else content_key(value)
    except (TypeError, OSError):
        return None


def _source(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # typed into a plain console
        return ""


def _session_cells() -> list[str]:
    """Source of the cells that this kernel has executed; empty outside of IPython."""
    try:
        from IPython import get_ipython
    except ImportError:
        return []
    shell = get_ipython()
    return list(shell.user_ns.get("In", [])) if shell else []


def _check_injected(chapter: str, cells: list[str]) -> None:
    """Check what papermill put in, for runs that did not come through `llmrec run`.

    papermill only warns of an unknown name and checks no type. Its cell starts with "# Parameters" and follows directly
    after the parameters cell, or stands first if the notebook has none.
    """
    for position, source in enumerate(cells):
        if source.startswith("# Parameters\n") and position:
            declared = literals(cells[position - 1], f"{chapter}, parameters cell")
            for name, value in literals(source, f"{chapter}, injected parameters").items():
                if name not in declared:
                    raise unknown_parameter(name, declared, chapter)
                convert(name, value, declared[name], f"{chapter}: ", text=False)
            return


def _model_hash(name: str) -> str | None:
    """SHA-256 of a catalog model's published weights, hash of a local folder; a hub name holds its revision itself."""
    from llmrec_lib.language_models import catalog

    if Path(name).is_dir():
        return catalog.model_hash(name)
    models = catalog.list_models()
    return dict(zip(models["name"], models["sha256"], strict=True)).get(name)
