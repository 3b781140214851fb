"""One look for all figures: colours that everybody can tell apart, intervals always shown, legible at half width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito, "Color Universal Design" (2008); each family has its own marker too: colour is never the only sign.
FAMILY_COLOURS = {"id": "#0072B2", "llm": "#E69F00", "prs": "#009E73", "fusion": "#D55E00", "control": "#6E6E6E"}
FAMILY_MARKERS = {"id": "o", "llm": "s", "prs": "^", "fusion": "D", "control": "X"}
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
WIDTH = 6.4  # inches


def use_style() -> None:
    """Set matplotlib's defaults for the study; call it once in a notebook's first code cell."""
    import matplotlib as mpl

    mpl.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.6),
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "figure.facecolor": "white",  # opaque: readable on pages with a dark background too
            "savefig.facecolor": "white",
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "font.size": 13,
            "axes.titlesize": 14,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": mpl.cycler(color=PALETTE),
            "grid.color": "#DDDDDD",
            "lines.linewidth": 2.0,
            "lines.markersize": 8,
            "legend.frameon": False,
            "svg.hashsalt": "llmrec",  # the same figure gives the same file
        }
    )


def metric_bars(table: pd.DataFrame, metric: str = "ndcg@10", ax: Axes | None = None) -> Axes:
    """Mean of a metric per method as a point with its 95 % interval, best method on top.

    Parameters
    ----------
    table : DataFrame
        Rows of ``metrics.csv`` of one data set and protocol; the interval is Student's over seeds, and missing for
        a single seed. Or one row per method with ``value``, ``low`` and ``high``, such as a bootstrap over users.
    metric : str
        ``name@k``; picks the rows if the table has the columns ``metric`` and ``k``.

    Raises
    ------
    ValueError
        No row has this metric, or the rows mix data sets or protocols.
    """
    rows = table
    if {"metric", "k"} <= set(table.columns):
        name, _, k = metric.partition("@")
        rows = table[(table["metric"] == name) & (table["k"].astype(str) == k)]
    if rows.empty:
        raise ValueError(f"the table has no rows for {metric!r}")
    for column in ("dataset", "protocol"):
        if column in rows and rows[column].nunique() > 1:
            raise ValueError(
                f"the table mixes {column}s ({', '.join(sorted(rows[column].unique()))}): choose one of them"
            )
    if {"low", "high"} <= set(rows.columns):
        summary = rows.set_index("method")[["family", "value", "low", "high"]]
    else:
        grouped = rows.groupby("method")["value"]
        half = grouped.sem() * _student(grouped.size())
        mean = grouped.mean()
        summary = pd.DataFrame({"value": mean, "low": mean - half, "high": mean + half})
        summary["family"] = rows.groupby("method")["family"].first()
    summary = summary.sort_values("value")
    ax = ax or _axes(len(summary))
    for family, part in summary.groupby("family"):
        places = summary.index.get_indexer(part.index)
        _points(ax, part, places, part["value"], FAMILY_COLOURS[family], FAMILY_MARKERS[family], family)
    ax.set_yticks(range(len(summary)), summary.index)
    ax.set_xlabel(f"{_label(metric)}, with 95 % interval")
    if summary["family"].nunique() > 1:
        _legend_above(ax)
    return ax


def gain_plot(comparisons: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Differences with their 95 % intervals around a line at zero, one row per comparison in the given order.

    Parameters
    ----------
    comparisons : DataFrame
        As `llmrec_lib.evaluation.compare_many` returns it. Row labels are its index where that is text, else "a − b"; a
        filled point is significant after Holm's correction.
    """
    if comparisons.empty:
        raise ValueError("there are no comparisons to draw")
    labels = [
        label if isinstance(label, str) else f"{row.a} − {row.b}"
        for label, row in zip(comparisons.index, comparisons.itertuples(), strict=True)
    ]
    ax = ax or _axes(len(comparisons))
    ax.axvline(0, color="black", linewidth=1)
    places = np.arange(len(comparisons))[::-1]
    filled = comparisons.get("significant", pd.Series(True, index=comparisons.index)).to_numpy(bool)
    for chosen, face, meaning in ((filled, PALETTE[0], "significant (Holm)"), (~filled, "white", "not significant")):
        if chosen.any():
            part = comparisons[chosen]
            _points(ax, part, places[chosen], part["difference"], PALETTE[0], "o", meaning, face)
    ax.set_yticks(places, labels)
    metrics = comparisons["metric"].unique()
    ax.set_xlabel(f"difference in {', '.join(map(_label, metrics))}, with 95 % interval")
    if "significant" in comparisons:
        _legend_above(ax)
    return ax


def curve(lines: Mapping[str, pd.DataFrame], x: str, y: str, ax: Axes | None = None) -> Axes:
    """One line per entry of `lines` (label -> DataFrame with columns x, y and, for a band, low and high)."""
    from matplotlib import pyplot as plt

    ax = ax or plt.subplots()[1]
    for (label, frame), marker, colour in zip(lines.items(), "os^DXvP", PALETTE, strict=False):
        ordered = frame.sort_values(x)
        ax.plot(ordered[x], ordered[y], marker=marker, color=colour, label=label)
        if {"low", "high"} <= set(ordered.columns):
            ax.fill_between(ordered[x], ordered["low"], ordered["high"], color=colour, alpha=0.2, linewidth=0)
    ax.set_xlabel(x)
    ax.set_ylabel(_label(y))
    if len(lines) > 1:
        ax.legend()
    return ax


def _points(
    ax: Axes,
    rows: pd.DataFrame,
    places: np.ndarray,
    middle: pd.Series,
    colour: str,
    marker: str,
    label: str,
    face: str = "",
) -> None:
    reach = np.nan_to_num(np.abs([middle - rows["low"], rows["high"] - middle]))
    style = {"color": colour, "marker": marker, "markerfacecolor": face or colour}
    ax.errorbar(middle, places, xerr=reach, linestyle="none", capsize=3, label=label, **style)


def _axes(rows: int) -> Axes:
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(WIDTH, 1.3 + 0.42 * rows))
    ax.set_ylim(-0.6, rows - 0.4)
    ax.grid(axis="y", visible=False)
    return ax


def _legend_above(ax: Axes) -> None:
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    ax.legend(**place, ncols=5, columnspacing=1.0, handletextpad=0.2, handlelength=1.5)


def _student(sizes: pd.Series) -> np.ndarray:
    from scipy import stats

    return stats.t.ppf(0.975, np.maximum(sizes - 1, 1))


def _label(metric: str) -> str:
    name, at, k = metric.partition("@")
    return (
        ({"ndcg": "NDCG", "mrr": "MRR", "map": "MAP", "f1": "F1"}.get(name, name.capitalize()) + at + k)
        if at
        else metric
    )
