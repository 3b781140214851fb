"""Columns of numbers are told from text, whatever made the table, and figures lead to themselves."""

import re

import page_look
import pandas as pd
import pytest


@pytest.mark.parametrize("text", ["0.0925", "-0.001", "+1.2 %", "38.6 ×", "1,682", "2e-05", "0.2*", "(3)", "12 s"])
def test_numbers(text):
    assert page_look.NUMBER.fullmatch(text)


@pytest.mark.parametrize("text", ["ease", "07_augmentation", "2026-11-27", "2 of 24", "06 fusion", "x1", "1 min 15 s"])
def test_no_numbers(text):
    assert not page_look.NUMBER.fullmatch(text)


def test_columns_of_a_table_with_cells_that_span_rows():
    index = pd.MultiIndex.from_product([["temporal", "random"], ["a", "b"]], names=["protocol", "method"])
    table = pd.DataFrame(
        {"ndcg": [0.1, 0.2, 0.3, float("nan")], "use": ["x", "y", "a long sentence about its use", "z"]}, index
    )
    shown = page_look.align(table.to_html())
    assert shown.count('<td class="num">') == 4 and '<th class="num">ndcg</th>' in shown
    assert '<td class="words">a long sentence about its use</td>' in shown
    assert "<td>x</td>" in shown and "<th>use</th>" in shown
    assert '<th rowspan="2" valign="top">temporal</th>' in shown
    assert "".join(re.sub(' class="(num|words)"', "", shown).split()) == "".join(table.to_html().split())


def test_other_classes_stay():
    table = '<table><thead><tr><th class="head"><p>n</p></th></tr></thead><tbody><tr><td class="a"><p>1</p></td></tr></tbody></table>'
    assert page_look.align(table) == table.replace('class="', 'class="num ')


def test_an_image_that_is_a_link_stays_one():
    page = '<a href="x"><img src="a.png"></a> <img alt="A" src="b.png"/> <img src="data:image/png;base64,AA">'
    shown = page_look.open_alone(page)
    assert shown.count("<a ") == 2
    assert (
        '<a class="full-size" href="b.png" title="Open this figure in full size"><img alt="A" src="b.png"/></a>'
        in shown
    )
