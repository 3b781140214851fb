"""Sphinx extension: what pages need to be readable in a browser, whoever wrote them: table columns and figures in full size.

Columns of numbers get the class ``num``, cells of many words ``words``, of very many ``sentence`` too; study.css does the
rest. A click on a figure opens it alone.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any

NUMBER = re.compile(r"[(\[]?[+\-−–]?[\d.][\d.,]*(e[+-]?\d+)?\s?(%|×|s|GB|MB)?[)\]]?\*?", re.IGNORECASE)
NOTHING = ("", "nan", "NaN", "None", "–", "-")
MANY, SENTENCE = 28, 80  # characters: a cell of so many may wrap, and is as wide as a few words, as half a sentence
CELL = re.compile(r"<(t[hd])\b([^>]*)>(.*?)</\1>", re.DOTALL)
LINKED_OR_IMAGE = re.compile(r"<a\b[^>]*>.*?</a>|(<img\b[^>]*>)", re.DOTALL)


def visible(cell: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", cell))).strip()


def _with_class(attributes: str, name: str) -> str:
    if re.search(r'\bclass="', attributes):
        return re.sub(r'\bclass="', f'class="{name} ', attributes, count=1)
    return f'{attributes} class="{name}"'


def _span(attributes: str) -> int:
    found = re.search(r'colspan="(\d+)"', attributes)
    return int(found[1]) if found else 1


def align(table: str) -> str:
    """A table's HTML with a class for each column of numbers and each cell of many words.

    Columns are counted from the right, since cells that span rows are missing at the left.
    """
    shown: dict[int, list[str]] = {}
    for row in re.findall(r"<tr\b.*?</tr>", table, re.DOTALL):
        for place, (kind, _, cell) in enumerate(reversed(CELL.findall(row))):
            if kind == "td":
                shown.setdefault(place, []).append(visible(cell))
    told = {place: [text for text in texts if text not in NOTHING] for place, texts in shown.items()}
    numbers = {place for place, texts in told.items() if texts and all(map(NUMBER.fullmatch, texts))}

    def in_row(row: re.Match[str]) -> str:
        found, place, parts = list(CELL.finditer(row[0])), 0, []
        for cell in reversed(found):
            kind, attributes, content = cell.groups()
            covers = range(place, place + _span(attributes))
            place = covers.stop
            if set(covers) <= numbers:
                attributes = _with_class(attributes, "num")
            elif (length := len(visible(content))) > MANY:
                attributes = _with_class(attributes, "words sentence" if length > SENTENCE else "words")
            parts.append(f"<{kind}{attributes}>{content}</{kind}>")
        before, after = (row[0][: found[0].start()], row[0][found[-1].end() :]) if found else (row[0], "")
        return before + "\n".join(reversed(parts)) + after

    return re.sub(r"<tr\b.*?</tr>", in_row, table, flags=re.DOTALL)


def open_alone(body: str) -> str:
    """HTML in which each image that is no link yet leads to its own file: a browser then shows it in full size."""

    def linked(found: re.Match[str]) -> str:
        source = re.search(r'src="([^"]+)"', found[1] or "")
        if not source or source[1].startswith("data:"):
            return found[0]
        return f'<a class="full-size" href="{source[1]}" title="Open this figure in full size">{found[1]}</a>'

    return LINKED_OR_IMAGE.sub(linked, body)


def _look(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if body := context.get("body"):
        body = re.sub(r"<table\b.*?</table>", lambda table: align(table[0]), body, flags=re.DOTALL)
        context["body"] = open_alone(body)


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", _look)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
