"""The runner: nothing runs on wrong parameters, nothing half done is kept, what is up to date is skipped."""

from __future__ import annotations

import json
import os
import shutil
import sys

import nbformat
import pytest

from llmrec_lib.study import ParameterError, declared_parameters, run
from llmrec_lib.study import runner as runner_module
from llmrec_lib.study.parameters import check_values
from llmrec_lib.study.runner import find_chapters

PARAMETERS = 'results_dir = "results"\nseeds = 5\nrate = 0.5\nfast = False\nks = [5, 10]\nword = "a"\n'


def check_parameters(notebook, given):
    return check_values(declared_parameters(notebook), given, notebook.stem)


def write_notebook(path, *cells, parameters=PARAMETERS, tag="parameters", kernelspec=True):
    notebook = nbformat.v4.new_notebook()
    if kernelspec:
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells = [nbformat.v4.new_markdown_cell("# A question"), nbformat.v4.new_code_cell(parameters)]
    notebook.cells[1].metadata["tags"] = [tag]
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with two chapters that leave a mark when they run, and profiles."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "profiles.yaml").write_text("full: {}\nquick: {all: {seeds: 2}, 02_second: {extra: 1}}\n")
    mark = "import os, sys\nopen(f'ran_{seeds}', 'w').close()\nprint(sys.executable, os.environ['OMP_NUM_THREADS'])"
    write_notebook(tmp_path / "notebooks" / "01_first.ipynb", mark)
    write_notebook(tmp_path / "notebooks" / "02_second.ipynb", mark, parameters=PARAMETERS + "extra = 3\n")
    return tmp_path


def ran(project):
    return sorted(path.name for path in project.glob("ran_*"))


def statuses(outcomes):
    return [(outcome.chapter, outcome.status) for outcome in outcomes]


def test_declared_parameters_are_read_with_their_types(tmp_path):
    notebook = write_notebook(tmp_path / "01_a.ipynb")
    assert declared_parameters(notebook) == {
        "results_dir": "results", "seeds": 5, "rate": 0.5, "fast": False, "ks": [5, 10], "word": "a",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("seeds", "3", 3),
        ("rate", 1, 1.0),
        ("rate", "2", 2.0),
        ("fast", "True", True),
        ("ks", "[1, 2]", [1, 2]),
        ("ks", [], []),
        ("word", "3", "3"),
    ],
)
def test_values_are_read_as_the_declared_type(tmp_path, name, value, read):
    got = check_parameters(write_notebook(tmp_path / "01_a.ipynb"), {name: value})[name]
    assert got == read
    assert type(got) is type(read)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seeds", "three"), ("seeds", 2.0), ("seeds", "2.5"), ("seeds", True), ("seeds", 0), ("seeds", None),
        ("rate", "x"), ("rate", True), ("fast", 1), ("fast", "1"), ("ks", "5"), ("ks", '["a"]'), ("ks", [5, 0.5]),
        ("word", 3),
    ],
)  # fmt: skip
def test_wrong_types_and_values_name_the_parameter(tmp_path, name, value):
    with pytest.raises(ParameterError, match=f"'{name}' must be"):
        check_parameters(write_notebook(tmp_path / "01_a.ipynb"), {name: value})


def test_common_values_are_checked(tmp_path):
    notebook = write_notebook(
        tmp_path / "01_a.ipynb", parameters='protocol = "temporal_ratio"\ndataset = "ml-100k"\nmax_users = 0'
    )
    for given in ({"protocol": "temporal"}, {"max_users": -1}, {"dataset": "../x"}, {"dataset": ""}):
        with pytest.raises(ParameterError, match=next(iter(given))):
            check_parameters(notebook, given)


def test_unknown_parameter_lists_the_known_and_the_nearest(tmp_path):
    with pytest.raises(ParameterError, match=r"(?s)'sede'.*mean 'seeds'.*rate = 0.5"):
        check_parameters(write_notebook(tmp_path / "01_a.ipynb"), {"sede": 3})


