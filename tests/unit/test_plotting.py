"""Figures say what the tables say."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
import pytest

mpl.use("agg")
from matplotlib import pyplot as plt

from llmrec_lib.plotting import critical_difference, gain_map


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_gain_map_has_a_cell_for_each_gain():
    gains = pd.DataFrame(
        [("a", "x", 0.034, 0.01, 0.05, True), ("b", "x", -0.2, -0.3, -0.1, True), ("b", "y", 0.0, -0.01, 0.01, False)],
        columns=["setting", "strategy", "relative", "low", "high", "significant"],
    )
    ax = gain_map(gains)
    texts = {text.get_text(): (text.get_position()[0], round(text.get_position()[1])) for text in ax.texts}
    assert texts == {
        "+3.4*": (0, 0),
        "+1.0 … +5.0": (0, 0),
        "-20.0*": (0, 1),
        "-30.0 … -10.0": (0, 1),
        "+0.0": (1, 1),
        "-1.0 … +1.0": (1, 1),
    }
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="no gains"):
        gain_map(gains[:0])


def test_critical_difference_by_hand():
    """Demšar 2006, table 5a and section 3.2.2: four methods, 14 data sets, q = 2.569, CD = 1.25."""
    scores = pd.DataFrame({"a": range(14), "b": range(1, 15), "c": range(2, 16), "d": range(-1, 13)})
    ax = critical_difference(scores)
    (bars,) = ax.containers
    assert bars.lines[0].get_xdata().tolist() == [4, 3, 2, 1]  # best on top
    assert [label.get_text() for label in ax.get_yticklabels()] == ["d", "a", "b", "c"]
    left, right = bars.lines[2][0].get_segments()[3][:, 0]
    assert right - left == pytest.approx(1.25, abs=0.01)
    with pytest.raises(ValueError, match="at least two settings"):
        critical_difference(scores[:1])
