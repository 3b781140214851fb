"""The book's own pages build offline, without a warning, and take their numbers out of the executed notebooks."""

import importlib.util
import json
import os
import re
import shutil
from html import unescape
from pathlib import Path

import executed_runs
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from build_book import BookError, build_book

ROOT = Path(__file__).parents[2]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [entry["file"] for part in TOC["parts"] for entry in part["chapters"]]
CHAPTERS = [Path(page).name for page in PAGES if page.startswith("book/executed/")]
VERDICT = "**Not shown on stand-in data**: nothing was computed"

PNG = (  # one white pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8/5+hHgAHggJ/PchI7wAAAABJRU5ErkJggg=="
)
GLUED = {
    "verdict": VERDICT,
    "best_id_name": "ease + sasrec",
    "best_id_ndcg": 0.12345,
    "best_fusion_name": "parallel (z)",
    "best_fusion_ndcg": 0.13579,
    "gain_percent": 10.0,
    "gain_low": -0.01,
    "gain_high": 0.02,
    "simple_ways": "- stand-in data: one weight beats shuffled text in the text's place",
}

ATTACK = "<script>window.attacked = 1</script>"


def glue_output(name, data):
    data = {f"application/papermill.record/{kind}": content for kind, content in data.items()}
    scrapbook = {"mime_prefix": "application/papermill.record/", "name": name}
    return nbformat.v4.new_output("display_data", data=data, metadata={"scrapbook": scrapbook})