@pytest.mark.parametrize(
    "parameters",
    ["a = 1 + x", "a: int = 1", "a = None", "a = b = 1", "a = [\n1]", "a = 1; a = 2", "a =", "print(1)", "a = (1,)"],
)
def test_parameters_cell_must_be_plain_literals(tmp_path, parameters):
    with pytest.raises(ParameterError, match="parameters cell, line 1"):
        declared_parameters(write_notebook(tmp_path / "01_a.ipynb", parameters=parameters))


def test_notebook_without_parameters_cell_or_kernelspec(tmp_path):
    with pytest.raises(ParameterError, match="0 cells tagged"):
        declared_parameters(write_notebook(tmp_path / "01_a.ipynb", tag="other"))
    with pytest.raises(ParameterError, match="no kernelspec"):
        declared_parameters(write_notebook(tmp_path / "01_a.ipynb", kernelspec=False))
    (tmp_path / "01_a.ipynb").write_text("[]")
    with pytest.raises(ParameterError, match="not a Jupyter notebook"):
        declared_parameters(tmp_path / "01_a.ipynb")


def test_chapters_by_number_name_or_both(project):
    first, second = sorted((project / "notebooks").glob("*.ipynb"))
    for name in ("02", "2", "second", "02_second"):
        assert find_chapters([name], project / "notebooks") == [second]
    assert find_chapters(["2", "1"], project / "notebooks") == [first, second]
    assert find_chapters([], project / "notebooks") == [first, second]
    for name in ("3", "", "0", "sec"):
        with pytest.raises(ParameterError, match="01_first, 02_second"):
            find_chapters([name], project / "notebooks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameters": {"sede": 3}}, "'sede'"),
        ({"parameters": {"seeds": "many"}}, "'seeds' must be"),
        ({"chapters": ["1"], "parameters": {"extra": 3}}, "'extra'"),
        ({"profile": "slow"}, "full, quick"),
        ({"engine": "spark"}, "local, dask"),
        ({"scheduler": "tcp://localhost:1"}, "dask"),
        ({"chapters": ["9"]}, "no chapter"),
    ],
)
def test_nothing_runs_if_anything_asked_for_is_wrong(project, arguments, message):
    with pytest.raises(ParameterError, match=message):
        run(**arguments)
    assert not ran(project)
    assert not (project / "_build").exists()


def test_one_wrong_chapter_stops_all_before_the_first(project):
    write_notebook(project / "notebooks" / "02_second.ipynb", parameters=PARAMETERS.replace("seeds = 5", 'seeds = "5"'))
    (project / "notebooks" / "profiles.yaml").write_text("quick: {}\n")
    with pytest.raises(ParameterError, match="02_second: parameter 'seeds' must be text"):
        run(parameters={"seeds": 3})
    assert not ran(project)


@pytest.mark.parametrize(
    "profiles", ["quick: {all: {sede: 1}}", "quick: {02_second: {rat: 1}}", "quick: {03_x: {seeds: 1}}"]
)
def test_misspelt_profile_entries_are_errors(project, profiles):
    (project / "notebooks" / "profiles.yaml").write_text(profiles)
    with pytest.raises(ParameterError, match="quick"):
        run(["1"])
    assert not ran(project)


