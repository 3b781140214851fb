"""Who may know what, when: training, validation and test events under four protocols, proved free of leaks."""

import functools
import itertools
import warnings
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix

from llmrec_lib.cache import content_key
from llmrec_lib.datasets import Dataset

PROTOCOLS = ("temporal_ratio", "random_ratio", "leave_one_out", "global_temporal")  # need more and more of the times
PARTS = ("train", "valid", "test")
_TIES, _RANDOM = 0, 1  # independent random streams of one seed


class LeakError(ValueError):
    """A held-out event is, or would become, known to the method that has to predict it."""


class ProtocolError(ValueError):
    """The data set does not allow this protocol; the message says which ones it allows."""


@dataclass(frozen=True, eq=False)
class Split:
    """Three disjoint parts of a data set's interactions, and all views of them that training and evaluation need.

    `train`, `valid` and `test` are int64 row positions into ``dataset.interactions``, sorted by user, time, and an order
    of ties that `seed` decides.

    Raises
    ------
    LeakError
        If the parts overlap or leave interactions out, or if an event in an earlier part is later than one of the same
        user (global_temporal: of any user) in a later part; random_ratio has no times to respect.
    """

    dataset: Dataset
    protocol: str
    seed: int
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    test_history: str = "train+valid"  # what a method may read at test time; RecBole's general models read "train" only
    notes: tuple[str, ...] = ()  # what a reader of results should know about this split
    fingerprint: str = field(init=False)  # hash of the data set's fingerprint and of everything above but the notes
    _kept: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.test_history not in ("train+valid", "train"):
            raise ValueError(f"test_history {self.test_history!r} must be 'train+valid' or 'train'")
        n = len(self.dataset.interactions)
        parts = [np.asarray(getattr(self, part), dtype=np.int64) for part in PARTS]
        rows = np.concatenate(parts)
        if ((rows < 0) | (rows >= n)).any():
            raise ValueError(f"row positions outside 0..{n - 1}, the interactions of {self.dataset.name}")
        times = np.bincount(rows, minlength=n)
        if (times != 1).any():
            row = int(np.argmax(times != 1))
            raise LeakError(f"row {row} of the interactions is in {times[row]} parts of the split instead of one")
        parts = [self._sorted(part) for part in parts]
        seed = int(self.seed)  # numpy's integers must give the same fingerprint
        key = content_key(self.dataset.fingerprint, self.protocol, seed, self.test_history, *parts)
        for name, value in {**dict(zip(PARTS, parts, strict=True)), "seed": seed, "fingerprint": key}.items():
            object.__setattr__(self, name, value)
        if self.dataset.time is not None and self.protocol != "random_ratio":
            self._prove_order()

    def _prove_order(self) -> None:
        events = self.dataset.interactions
        for earlier, later in itertools.combinations(PARTS, 2):
            last = events.iloc[getattr(self, earlier)].groupby("user")["timestamp"].max()
            first = events.iloc[getattr(self, later)].groupby("user")["timestamp"].min()
            both = last.index.intersection(first.index)
            wrong = last > first.min() if self.protocol == "global_temporal" else last[both] > first[both]
            if wrong.any():
                user = self.dataset.user_ids[wrong.idxmax()]
                raise LeakError(f"user {user!r} has a {earlier} event later than a {later} event")

    @functools.cached_property
    def _rank(self) -> np.ndarray:
        """Place of each interaction in the order user, time, seeded order of ties."""
        return np.argsort(_time_order(self.dataset, self.seed))

    def _sorted(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(self._rank[rows])]

    def pairs(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Users and items of "train", "valid", "test" or "train+valid", int64 [n_events] each, by user, time, tie."""
        if part not in (*PARTS, "train+valid"):
            raise ValueError(f"part {part!r} must be 'train', 'valid', 'test' or 'train+valid'")
        if ("pairs", part) not in self._kept:
            rows = self._sorted(np.concatenate([getattr(self, name) for name in part.split("+")]))
            events = self.dataset.interactions.iloc[rows]
            self._kept["pairs", part] = events["user"].to_numpy(), events["item"].to_numpy()
        return self._kept["pairs", part]

    def matrix(self, part: str, half_life: float | None = None) -> csr_matrix:
        """Where user and item meet in the part, float32 [n_users, n_items]; kept, so do not change it in place.

        Ones; with `half_life` h, the event n places before its user's newest in the part counts 2^(−n / h).
        """
        if ("matrix", part, half_life) not in self._kept:
            users, items = self.pairs(part)
            age = np.searchsorted(users, users, side="right") - 1 - np.arange(len(users))
            votes = np.exp2(-age / (half_life or np.inf), dtype=np.float32)
            shape = (self.dataset.n_users, self.dataset.n_items)
            self._kept["matrix", part, half_life] = csr_matrix((votes, (users, items)), shape=shape)
        return self._kept["matrix", part, half_life]

    def seen(self, phase: str) -> csr_matrix:
        """What is masked before ranking, for every method alike: "valid": train; "test": train and valid."""
        return self.matrix(_of_phase(phase, valid="train", test="train+valid"))

    def history_matrix(self, phase: str, half_life: float | None = None) -> csr_matrix:
        """What a method may read as input: "train" and "valid": train; "test": `test_history`; see `matrix`."""
        return self.matrix(_of_phase(phase, train="train", valid="train", test=self.test_history), half_life)

    def histories(self, users: ArrayLike, phase: str) -> list[np.ndarray]:
        """The items that a method may read for each of `users`, oldest first; the same rule as `history_matrix`."""
        owners, items = self.pairs(_of_phase(phase, train="train", valid="train", test=self.test_history))
        starts, ends = (np.searchsorted(owners, users, side=side) for side in ("left", "right"))
        return [items[start:end] for start, end in zip(starts, ends, strict=True)]

    def targets(self, phase: str) -> csr_matrix:
        """What has to be predicted, float32 [n_users, n_items]: "valid": valid; "test": test."""
        return self.matrix(_of_phase(phase, valid="valid", test="test"))

    def eval_users(self, phase: str, max_users: int = 0) -> np.ndarray:
        """Users with a target, ascending, int64; with `max_users` > 0 a sample of so many, part of any larger sample."""
        if max_users < 0:
            raise ValueError(f"max_users is {max_users}; give 0 for all users, or a positive number")
        users = np.flatnonzero(np.diff(self.targets(phase).indptr))
        if 0 < max_users < len(users):
            priority = np.random.default_rng(0).permutation(self.dataset.n_users)
            users = np.sort(users[np.argsort(priority[users])[:max_users]])
        return users

    @functools.cached_property
    def item_counts(self) -> np.ndarray:
        """Training events of each item, int64 [n_items]."""
        return np.bincount(self.pairs("train")[1], minlength=self.dataset.n_items)

    @functools.cached_property
    def user_counts(self) -> np.ndarray:
        """Training events of each user, int64 [n_users]."""
        return np.bincount(self.pairs("train")[0], minlength=self.dataset.n_users)

    def guard(self, users: ArrayLike, items: ArrayLike, phase: str, what: str) -> None:
        """Raise a LeakError if any of these user-item pairs is held out in a phase, before they reach a method.

        `users` and `items` have shapes that broadcast. In the phases "train" and "valid" no pair may be a validation or
        test event, in "test" none may be a test event. `what` names the pairs in the message: "prompt history" …
        """
        held_out = _of_phase(phase, train="valid test", valid="valid test", test="test").split()
        pairs = np.broadcast_arrays(np.asarray(users, dtype=np.int64), np.asarray(items, dtype=np.int64))
        users, items = (ids.ravel() for ids in pairs)
        if not len(users):
            return
        n_users, n_items = self.dataset.n_users, self.dataset.n_items
        if ((users < 0) | (users >= n_users) | (items < 0) | (items >= n_items)).any():
            raise ValueError(f"{what}: internal ids must lie in 0..{n_users - 1} (users) and 0..{n_items - 1} (items)")
        for part in held_out:
            if len(leaks := np.flatnonzero(self.matrix(part)[users, items])):
                user, item = self.dataset.user_ids[users[leaks[0]]], self.dataset.item_ids[items[leaks[0]]]
                first = f"{len(leaks):,} held-out {part} event(s), the first: user {user!r}, item {item!r}"
                raise LeakError(f"{what} (phase {phase!r}) holds {first}; build it from split.histories of this phase")


def split(
    dataset: Dataset, protocol: str = "temporal_ratio", seed: int = 0,
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1), test_history: str = "train+valid",
) -> Split:  # fmt: skip
    """Divide the interactions into training, validation and test.

    ``temporal_ratio``: of each user's events by time, the first 80 % train, the next 10 % validate, the last 10 % test;
    without timestamps in a seeded random order, with a warning. ``random_ratio``: the same shares at random.
    ``leave_one_out``: the last event tests, the one before validates; of two events the last tests, a single one trains.
    ``global_temporal``: the earliest 80 % of all events train, the next 10 % validate, the last 10 % test, for all users
    together; events at the very instant of a boundary belong to the later part. Other shares are given as `ratios`,
    rounded for each user as in `ratio_counts`; for `seed` and `test_history` see `Split`.

    Raises
    ------
    ProtocolError
        If the protocol is unknown, needs times that the data set does not have, or leaves a part empty.
    """
    if protocol not in PROTOCOLS:
        raise ProtocolError(f"protocol {protocol!r} is unknown; use one of {', '.join(PROTOCOLS)}")
    if seed < 0 or len(ratios) != 3 or not all(0 < ratio < np.inf for ratio in ratios):
        raise ValueError(f"seed {seed} must be at least 0, ratios {ratios} three numbers > 0: train, valid, test")
    possible = {"timestamp": PROTOCOLS, "position": PROTOCOLS[:3], None: PROTOCOLS[:2]}[dataset.time]
    if protocol not in possible:
        has = "timestamps that cannot be compared between users" if dataset.time else "no timestamps"
        raise ProtocolError(f"{protocol} is not possible: {dataset.name} has {has}; use {' or '.join(possible)}")
    notes: list[str] = []
    if dataset.time is None and protocol == "temporal_ratio":
        notes.append(f"{dataset.name} has no timestamps: temporal_ratio falls back to a seeded random order")
        warnings.warn(notes[-1], stacklevel=2)
    users, order = dataset.interactions["user"].to_numpy(), _time_order(dataset, seed)
    if protocol == "random_ratio":
        order = np.lexsort((np.random.default_rng([seed, _RANDOM]).permutation(len(users)), users))
    if protocol == "global_temporal":
        time = dataset.interactions["timestamp"].to_numpy()[order]
        shares = np.cumsum(ratios[:2]) / sum(ratios)
        boundaries = np.sort(time)[[min(int(round(share * len(time), 6)), len(time) - 1) for share in shares]]
        part = np.searchsorted(boundaries, time, side="right")
    else:
        sizes = np.bincount(users, minlength=dataset.n_users)
        n_train, _, n_test = ratio_counts(sizes, ratios)
        if protocol == "leave_one_out":
            n_test = (sizes >= 2).astype(np.int64)
            n_train = sizes - n_test - (sizes >= 3)
        position = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        part = (position >= np.repeat(n_train, sizes)).astype(int) + (position >= np.repeat(sizes - n_test, sizes))
    parts = [order[part == which] for which in range(3)]
    if not all(map(len, parts)):
        found = ", ".join(f"{name} {len(rows):,}" for name, rows in zip(PARTS, parts, strict=True))
        reason = "too many events share an instant" if protocol == "global_temporal" else "no user has enough events"
        raise ProtocolError(f"{protocol} leaves part of {dataset.name} empty ({found}): {reason}; use another protocol")
    return Split(dataset, protocol, seed, *parts, test_history=test_history, notes=tuple(notes))


def ratio_counts(sizes: np.ndarray, ratios: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events of each user in the three parts, int64 [n_users] each, rounded as RecBole 1.2.1 does.

    Source: ``recbole.data.dataset.Dataset._calcu_split_ids``. Validation and test are rounded down, but a share between
    0 and 1 event becomes 1 as long as training keeps one: test first, then validation.
    """
    total = sum(ratios)  # as RecBole adds them up: rounding must be the same to the last bit
    exact = [ratio / total * sizes for ratio in ratios]
    counts = [share.astype(np.int64) for share in exact]
    counts[0] = sizes - counts[1] - counts[2]
    for which in (2, 1):
        more = (counts[0] > 1) & (exact[which] > 0) & (exact[which] < 1)
        counts[which], counts[0] = counts[which] + more, counts[0] - more
    return counts[0], counts[1], counts[2]


def _time_order(dataset: Dataset, seed: int) -> np.ndarray:
    """Rows by user, exact time, and for ties (all events, where there is no time) a seeded random order."""
    users = dataset.interactions["user"].to_numpy()
    ties = np.random.default_rng([seed, _TIES]).permutation(len(users))
    times = () if dataset.time is None else (dataset.interactions["timestamp"].to_numpy(),)
    return np.lexsort((ties, *times, users))


def _of_phase(phase: str, **parts: str) -> str:
    if phase not in parts:
        raise ValueError(f"phase {phase!r} must be one of {', '.join(map(repr, parts))}")
    return parts[phase]
