"""Build the book from executed notebooks, running nothing: a failed notebook, a missing one or a warning stops it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmrec_lib.cache import content_key

EXECUTED = "book/executed"
KEY_FILE = ".source-key"


class BookError(ValueError):
    """The book cannot be built from what is there; the message says from which file and why."""


def build_book(executed: str | Path = EXECUTED, out: str | Path = "_build/html", root: str | Path = ".") -> Path:
    """Build the book into `out` with every warning an error; what was there stays until the new book is complete.

    Parameters
    ----------
    executed : folder of the executed notebooks, one for each ``book/executed/NN_name`` in ``_toc.yml``.
    out : folder of the finished pages; replaced as a whole. Nothing is built where it is already up to date.
    root : folder of ``_config.yml``, ``_toc.yml`` and ``book/``.

    Returns
    -------
    Path of the page to open first.

    Raises
    ------
    BookError
        A chapter is missing, did not run to its end, or Jupyter Book gave a warning or an error.
    """
    executed, out, root = Path(executed).resolve(), Path(out).resolve(), Path(root).resolve()
    notebooks = executed_notebooks(root / "_toc.yml", executed)
    sources = [path for path in source_files(root) if Path(EXECUTED) not in path.parents]
    library = sorted(Path(__file__).parents[1].rglob("*.py"))  # the API reference is made from its docstrings
    lock = [path for path in [root / "requirements.lock"] if path.is_file()]
    key = content_key([(str(path), root / path) for path in sources], notebooks, library, lock)
    index = out / "index.html"
    if _is_up_to_date(out / KEY_FILE, index, key):
        return index
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book-", dir=out.parent) as scratch:
        stage = Path(scratch) / "source"
        for path in sources:
            _copy(root / path, stage / path)
        for path in notebooks:
            _copy(path, stage / EXECUTED / path.name)
        html = _jupyter_book(stage)
        (html / KEY_FILE).write_text(key, encoding="utf-8")
        if out.exists():
            os.replace(out, Path(scratch) / "replaced")
        os.replace(html, out)
    return index


def executed_notebooks(toc: Path, executed: Path) -> list[Path]:
    """Executed notebooks that the table of contents asks for, in order; BookError where one is missing or failed."""
    names = [Path(name).name.removesuffix(".ipynb") for name in _pages(toc) if name.startswith(EXECUTED + "/")]
    paths = [executed / f"{name}.ipynb" for name in names]
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        raise BookError(f"{executed} has no executed notebook of {', '.join(missing)}: run `make study` to its end")
    faults = [fault for path in paths for fault in notebook_faults(path)]
    if faults:
        raise BookError("these chapters did not run to their end:\n  " + "\n  ".join(faults))
    return paths


def notebook_faults(path: Path) -> list[str]:
    """One line for each cell that failed or that papermill never reached, naming chapter and cell (counted from 1)."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = notebook["cells"]
    except (ValueError, KeyError) as error:
        raise BookError(f"{path} is no notebook: {error!r}") from error
    faults = []
    for number, cell in enumerate(cells, start=1):
        where = f"{path.stem}, cell {number}"
        run = cell.get("metadata", {}).get("papermill", {})
        errors = [output for output in cell.get("outputs", []) if output.get("output_type") == "error"]
        if errors:
            faults += [f"{where}: {error.get('ename')}: {error.get('evalue')}" for error in errors]
        elif run.get("exception") or run.get("status") in ("failed", "pending", "running"):
            faults.append(f"{where}: papermill left it {run.get('status', 'with an exception')}")
    if not faults and notebook.get("metadata", {}).get("papermill", {}).get("exception"):
        faults.append(f"{path.stem}: papermill noted an exception")
    return faults


def source_files(root: Path) -> list[Path]:
    """Files that the book is made of, relative to `root`: the two at the root, Markdown beside them, and ``book/``."""
    files = [root / "_config.yml", root / "_toc.yml", *root.glob("*.md"), *(root / "book").rglob("*")]
    return sorted(path.relative_to(root) for path in files if path.is_file() and "__pycache__" not in path.parts)


def _pages(toc: Path) -> Iterator[str]:
    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (str(node[key]) for key in ("root", "file") if key in node)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from walk(child)

    yield from walk(yaml.safe_load(toc.read_text(encoding="utf-8")))


def _is_up_to_date(key_file: Path, index: Path, key: str) -> bool:
    """Whether `key` made these pages, and nobody (a bare ``jupyter-book build .``) has written over them since."""
    if not key_file.is_file() or not index.is_file() or key_file.read_text(encoding="utf-8") != key:
        return False
    return index.stat().st_mtime <= key_file.stat().st_mtime


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _jupyter_book(stage: Path) -> Path:
    """Run Jupyter Book in the folder `stage`; BookError if it warned. Gives the folder of the pages."""
    # This interpreter's Jupyter Book, wherever the shell's PATH leads; the package has no __main__.
    start = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    done = subprocess.run([*start, "build", ".", "-q", "-W", "-n", "--keep-going"], cwd=stage, check=False)
    html = stage / "_build" / "html"
    if done.returncode or not (html / "index.html").is_file():
        raise BookError(f"Jupyter Book ended with status {done.returncode}; its warnings and errors are above")
    return html


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmrec_lib.study.book", description=__doc__)
    parser.add_argument("--executed", default=EXECUTED, help="folder of the executed notebooks (default: %(default)s)")
    parser.add_argument("--out", default="_build/html", help="folder of the finished pages (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        index = build_book(options.executed, options.out)
    except (BookError, FileNotFoundError) as error:
        print(f"the book was not built: {error}", file=sys.stderr)
        return 1
    print(f"the book is at {index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
