"""Each fault of RecBole that is mended, and that nothing of the mending is left in the process."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from llmrec_lib import _recbole
from llmrec_lib.baselines import BASELINES
from llmrec_lib.datasets import load_folder
from llmrec_lib.evaluation import evaluate
from llmrec_lib.recommender import RecBoleRecommender, Recommender, to_recbole
from llmrec_lib.splits import LeakError, split
from tests.checkerboard import write_checkerboard

ALIASES = ("float_", "complex_", "unicode_", "float")
ROOT = Path(__file__).parents[2]


def fit(model, parts, **settings):
    return _recbole.fit(model, parts, settings, 0, progress=False)


def environment() -> dict:
    """Without what scikit-learn and torch's compiler set when they are first imported."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("KMP_", "TORCHINDUCTOR_"))}


def process_state() -> dict:
    return {
        "argv": list(sys.argv),
        "environment": environment(),
        "numpy": set(vars(np)),
        "dok": "_update" in vars(sp.dok_matrix),
        "anomaly": torch.is_anomaly_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "python rng": random.getstate(),
        "numpy rng": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch rng": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "cwd": os.getcwd(),
    }


def assert_same(before: dict, after: dict) -> None:
    for name, value in before.items():
        assert after[name] == value, f"{name} changed"


@pytest.fixture
def strange_process(monkeypatch, tmp_path):
    """A process with options of its own and the random states somewhere in the middle."""
    monkeypatch.setattr(sys, "argv", ["program", "--epochs=3", "--learning_rate=9", "--gpu_id=5"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    monkeypatch.chdir(tmp_path)
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    return tmp_path


# Each entry of FAULTS has its tests here; a new entry needs a new line.
TESTED = {
    "numpy aliases": ["test_process_state_is_as_before", "test_aliases_are_there_inside_only"],
    "dok_matrix._update": ["test_process_state_is_as_before", "test_graph_models_train"],
    "torch.load": ["test_pickles_are_not_read"],
    "collector .cpu()": ["test_catalogue_metrics_of_recbole_work"],
    "anomaly mode": ["test_anomaly_mode_stays_as_it_was"],
    "process state": ["test_process_state_is_as_before", "test_options_of_the_program_are_not_read"],
    "unmasked sequences": ["test_validation_of_sequences_is_masked"],
    "float32 time": ["test_order_does_not_depend_on_rounded_time"],
    "prefix rows": ["test_each_event_but_the_first_is_a_target_once", "test_loss_at_every_position"],
    "popularity by batch": ["test_pop_counts_events"],
}


def test_every_fault_has_a_test():
    assert set(TESTED) == set(_recbole.FAULTS)
    assert all(callable(globals()[name]) for names in TESTED.values() for name in names)


@pytest.mark.parametrize("model", ["Pop", "BPR", "LightGCN", "SASRec", "FM", "EASE"])
def test_process_state_is_as_before(checkerboard_split, strange_process, model):
    name = {"SASRec": "sasrec", "FM": "fm", "BPR": "bpr", "LightGCN": "lightgcn", "EASE": "ease", "Pop": "pop"}[model]
    settings = {**BASELINES[name].settings, "epochs": 2, "eval_step": 1}
    if model == "FM":
        settings["item_columns"] = ["genre"]
    before = process_state()
    state = fit(model, checkerboard_split, **settings)
    assert_same(before, process_state())
    if model != "EASE":
        restored = _recbole.restore(model, checkerboard_split, settings, 0, state)
        recommender = RecBoleRecommender(restored, checkerboard_split, model)
        recommender.score(torch.tensor([1, 2]))
        _recbole.judge(to_recbole(recommender), checkerboard_split, ["Recall"], [5])()
        assert_same(before, process_state())
    assert list(strange_process.iterdir()) == []  # no log_tensorboard/, saved/, log/


def test_state_is_restored_after_an_error(checkerboard_split, strange_process):
    before = process_state()
    with pytest.raises(ValueError, match="BPR"):
        fit("NoSuchModel", checkerboard_split)
    with pytest.raises(RuntimeError), _recbole.contained(5):
        random.random(), np.random.rand(), torch.rand(1)
        sys.argv.append("--x")
        torch.autograd.set_detect_anomaly(True)
        torch.backends.cudnn.deterministic = True
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        np.bool = bool
        raise RuntimeError
    assert_same(before, process_state())


def test_a_variable_that_was_not_set_is_not_set_afterwards(monkeypatch, checkerboard_split):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fit("Pop", checkerboard_split, epochs=1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_containers_nest(strange_process):
    before = process_state()
    with _recbole.contained(1):
        with _recbole.contained(2):
            torch.rand(3)
        assert all(hasattr(np, name) for name in ALIASES)
        assert hasattr(sp.dok_matrix, "_update")
    assert_same(before, process_state())


def test_seed_decides_inside(strange_process):
    draws = []
    for seed in (3, 3, 4):
        with _recbole.contained(seed):
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[1], draws[2], strict=True))


def test_aliases_are_there_inside_only():
    assert not any(name in vars(np) for name in ALIASES)
    with _recbole.contained():
        assert np.float_ is np.float64 and np.complex_ is np.complex128 and np.unicode_ is np.str_
    assert not any(name in vars(np) for name in ALIASES)


def test_graph_models_train(checkerboard_split):
    state = fit("LightGCN", checkerboard_split, epochs=1, embedding_size=8)
    assert state["user_embedding.weight"].shape == (25, 8)


def test_options_of_the_program_are_not_read(checkerboard_split, strange_process):
    state = fit("BPR", checkerboard_split, epochs=2, eval_step=1, embedding_size=8)
    assert int(state["epochs"]) == 2  # not the 3 of the command line
    assert sys.argv[1] == "--epochs=3"


@pytest.mark.parametrize("enabled", [True, False])
def test_anomaly_mode_stays_as_it_was(checkerboard_split, enabled):
    torch.autograd.set_detect_anomaly(enabled)
    try:
        _recbole._model_class.cache_clear()
        with _recbole.contained(0):
            _recbole._model_class("SASRec", True)
            assert not torch.is_anomaly_enabled()  # in training it would cost half of the time
        assert torch.is_anomaly_enabled() == enabled
    finally:
        torch.autograd.set_detect_anomaly(False)


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_are_not_read(checkerboard_split, tmp_path, monkeypatch):
    sung = tmp_path / "the canary has sung"
    checkpoint = tmp_path / "checkpoint.pth"
    with open(checkpoint, "wb") as file:
        pickle.dump(Canary(sung), file)
    with open(checkpoint, "rb") as file:
        pickle.load(file).close()
    assert sung.exists()  # the canary can sing
    sung.unlink()
    with _recbole.contained(0):
        built = _recbole.build("BPR", checkerboard_split, {}, 0)
        trainer = _recbole.make_trainer(built, "BPR", lambda: 0.0)
        with pytest.raises(ValueError, match="checkpoint.pth.*pickles.*not read"):
            trainer.resume_checkpoint(str(checkpoint))
    assert not sung.exists()
    # Nor does training, restoring or evaluating load or save any pickle.
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: pytest.fail("a checkpoint was read or written"))
    settings = {"epochs": 2, "eval_step": 1}
    state = fit("BPR", checkerboard_split, **settings)
    model = _recbole.restore("BPR", checkerboard_split, settings, 0, state)
    wrapped = to_recbole(RecBoleRecommender(model, checkerboard_split, "bpr"))
    assert _recbole.judge(wrapped, checkerboard_split, ["NDCG"], [5])()["ndcg@5"] > 0