def stand_in(name):
    """A notebook as papermill and the runner leave it, with nothing in it."""
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{name} ran\n")]
    if name == "01_data":  # as a notebook shows titles: in a table of pandas
        table = pd.DataFrame({"title": [ATTACK]})
        data = {"text/html": table.to_html(), "text/plain": repr(table)}
        outputs += [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]
    if name == "06_fusion":
        outputs += [glue_output(key, {"text/plain": repr(value)}) for key, value in GLUED.items()]
        image = {"image/png": PNG, "text/plain": "<Figure size 1x1 with 1 Axes>"}
        outputs += [glue_output(name, image) for name in ("gain_figure", "map_figure", "lm_gain_figure")]
    if name == "07_augmentation":
        outputs += [glue_output("verdict", {"text/plain": repr(VERDICT)})]
    if name == "08_compression":
        outputs += [glue_output("verdict", {"text/plain": repr(VERDICT)})]
        outputs += [glue_output("frontier_figure", {"image/png": PNG, "text/plain": "<Figure size 1x1 with 1 Axes>"})]
    if name == "09_cold_start":
        outputs += [glue_output("verdict", {"text/plain": repr(VERDICT)})]
        outputs += [glue_output("cold_figure", {"image/png": PNG, "text/plain": "<Figure size 1x1 with 1 Axes>"})]
    if name in ("10_challenges", "11_conclusions"):
        outputs += [glue_output("verdict", {"text/plain": repr(VERDICT)})]
        image = {"image/png": PNG, "text/plain": "<Figure size 1x1 with 1 Axes>"}
        outputs += [glue_output(name, image) for name in ("attack_figure", "cost_figure", "help_figure")]
        outputs += [
            glue_output("help_table", {"text/plain": repr("| setting | text |\n| --- | --- |\n| stand-in | +1% |")})
        ]
    cells = [
        nbformat.v4.new_markdown_cell(f"# {name[3:]}\n\nA formula: $x_i = \\sum_j S_{{ij}}$"),
        nbformat.v4.new_code_cell("seeds = 2", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print('ran')", execution_count=1, outputs=outputs),
    ]
    run = {
        "peak_memory_mb": 1234.5,
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_gb": 24.0},
        "versions": {"torch": "9.9"},
    }
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        "papermill": {"start_time": "2026-01-02T03:04:05+00:00", "duration": 75.0, "exception": None},
        "llmrec": {
            "stamp": {"notebook": "ab" * 32, "lock": None},
            "parameters": {"dataset": "stand-in", "protocol": "temporal_ratio", "seeds": 2},
            "run": run,
        },
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The repository's pages with stand-in chapters."""
    root = tmp_path_factory.mktemp("book")
    for name in ("_config.yml", "_toc.yml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "book", root / "book", ignore=shutil.ignore_patterns("executed", "__pycache__"))
    (root / "book/executed").mkdir()
    (root / "benchmarks").mkdir()
    for measured in (ROOT / "benchmarks").glob("*.json"):
        shutil.copy(measured, root / "benchmarks")
    for table in [*(ROOT / "results").glob("*/*/run.json"), *(ROOT / "results").glob("*/09_cold_start/*.csv")]:
        (root / table.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(table, root / table.relative_to(ROOT))
    for name in CHAPTERS:
        nbformat.write(stand_in(name), root / f"book/executed/{name}.ipynb")
    return root


@pytest.fixture(scope="module")
def html(source):
    with pytest.MonkeyPatch.context() as patch:
        # The library is imported for its reference, wherever the tests found it.
        patch.setenv("GITHUB_REPOSITORY", "owner/name")
        patch.setenv("GITHUB_REF_NAME", "main")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        return build_book(source / "book/executed", source / "html", source).parent


def words(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_every_page_is_there_and_none_shows_an_error(html):
    for page in [TOC["root"], *PAGES]:
        text = words(html / f"{page}.html")
        assert "Traceback" not in text and "{{" not in text and "Unknown interpreted text role" not in text, page


@pytest.mark.slow
def test_a_script_in_a_title_is_only_text(html):
    page = (html / "book/executed/01_data.html").read_text(encoding="utf-8")
    assert ATTACK not in page and "attacked = 1" in unescape(words(html / "book/executed/01_data.html"))


@pytest.mark.slow
def test_chapters_open_unexecuted_in_jupyterlab_and_where_the_repository_is_known_in_colab(html):
    for name in CHAPTERS:
        page = (html / f"book/executed/{name}.html").read_text(encoding="utf-8")
        assert f'href="http://localhost:8888/lab/tree/notebooks/{name}.ipynb"' in page
        assert f'href="https://colab.research.google.com/github/owner/name/blob/main/notebooks/{name}.ipynb"' in page
        assert (ROOT / f"notebooks/{name}.ipynb").is_file()
    assert "lab/tree" not in (html / "book/glossary.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_first_page_takes_its_numbers_from_the_run(html):
    page = unescape((html / "book/index.html").read_text(encoding="utf-8"))
    text = words(html / "book/index.html")
    for part in (
        "Not shown on stand-in data",
        "ease + sasrec",
        "0.1235",
        "parallel (z)",
        "0.1358",
        "one weight beats shuffled text",
        "data stand-in",
        "seeds 2",
    ):
        assert part in text, part
    image = re.search(r'<img alt="Difference in NDCG@10[^"]*" src="([^"]+)"', page)
    assert (html / "book" / image.group(1)).is_file()


@pytest.mark.slow
def test_the_status_page_says_when_where_and_from_what(html):
    text = words(html / "book/status.html")
    for part in ("2026-01-02 03:04", "1 min 15 s", "1.2 GB", "Some CPU, 2 cores", "abababababab", "torch 9.9"):
        assert part in text, part
    assert all(re.search(rf'href="executed/{name}.html"', (html / "book/status.html").read_text()) for name in CHAPTERS)


@pytest.mark.slow
def test_code_opens_with_a_click_but_parameters_are_seen(html):
    page = (html / "book/executed/06_fusion.html").read_text(encoding="utf-8")
    assert (
        len(re.findall(r'<details class="[^"]*above-input', page)) == 1
    )  # the stand-in has one cell beside its parameters
    assert re.search(r'<div class="cell tag_parameters[^"]*">\s*<div class="cell_input', page)


@pytest.mark.slow
def test_figures_open_alone(html):
    page = (html / "book/index.html").read_text(encoding="utf-8")
    figures = re.findall(r'<a class="full-size" href="([^"]+)"[^>]*><img [^>]*src="([^"]+)"', page)
    assert len(figures) >= 5 and all(target == shown for target, shown in figures)
    assert all((html / "book" / target).is_file() for target, _ in figures)


@pytest.mark.slow
def test_the_changelog_and_the_citation_are_a_page(html):
    text = words(html / "book/changelog.html")
    assert "A change that moves a published number says which, and why" in text
    assert "cff-version" in text and "CC-BY-4.0" in text


@pytest.mark.slow
def test_the_status_page_shows_other_data_sets_and_both_runs_of_a_chapter(html):
    text = unescape(words(html / "book/status.html"))
    elsewhere = json.loads((ROOT / "results/online-retail/06_fusion/run.json").read_text())
    assert re.search(rf"online-retail\s+06_fusion\s+{elsewhere['started'][:10]}", text)
    twice = json.loads((ROOT / "benchmarks/two_runs.json").read_text())["chapters"]
    for chapter, one in twice.items():
        shared = f"{one['rows'] - one['lacking']:,}"
        ndcg, verdicts, any_metric = map(re.escape, said_of(one))
        row = rf"{chapter.replace('/', ' ')}\s+{ndcg}\s+{verdicts}\s+{any_metric}\s+{shared}\s+{one['lacking']:,}\s"
        assert re.search(row, text), chapter
        assert not one["off"] or f"{chapter}, any metric: {one['where']}" in text
        for name in (one.get("verdicts") or {}).get("changed", []):
            assert f"{chapter}, another verdict: {name}" in text
    assert re.search(r"protocol\s+'leave_one_out'", text)  # of amazon-games, which differs from the other data sets'


def said_of(one):
    """The three cells about a chapter that ran twice."""
    ndcg = verdicts = "not recorded"
    if "mean_ndcg" in one:
        off = one["mean_ndcg"] and one["mean_ndcg"]["off"]
        ndcg = "–" if off is None else f"{off:.5f}" if off else "0"
        found = one["verdicts"]
        verdicts = f"{len(found['changed'])} of {found['shared']}" if found else "–"
    metric = one["where"].split(", ")[-2]
    size = f"{100 * one['off']:.1f} %" if metric.startswith("popularity") else f"{one['off']:.5f}"
    return ndcg, verdicts, f"{metric}: {size}" if one["off"] else "0"


@pytest.mark.slow
def test_the_speed_page_shows_each_measurement(html):
    page = html / "book/speed.html"
    text = unescape(words(page))
    for row in json.loads((ROOT / "benchmarks/results.json").read_text()):
        if "factor" in row:
            continue
        assert re.search(rf"{re.escape(row['name'])}\s+{row['ratio']:.1f} ×", text), row["name"]
    for name in ("roof_share", "ratio_at_floor"):
        row = next(row for row in json.loads((ROOT / "benchmarks/results.json").read_text()) if name in row)
        most = row["ratio_at_floor"] if name == "ratio_at_floor" else row["ratio"] / row["roof_share"]
        assert re.search(rf"{re.escape(row['name'])}\s+[\d.]+ ×\s+\d+ ×\s+{most:.1f} ×", text), row["name"]
        if row["ratio"] < most < executed_runs.BenchmarkTable._named(executed_runs.BenchmarkTable.aims, row):
            assert f"would give {most:.1f} ×, so the aim is out of reach here" in text
    minutes = f"{943 * json.loads((ROOT / 'benchmarks/results.json').read_text())[0]['ours'] / 60:,.0f}"
    assert re.search(rf"likelihood over the vocabulary, float32\s+{minutes}\s", text)
    image = re.search(r'<img alt="Two panels[^"]*" src="([^"]+)"', page.read_text(encoding="utf-8"))
    assert (page.parent / image.group(1)).is_file()


@pytest.mark.slow
def test_the_page_about_scale_shows_each_step_and_what_the_soak_saw(html):
    text = unescape(words(html / "book/scale.html"))
    rows = json.loads((ROOT / "benchmarks/scale.json").read_text())["rows"]
    for step in {row["step"] for row in rows}:
        own = [row for row in rows if row["step"] == step]
        cells = [re.escape(step), *(rf"[\d.]+ s, {row['peak MB'] / 1000:.1f} GB" for row in own)]
        assert len(own) == 3
        assert re.search(r"\s+".join(cells), text), step
    soak = json.loads((ROOT / "benchmarks/soak.json").read_text())
    assert re.search(rf"kills\s+{soak['kills']}\b", text)


@pytest.mark.slow
def test_the_page_about_speed_shows_what_a_gpu_changes(html):
    text = unescape(words(html / "book/speed.html"))
    found = json.loads((ROOT / "benchmarks/gpu.json").read_text())
    for row in found["speed"]:
        step, ratio = re.escape(f"{row['step']}, {row['variant']}"), f"{row['ratio']:.0f}"
        assert re.search(rf"{step}\s+[\d.,]+\s+[\d.,]+\s+{row['unit']}/s\s+{ratio} ×", text), step


@pytest.mark.slow
def test_the_page_about_the_whole_model_shows_what_was_measured(html):
    text = unescape(words(html / "book/whole_model.html"))
    gpu, found = (json.loads((ROOT / f"benchmarks/{name}.json").read_text()) for name in ("gpu", "whole"))
    for name, values in gpu["whole"]["ndcg@10"].items():
        assert re.search(rf"{re.escape(name)}\s+{', '.join(f'{value:.4f}' for value in values)}", text), name
    for row in found["means"]:
        assert re.search(rf"{re.escape(row['method'])}\s+{row['value']:.4f}\s+{row['low']:.4f} to", text), row["method"]
    for run in found["trainings"]:
        watched = " → ".join(f"{point['valid_ndcg']:.3f}" for point in run["curve"])
        assert re.search(rf"{re.escape(run['condition'])}\s+{run['seed']}\s+[\d. →]+\s+{watched}", text), run["seed"]
    best = {row["comparison"]: row for row in found["compared"]}["ID + LM against ID"]
    said = f"changes by {best['relative']:+.1%} ({best['mean_a']:.4f} against {best['mean_b']:.4f}"
    assert said in text and said in unescape(words(html / "book/index.html"))
    values, by_seed = (np.load(ROOT / f"benchmarks/{name}.npz") for name in ("whole", "gpu"))
    for row in found["means"]:
        assert values[row["method"]].mean() == pytest.approx(row["value"], abs=1e-6)
    for name, means in gpu["whole"]["ndcg@10"].items():
        own = [by_seed[key].mean() for key in sorted(by_seed) if key.startswith(f"{name}, seed ")]
        assert own == pytest.approx(means, abs=1e-6)


@pytest.mark.slow
def test_the_index_says_where_text_ranks_unseen_items(html):
    text, found = words(html / "book/index.html"), {}
    for folder in sorted((ROOT / "results").glob("*/09_cold_start")):
        values, compared = (pd.read_csv(folder / f"{name}.csv") for name in ("scopes", "comparisons"))
        values, compared = (table[table["scope"] == executed_runs.ColdTable.scope] for table in (values, compared))
        if compared.empty:
            continue
        found[folder.parent.name] = values.set_index("method")["value"]
        gains = compared[compared["significant"] & (compared["difference"] > 0)]
        beaten = gains["comparison"].str.removeprefix("over ")
        said = re.search(rf"{folder.parent.name}, only new items ranked: ID \+ text ([^.]*)\.", text)[1]
        assert ("is better than " + ", ".join(beaten) in said) if len(beaten) else "is better than" not in said
    for system in executed_runs.ColdTable.systems:
        assert " ".join([system, *(f"{values[system]:.4f}" for values in found.values())]) in text


@pytest.mark.slow
def test_pages_need_no_network(html):
    if importlib.util.find_spec(executed_runs.MATHJAX_PACKAGE) is None:
        pytest.skip("formulas need the package sphinx-mathjax-offline")
    for path in html.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]+)"', page)
        loaded += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="(https?:[^"]+)"', page)
        assert not loaded, (path.name, loaded)
    assert (html / "_static/mathjax" / executed_runs.MATHJAX_FILE).is_file()


def test_a_failed_chapter_is_refused_by_name(source, tmp_path):
    failed = tmp_path / "executed"
    shutil.copytree(source / "book/executed", failed)
    notebook = nbformat.read(failed / "06_fusion.ipynb", 4)
    notebook.cells[2].outputs.append(nbformat.v4.new_output("error", ename="LeakError", evalue="user 7", traceback=[]))
    nbformat.write(notebook, failed / "06_fusion.ipynb")
    with pytest.raises(BookError, match="06_fusion, cell 3: LeakError: user 7"):
        build_book(failed, tmp_path / "html", source)
    assert not (tmp_path / "html").exists()


def test_each_notebook_is_a_chapter():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")) == CHAPTERS


def test_each_module_is_in_the_reference():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "llmrec_lib").rglob("*.py")
        if path.name[0] != "_" and path.name != "cli.py"
    }
    assert set(re.findall(r"automodule:: (\S+)", (ROOT / "book/api.md").read_text())) == modules


