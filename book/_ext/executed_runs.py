"""Sphinx extension: the pages around the chapters take figures, numbers and run data out of the executed notebooks.

In Markdown: ``{{ run.fusion.best_id_ndcg }}`` is what chapter 06_fusion glued under that name; the directives are
``run-figure``, ``run-settings``, ``run-status``, ``run-elsewhere``, ``cold-table`` and ``two-runs``. A name that no chapter glued
is a warning, so it stops the build.
``benchmark-table``, ``benchmark-users`` and ``benchmark-growth`` show what `make bench` measured, ``scale-table`` what
``python -m benchmarks.scale`` did, ``soak-table`` what `make soak` saw, ``gpu-table`` and ``gpu-whole`` what
``python -m benchmarks.gpu`` did, ``whole-model`` and ``whole-answer`` what ``python -m benchmarks.whole`` found.
"""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from llmrec_lib.evaluation.statistics import direction

EXECUTED, BENCHMARKS = "book/executed", "benchmarks/results.json"
PREFIX = "application/papermill.record/"  # myst_nb.glue(..., display=False) puts it before each MIME type
# The package carries the JavaScript: formulas then need no network. SVG output needs no fonts either.
MATHJAX_PACKAGE, MATHJAX_FILE = "sphinx-mathjax-offline", "tex-svg-full.js"
JUPYTERLAB = "http://localhost:8888/lab/tree/{}"
COLAB = "https://colab.research.google.com/github/{}/blob/{}/{}"
NOT_RECORDED = "not recorded"
PLACES = ("dataset", "data_dir", "results_dir")  # parameters that say where, and no scale


def notebooks(source: Path) -> dict[str, dict[str, Any]]:
    """Chapter name -> executed notebook, in order."""
    found = sorted((source / EXECUTED).glob("[0-9][0-9]_*.ipynb"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found if ".failed" not in path.name}


def glued(notebook: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> MIME type -> data of everything that a notebook glued."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return {
        output["metadata"]["scrapbook"]["name"]: {
            kind.removeprefix(PREFIX): "".join(data) if isinstance(data, list) else data
            for kind, data in output["data"].items()
        }
        for output in outputs
        if "scrapbook" in output.get("metadata", {})
    }


def value(data: dict[str, Any]) -> Any:
    """A glued number or text; Markdown as its source."""
    if "text/markdown" in data:
        return data["text/markdown"]
    try:
        return ast.literal_eval(data["text/plain"])  # glue keeps repr(value)
    except (ValueError, SyntaxError):
        return data["text/plain"]


def figure_png(notebook: dict[str, Any], name: str) -> bytes:
    """The image that a notebook glued under this name."""
    return base64.b64decode(glued(notebook)[name]["image/png"])


def settings(notebook: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a run: all of them after `llmrec run`, those that were changed after plain papermill."""
    metadata = notebook["metadata"]
    return metadata.get("llmrec", metadata.get("papermill", {})).get("parameters", {})


def sources_now(source: Path, chapter: str) -> dict[str, str]:
    """The hashes in a chapter's stamp of what somebody may edit: notebook, what it imports of the library, lock."""
    from llmrec_lib.cache import content_key, file_sha256
    from llmrec_lib.study.provenance import library_hash
    from llmrec_lib.study.runner import _cells

    cells = _cells(source / "notebooks" / f"{chapter}.ipynb")
    library = library_hash(used_by="\n".join(text for _, text, _ in cells))
    return {"notebook": content_key(cells), "library": library, "lock": file_sha256(source / "requirements.lock")}


def changed_since(source: Path, chapter: str, stamp: dict[str, Any]) -> str:
    """Which sources of an executed chapter are others now than its stamp says."""
    needed = source / "notebooks" / f"{chapter}.ipynb", source / "requirements.lock"
    if not stamp or not all(path.exists() for path in needed):
        return NOT_RECORDED
    return ", ".join(n for n, value in sources_now(source, chapter).items() if stamp.get(n) != value) or "nothing"


class _FromRuns(SphinxDirective):
    """What the directives share: they read notebooks, and write Markdown."""

    def chapters(self) -> dict[str, dict[str, Any]]:
        source = Path(self.env.srcdir)
        for path in (source / EXECUTED).glob("*.ipynb"):
            self.env.note_dependency(str(path))
        return notebooks(source)

    def chapter(self, name: str) -> dict[str, Any]:
        try:
            return self.chapters()[name]
        except KeyError:
            raise self.error(f"{EXECUTED} has no executed notebook {name!r}") from None

    def figure(self, name: str, image: bytes) -> list[nodes.Node]:
        """An image with the alt text and the caption that the directive was given."""
        path = Path(self.env.doctreedir).parent / "run_figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        uri = "/" + os.path.relpath(path, self.env.srcdir).replace(os.sep, "/")
        figure = nodes.figure("", nodes.image(uri=uri, alt=self.options.get("alt", "")))
        if self.content:
            paragraph = self.markdown("\n".join(self.content))[0]
            figure += nodes.caption("", "", *paragraph.children)
        self.add_name(figure)
        return [figure]

    def benchmarks(self, file: str = BENCHMARKS) -> Any:
        path = Path(self.env.srcdir) / file
        self.env.note_dependency(str(path))
        return json.loads(path.read_text(encoding="utf-8"))

    def markdown(self, text: str) -> list[nodes.Node]:
        box = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), self.get_source_info()[0]), self.content_offset, box)
        return box.children