def test_catalogue_metrics_of_recbole_work(checkerboard_split):
    metrics = ["ItemCoverage", "GiniIndex", "ShannonEntropy", "AveragePopularity", "TailPercentage"]
    model = RecBoleRecommender(
        _recbole.restore("BPR", checkerboard_split, {}, 0, fit("BPR", checkerboard_split, epochs=1)),
        checkerboard_split,
        "b",
    )
    values = _recbole.judge(to_recbole(model), checkerboard_split, metrics, [5])()
    assert set(values) == {f"{name.lower()}@5" for name in metrics}
    assert all(np.isfinite(value) for value in values.values())


class Memory(Recommender):
    """Recommends again what the user has had, the newest first, and then the target: right only behind a mask."""

    def score(self, users):
        seen = torch.from_numpy(self.split.seen(self.phase)[users.numpy()].toarray())
        return 9 * seen + torch.from_numpy(self.split.targets(self.phase)[users.numpy()].toarray())


def test_validation_of_sequences_is_masked(checkerboard_split, monkeypatch):
    """A sequential model that scores like `Memory` is at 1.0 on validation; unmasked it would be at 0 for k = 1."""
    memory = Memory(checkerboard_split, "memory")
    monkeypatch.setattr(_recbole, "full_sort_scores", lambda model, parts, users, phase: memory.at(phase).score(users))
    state = fit("SASRec", checkerboard_split, **{**BASELINES["sasrec"].settings, "epochs": 1, "eval_step": 1})
    assert state["valid_curve"].tolist() == [1.0]
    assert _recbole.judge(to_recbole(memory, "valid"), checkerboard_split, ["Hit"], [1])()["hit@1"] == 1.0