def test_run_skip_and_rerun(project, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert statuses(run(["2"])) == [("02_second", "done")]
    assert ran(project) == ["ran_2"]  # the profile's seeds
    executed = project / "_build" / "executed" / "02_second.ipynb"
    text = executed.read_text()
    notebook = json.loads(text)
    interpreter, threads = notebook["cells"][-1]["outputs"][0]["text"][0].split()
    assert interpreter.replace("<python>", sys.prefix) == sys.executable
    assert int(threads) >= 1
    assert str(project) not in text
    assert sys.prefix not in text
    assert notebook["metadata"]["llmrec"]["parameters"]["extra"] == 1

    assert statuses(run(["2"])) == [("02_second", "up to date")]
    lines = []
    monkeypatch.setattr(
        runner_module, "_execute", lambda job: runner_module.ChapterOutcome(job.chapter, "done", 0, job.target)
    )
    cells = ["print(1)"]
    run(["2"], parameters={"extra": 7}, report=lines.append)
    assert "parameters changed" in lines[0]
    run(["2"], force=True, report=lines.append)
    assert "asked for" in lines[-2]
    write_notebook(project / "notebooks" / "02_second.ipynb", *cells, parameters=PARAMETERS + "extra = 3\n")
    run(["2"], report=lines.append)
    assert "notebook changed" in lines[-2]


def test_a_model_that_was_trained_again_in_its_folder_outdates_the_chapter(project, tmp_path):
    model, lines = tmp_path / "my-encoder", []
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"first weights")
    parameters = PARAMETERS + f"extra = 1\nencoder = {str(model)!r}\n"
    write_notebook(project / "notebooks" / "02_second.ipynb", "print(1)", parameters=parameters)
    assert statuses(run(["2"])) == [("02_second", "done")]
    assert statuses(run(["2"])) == [("02_second", "up to date")]
    (model / "model.safetensors").write_bytes(b"other weights")
    assert statuses(run(["2"], report=lines.append)) == [("02_second", "done")]
    assert "models changed" in lines[0]


def test_failed_chapter_is_kept_apart_and_the_others_run(project):
    write_notebook(project / "notebooks" / "01_first.ipynb", "x = 1", "raise RuntimeError(f'no {word}')")
    outcomes = run(parameters={"word": "luck"})
    assert statuses(outcomes) == [("01_first", "failed"), ("02_second", "done")]
    assert "01_first failed in cell 4 with RuntimeError: no luck" in outcomes[0].error
    executed = project / "_build" / "executed"
    assert sorted(path.name for path in executed.glob("[!.]*")) == ["01_first.failed.ipynb", "02_second.ipynb"]


