"""No result is typed by hand: a decimal in prose comes out of an executed cell, or is no result."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROSE = [*sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), *sorted((ROOT / "book").glob("*.md"))]
DECIMAL = re.compile(r"(?<![\w.,])[+\-−–]?\d*\.\d+(?!\.?\w)")
ALLOWED = {  # a decimal, and what has to stand in the same sentence or table row
    "3.11": "Python",
    "3.12": "Python",
    "3.13": "Python",
    ".05": r"\bp\b|below",  # the level of significance
    "0.5": "guessing",  # the AUC of chance
}


def without_code(text):
    """Prose alone: no fenced code (what stands in a directive stays), inline code, formula, substitution, role, link or comment."""
    lines, fences = [], []  # of each open fence: its ticks, and whether it is a directive
    for line in text.splitlines():
        fence = re.match(r"\s*(`{3,}|~{3,})(.*)", line)
        if fence and fences and not fence[2].strip() and fence[1].startswith(fences[-1][0]):
            fences.pop()
        elif fence and all(prose for _, prose in fences):
            fences.append((fence[1], fence[2].startswith("{") and "literalinclude" not in fence[2]))
        elif all(prose for _, prose in fences):
            lines.append(line)
    text = "\n".join(lines)
    for pattern in (r"<!--.*?-->", r"\$\$.*?\$\$", r"\{\{.*?\}\}", r"\{[\w:-]+\}`[^`]*`", r"(`+)(?!`).*?(?<!`)\1(?!`)"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    text = re.sub(r"\$[^$\n]+\$", " ", text)
    return re.sub(r"\]\([^)]*\)|https?://\S+", " ", text)


def typed(text):
    """Decimals of a Markdown text that may be results, each with its sentence."""
    sentences = [
        part for block in re.split(r"\n\s*\n|\n(?=[|-])", without_code(text)) for part in re.split(r"[.:;]\s", block)
    ]
    found = [(number[0], " ".join(sentence.split())) for sentence in sentences for number in DECIMAL.finditer(sentence)]
    return [(number, sentence) for number, sentence in found if not re.search(ALLOWED.get(number, "(?!)"), sentence)]


@pytest.mark.parametrize(
    "text",
    [
        "The fusion reaches 0.2074.",
        "It gains +1.2 % over *ID only*.",
        "| system | .2038 |",
        "```{note}\nNDCG@10 is 0.31 here.\n```\n",
        "```bash\nls\n```\nand then 0.3 more",
        "A threshold of 0.5 is best.",
        "Version 3.11 of the figure",
    ],
)
def test_the_gate_sees_a_typed_result(text):
    assert len(typed(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "The fusion reaches {{ run.fusion.best }} on `0.1`, see [there](x.md#2.5) and {cite}`a2.5`.",
        "$w = 0.5$ and 95 % of 943 users, chapter 6. 2 of 3 are 1,682.",
        "```python\nx = 0.25\n```\n",
        "With Python 3.11 (3.12 and 3.13 work too)",
        "*Significant* means a corrected p below .05.",
        "An AUC of 0.5 is guessing.",
    ],
)
def test_the_gate_lets_pass_what_is_no_result(text):
    assert typed(text) == []


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_no_result_is_typed(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert typed(text) == []