def test_order_does_not_depend_on_rounded_time(tmp_path):
    """Events every ten seconds, a billion seconds in: float32 would make them one or two instants."""
    path = tmp_path / "close"
    path.mkdir()
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(6):
        rows += [f"u{user}\ti{(3 * user + place) % 8}\t{1_000_000_000 + 10 * (7 - place)}" for place in range(8)]
    (path / "close.inter").write_text("\n".join(rows) + "\n")
    parts = split(load_folder(path), "leave_one_out")
    assert len(np.unique(np.float32(parts.dataset.interactions["timestamp"]))) < 3
    for user in range(1, 7):
        assert (
            np.diff(
                parts.dataset.interactions["timestamp"].to_numpy()[parts.train[parts.pairs("train")[0] == user]]
            ).min()
            > 0
        )
    table = _recbole.windows(parts, 50)
    for row in table.itertuples():
        history = parts.histories([row.user_id], "train")[0]
        assert [*row.item_id_list, row.item_id] == history.tolist()
    with _recbole.contained(0):
        built = _recbole.build("SASRec", parts, BASELINES["sasrec"].settings, 0)
        assert built.config["TIME_FIELD"] is None
        assert not any("time" in field for field in built.datasets[0].inter_feat.columns)


@pytest.mark.parametrize("max_length", [1, 2, 3, 7, 50])
def test_each_event_but_the_first_is_a_target_once(ml100k_split, checkerboard_split, max_length):
    for parts in (checkerboard_split, ml100k_split):
        table = _recbole.windows(parts, max_length)
        assert table["item_length"].between(1, max_length).all()
        assert (table["item_id_list"].map(len) == table["item_length"]).all()
        targets = Counter()
        for user, sequence, following in zip(table["user_id"], table["item_id_list"], table["item_id"], strict=True):
            targets.update((user, item) for item in [*sequence[1:], following])
        users, items = parts.pairs("train")
        expected = Counter(zip(users, items, strict=True))
        firsts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
        expected.subtract(zip(users[firsts], items[firsts], strict=True))
        assert targets == +expected
        assert max(targets.values()) == 1


def test_windows_are_contiguous_pieces_of_histories(checkerboard_split):
    for row in _recbole.windows(checkerboard_split, 2).itertuples():
        history = checkerboard_split.histories([row.user_id], "train")[0].tolist()
        piece = [*row.item_id_list, row.item_id]
        start = history.index(piece[0])
        assert history[start : start + len(piece)] == piece


def test_windows_are_guarded(checkerboard_split, monkeypatch):
    kind, real = type(checkerboard_split), type(checkerboard_split).pairs
    monkeypatch.setattr(kind, "pairs", lambda self, part: real(self, "train+valid" if part == "train" else part))
    with pytest.raises(LeakError, match="training windows"):
        _recbole.windows(checkerboard_split, 5)
    with pytest.raises(LeakError, match="training rows"):
        fit("BPR", checkerboard_split, epochs=1)
    with pytest.raises(LeakError, match="training windows"):
        fit("SASRec", checkerboard_split, **BASELINES["sasrec"].settings)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_loss_at_every_position(checkerboard_split, model):
    """The mean over positions of the cross entropy of RecBole's own model, one prefix at a time."""
    settings = {**BASELINES[model.lower()].settings, "MAX_ITEM_LIST_LENGTH": 6}
    with _recbole.contained(0):
        built = _recbole.build(model, checkerboard_split, settings, 0)
        net = built.model.eval()  # without dropout both ways see the same network
        batch = next(iter(built.loader))
        loss = net.calculate_loss(batch)
        losses = []
        for sequence, length, last in zip(batch["item_id_list"], batch["item_length"], batch["item_id"], strict=True):
            events = [*sequence[:length].tolist(), int(last)]
            for end in range(1, len(events)):
                prefix = torch.zeros(1, 6, dtype=torch.long)
                prefix[0, :end] = torch.tensor(events[:end])
                output = net.forward(prefix, torch.tensor([end]))
                logits = output @ net.item_embedding.weight.T
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([events[end]])))
        assert len(losses) == 72
        assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_pop_counts_events(ml100k_split):
    """Batches hold an item many times; RecBole's own Pop would count it once for each batch."""
    state = fit("Pop", ml100k_split, epochs=1, train_batch_size=1000)
    assert state["item_cnt"].flatten().tolist() == ml100k_split.item_counts.tolist()


def test_unknown_models_are_answered_with_the_known_ones(checkerboard_split):
    with pytest.raises(ValueError, match="RecBole has no model 'SASREC2'; it has .*BPR.*FM.*SASRec"):
        fit("SASREC2", checkerboard_split)
    names = _recbole.model_names()
    assert {"BPR", "EASE", "FM", "GRU4Rec", "LightGCN", "SASRec"} <= set(names)
    assert len(names) == len(set(names)) > 50