class RunFigure(_FromRuns):
    """``run-figure`` CHAPTER NAME: a glued figure, with alt text and caption."""

    required_arguments = 2
    has_content = True
    option_spec = {"alt": directives.unchanged_required, "name": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        chapter, name = self.arguments
        try:
            image = figure_png(self.chapter(chapter), name)
        except KeyError:
            raise self.error(f"{chapter} glued no figure {name!r}") from None
        return self.figure(f"{chapter}-{name}", image)


class RunSettings(_FromRuns):
    """``run-settings`` CHAPTER: one line saying at which scale the numbers of a chapter were made."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        notebook = self.chapter(self.arguments[0])
        given = settings(notebook)
        users = given.get("max_users", 0)
        facts = {
            "data": given.get("dataset"),
            "protocol": given.get("protocol"),
            "seeds": given.get("seeds"),
            "users": f"a sample of {users}" if users else "all",
            "executed": _day(notebook["metadata"].get("papermill", {}).get("start_time")),
        }
        return self.markdown(
            "*Made from this run:* " + ", ".join(f"{name} {fact or NOT_RECORDED}" for name, fact in facts.items()) + "."
        )


class RunStatus(_FromRuns):
    """``run-status``: when each chapter ran, how long, on what machine, with which parameters, from which sources."""

    def run(self) -> list[nodes.Node]:
        chapters = self.chapters()
        rows, stamps, lists = [], [], []
        for name, notebook in chapters.items():
            papermill = notebook["metadata"].get("papermill", {})
            record = notebook["metadata"].get("llmrec", {})
            run = record.get("run", {})
            memory = run.get("peak_memory_mb")
            rows.append(
                [
                    f"{{doc}}`/{EXECUTED}/{name}`",
                    changed_since(Path(self.env.srcdir), name, record.get("stamp", {})),
                    _day(papermill.get("start_time")),
                    _clock(papermill.get("duration")),
                    f"{memory / 1000:.1f} GB" if memory else NOT_RECORDED,
                    _machine(run.get("machine")),
                ]
            )
            stamp = record.get("stamp", {})
            parts = ("notebook", "parameters", "library", "lock", "data", "versions")
            stamps.append([name] + [f"`{stamp[part][:12]}`" if stamp.get(part) else "–" for part in parts])
            versions = ", ".join(f"{package} {version}" for package, version in run.get("versions", {}).items())
            lists += [f"````{{dropdown}} {name}", f"Versions: {versions or NOT_RECORDED}", ""]
            lists += [_table(["parameter", "value"], [[f"`{k}`", f"`{v!r}`"] for k, v in settings(notebook).items()])]
            lists += ["````", ""]
        return self.markdown(
            "\n".join(
                [
                    _table(["chapter", "changed since", "executed (UTC)", "took", "peak memory", "machine"], rows),
                    "\n**Hashes** (first 12 digits of SHA-256)\n",
                    _table(["chapter", *parts], stamps),
                    "\n**Parameters and versions**\n",
                    *lists,
                ]
            )
            if chapters
            else "There is no executed chapter."
        )


class RunElsewhere(_FromRuns):
    """``run-elsewhere``: the runs on other data sets, from their tables' ``run.json``."""

    def run(self) -> list[nodes.Node]:
        chapters, rows, scales = self.chapters(), [], []
        for path in sorted(Path(self.env.srcdir).glob("results/*/*/run.json")):
            self.env.note_dependency(str(path))
            run, name = json.loads(path.read_text(encoding="utf-8")), path.parent.name
            usual = settings(chapters[name]) if name in chapters else {}
            if run["parameters"]["dataset"] == usual.get("dataset"):
                continue
            facts = [_day(run["started"]), _clock(run["wall_seconds"]), f"{run['peak_memory_mb'] / 1000:.1f} GB"]
            rows.append([path.parent.parent.name, name, *facts])
            own = {k: v for k, v in run["parameters"].items() if k not in PLACES and k in usual and v != usual[k]}
            scales += [
                f"````{{dropdown}} {path.parent.parent.name}, {name}",
                f"Machine: {_machine(run['machine'])}",
                "",
            ]
            scales += [_table(["parameter", "value"], [[f"`{k}`", f"`{v!r}`"] for k, v in own.items()]), "````", ""]
        table = _table(["data set", "chapter", "executed (UTC)", "took", "peak memory"], rows)
        return self.markdown("\n".join([table, *scales]) if rows else "None was run.")


class ColdTable(_FromRuns):
    """``cold-table``: unseen targets among unseen items on each data set that chapter 09 was run on, from its tables."""

    scope = "unseen targets among unseen items"
    ranked = {scope: "only new items ranked", "unseen targets": "all items ranked"}
    systems = ("chance", "ID + words", "ID + untrained encoder", "ID + text")

    def run(self) -> list[nodes.Node]:
        columns, sentences = [["", "users", "new items", "seeds", *self.systems]], []
        for folder in sorted(path.parent for path in Path(self.env.srcdir).glob("results/*/09_cold_start/run.json")):
            paths = [folder / f"{name}.csv" for name in ("scopes", "comparisons", "metrics", "facts")]
            for path in paths:
                self.env.note_dependency(str(path))
            values, comparisons, metrics, facts = map(pd.read_csv, paths)
            values, compared = (table[table["scope"] == self.scope] for table in (values, comparisons))
            if compared.empty:
                continue
            values, name = values.set_index("method"), folder.parent.name
            new = facts.set_index("fact")["value"]["unseen items"]
            means = [f"{values.loc[method].value:.4f}" if method in values.index else "–" for method in self.systems]
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))["parameters"]
            setting = f"{name}, {metrics['protocol'].iloc[0].replace('_', ' ')}"
            columns.append([setting, compared["n_users"].iloc[0], new, run["seeds"], *means])
            for scope, ranked in self.ranked.items():
                rows = comparisons[comparisons["scope"] == scope]
                rivals = rows["comparison"].str.removeprefix("over ")
                sides = {1: "is better than", -1: "is worse than", 0: "is not shown to differ from"}
                signs = rows.apply(direction, axis=1)
                found = [f"{word} {', '.join(rivals[signs == s])}" for s, word in sides.items() if (signs == s).any()]
                sentences.append(f"- {name}, {ranked}: ID + text {'; '.join(found)}.")
        header, *rows = zip(*columns, strict=True)
        return self.markdown("\n".join([_table(header, rows), *sentences]) if sentences else "None was run.")


