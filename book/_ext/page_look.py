"""Sphinx extension: what pages need to be readable in a browser, whoever wrote them: table columns and figures in full size.

Columns of numbers get the class ``num``, cells of many words ``words``, of very many ``sentence`` too; study.css does the
rest. A click on a figure opens it alone.
"""

from __future__ import annotations

import re
from typing import Any

from bs4 import BeautifulSoup, Tag

NUMBER = re.compile(r"[(\[]?[+\-−–]?[\d.][\d.,]*(e[+-]?\d+)?\s?(%|×|s|GB|MB)?[)\]]?\*?", re.IGNORECASE)
NOTHING = ("", "nan", "NaN", "None", "–", "-")
MANY, SENTENCE = 28, 80  # characters: a cell of so many may wrap, and is as wide as a few words, as half a sentence


def _shown(cell: Tag) -> str:
    return " ".join(cell.get_text().split())


def _from_the_right(row: Tag) -> list[tuple[Tag, range]]:
    """Cells and the columns that they cover, counted from the right, since cells that span rows are missing at the left."""
    cells, place = [], 0
    for cell in reversed(row.find_all(["td", "th"])):
        covers = range(place, place + int(cell.get("colspan", 1)))
        cells.append((cell, covers))
        place = covers.stop
    return cells


def _align(table: Tag) -> None:
    rows = [_from_the_right(row) for row in table.find_all("tr")]
    told: dict[int, list[str]] = {}
    for cell, covers in (pair for row in rows for pair in row):
        if cell.name == "td" and _shown(cell) not in NOTHING:
            told.setdefault(covers.start, []).append(_shown(cell))
    numbers = {place for place, texts in told.items() if all(map(NUMBER.fullmatch, texts))}
    for cell, covers in (pair for row in rows for pair in row):
        size = len(_shown(cell))
        wide = ["words"] * (size > MANY) + ["sentence"] * (size > SENTENCE)
        if names := ["num"] if set(covers) <= numbers else wide:
            cell["class"] = [*names, *cell.get("class", [])]


def align(html: str) -> str:
    """HTML whose tables have a class for each column of numbers and each cell of many words."""
    page = BeautifulSoup(html, "html.parser")
    for table in page.find_all("table"):
        _align(table)
    return str(page)


def open_alone(html: str) -> str:
    """HTML in which each image that is no link yet leads to its own file: a browser then shows it in full size."""
    page = BeautifulSoup(html, "html.parser")
    for image in page.find_all("img", src=True):
        if not image.find_parent("a") and not image["src"].startswith("data:"):
            about = {"class": "full-size", "href": image["src"], "title": "Open this figure in full size"}
            image.wrap(page.new_tag("a", attrs=about))
    return str(page)


def _look(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if body := context.get("body"):
        context["body"] = open_alone(align(body))


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", _look)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