@pytest.mark.parametrize("model", ["BPR", "SASRec", "FM"])
def test_ids_and_rows_are_those_of_the_split(tmp_path, model):
    """Also where the file of items is in an order of its own, and has items that nobody met."""
    path = write_checkerboard(tmp_path)
    file = path / "checkerboard.item"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, "i99\teven story 99\teven", *rows[::-1]]) + "\n")
    parts = split(load_folder(path))
    settings = {"BPR": {}, "SASRec": BASELINES["sasrec"].settings, "FM": {"item_columns": ["genre"]}}[model]
    with _recbole.contained(0):
        built = _recbole.build(model, parts, settings, 0)
        train = built.datasets[0]
        assert train.field2id_token["user_id"].tolist() == parts.dataset.user_ids.tolist()
        assert train.field2id_token["item_id"].tolist() == parts.dataset.item_ids.tolist()
        if model != "SASRec":
            for part, dataset in zip(("train", "valid", "test"), built.datasets, strict=True):
                pairs = set(
                    zip(dataset.inter_feat["user_id"].tolist(), dataset.inter_feat["item_id"].tolist(), strict=True)
                )
                assert pairs == set(zip(*(ids.tolist() for ids in parts.pairs(part)), strict=True))
        if model == "FM":
            genres = built.model.item_features["genre"][:, 0].tolist()
            words = [train.field2id_token["genre"][number] for number in genres]
            assert words[1:] == parts.dataset.items["genre"].tolist()[1:]


def test_sequences_hold_the_newest_events(checkerboard_split):
    batch = _recbole._sequences(checkerboard_split, torch.tensor([3, 1]), "test", 3)
    for row, user in enumerate((3, 1)):
        assert batch["item_id_list"][row].tolist() == checkerboard_split.histories([user], "test")[0][-3:].tolist()
    assert batch["item_length"].tolist() == [3, 3]
    padded = _recbole._sequences(checkerboard_split, torch.tensor([1, 0]), "valid", 6)
    assert padded["item_id_list"][0].tolist() == [*checkerboard_split.histories([1], "valid")[0].tolist(), 0, 0]
    assert padded["item_length"].tolist() == [4, 1]  # a user without history has one PAD


def test_a_wrapped_recommender_is_one_of_recbole(checkerboard_split):
    from recbole.model.abstract_recommender import GeneralRecommender

    memory = Memory(checkerboard_split, "memory")
    for phase in ("valid", "test"):
        wrapped = to_recbole(memory, phase)
        assert isinstance(wrapped, GeneralRecommender)
        scores = wrapped.full_sort_predict({"user_id": torch.tensor([4, 2])})
        assert torch.equal(scores.view(2, 17), memory.at(phase).score(torch.tensor([4, 2])))
        theirs = _recbole.judge(wrapped, checkerboard_split, ["Hit"], [1])()
        assert theirs["hit@1"] == evaluate(memory, checkerboard_split, phase, ks=(1,)).mean("hit@1") == 1.0


IMPORTS = """
import os, random, sys
import numpy as np
import scipy.sparse as sp
import torch
sys.argv = ["program", "--epochs=3"]
def state():
    return (
        list(sys.argv), dict(os.environ), sorted(vars(np)), "_update" in vars(sp.dok_matrix),
        torch.is_anomaly_enabled(),
        random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads(),
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, sorted(os.listdir(".")),
    )
vars(np).setdefault("__warningregistry__", {})
import pkgutil, importlib
before = state()
import llmrec_lib
names = [module.name for module in pkgutil.walk_packages(llmrec_lib.__path__, "llmrec_lib.")]
for name in names:
    importlib.import_module(name)
assert "llmrec_lib._recbole" in names and "llmrec_lib.evaluation.evaluate" in names, names
for number, (old, new) in enumerate(zip(before, state())):
    assert old == new, number
heavy = {"recbole", "transformers", "ray"} & set(sys.modules)
assert not heavy, heavy
print(len(names))
"""


def run_alone(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_library_changes_nothing(tmp_path):
    assert int(run_alone(IMPORTS, tmp_path)) > 15


FIRST_USE = """
import sys
from pathlib import Path
import torch
from llmrec_lib import _recbole
from llmrec_lib.datasets import load_folder
from llmrec_lib.recommender import ItemSimilarityRecommender, to_recbole
from llmrec_lib.splits import split
parts = split(load_folder(Path("checkerboard")))
wrapped = to_recbole(ItemSimilarityRecommender(parts, torch.eye(17), "same"))
print(_recbole.judge(wrapped, parts, ["Hit"], [5])())
assert not torch.is_anomaly_enabled()
assert "ray" not in sys.modules and "recbole.quick_start" not in sys.modules
"""


def test_handing_back_to_recbole_needs_nothing_before(tmp_path):
    """In a fresh process, where nothing of RecBole has been imported inside `contained` yet."""
    write_checkerboard(tmp_path)
    assert "hit@5" in run_alone(FIRST_USE, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkerboard"]
