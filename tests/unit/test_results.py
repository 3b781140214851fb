"""Study: units are kept and read back only for the same things; the tables keep their contract; no place leaks."""

from __future__ import annotations

import json
import os
import platform
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llmrec_lib.evaluation import Evaluation
from llmrec_lib.study import ParameterError, Study, provenance, results


@pytest.fixture
def parameters(tmp_path, monkeypatch):
    """Parameters of a study of three events, away from this machine's data and models."""
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\nu\tj\t2\nv\ti\t3\n")
    models = types.ModuleType("llmrec_lib.language_models")
    listed = pd.DataFrame({"name": ["minilm", "smollm2-135m"], "sha256": ["abc", "def"]})
    models.catalog = types.SimpleNamespace(list_models=lambda: listed, split_name=lambda name: (name, ""))
    monkeypatch.setitem(sys.modules, models.__name__, models)
    return {"dataset": "tiny", "data_dir": str(tmp_path / "data"), "results_dir": str(tmp_path / "results"), "seeds": 2}


def evaluation(method="ease", family="id", seed=0, protocol="temporal_ratio", value=0.25, phase="test"):
    per_user = pd.DataFrame({"ndcg@10": [value, 1 / 3], "recall@5": [0.0, 1.0]}, index=pd.Index([2, 1], name="user"))
    return Evaluation(method, family, "tiny", protocol, seed, phase, per_user, {"coverage@10": 0.5}, 1.25)


def test_tables_keep_their_contract(parameters, tmp_path):
    study = Study("06_fusion", **parameters, max_users=7, depth=3)
    study.unit("rrf", family="fusion", seed=1, compute=lambda: evaluation("rrf", "fusion", 1))
    study.unit("ease", family="id", seed=0, compute=lambda: evaluation())
    study.unit(
        "ease", family="id", seed=0, protocol="leave_one_out", compute=lambda: evaluation(protocol="leave_one_out")
    )
    study.note("trials", 20)
    study.table(pd.DataFrame({"x": [1]}), "weights.csv")
    study.finish()
    folder = tmp_path / "results" / "tiny" / "06_fusion"
    metrics = pd.read_csv(folder / "metrics.csv")
    assert list(metrics) == [
        "dataset",
        "protocol",
        "method",
        "family",
        "seed",
        "metric",
        "k",
        "value",
        "n_users",
        "seconds",
    ]
    assert len(metrics) == 9
    order = ["protocol", "method", "family", "seed", "metric", "k"]
    assert metrics[order].equals(metrics[order].sort_values(order, ignore_index=True))
    row = metrics.query("method == 'rrf' and metric == 'ndcg'").iloc[0]
    assert (row["k"], row["seed"], row["n_users"], row["seconds"]) == (10, 1, 2, 1.25)
    assert row["value"] == pytest.approx((0.25 + 1 / 3) / 2, abs=1e-12)
    per_user = pd.read_parquet(folder / "per_user.parquet")
    assert list(per_user) == ["method", "seed", "user", "metric", "k", "value", "protocol"]
    assert len(per_user) == 12
    assert pd.read_csv(folder / "weights.csv")["x"].tolist() == [1]

    text = (folder / "run.json").read_text()
    record = json.loads(text)
    assert record["parameters"]["depth"] == 3
    assert record["parameters"]["data_dir"] == "data"  # the last component
    assert record["models"]["encoder"] == {"name": "minilm", "sha256": "abc"}
    assert record["notes"] == {"trials": 20}
    assert record["data"]["fingerprint"] == study.data.fingerprint
    assert record["versions"]["python"] == platform.python_version()
    assert {"cpu", "cores", "memory_gb"} <= set(record["machine"])
    assert record["peak_memory_mb"] > 10
    for private in (
        str(tmp_path),
        str(Path.home()),
        str(Path.cwd()),
        sys.prefix,
        platform.node(),
        os.environ.get("USER"),
    ):
        assert not private or f'"{private}' not in text.replace("/", '"/')


def test_rows_do_not_depend_on_the_order_of_units(parameters, tmp_path):
    contents = []
    for chapter, seeds in (("01_a", (0, 1)), ("02_b", (1, 0))):
        study = Study(chapter, **parameters)
        for seed in seeds:
            study.unit("ease", family="id", seed=seed, compute=lambda seed=seed: evaluation(seed=seed))
        study.finish()
        folder = tmp_path / "results" / "tiny" / chapter
        contents.append([(folder / name).read_bytes() for name in ("metrics.csv", "per_user.parquet")])
    assert contents[0] == contents[1]


def calls(parameters, crash_at=None, **changes):
    """Run a chapter of three units that dies in one of them; return the seeds that were computed."""
    watch = types.SimpleNamespace(computed=[], crash_at=crash_at)  # an object without readable content: not in the key

    def compute(seed):
        if seed == watch.crash_at:
            raise KeyboardInterrupt
        watch.computed.append(seed)
        return evaluation(seed=seed)

    study = Study("06_fusion", **{**parameters, **changes})
    try:
        for seed in range(3):
            study.unit("ease", family="id", seed=seed, compute=lambda seed=seed: compute(seed))
        study.finish()
    except KeyboardInterrupt:
        pass
    return watch.computed


def test_a_killed_run_goes_on_where_it_was(parameters, tmp_path):
    folder = tmp_path / "results" / "tiny" / "06_fusion"
    assert calls(parameters, crash_at=2) == [0, 1]
    assert not (folder / "metrics.csv").exists()
    assert calls(parameters) == [2]
    first = (folder / "metrics.csv").read_bytes()
    assert json.loads((folder / "run.json").read_text())["units"] == {"computed": 1, "read_back": 2}
    assert calls(parameters) == []
    assert (folder / "metrics.csv").read_bytes() == first
    for unit in (folder / "units").iterdir():
        unit.write_bytes(b"damaged")
    assert calls(parameters) == [0, 1, 2]