def test_each_citation_has_a_source():
    keys = set(re.findall(r"^@\w+\{(\S+),$", (ROOT / "book/references.bib").read_text(), re.MULTILINE))
    pages = [path.read_text() for path in (ROOT / "book").glob("*.md")]
    pages += [
        "".join(c["source"]) for p in (ROOT / "notebooks").glob("*.ipynb") for c in json.loads(p.read_text())["cells"]
    ]
    groups = [group for page in pages for group in re.findall(r"\{cite\w*(?::\w+)?\}`([^`]+)`", page)]
    used = {key.strip() for group in groups for key in group.split(",")}
    assert used <= keys, used - keys


def test_the_figure_in_the_readme_is_the_published_one():
    image, chapter = ROOT / "book/_static/gain.png", ROOT / "book/executed/06_fusion.ipynb"
    if not image.is_file() or not chapter.is_file():
        pytest.skip("the full run has not been published yet")
    assert image.read_bytes() == executed_runs.figure_png(json.loads(chapter.read_text()), "gain_figure"), (
        "write it anew: python book/_ext/executed_runs.py"
    )


def test_nothing_published_names_a_folder_of_a_machine():
    texts = {
        path: path.read_text() for suffix in ("csv", "json") for path in (ROOT / "results").glob(f"*/*/*.{suffix}")
    }
    for path in (ROOT / "book/executed").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("image/png", None)
                output.get("data", {}).pop("application/papermill.record/image/png", None)
        texts[path] = json.dumps(notebook)
    assert len(texts) > 20
    for path, text in texts.items():
        assert not re.search(r"(?<![\w./])/(tmp|home|root|work|Users|mnt)/\w", text), path


