"""One look for all figures: colours that everybody can tell apart, intervals always shown, legible at half width."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito, "Color Universal Design" (2008); each family has its own marker too: colour is never the only sign.
FAMILY_COLOURS = {"id": "#0072B2", "llm": "#E69F00", "prs": "#009E73", "fusion": "#D55E00", "control": "#6E6E6E"}
FAMILY_MARKERS = {"id": "o", "llm": "s", "prs": "^", "fusion": "D", "control": "X"}
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = Path(__file__).with_suffix(".mplstyle")


def use_style() -> None:
    """Set matplotlib's defaults for the study; call it once in a notebook's first code cell."""
    from matplotlib import style

    style.use(STYLE)


def metric_bars(table: pd.DataFrame, metric: str = "ndcg@10", ax: Axes | None = None) -> Axes:
    """Mean of `metric` per method as a point with its 95 % interval, best method on top.

    `table` has one row per method: method, family, value, low, high. ValueError if it has none.
    """
    if table.empty:
        raise ValueError(f"the table has no rows for {metric!r}")
    table = table.sort_values("value").assign(place=range(len(table)))
    ax = ax or _axes(len(table))
    for family, part in table.groupby("family"):
        colour, marker = FAMILY_COLOURS[family], FAMILY_MARKERS[family]
        _points(ax, part, part["value"], color=colour, markerfacecolor=colour, marker=marker, label=family)
    ax.set_yticks(table["place"], table["method"])
    ax.set_xlabel(f"{_label(metric)}, with 95 % interval")
    if table["family"].nunique() > 1:
        _legend_above(ax)
    return ax


def gain_plot(comparisons: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Differences with their 95 % intervals around a line at zero, one row per comparison, first on top.

    `comparisons` is what `llmrec_lib.evaluation.compare_many` returns (none: ValueError); row labels are its index. A
    filled point is significant after Holm's correction.
    """
    if comparisons.empty:
        raise ValueError("there are no comparisons to draw")
    ax = ax or _axes(len(comparisons))
    ax.axvline(0, color="black", linewidth=1)
    rows = comparisons.assign(place=range(len(comparisons))[::-1])
    for significant, part in rows.groupby("significant", sort=False):
        face, label = (PALETTE[0], "significant (Holm)") if significant else ("white", "not significant")
        _points(ax, part, part["difference"], color=PALETTE[0], markerfacecolor=face, marker="o", label=label)
    ax.set_yticks(rows["place"], rows.index)
    ax.set_xlabel(f"difference in {', '.join(map(_label, rows['metric'].unique()))}, with 95 % interval")
    ax.locator_params(axis="x", nbins=3)  # more labels than that run into each other
    _legend_above(ax)
    return ax


def gain_map(gains: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """One cell for each row (setting) and column (strategy): relative gain in percent, its interval below it.

    `gains` has one line per cell: setting, strategy, relative, low, high (relative to the same baseline), significant.
    Settings and strategies keep the order in which they come; bold and a star mark significant gains and losses.
    """
    from matplotlib import pyplot as plt

    if gains.empty:
        raise ValueError("there are no gains to draw")
    settings, strategies = gains["setting"].unique().tolist(), gains["strategy"].unique().tolist()
    ax = ax or plt.subplots(figsize=(2.4 + 0.84 * len(strategies), 1.6 + 0.55 * len(settings)))[1]
    table = gains.pivot(index="setting", columns="strategy", values="relative").loc[settings, strategies]
    reach = max(0.05, np.nanquantile(np.abs(table), 0.9))
    ax.imshow(table, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    for cell in gains.itertuples():
        x, y = strategies.index(cell.strategy), settings.index(cell.setting)
        style = {"color": "white" if abs(cell.relative) > 0.7 * reach else "black", "ha": "center", "va": "center"}
        gain, weight = f"{100 * cell.relative:+.1f}{'*' * cell.significant}", "bold" if cell.significant else "normal"
        ax.text(x, y - 0.15, gain, fontsize=9.5, fontweight=weight, **style)
        ax.text(x, y + 0.23, f"{100 * cell.low:+.1f} … {100 * cell.high:+.1f}", fontsize=7.5, **style)
    ax.set_xticks(range(len(strategies)), strategies, rotation=35, ha="right", rotation_mode="anchor", fontsize=10)
    ax.set_yticks(range(len(settings)), settings, fontsize=10)
    ax.grid(visible=False)
    return ax


def critical_difference(scores: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean rank of each method over settings (1 is best), with the half of Nemenyi's critical difference to both sides.

    Methods whose bars do not touch differ at the 5 % level. Source: Demšar 2006, "Statistical Comparisons of Classifiers
    over Multiple Data Sets". `scores`: one row per setting (at least two), one column per method, higher is better.
    """
    from scipy.stats import studentized_range

    n_settings, n_methods = scores.shape
    if n_settings < 2 or n_methods < 2:
        raise ValueError(f"scores has shape {scores.shape}; at least two settings and two methods are compared")
    half = studentized_range.ppf(0.95, n_methods, np.inf) * np.sqrt(n_methods * (n_methods + 1) / (12 * n_settings)) / 2
    ranks = scores.rank(axis=1, ascending=False).mean().sort_values(ascending=False)
    rows = pd.DataFrame({"place": range(len(ranks)), "low": ranks - half, "high": ranks + half})
    ax = ax or _axes(len(ranks))
    _points(ax, rows, ranks, color=PALETTE[0], marker="o")
    ax.set_yticks(rows["place"], ranks.index)
    ax.set_xlabel(f"mean rank over {n_settings} settings, 1 is best")
    return ax


def _points(ax: Axes, rows: pd.DataFrame, middle: pd.Series, **style: str) -> None:
    reach = np.nan_to_num(np.abs([middle - rows["low"], rows["high"] - middle]))
    ax.errorbar(middle, rows["place"], xerr=reach, linestyle="none", capsize=3, **style)


def _axes(rows: int) -> Axes:
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(6.4, 1.3 + 0.42 * rows))
    ax.set_ylim(-0.6, rows - 0.4)
    ax.grid(axis="y", visible=False)
    return ax


def _legend_above(ax: Axes) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, columnspacing=1, handletextpad=0.2)


def _label(metric: str) -> str:
    name, at, k = metric.partition("@")
    known = {"ndcg": "NDCG", "mrr": "MRR", "map": "MAP", "f1": "F1"}
    return known.get(name, name.capitalize()) + at + k if at else metric