class TwoRuns(_FromRuns):
    """``two-runs``: what ``make agree`` found between the run before and the published one."""

    def run(self) -> list[nodes.Node]:
        rows, places = [], ["````{dropdown} Where each differs most"]
        for chapter, one in self.benchmarks("benchmarks/two_runs.json")["chapters"].items():
            runs = [
                f"{(_day(one[run]['started']))[:10]}, {one[run]['cpu'] or NOT_RECORDED}" for run in ("first", "second")
            ]
            counts = [f"{one['rows'] - one['lacking']:,}", f"{one['lacking']:,}"]
            # What an older `make agree --out` wrote has neither of the two.
            mean, verdicts = one.get("mean_ndcg"), one.get("verdicts")
            rows.append([chapter.replace("/", " "), *_changes(one, mean, verdicts), *counts, *runs])
            for name, worst in (("a mean NDCG@10", mean), ("any metric", one)):
                if worst and worst["off"]:
                    values = " and ".join(f"{value:.4g}" for value in worst["values"])
                    places.append(f"- {chapter}, {name}: {worst['where']}: {values}")
            places += [f"- {chapter}, another verdict: {name}" for name in (verdicts or {}).get("changed", [])]
        header = ["chapter", "largest difference of a mean NDCG@10", "verdicts that changed"]
        header += ["largest difference of any metric", "values of both", "of one alone", "run before", "this run"]
        return self.markdown("\n".join([_table(header, rows), *places, "````"]))


