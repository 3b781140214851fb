"""Nobody can be found in what is published: no user id in tables, in the output of notebooks, or on a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
EXECUTED = sorted((ROOT / "book" / "executed").glob("[0-9][0-9]_*.ipynb"))
TABLES = sorted((ROOT / "results").rglob("*.csv"))
PER_USER = sorted((ROOT / "results").rglob("per_user.parquet"))
ID_COLUMN = re.compile(r"(user|customer|person|member|reviewer|zip)([ _]?(id|code|number|name))?", re.IGNORECASE)
ONE_USER = re.compile(r"\buser(?:[ _]id)?[ :=#']{1,3}\d+\b", re.IGNORECASE)


def outputs(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = []
    for output in [output for cell in cells for output in cell.get("outputs", [])]:
        for kind, data in {**output.get("data", {}), "text": output.get("text", "")}.items():
            if not kind.startswith("image/"):
                texts.append("".join(data) if isinstance(data, list) else str(data))
    return texts


def problems(text: str) -> list[str]:
    headers = [re.sub("<[^>]+>", "", header).strip() for header in re.findall(r"<th[^>]*>(.*?)</th>", text, re.DOTALL)]
    return [header for header in headers if ID_COLUMN.fullmatch(header)] + ONE_USER.findall(text)


@pytest.mark.parametrize(
    "text", ["<table><th>user</th></table>", '<th scope="col">user_id</th>', "user 196 chose", "user_id=7", "User: 12", "<th>zip_code</th>"]
)  # fmt: skip
def test_the_gate_sees_a_user(text):
    assert problems(text)


@pytest.mark.parametrize("text", ["<th>users</th>", "943 users", "per user", "1,000 users × 7", "users 1,000 times"])
def test_the_gate_lets_numbers_of_users_pass(text):
    assert not problems(text)


@pytest.mark.parametrize("notebook", EXECUTED, ids=lambda path: path.stem)
def test_no_executed_notebook_shows_a_user(notebook):
    shown = outputs(notebook)
    assert shown
    assert {problem for text in shown for problem in problems(text)} == set()


def test_no_table_names_a_user():
    assert len(TABLES) > 40
    columns = {str(path.relative_to(ROOT)): pd.read_csv(path, nrows=0).columns for path in TABLES}
    named = {name: [column for column in found if ID_COLUMN.fullmatch(column)] for name, found in columns.items()}
    assert {name: found for name, found in named.items() if found} == {}


def test_values_per_user_have_numbers_of_their_own():
    """Comparisons are paired by user, so each needs a number; it is the internal one, which no file of the data set has."""
    assert PER_USER
    for path in PER_USER:
        users = pd.read_parquet(path, columns=["user"])["user"]
        assert users.dtype.kind == "i", path
        assert users.min() >= 1, path
        assert set(pd.read_parquet(path).columns) <= {"method", "protocol", "seed", "user", "metric", "k", "value"}, (
            path
        )
