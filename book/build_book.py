"""Build the book from executed notebooks, running nothing: a failed notebook, a missing one or a warning stops it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import llmrec_lib
from llmrec_lib.cache import content_key

EXECUTED = "book/executed"
KEY_FILE = ".source-key"


class BookError(ValueError):
    """The book cannot be built from what is there; the message says from which file and why."""


def build_book(executed: str | Path = EXECUTED, out: str | Path = "_build/html", root: str | Path = ".") -> Path:
    """Build the book into `out`; what was there stays until the new book is complete. Gives the page to open first.

    A chapter that is missing or did not run to its end, and any warning of Jupyter Book, is a BookError.

    Parameters
    ----------
    executed : folder of the executed notebooks, one for each ``book/executed/NN_name`` in ``_toc.yml``.
    out : folder of the finished pages; replaced as a whole. Nothing is built where it is already up to date.
    root : folder of ``_config.yml``, ``_toc.yml`` and ``book/``.
    """
    executed, out, root = Path(executed).resolve(), Path(out).resolve(), Path(root).resolve()
    notebooks = {Path(EXECUTED, path.name): path for path in executed_notebooks(root / "_toc.yml", executed)}
    files = [root / name for name in ("_config.yml", "_toc.yml", "CITATION.cff", "requirements.lock")]
    files += [*root.glob("*.md"), *(root / "book").rglob("*")]
    files += [*root.glob("benchmarks/*.json"), *root.glob("results/*/*/run.json")]
    files += [*root.glob("results/*/09_cold_start/*.csv"), *root.glob("notebooks/*.ipynb")]
    sources = {path.relative_to(root): path for path in files if path.is_file()}
    skipped = {"executed", "__pycache__"}
    sources = {name: path for name, path in sources.items() if not skipped.intersection(name.parts)} | notebooks
    # The API reference is made from the library's docstrings, and its hash stands on the status page.
    made_by = sorted(
        p for p in Path(llmrec_lib.__file__).parent.rglob("*.*") if p.suffix in (".py", ".yaml", ".mplstyle")
    )
    launch = [os.environ.get(name, "") for name in ("GITHUB_REPOSITORY", "GITHUB_REF_NAME")]  # where Colab finds it
    key = content_key({str(name): path for name, path in sources.items()}, made_by, launch)
    index, key_file = out / "index.html", out / KEY_FILE
    made = index.is_file() and key_file.is_file() and key_file.read_text(encoding="utf-8") == key
    if made and index.stat().st_mtime <= key_file.stat().st_mtime:  # else a bare `jupyter-book build .` wrote over it
        return index
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book-", dir=out.parent) as scratch:
        stage = Path(scratch) / "source"
        for name, path in sources.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            if name in notebooks:
                (stage / name).write_text(folded(path.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copy2(path, stage / name)
        html = _jupyter_book(stage)
        (html / KEY_FILE).write_text(key, encoding="utf-8")
        if out.exists():
            os.replace(out, Path(scratch) / "replaced")
        os.replace(html, out)
    return index


def executed_notebooks(toc: Path, executed: Path) -> list[Path]:
    """Executed notebooks that the table of contents asks for, in order; BookError where one is missing or failed."""
    names = re.findall(rf"^[\s-]*file: *{EXECUTED}/(\w+)", toc.read_text(encoding="utf-8"), re.MULTILINE)
    paths = [executed / f"{name}.ipynb" for name in names]
    if missing := [path.stem for path in paths if not path.is_file()]:
        raise BookError(f"{executed} has no executed notebook of {', '.join(missing)}: run `make study` to its end")
    if faults := [fault for path in paths for fault in notebook_faults(path)]:
        raise BookError("these chapters did not run to their end:\n  " + "\n  ".join(faults))
    return paths


def notebook_faults(path: Path) -> list[str]:
    """One line for each cell that failed or that papermill never reached, naming chapter and cell (counted from 1)."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError) as error:
        raise BookError(f"{path} is no notebook: {error!r}") from error
    faults = []
    for number, cell in enumerate(cells, start=1):
        run = cell.get("metadata", {}).get("papermill", {})
        errors = [output for output in cell.get("outputs", []) if output.get("output_type") == "error"]
        found = [f"{error.get('ename')}: {error.get('evalue')}" for error in errors]
        if not found and (run.get("exception") or run.get("status") in ("failed", "pending", "running")):
            found = [f"papermill left it {run.get('status', 'with an exception')}"]
        faults += [f"{path.stem}, cell {number}: {fault}" for fault in found]
    return faults


def folded(notebook: str) -> str:
    """The JSON of a notebook whose code opens with a click on its page; its parameters stay in sight."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and not {"parameters", "hide-input"} & set(tags):
            cell["metadata"]["tags"] = [*tags, "hide-input"]
    return json.dumps(content)


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executed", default=EXECUTED, help="folder of the executed notebooks (default: %(default)s)")
    parser.add_argument("--out", default="_build/html", help="folder of the finished pages (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        print(f"the book is at {build_book(options.executed, options.out)}")
    except (BookError, FileNotFoundError) as error:
        print(f"the book was not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