def test_chapters_side_by_side_and_the_last_one_alone(project, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meet = """
import os, pathlib, time
pathlib.Path(f'begun_{word}').touch()
latest = time.time() + 60
while len(list(pathlib.Path('.').glob('begun_*'))) < 2:
    assert time.time() < latest, 'the other chapter does not begin'
    time.sleep(0.1)
time.sleep(1)
pathlib.Path(f'ended_{word}').touch()
print(os.environ['OMP_NUM_THREADS'])
"""
    after = "import pathlib\nassert len(list(pathlib.Path('.').glob('ended_*'))) == 2"
    for number, cell in (("01_first", meet), ("02_second", meet), ("03_third", after)):
        parameters = PARAMETERS.replace('word = "a"', f'word = "{number}"') + "extra = 3\n"
        write_notebook(project / "notebooks" / f"{number}.ipynb", cell, parameters=parameters)
    lines = []
    outcomes = run(at_once=2, report=lines.append)
    assert statuses(outcomes) == [("01_first", "done"), ("02_second", "done"), ("03_third", "done")], lines
    assert "03_third: done" in lines[-1]
    executed = json.loads((project / "_build" / "executed" / "01_first.ipynb").read_text())
    assert executed["cells"][-1]["outputs"][0]["text"][0].split() == [str(max(1, os.cpu_count() // 2))]


def test_one_that_fails_side_by_side_leaves_the_others_alone(project):
    write_notebook(project / "notebooks" / "01_first.ipynb", "raise RuntimeError(f'no {word}')")
    write_notebook(project / "notebooks" / "03_third.ipynb", "print(1)")
    outcomes = run(parameters={"word": "luck"}, at_once=3)
    assert statuses(outcomes) == [("01_first", "failed"), ("02_second", "done"), ("03_third", "done")]
    assert "RuntimeError: no luck" in outcomes[0].error


def test_dead_kernel_is_a_failure_with_its_cell(project):
    write_notebook(project / "notebooks" / "01_first.ipynb", "x = 1", "import os; os._exit(1)")
    (outcome,) = run(["first"])
    assert outcome.status == "failed"
    assert "in cell 4 with DeadKernelError" in outcome.error


def test_kernel_that_dies_at_its_start_is_tried_once_more(project, monkeypatch):
    import papermill

    tries = []

    def refuse(*_, **__):
        tries.append(1)
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(papermill, "execute_notebook", refuse)
    (outcome,) = run(["first"])
    assert len(tries) == 2
    assert "before its first cell with RuntimeError: Kernel died" in outcome.error


def test_changed_or_removed_results_are_made_again(project):
    write_notebook(
        project / "notebooks" / "01_first.ipynb",
        "import os\nfolder = os.path.join(results_dir, dataset, '01_first')\nos.makedirs(folder, exist_ok=True)",
        "with open(folder + '/metrics.csv', 'w') as file: file.write('a')",
        parameters='dataset = "ml-100k"\n' + PARAMETERS,
    )
    assert statuses(run(["1"], results_dir="out")) == [("01_first", "done")]
    assert statuses(run(["1"], results_dir="out")) == [("01_first", "up to date")]
    (project / "out" / "ml-100k" / "01_first" / "metrics.csv").unlink()
    assert statuses(run(["1"], results_dir="out")) == [("01_first", "done")]


@pytest.mark.slow
def test_dask_gives_what_local_gives(project):
    pytest.importorskip("distributed")
    outcomes = run(["2"], engine="dask")
    assert statuses(outcomes) == [("02_second", "done")]
    assert statuses(run(["2"], engine="local")) == [("02_second", "up to date")]
    assert ran(project) == ["ran_2"]


def test_a_changed_module_outdates_only_what_imports_it(tmp_path, monkeypatch):
    """In a copy of the library: a change in one file changes the hashes of those notebooks alone that need the file."""
    from llmrec_lib.study import provenance

    package = tmp_path / "llmrec_lib"
    shutil.copytree(provenance.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", package)
    notebooks = {
        "recommenders": "from llmrec_lib.baselines import train\nfrom llmrec_lib.study import Study",
        "fusion": "from llmrec_lib.fusion import (\n    HybridFusion,\n    tune,\n)\nimport llmrec_lib.llm_based",
        "texts": "from llmrec_lib.language_models import encoder, catalog",
        "a magic": "%matplotlib inline\nfrom llmrec_lib.evaluation import evaluate",
        "nothing": "x = 1",
    }

    def hashes(results_only):
        provenance.library_hash.cache_clear()
        return {n: provenance.library_hash(results_only=results_only, used_by=text) for n, text in notebooks.items()}

    def outdated(file, results_only=False, more="another = 1"):
        before, path = hashes(results_only), package / file
        content = path.read_text(encoding="utf-8")
        path.write_text(f"{content}\n{more}\n", encoding="utf-8")
        after = hashes(results_only)
        path.write_text(content, encoding="utf-8")
        return {name for name in notebooks if before[name] != after[name]}

    everything = set(notebooks)
    assert outdated("cache.py") == everything
    assert outdated("fusion.py") == {"fusion", "nothing"}  # a notebook that imports nothing has the hash of all
    assert outdated("language_models/finetune.py") == {"fusion", "nothing"}  # by way of llm_based
    assert outdated("language_models/low_rank.py") == {"fusion", "nothing"}
    assert outdated("language_models/memorisation.py") == {"nothing"}
    assert outdated("language_models/encoder.py") == {"fusion", "texts", "nothing"}
    assert outdated("baselines.yaml") == {"recommenders", "nothing"}
    assert outdated("evaluation/__init__.py") == everything - {"texts"}
    assert outdated("plotting.py") == {"nothing"}
    assert outdated("study/runner.py") == {"recommenders", "fusion", "nothing"}
    assert outdated("study/runner.py", results_only=True) == set()
    assert outdated("cache.py", more="# a comment\n\n\n'''and prose'''") == set()
    provenance.library_hash.cache_clear()