def _changes(one: dict[str, Any], mean: dict[str, Any] | None, verdicts: dict[str, Any] | None) -> list[str]:
    """How much a mean NDCG@10 differs, how many verdicts, and how much any metric, with that metric's name."""
    nothing = "–" if "verdicts" in one else NOT_RECORDED
    ndcg = nothing if mean is None else f"{mean['off']:.5f}" if mean["off"] else "0"
    said = f"{len(verdicts['changed'])} of {verdicts['shared']}" if verdicts else nothing
    relative = abs(one["values"][0]) > 1  # as two_runs.py has it
    size = f"{100 * one['off']:.1f}\u00a0%" if relative else f"{one['off']:.5f}"
    return [ndcg, said, f"{one['where'].split(', ')[-2]}: {size}" if one["off"] else "0"]


class BenchmarkTable(_FromRuns):
    """``benchmark-table``: each claim of `make bench` beside its peer, with what differs, and the machines it was measured on.

    Below it, what explains a missed aim: the ratio that would be left if the matrix products alone took time, at their best rate.
    """

    # What `error` of a row is, by the beginning of its name; a row may name it itself, as `what`.
    differs = {
        "likelihood": "nats of a title's log probability",
        "encoding": "1 − cosine",
        "compressed": "of NDCG@10 lost",
        "full-ranking": "of a metric",
        "sasrec": "of the number of predicted events",
    }
    aims = {
        "likelihood over the vocabulary, bfloat16 with AMX": 250,
        "likelihood over the vocabulary": 60,
        "encoding, float32": 6,
        "encoding, bfloat16": 10,
        "full-ranking evaluation": 5,
        "sasrec epoch": 40,
    }

    def run(self) -> list[nodes.Node]:
        measured = [row for row in self.benchmarks() if "factor" not in row]
        rows = [
            [
                row["name"],
                f"**{row['ratio']:.1f} ×**",
                f"{aim} ×" if (aim := self._aim(row)) else "–",
                f"{ceiling:.1f} ×" if (ceiling := self._ceiling(row)) else "–",
                self._difference(row),
                *(f"{row[who]:,.0f}" if row[who] >= 1000 else f"{row[who]:.3g}" for who in ("ours", "peer")),
                row["unit"],
                f"{100 * row['roof_share']:.0f} %" if "roof_share" in row else "–",
            ]
            for row in measured
        ]
        header = ["what", "faster", "aim", "faster at the roof", "difference (of what)", "ours", "peer", "unit"]
        table = _table([*header, "of the GEMM roof"], rows)
        machines = "; ".join(sorted({_machine(row["machine"]) for row in measured}))
        missed = [line for row in measured if (line := self._missed(row))]
        slower = [row["name"] for row in measured if row["ratio"] < 1]
        missed += [f"- **Slower than the peer:** {', '.join(slower)}."] if slower else []
        return self.markdown("\n".join([table, *missed, "", f"*Measured on:* {machines}."]))

    @staticmethod
    def _named(table: dict[str, Any], row: dict[str, Any]) -> Any:
        return next((found for name, found in table.items() if row["name"].startswith(name)), None)

    def _aim(self, row: dict[str, Any]) -> int | None:
        return self._named(self.aims, row | {"name": row["name"] + " with AMX" * (_amx(row) == "yes")})

    def _difference(self, row: dict[str, Any]) -> str:
        what = row.get("what") or self._named(self.differs, row)
        size = "0" if not row["error"] else f"{row['error']:.{'1g' if row['error'] >= 0.001 else '0e'}}"
        return f"{size} ({what})" if what else size

    @staticmethod
    def _ceiling(row: dict[str, Any]) -> float | None:
        return row.get("ratio_at_floor") or (row["ratio"] / row["roof_share"] if "roof_share" in row else None)

    def _missed(self, row: dict[str, Any]) -> str | None:
        aim, ceiling = self._aim(row), self._ceiling(row)
        if not aim or row["ratio"] >= aim:
            return None
        why = "; why was not measured"
        if ceiling:
            within = "so the aim is out of reach here" if ceiling < aim else "so this program leaves a part unused"
            why = f": its matrix products alone, at the best rate of these cores, would give {ceiling:.1f}\u00a0×, {within}"
        return f"- **Missed:** {row['name']} was to be {aim}\u00a0× as fast, and is {row['ratio']:.1f}\u00a0×{why}."


