"""The book's builder refuses what a reader could not trust: failed cells, missing chapters, warnings."""

import nbformat
import pytest
from build_book import BookError, build_book, main, notebook_faults

CONFIG = """title: Small
author: nobody
execute:
  execute_notebooks: "off"
only_build_toc_files: true
"""
TOC = """format: jb-book
root: book/index
chapters:
- file: book/executed/01_data
"""


def notebook(text, outputs=(), **metadata):
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=1, outputs=list(outputs))
    cell.metadata.update(metadata)
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {text}"), cell], metadata=language)


@pytest.fixture
def root(tmp_path):
    for folder in ("book/executed", "mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "_config.yml").write_text(CONFIG)
    (tmp_path / "_toc.yml").write_text(TOC)
    (tmp_path / "book/index.md").write_text("# Start\n")
    nbformat.write(notebook("published chapter"), tmp_path / "book/executed/01_data.ipynb")
    nbformat.write(notebook("my own run"), tmp_path / "mine/01_data.ipynb")
    return tmp_path


def test_failed_cells_are_named(root):
    path = root / "mine/01_data.ipynb"
    assert notebook_faults(path) == []
    error = nbformat.v4.new_output("error", ename="LeakError", evalue="user 7 was seen", traceback=[])
    nbformat.write(notebook("x", [error]), path)
    assert notebook_faults(path) == ["01_data, cell 2: LeakError: user 7 was seen"]
    for status in ({"status": "failed"}, {"status": "pending"}, {"exception": True}):
        nbformat.write(notebook("x", papermill=status), path)
        assert len(notebook_faults(path)) == 1
    with pytest.raises(BookError, match="01_data, cell 2"):
        build_book(root / "mine", root / "html", root)
    assert not (root / "html").exists()


def test_missing_chapters_are_named(root):
    (root / "mine/01_data.ipynb").unlink()
    with pytest.raises(BookError, match="no executed notebook of 01_data"):
        build_book(root / "mine", root / "html", root)


def test_missing_book_is_an_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    assert "_toc.yml" in capsys.readouterr().err


@pytest.mark.slow
def test_build_from_own_notebooks_then_skip_then_refuse_a_warning(root, capfd):
    index = build_book(root / "mine", root / "html", root)
    page = root / "html/book/executed/01_data.html"
    assert index.is_file()
    assert "my own run" in page.read_text() and "published chapter" not in page.read_text()
    assert "published chapter" in (root / "book/executed/01_data.ipynb").read_text()

    page.write_text("kept")
    build_book(root / "mine", root / "html", root)
    assert page.read_text() == "kept"  # up to date: nothing was built

    (root / "book/index.md").write_text("# Start\n\n[](no-such-target)\n")
    with pytest.raises(BookError, match="Jupyter Book ended with status"):
        build_book(root / "mine", root / "html", root)
    assert "no-such-target" in capfd.readouterr().err
    assert page.read_text() == "kept"  # the old book stays
    assert not list(root.glob(".book-*"))
