"""The README's example runs as it stands, and everything the README points at is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MADE_BY_THE_FULL_RUN = ("book/_static/gain.png", "book/executed/")


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    marked = re.findall(r"<!-- executed by tests/book/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len(marked) == len(re.findall("```python", README)) == 1
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", marked[0]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"[+-]0\.\d{4} NDCG@10, 95 % interval [+-]0\.\d{4} to [+-]0\.\d{4}, p [01]\.\d{3}", last)
    assert not list(tmp_path.iterdir()), "the example leaves files behind"


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("https://")]
    gone = [link for link in links if not (ROOT / link).exists() and not link.startswith(MADE_BY_THE_FULL_RUN)]
    assert links and not gone


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