class BenchmarkUsers(_FromRuns):
    """``benchmark-users``: minutes to score the catalogue for all users by likelihood, at the measured seconds per user."""

    def run(self) -> list[nodes.Node]:
        measured = {row["name"]: row for row in self.benchmarks()}
        # The benchmark of the evaluation names in its unit how many users the data set has.
        users = int(re.search(r"(\d+) users", measured["full-ranking evaluation"]["unit"])[1])
        rows = [
            [name, *(f"{users * row[who] / 60:,.0f}" for who in ("ours", "peer")), _machine(row["machine"]), _amx(row)]
            for name, row in measured.items()
            if row["unit"] == "seconds per user"
        ]
        header = ["what", "ours, minutes", "peer, minutes", "machine", "AMX"]
        return self.markdown(
            f"All {users} users of ml-100k, computed from the seconds per user above:\n\n{_table(header, rows)}"
        )


def _amx(row: dict[str, Any]) -> str:
    """Whether the processor multiplies bfloat16 tiles in hardware (Intel's AMX); processors of AMD do not."""
    known = row["machine"].get("amx", False if row["machine"].get("cpu", "").startswith("AMD") else None)
    return {True: "yes", False: "no", None: NOT_RECORDED}[known]


class BenchmarkGrowth(_FromRuns):
    """``benchmark-growth``: seconds and memory against the size of the task, with alt text and caption."""

    has_content = True
    option_spec = {"alt": directives.unchanged_required, "name": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        from matplotlib import style
        from matplotlib.figure import Figure

        from llmrec_lib.plotting import PALETTE, STYLE

        rows = [row for row in self.benchmarks() if "factor" in row]
        tasks = list(dict.fromkeys(row["name"].split(" ×")[0] for row in rows))
        with style.context(STYLE):
            figure = Figure(figsize=(6.4, 4.6))
            for axis, unit in zip(figure.subplots(1, 2), ("seconds", "MB"), strict=True):
                for task, colour, marker in zip(tasks, PALETTE, "osD^vX", strict=False):
                    own = [row for row in rows if row["name"].startswith(f"{task} ×") and row["unit"] == unit]
                    sizes, values = [row["factor"] for row in own], [row["ours"] for row in own]
                    axis.plot(sizes, values, marker=marker, color=colour, label=task.removeprefix("growth of "))
                    if unit == "seconds":
                        axis.plot(sizes, [values[0] * size for size in sizes], color=colour, linestyle=":", linewidth=1)
                axis.set(xscale="log", xlabel="size of the task, ×", ylabel=unit)
                axis.set(**({"yscale": "log"} if unit == "seconds" else {"ylim": (0, None)}))
                axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
                axis.minorticks_off()
            figure.legend(*axis.get_legend_handles_labels(), loc="outside upper left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=2 * figure.dpi)
        return self.figure("growth", buffer.getvalue())


class ScaleTable(_FromRuns):
    """``scale-table``: seconds and peak memory of each step at three sizes."""

    def run(self) -> list[nodes.Node]:
        found = self.benchmarks("benchmarks/scale.json")
        by_step: dict[str, list[dict[str, Any]]] = {}
        for row in found["rows"]:
            by_step.setdefault(row["step"], []).append(row)
        sizes = [f"{row['users']:,} × {row['items']:,}" for row in next(iter(by_step.values()))]
        rows = [
            [
                step,
                *(
                    f"{row['seconds']:.{0 if row['seconds'] > 10 else 1}f} s, {row['peak MB'] / 1000:.1f} GB"
                    for row in own
                ),
            ]
            for step, own in by_step.items()
        ]
        table = _table(["step", *sizes], rows)
        explained = "Peak memory is that of the whole process, libraries (about 0.4 GB), data and models included."
        threads = ", ".join(sorted({f"{row['threads']} thread(s)" for row in found["rows"]}))
        return self.markdown(f"{table}\n{explained}\n\n*Measured on:* {_machine(found['machine'])}, {threads}.")


class SoakTable(_FromRuns):
    """``soak-table``: what the last `make soak` did and found."""

    def run(self) -> list[nodes.Node]:
        found = dict(self.benchmarks("benchmarks/soak.json"))
        measured_on = _machine(found.pop("machine"))
        rows = [[name, value] for name, value in found.items()]
        return self.markdown(f"{_table(['what', 'how often'], rows)}\n*Measured on:* {measured_on}.")


class GpuTable(_FromRuns):
    """``gpu-table``: rates on a GPU and on two threads of the processor beside it."""

    def run(self) -> list[nodes.Node]:
        found = self.benchmarks("benchmarks/gpu.json")
        rows = [
            [
                f"{row['step']}, {row['variant']}",
                *(f"{1 / row[where]:,.{0 if row[where] < 0.01 else 2}f}" for where in ("gpu", "cpu")),
                row["unit"] + "/s",
                f"**{row['ratio']:.0f} ×**",
                f"{row['error']:.0e} ({row['what']})",
            ]
            for row in found["speed"]
        ]
        table = _table(["what", "GPU", "two threads", "unit", "faster", "difference"], rows)
        return self.markdown(f"{table}\n*Measured on:* {_machine(found['machine'])}.")


class GpuWhole(_FromRuns):
    """``gpu-whole``: what all layers of the model reached on a GPU, by seed, and the gain over each method's control."""

    def run(self) -> list[nodes.Node]:
        found = self.benchmarks("benchmarks/gpu.json")
        against = {row["method"]: row for row in found["whole"]["compared"]}
        gain = "{relative:+.1%} against {control}, p {p_holm:.4f}"
        rows = [
            [name, ", ".join(f"{one:.4f}" for one in values), gain.format(**against[name]) if name in against else "–"]
            for name, values in found["whole"]["ndcg@10"].items()
        ]
        table = _table(["histories, or body", "NDCG@10 of each seed", "gain"], rows)
        best = max(
            (row for row in against.values() if row["control"] == "unchanged copies"), key=lambda row: row["relative"]
        )
        spread = max(
            max(values) / min(values) - 1 for name, values in found["whole"]["ndcg@10"].items() if "body" in name
        )
        answer = (
            f"A second pass through the same histories changes NDCG@10 by {against['unchanged copies']['relative']:+.1%}; the best "
            f"of the changed copies on test, {best['method']}, by {best['relative']:+.1%} beyond that (p {best['p_holm']:.4f}). "
            f"One training each: the same body with another seed differs by up to {spread:.1%}."
        )
        return self.markdown(f"{table}\n*Measured on:* {_machine(found['machine'])}.\n\n{answer}")


class WholeModel(_FromRuns):
    """``whole-model``: the answer of ``python -m benchmarks.whole``, its gains as a figure, all systems, and the trainings."""

    has_content = True
    option_spec = {"alt": directives.unchanged_required, "name": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        from matplotlib import style
        from matplotlib.figure import Figure

        from llmrec_lib.plotting import STYLE, gain_plot

        found = self.benchmarks("benchmarks/whole.json")
        compared = pd.DataFrame(found["compared"]).set_index("comparison")
        with style.context(STYLE):
            drawn = Figure(figsize=(8, 1.6 + 0.34 * len(compared)))
            gain_plot(compared, drawn.subplots())
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=2 * drawn.dpi, bbox_inches="tight")
        rows = [
            [row["method"], f"{row['value']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"] for row in found["means"]
        ]
        table = _table(["system", "NDCG@10", "95 % interval"], sorted(rows, key=lambda row: row[1], reverse=True))
        return [
            *self.markdown(_whole_answer(found)),
            *self.figure("whole", buffer.getvalue()),
            *self.markdown(table),
            *self.markdown(_trainings(found)),
        ]


class WholeAnswer(_FromRuns):
    """``whole-answer``: what ``python -m benchmarks.whole`` found, in words."""

    def run(self) -> list[nodes.Node]:
        return self.markdown(_whole_answer(self.benchmarks("benchmarks/whole.json")))


def _whole_answer(found: dict[str, Any]) -> str:
    compared = pd.DataFrame(found["compared"]).set_index("comparison")

    def holds(row: pd.Series) -> bool:
        """Over users, after Holm's correction, and over trainings; with one seed there is nothing to ask of the second."""
        return bool(row.significant) and not row.p_seeds >= 0.05

    def probabilities(row: pd.Series) -> str:
        over_trainings = "" if pd.isna(row.p_seeds) else f", over trainings {row.p_seeds:.3f}"
        return f"p over users {row.p_holm:.4f}{over_trainings}"

    def judged(name: str) -> str:
        row = compared.loc[name]
        word = ("above" if row.difference > 0 else "below") if holds(row) else "not shown to differ from"
        return f"{word} {row.b} ({row.mean_b:.4f}, {probabilities(row)})"

    def gain(name: str) -> str:
        row = compared.loc[name]
        shown = "" if holds(row) else ", not shown to differ"
        return f"{row.relative:+.1%} ({row.mean_a:.4f} against {row.mean_b:.4f}, {probabilities(row)}{shown})"

    runs = [run for run in found["trainings"] if run["condition"] == "LM"]
    last = runs[0]["curve"][-1]
    controls = [name for name in compared.index if name.startswith(("LM against LM", "ID + LM against ID + LM"))]
    alone, fused = ([name for name in controls if name.startswith(start)] for start in ("LM", "ID"))

    def gains(names: list[str]) -> bool:
        return all(holds(compared.loc[name]) and compared.loc[name].difference > 0 for name in names)

    reads = "What it has read counts: alone" if gains(alone) else "That what it has read counts is not shown: alone"
    better = "is better than" if gains(alone) else "is not in each case better than"
    helps = "it is better with it" if gains(["ID + LM against ID"]) else "nothing of that is shown to be left"
    return (
        f"{reads}, the fine-tuned language model {better} the same from random weights and on shuffled titles. "
        f"Beside the best ID-only system, {helps}.\n\n"
        f"After {last['epoch']:.0f} epochs of all {runs[0]['layers']} layers ({last['tokens'] / 1e6:.1f} million tokens; "
        f"{len(runs)} training{'s' * (len(runs) > 1)}) it has NDCG@10 "
        f"{compared.loc['LM against sasrec'].mean_a:.4f}: {judged('LM against sasrec')}, {judged('LM against gru4rec')}. "
        f"Trained in the same way, it is {', '.join(map(judged, alone))}.\n\n"
        f"The best ID-only system changes by {gain('ID + LM against ID')} with it. Against the same with ItemKNN as a further arm in "
        f"its place the difference is {gain('ID + LM against ID + itemknn')}, against sentence embeddings "
        f"{gain('ID + LM against ID + text')}; against the model "
        + " and against the model ".join(
            f"{name.partition('ID + LM against ID + LM ')[2]} {gain(name)}" for name in fused
        )
        + "."
    )


def _trainings(found: dict[str, Any]) -> str:
    rows = []
    for run in found["trainings"]:
        curve = run["curve"]
        shown = (
            " → ".join(f"{point[of]:.{n}f}" for point in curve) for of, n in (("valid_loss", 2), ("valid_ndcg", 3))
        )
        rows.append([run["condition"], run["seed"], *shown, f"{run['tokens_per_second']:,.0f}"])
    about = found["trainings"][0]
    rounded = f"{about['dtype'].removeprefix('torch.')}{', products in TF32' if about['tf32'] else ''}"
    header = [
        "model",
        "seed",
        "nats per title, before and after each epoch",
        "NDCG@10 of 50 validation users",
        "tokens/s",
    ]
    where = (
        f"*Trained on:* {_machine(about['machine'])}, {rounded}, several at once; torch {about['versions']['torch']}."
    )
    return f"{_table(header, rows)}\n{where}\n\n*Fused and judged on:* {_machine(found['machine'])}."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _day(time: str | None) -> str:
    return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M") if time else NOT_RECORDED


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return NOT_RECORDED
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _machine(facts: dict[str, Any] | None) -> str:
    if not facts:
        return NOT_RECORDED
    names = [facts.get("cpu"), f"{facts.get('cores')} cores", f"{facts.get('memory_gb')} GB", facts.get("gpu")]
    return ", ".join(str(name) for name in names if name)


def _configure(app: Any, config: Any) -> None:
    runs = {
        name[3:]: {key: value(data) for key, data in glued(notebook).items()}
        for name, notebook in notebooks(Path(app.srcdir)).items()
    }
    config.myst_substitutions = {**config.myst_substitutions, "run": runs}
    if _mathjax():
        config.mathjax_path = f"mathjax/{MATHJAX_FILE}"


def _keep_whole(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in a property's first line for its type."""
    if what in ("property", "attribute") and lines:
        lines[0] = lines[0].replace(": ", " – ")


def _mathjax() -> Path | None:
    """The JavaScript inside the package; None without the package, then the page asks a CDN as Sphinx does."""
    found = importlib.util.find_spec(MATHJAX_PACKAGE)
    return Path(found.origin).parent / "static" / "mathjax" / MATHJAX_FILE if found and found.origin else None


def _copy_mathjax(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.format == "html" and (source := _mathjax()):
        target = Path(app.outdir) / "_static" / "mathjax" / MATHJAX_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _without_thebe(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """No live kernel is offered; Jupyter Book would put its script into each page twice, which is an error there."""
    for kind in ("script_files", "css_files"):
        files = context.get(kind, [])
        context[kind] = [file for file in files if "thebe" not in f"{file} {getattr(file, 'attributes', '')}".lower()]


def _launch(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Each chapter opens as its unexecuted notebook in the reader's JupyterLab, and in Colab where the book is built on GitHub."""
    if not page.startswith(f"{EXECUTED}/"):
        return
    notebook, repository = f"notebooks/{Path(page).name}.ipynb", os.environ.get("GITHUB_REPOSITORY")
    buttons = [
        ("JupyterLab", "Open in your JupyterLab; start it first: .venv/bin/jupyter lab", JUPYTERLAB.format(notebook))
    ]
    if repository:
        install = f'%pip install "llmrec_lib @ git+https://github.com/{repository}"'
        url = COLAB.format(repository, os.environ.get("GITHUB_REF_NAME", "main"), notebook)
        buttons.append(("Colab", f"Open in Colab; add a first cell there: {install}", url))
    links = [
        {"type": "link", "text": text, "tooltip": tooltip, "icon": "fas fa-rocket", "url": url}
        for text, tooltip, url in buttons
    ]
    group = {"type": "group", "tooltip": "Run this chapter yourself", "icon": "fas fa-rocket", "buttons": links}
    context["header_buttons"].insert(0, {**group, "label": "launch-buttons"})


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", _configure)
    app.connect("html-page-context", _launch, priority=600)  # the theme's own buttons come with 501
    app.connect("html-page-context", _without_thebe, priority=900)
    app.connect("autodoc-process-docstring", _keep_whole, priority=400)  # before napoleon
    app.connect("build-finished", _copy_mathjax)
    app.add_directive("run-figure", RunFigure)
    app.add_directive("run-settings", RunSettings)
    app.add_directive("run-status", RunStatus)
    app.add_directive("run-elsewhere", RunElsewhere)
    app.add_directive("cold-table", ColdTable)
    app.add_directive("two-runs", TwoRuns)
    app.add_directive("whole-answer", WholeAnswer)
    app.add_directive("benchmark-table", BenchmarkTable)
    app.add_directive("benchmark-users", BenchmarkUsers)
    app.add_directive("benchmark-growth", BenchmarkGrowth)
    app.add_directive("scale-table", ScaleTable)
    app.add_directive("soak-table", SoakTable)
    app.add_directive("gpu-table", GpuTable)
    app.add_directive("gpu-whole", GpuWhole)
    app.add_directive("whole-model", WholeModel)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":  # the figure that the README shows, after a full run
    root = Path(__file__).parents[2]
    (root / "book/_static/gain.png").write_bytes(figure_png(notebooks(root)["06_fusion"], "gain_figure"))