def test_a_unit_is_made_again_when_something_that_decides_it_changed(parameters, tmp_path, monkeypatch):
    assert calls(parameters) == [0, 1, 2]
    assert calls(parameters, seeds=9) == []
    assert calls(parameters, max_users=5) == [0, 1, 2]
    with monkeypatch.context() as context:
        context.setattr(provenance, "library_hash", lambda **_: "other")
        assert calls(parameters) == [0, 1, 2]
    with open(tmp_path / "data" / "tiny" / "tiny.inter", "a") as file:
        file.write("v\tj\t4\n")
    assert calls(parameters) == [0, 1, 2]


def test_a_unit_depends_on_the_values_its_function_names(parameters):
    values = []
    for penalty, key in ((1.0, ()), (2.0, ()), (2.0, np.arange(3))):

        def fit():
            return evaluation(value=penalty)  # noqa: B023

        def compute():
            return fit()

        unit = Study("02_baselines", **parameters).unit("ease", family="id", seed=0, key=key, compute=compute)
        values.append(unit.per_user["ndcg@10"].iloc[0])
    assert values == [1.0, 2.0, 2.0]
    assert len(list((Path(parameters["results_dir"]) / "tiny" / "02_baselines" / "units").iterdir())) == 3


OFFSET = 0.0


def shifted(value):
    return value + OFFSET


def test_a_unit_depends_on_names_inside_lambdas_and_generators_too(parameters, monkeypatch):
    def unit():
        compute = lambda: evaluation(value=sum(shifted(value) for value in [1.0]))  # noqa: E731
        return Study("02_baselines", **parameters).unit("ease", family="id", seed=0, compute=compute)

    assert unit().per_user["ndcg@10"].iloc[0] == 1
    monkeypatch.setattr(sys.modules[__name__], "OFFSET", 2.0)
    assert unit().per_user["ndcg@10"].iloc[0] == 3


def test_a_unit_depends_on_default_arguments(parameters):
    def unit(value):
        compute = lambda value=value: evaluation(value=value)  # noqa: E731
        return Study("02_baselines", **parameters).unit("ease", family="id", seed=0, compute=compute)

    assert [unit(value).per_user["ndcg@10"].iloc[0] for value in (0.25, 0.5, 0.25)] == [0.25, 0.5, 0.25]


def test_read_back_is_what_was_computed(parameters):
    fresh = Study("01_a", **parameters).unit("ease", family="id", seed=0, compute=evaluation)
    again = Study("01_a", **parameters).unit("ease", family="id", seed=0, compute=evaluation)
    pd.testing.assert_frame_equal(fresh.per_user, again.per_user)
    assert again.per_user.index.name == "user"
    assert (fresh.catalogue, fresh.seconds, fresh.phase) == (again.catalogue, again.seconds, again.phase)


def test_mislabelled_and_repeated_units_are_refused(parameters):
    study = Study("01_a", **parameters)
    with pytest.raises(ValueError, match="labelled"):
        study.unit("bpr", family="id", seed=0, compute=evaluation)
    with pytest.raises(ValueError, match="family"):
        study.unit("ease", family="hybrid", seed=0, compute=evaluation)
    study.unit("ease", family="id", seed=0, compute=evaluation)
    with pytest.raises(ValueError, match="name of its own"):
        study.unit("ease", family="id", seed=0, key="other", compute=evaluation)


def test_validation_units_are_kept_but_are_no_results(parameters):
    study = Study("01_a", **parameters)
    study.unit("ease", family="id", seed=0, compute=lambda: evaluation(phase="valid"))
    with pytest.raises(ValueError, match="no test unit"):
        study.finish()


@pytest.mark.parametrize("name", ["metrics.csv", "../x.csv", "x.txt"])
def test_table_names(parameters, name):
    with pytest.raises(ValueError, match="name|written"):
        Study("01_a", **parameters).table(pd.DataFrame(), name)


@pytest.mark.parametrize(
    "wrong", [{"seeds": "3"}, {"seeds": 1.5}, {"protocol": "x"}, {"max_users": -1}, {"llm": 1}, {"own": None}]
)
def test_types_are_checked_in_the_notebook_too(parameters, wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        Study("01_a", **{**parameters, **wrong})


def test_one_line_says_what_is_used(parameters, capsys, tmp_path):
    Study("01_a", **parameters)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("01_a: dataset='tiny', data_dir='data', protocol='temporal_ratio', seeds=2")
    assert str(tmp_path) not in line


def test_what_papermill_injected_is_checked(parameters, monkeypatch):
    declared = "seeds = 5\nword = 'a'"
    for injected, message in (
        ("sede = 3", "'sede'.*mean 'seeds'"),
        ('seeds = "3"', "'seeds' must be"),
        ("word = 1", "'word'"),
    ):
        monkeypatch.setattr(
            results, "_session_cells", lambda injected=injected: ["", declared, f"# Parameters\n{injected}"]
        )
        with pytest.raises(ParameterError, match=message):
            Study("01_a", **parameters)
    monkeypatch.setattr(results, "_session_cells", lambda: ["", "# Parameters\nseeds = 3", declared])
    with pytest.raises(ParameterError, match="unknown parameter 'seeds'"):  # papermill found no parameters cell
        Study("01_a", **parameters)
    monkeypatch.setattr(results, "_session_cells", lambda: ["", declared, "# Parameters\nseeds = 3", "Study()"])
    Study("01_a", **parameters)
