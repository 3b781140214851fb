"""The parts of a split: what each protocol promises, and that no held-out event can slip through."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_lib.datasets import load_folder
from llmrec_lib.splits import PROTOCOLS, LeakError, ProtocolError, Split, ratio_counts, split
from tests.checkerboard import write_checkerboard


def make(folder, events, time=True):
    """A data set of (user, item, timestamp) triples."""
    path = folder / "toy"
    path.mkdir(parents=True, exist_ok=True)
    header = ["user_id:token", "item_id:token", "timestamp:float"]
    rows = [header, *[[str(value) for value in event] for event in events]]
    (path / "toy.inter").write_text("".join("\t".join(row[: 3 if time else 2]) + "\n" for row in rows))
    return load_folder(path)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    return load_folder(write_checkerboard(tmp_path_factory.mktemp("data")))


def recbole_counts(total: int, ratios: tuple[float, ...]) -> list[int]:
    """The rule of recbole 1.2.1, Dataset.split_by_ratio and Dataset._calcu_split_ids, for one user."""
    ratios = [ratio / sum(ratios) for ratio in ratios]
    counts = [int(ratio * total) for ratio in ratios]
    counts[0] = total - sum(counts[1:])
    for place in range(1, len(ratios)):
        if counts[0] <= 1:
            break
        if 0 < ratios[-place] * total < 1:
            counts[-place] += 1
            counts[0] -= 1
    return counts


@pytest.mark.parametrize("ratios", [(0.8, 0.1, 0.1), (8, 1, 1), (0.6, 0.2, 0.2), (0.7, 0.1, 0.2), (1, 1, 1)])
def test_ratio_counts_are_those_of_recbole(ratios):
    sizes = np.arange(1, 800)
    expected = [recbole_counts(int(size), ratios) for size in sizes]
    assert np.stack(ratio_counts(sizes, ratios), axis=1).tolist() == expected
    assert np.stack(ratio_counts(np.arange(5), (0.8, 0.1, 0.1)), axis=1).tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 0, 1],
        [1, 1, 1],
        [2, 1, 1],
    ]


def test_leave_one_out_by_hand(tmp_path):
    events = [("a", "x", 3), ("a", "y", 1), ("a", "z", 2), ("b", "x", 9), ("b", "y", 8), ("c", "x", 5), ("a", "w", 0)]
    parts = split(make(tmp_path, events), "leave_one_out")
    assert parts.train.tolist() == [6, 1, 4, 5] and parts.valid.tolist() == [2] and parts.test.tolist() == [0, 3]


def test_temporal_ratio_by_hand(tmp_path):
    events = [("a", f"i{n}", 100 - n) for n in range(10)]
    parts = split(make(tmp_path, events), "temporal_ratio")
    assert (parts.train.tolist(), parts.valid.tolist(), parts.test.tolist()) == ([9, 8, 7, 6, 5, 4, 3, 2], [1], [0])


def test_global_temporal_by_hand(tmp_path):
    times = [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 11, 12, 13, 14, 15, 16, 18, 18, 19, 20]
    parts = split(make(tmp_path, [("ab"[n % 2], f"i{n}", t) for n, t in enumerate(times)]), "global_temporal")
    time = parts.dataset.interactions["timestamp"].to_numpy()
    assert time[parts.train].max() == 16 and set(time[parts.valid]) == {18} and set(time[parts.test]) == {19, 20}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_views_agree(board, protocol):
    parts = split(board, protocol, seed=3)
    users, items = parts.pairs("train")
    assert users.dtype == np.int64 and parts.matrix("train")[users, items].min() == 1
    both = parts.matrix("train") + parts.matrix("valid")
    assert (parts.seen("test") != both).nnz == 0 and (parts.seen("valid") != parts.matrix("train")).nnz == 0
    assert parts.seen("test").multiply(parts.targets("test")).nnz == 0
    assert parts.matrix("train").dtype == np.float32 and parts.matrix("test").shape == (board.n_users, board.n_items)
    assert parts.item_counts.sum() == parts.user_counts.sum() == len(parts.train)
    time = board.interactions.set_index(["user", "item"])["timestamp"]
    for phase in ("train", "valid", "test"):
        for user, history in enumerate(parts.histories(np.arange(board.n_users), phase)):
            assert sorted(history) == parts.history_matrix(phase)[[user]].indices.tolist()
            assert time.loc[[(user, item) for item in history]].is_monotonic_increasing
    assert parts.eval_users("test").tolist() == sorted(set(parts.pairs("test")[0]))


def test_test_history_is_a_choice_that_counts(board):
    short, full = split(board, test_history="train"), split(board)
    assert (short.history_matrix("test") != short.matrix("train")).nnz == 0
    assert (short.seen("test") != full.seen("test")).nnz == 0 and short.fingerprint != full.fingerprint
    assert full.history_matrix("test").nnz == len(full.train) + len(full.valid)
    with pytest.raises(ValueError, match="test_history"):
        split(board, test_history="all")


def test_ties_are_broken_by_the_seed_alone(tmp_path):
    data = make(tmp_path, [("a", f"i{n}", 7 if n < 10 else n) for n in range(12)])
    orders = {tuple(split(data, "leave_one_out", seed=seed).train) for seed in range(5)}
    assert len(orders) == 5 and all(order[-1] < 10 for order in orders)
    assert {split(data, "leave_one_out", seed=seed).test.item() for seed in range(5)} == {11}
    tied = make(tmp_path / "tied", [("a", f"i{n}", min(n, 8)) for n in range(12)])
    last = {split(tied, "leave_one_out", seed=seed).test.item() for seed in range(30)}
    assert last == {8, 9, 10, 11}


def test_order_is_exact_beyond_float_precision(tmp_path):
    base = 2**60
    data = make(tmp_path, [("a", "x", base + 2), ("a", "y", base + 1), ("a", "z", base)])
    assert split(data, "leave_one_out").test.tolist() == [0]


def test_without_timestamps(tmp_path):
    data = load_folder(write_checkerboard(tmp_path, with_time=False))
    with pytest.warns(UserWarning, match="random order"):
        parts = split(data, seed=1)
    with pytest.warns(UserWarning):
        other = split(data, seed=2)
    assert "random order" in parts.notes[0] and not np.array_equal(parts.test, other.test)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(split(data, "random_ratio").test) == len(parts.test)
    for protocol in ("leave_one_out", "global_temporal"):
        with pytest.raises(ProtocolError, match="random_ratio"):
            split(data, protocol)


def test_global_split_of_positions_is_refused(tmp_path):
    data = make(tmp_path, [(u, f"i{n}", n) for u in "abc" for n in range(6)])
    with pytest.raises(ProtocolError, match="cannot be compared|compares times between users"):
        split(data, "global_temporal")
    assert len(split(data, "leave_one_out").test) == 3


def test_impossible_requests(tmp_path, board):
    with pytest.raises(ProtocolError, match="temporal_ratio"):
        split(board, "kfold")
    with pytest.raises(ValueError, match="ratios"):
        split(board, ratios=(0.9, 0.1, 0))
    with pytest.raises(ProtocolError, match="valid 0"):
        split(make(tmp_path, [("a", "x", 1), ("a", "y", 2), ("b", "x", 3)]), "leave_one_out")
    with pytest.raises(ProtocolError, match="share an instant"):
        split(make(tmp_path, [("a", f"i{n}", 5) for n in range(20)]), "global_temporal")
    for call in (board_split := split(board)).seen, board_split.targets, board_split.matrix, board_split.pairs:
        with pytest.raises(ValueError, match="'test'"):
            call("tset")


def test_constructor_proves_the_parts(board):
    parts = split(board)
    train, valid, test = parts.train, parts.valid, parts.test
    with pytest.raises(LeakError, match="in 2 parts"):
        Split(board, "temporal_ratio", 0, np.append(train, test[0]), valid, test)
    with pytest.raises(LeakError, match="in 0 parts"):
        Split(board, "temporal_ratio", 0, train[1:], valid, test)
    with pytest.raises(ValueError, match="outside"):
        Split(board, "temporal_ratio", 0, train, valid, np.append(test, 10**6))
    for protocol in ("temporal_ratio", "leave_one_out", "global_temporal"):
        with pytest.raises(LeakError, match="later than"):
            Split(board, protocol, 0, np.append(train[1:], test[0]), valid, np.append(test[1:], train[0]))
    with pytest.raises(LeakError, match="later than"):
        Split(board, "global_temporal", 0, train, valid, test)
    shuffled = Split(board, "temporal_ratio", 0, train[::-1], valid[::-1], test[::-1])
    assert shuffled.fingerprint == parts.fingerprint and shuffled.train.tolist() == train.tolist()


def test_split_survives_pickling(board):
    parts = split(board, seed=np.int64(2))
    parts.seen("test")
    copy = pickle.loads(pickle.dumps(parts))
    assert copy.fingerprint == split(board, seed=2).fingerprint and (copy.seen("test") != parts.seen("test")).nnz == 0


def test_guard(board):
    parts = split(board)
    parts.guard(*parts.pairs("train"), "train", "training windows")
    parts.guard(*parts.pairs("valid"), "test", "history")
    parts.guard([], [], "train", "nothing")
    users, items = parts.pairs("test")
    for phase in ("train", "valid", "test"):
        with pytest.raises(LeakError) as caught:
            parts.guard(users[5], items[5], phase, "prompt history")
        for word in ("prompt history", board.user_ids[users[5]], board.item_ids[items[5]], phase):
            assert repr(word).strip("'") in str(caught.value)
    for phase in ("train", "valid"):
        with pytest.raises(LeakError, match="valid event"):
            parts.guard(*parts.pairs("valid"), phase, "x")
    with pytest.raises(LeakError):
        parts.guard(users[:1, None], np.arange(board.n_items)[None], "test", "all items")
    with pytest.raises(ValueError, match="internal ids"):
        parts.guard([0], [board.n_items], "test", "x")
    with pytest.raises(ValueError, match="phase"):
        parts.guard([1], [1], "tests", "x")


def test_samples_of_users_are_nested_and_the_same_for_every_seed(board):
    samples = [split(board, seed=seed).eval_users("test", size) for seed in (0, 1) for size in (5, 10, 99)]
    assert [len(sample) for sample in samples] == [5, 10, 24] * 2
    assert set(samples[0]) < set(samples[1]) and (np.diff(samples[1]) > 0).all()
    assert all(np.array_equal(a, b) for a, b in zip(samples[:3], samples[3:], strict=True))
    with pytest.raises(ValueError, match="max_users"):
        split(board).eval_users("test", -1)


@settings(max_examples=40, deadline=None)
@given(
    events=st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(0, 11)), st.integers(-3, 30), min_size=12, max_size=60
    ),
    protocol=st.sampled_from(PROTOCOLS),
    seed=st.integers(0, 2**32),
)
def test_any_split_partitions_and_repeats(tmp_path_factory, events, protocol, seed):
    data = make(tmp_path_factory.mktemp("any"), [(u, i, t) for (u, i), t in events.items()])
    try:
        parts = split(data, protocol, seed=seed)
    except ProtocolError:
        return
    rows = np.concatenate((parts.train, parts.valid, parts.test))
    assert sorted(rows) == list(range(len(events)))
    again = split(data, protocol, seed=seed)
    assert again.fingerprint == parts.fingerprint and np.array_equal(again.train, parts.train)
    sizes = np.bincount(data.interactions["user"], minlength=data.n_users)
    counts = [np.bincount(parts.pairs(part)[0], minlength=data.n_users) for part in ("train", "valid", "test")]
    if protocol.endswith("_ratio"):
        assert all(np.array_equal(*two) for two in zip(counts, ratio_counts(sizes, (0.8, 0.1, 0.1)), strict=True))
    time, user = (data.interactions[column].to_numpy() for column in ("timestamp", "user"))
    if protocol == "global_temporal":
        assert time[parts.train].max() < time[parts.valid].min() <= time[parts.valid].max() < time[parts.test].min()
    elif protocol != "random_ratio":
        for row in parts.test:
            earlier = np.concatenate((parts.train, parts.valid))
            assert (time[earlier[user[earlier] == user[row]]] <= time[row]).all()


def test_votes_of_a_history_fade(checkerboard_split):
    """The newest event counts 1, the one before 2^(-1/h), by hand; nothing else of the history changes."""
    for phase in ("valid", "test"):
        whole, faded = (checkerboard_split.history_matrix(phase, half_life) for half_life in (None, 2.0))
        assert (whole > 0).toarray().tolist() == (faded > 0).toarray().tolist()
        users = np.arange(1, checkerboard_split.dataset.n_users)
        for user, history in zip(users, checkerboard_split.histories(users, phase), strict=True):
            expected = 2.0 ** (-np.arange(len(history))[::-1] / 2.0)
            assert faded[user, history].toarray().ravel().tolist() == pytest.approx(expected.tolist())