def test_stale_chapters_are_named_with_what_changed(monkeypatch, capsys):
    import stale

    monkeypatch.chdir(ROOT)
    reasons = stale.stale()
    assert [*reasons] == CHAPTERS
    parts = {"notebook", "parameters", "library", "lock", "data", "models", "versions"}
    for reason in reasons.values():
        changed = reason.removesuffix(" changed").split(", ") if reason.endswith(" changed") else []
        assert set(changed) <= parts
        assert reason == "" or changed or reason == "its results were changed or removed"
    monkeypatch.setattr(stale, "_out_of_date", lambda job: "data changed" if job.chapter == CHAPTERS[1] else "")
    assert stale.main(strict=False) == 0
    assert stale.main(strict=True) == 1
    assert f"{CHAPTERS[0]}: up to date\n{CHAPTERS[1]}: stale (data changed)" in capsys.readouterr().out


def test_the_status_page_names_the_sources_that_changed_since(tmp_path):
    for place in ("notebooks/05_prs_based.ipynb", "requirements.lock"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    notebook, lock = tmp_path / "notebooks/05_prs_based.ipynb", tmp_path / "requirements.lock"
    said = executed_runs.sources_now(tmp_path, "05_prs_based")
    assert executed_runs.changed_since(tmp_path, "05_prs_based", said) == "nothing"
    lock.write_text("torch==1.0\n")
    assert executed_runs.changed_since(tmp_path, "05_prs_based", said) == "lock"
    cells = json.loads(notebook.read_text())
    cells["cells"][0]["source"] = ["Another text, and no import\n"]
    notebook.write_text(json.dumps(cells))
    assert executed_runs.changed_since(tmp_path, "05_prs_based", said) == "notebook, lock"
    assert executed_runs.changed_since(tmp_path, "05_prs_based", {}) == executed_runs.NOT_RECORDED
    assert executed_runs.changed_since(tmp_path, "99_no_chapter", said) == executed_runs.NOT_RECORDED
