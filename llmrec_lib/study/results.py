"""What a notebook needs of the study: parameters checked once more, each unit kept at once, tidy tables at the end."""

import functools
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import CodeType
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet

from llmrec_lib.cache import atomic_write, content_key
from llmrec_lib.datasets import Dataset, load_dataset
from llmrec_lib.evaluation import Evaluation
from llmrec_lib.recommender import Recommender
from llmrec_lib.study import provenance
from llmrec_lib.study.parameters import check_values, literals

FAMILIES = ("id", "llm", "prs", "fusion", "control")
METRICS_ORDER = ["protocol", "method", "family", "seed", "metric", "k"]
# How often and where, not what: a unit is of one seed, and its data are known by their content.
NOT_IN_A_UNIT = ("seeds", "results_dir", "data_dir")
COMMON = {"dataset": "ml-100k", "data_dir": "", "protocol": "temporal_ratio", "seeds": 1, "max_users": 0}
COMMON |= {"encoder": "minilm", "llm": "smollm2-135m", "results_dir": "results"}


class Study:
    """One chapter's run: hand it all parameters in the first code cell, each result as a `unit`, and `finish`.

    Parameters
    ----------
    chapter : such as "06_fusion"
    **parameters : all of the chapter's, by name. Those left out of the common eight have their usual default. A wrong
        type or value, or (in a notebook started by papermill alone) an undeclared name is a ParameterError.
    """

    def __init__(self, chapter: str, **parameters: Any):
        _check_injected(chapter, _session_cells())
        # A common parameter is of its default's type, any other of its own.
        self.parameters = check_values(COMMON | parameters | COMMON, parameters, chapter, text=False)
        self.chapter = chapter
        self.protocol: str = self.parameters["protocol"]
        self.folder = Path(self.parameters["results_dir"]) / self.parameters["dataset"] / chapter
        self.units: dict[tuple[str, str, int], Evaluation] = {}
        self._keys: dict[tuple[str, str, int], str] = {}
        self._notes: dict[str, Any] = {}
        self._computed, self._started = 0, datetime.now(UTC)
        self._public = provenance.public_parameters(self.parameters)
        print(f"{chapter}: " + ", ".join(f"{name}={value!r}" for name, value in self._public.items() if value != ""))

    @functools.cached_property
    def data(self) -> Dataset:
        """The chapter's data set, loaded once."""
        return load_dataset(self.parameters["dataset"], self.parameters["data_dir"])

    @functools.cached_property
    def models(self) -> dict[str, dict[str, str | None]]:
        """Name and hash of the models that the parameters encoder and llm stand for."""
        hashes = {role: provenance.model_hash(self.parameters[role]) for role in ("encoder", "llm")}
        return {role: {"name": self._public[role], "sha256": sha256} for role, sha256 in hashes.items()}

    def unit(
        self, method: str, *, family: str, seed: int, compute: Callable[[], Evaluation], key: Any = (),
        protocol: str | None = None,
    ) -> Evaluation:  # fmt: skip
        """Result of one method × protocol × seed: read back if computed from the same things before, else computed.

        "The same things": the arguments, the study's parameters (without seeds, results_dir, data_dir), the content of
        data and models, the source of what the notebook imports of the library and of what that imports, package versions,
        the source text of `compute`, and of the names in it the plain values, arrays and tables, the notebook's own
        functions (and theirs), the fingerprints of splits and the descriptions of recommenders. Do not name in `compute` a
        list or dict that grows with each call.

        Parameters
        ----------
        method : unique within protocol and seed; used twice for different things, it is a ValueError.
        family : "id", "llm", "prs", "fusion" or "control"
        compute : without arguments; the Evaluation must be labelled as this unit, or ValueError.
        key : plain values, arrays, tensors: whatever else decides the result, such as a recommender's fitted tensor.
        protocol : the study's own, if not given.
        """
        protocol = protocol or self.protocol
        if family not in FAMILIES:
            raise ValueError(f"unit {method!r}: family {family!r} is not one of {', '.join(FAMILIES)}")
        unit_key = content_key(
            (protocol, method, family, seed, key),
            {name: value for name, value in self.parameters.items() if name not in (*NOT_IN_A_UNIT, "protocol")},
            self.data.fingerprint,
            self.models,
            provenance.library_hash(results_only=True, used_by="\n".join(_session_cells())),
            provenance.versions(),
            _what_it_uses(compute),
        )
        if self._keys.setdefault((protocol, method, seed), unit_key) != unit_key:
            known = f"unit {method!r} ({protocol}, seed {seed}) was already given with other settings or another key"
            raise ValueError(f"{known}: give the variant a name of its own, or make a new Study after editing a cell")
        name = re.sub(r"[^\w.+-]+", "-", f"{protocol}.{method}.{seed}")[:100]
        path = self.folder / "units" / f"{name}.{unit_key[:16]}.parquet"
        evaluation = _read_unit(path)
        if evaluation is None:
            evaluation = compute()
            given = (self.parameters["dataset"], protocol, method, family, seed)
            labelled = tuple(getattr(evaluation, n) for n in ("dataset", "protocol", "method", "family", "seed"))
            if given != labelled:
                raise ValueError(f"unit {given} got an Evaluation labelled {labelled}: label it as the unit")
            table = evaluation.per_user.copy()
            table.attrs = {name: value for name, value in vars(evaluation).items() if name != "per_user"}
            with atomic_write(path) as temporary:  # parquet keeps the attrs too: one file, there whole or not at all
                table.to_parquet(temporary)
            self._computed += 1
        if evaluation.phase == "test":  # a validation unit is kept for resuming, but no result
            self.units[protocol, method, seed] = evaluation
        return evaluation

    def note(self, key: str, value: Any) -> None:
        """Add a fact (anything JSON can hold) to ``run.json`` under ``notes``."""
        json.dumps(value)
        self._notes[key] = value

    def table(self, frame: pd.DataFrame, name: str) -> pd.DataFrame:
        """Keep a further tidy table beside the metrics, as ``name.csv``; the index is not written."""
        if Path(name).name != name or Path(name).suffix != ".csv" or name == "metrics.csv":
            raise ValueError(f"table name {name!r} must be a file name that ends in .csv, and not metrics.csv")
        self._write_csv(frame, name)
        return frame

    def _write_csv(self, frame: pd.DataFrame, name: str) -> None:
        with atomic_write(self.folder / name) as temporary:
            frame.to_csv(temporary, index=False, lineterminator="\n")

    def finish(self) -> pd.DataFrame:
        """Write ``metrics.csv``, ``per_user.parquet`` and ``run.json`` of all test units of this run (none: ValueError).

        Returns the metrics: dataset, protocol, method, family, seed, metric, k, value, n_users, seconds; sorted.
        """
        if not self.units:
            raise ValueError(f"{self.chapter} has no test unit: nothing to write; call study.unit(...) before finish()")
        rows = pd.concat([self.units[label].tidy() for label in sorted(self.units)])
        metrics = rows.sort_values(METRICS_ORDER, kind="stable", ignore_index=True)
        self._write_csv(metrics, "metrics.csv")
        with atomic_write(self.folder / "per_user.parquet") as temporary:
            writer = None
            small = {"compression": "zstd", "compression_level": 19, "use_dictionary": ["method", "metric"]}
            small["column_encoding"] = dict.fromkeys(("seed", "user", "k"), "DELTA_BINARY_PACKED")
            # One method at a time: all users × metrics × methods need not fit in memory, and seeds side by side pack well.
            for (protocol, _), labels in itertools.groupby(sorted(self.units), key=lambda label: label[:2]):
                rows = pd.concat([self.units[label].per_user_tidy() for label in labels]).assign(protocol=protocol)
                rows = rows.sort_values(["metric", "k", "user", "seed"], kind="stable")
                rows = pyarrow.Table.from_pandas(rows, preserve_index=False)
                writer = writer or pyarrow.parquet.ParquetWriter(temporary, rows.schema, **small)
                writer.write_table(rows.cast(writer.schema))
            writer.close()
        made_with = {"models": self.models, "versions": provenance.versions(), "library": provenance.library_hash()}
        record = {
            "chapter": self.chapter,
            "parameters": self._public,
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint, "notes": list(self.data.notes)},
            **made_with,
            "machine": provenance.machine(),
            "started": self._started.isoformat(timespec="seconds"),
            "wall_seconds": round((datetime.now(UTC) - self._started).total_seconds(), 1),
            "units": {"computed": self._computed, "read_back": len(self._keys) - self._computed},
            "peak_memory_mb": provenance.peak_memory_mb(),
            "notes": self._notes,
        }
        with atomic_write(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return metrics


def _read_unit(path: Path) -> Evaluation | None:
    """The unit stored at `path`; None if there is none, or one damaged from outside, which is then computed again."""
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors
        return None
    labels, table.attrs = table.attrs, {}
    return Evaluation(per_user=table, **labels)


def _what_it_uses(function: Callable, above: tuple = ()) -> list:
    """Content of a function that decides its result and can be read: its source, and what the names in it stand for."""
    names, known = _names(function.__code__), {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    used = [(name, _content(known[name], (*above, function))) for name in sorted(names & known.keys())]
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]  # lambda w=w: …
    return [inspect.getsource(function), used, _content(given, (*above, function))]


def _names(code: CodeType) -> set[str]:
    """The names in a function that stand for something outside of it, also those inside lambdas, loops and generators."""
    return {*code.co_names, *code.co_freevars}.union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


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
    if isinstance(value, Recommender):
        value = value.describe()
    try:
        return None if callable(value) or inspect.ismodule(value) else content_key(value)
    except (TypeError, OSError):
        return None


def _session_cells() -> list[str]:
    """Source of the cells that this kernel has executed; empty outside of IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return list(shell.user_ns.get("In", [])) if shell else []


def _check_injected(chapter: str, cells: list[str]) -> None:
    """Check the cell that papermill put after the parameters cell: it only warns of unknown names and checks no type."""
    for before, source in zip(cells, cells[1:], strict=False):
        if source.startswith("# Parameters\n"):
            declared = literals(before, f"{chapter}, parameters cell")
            check_values(declared, literals(source, f"{chapter}, injected parameters"), chapter, text=False)
