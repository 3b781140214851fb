"""Who may know what, when: training, validation and test events under four protocols, proved free of leaks."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix

from llmrec_lib.cache import content_key
from llmrec_lib.datasets import Dataset

PROTOCOLS = ("temporal_ratio", "random_ratio", "leave_one_out", "global_temporal")
_TIES, _RANDOM = 0, 1  # independent random streams of one seed


class LeakError(ValueError):
    """A held-out event is, or would become, known to the method that has to predict it."""


class ProtocolError(ValueError):
    """The data set does not allow this protocol; the message says which ones it allows."""


@dataclass(frozen=True, eq=False)
class Split:
    """Three disjoint parts of a data set's interactions, and all views of them that training and evaluation need.

    Attributes
    ----------
    dataset : Dataset
    protocol : str
        One of `PROTOCOLS`.
    seed : int
        Decides the order of tied events, and the random orders.
    train, valid, test : numpy.ndarray of int64
        Row positions into ``dataset.interactions``, sorted by user, time, and the seeded order of ties.
    test_history : {"train+valid", "train"}
        What a method may read as input at test time. RecBole's general models read "train", its sequential ones both.
    notes : tuple of str
        What a reader of results should know about this split.
    fingerprint : str
        Hash of the data set's fingerprint and all of the above.

    Raises
    ------
    LeakError
        If the parts overlap or leave interactions out; for temporal_ratio and leave_one_out with known times, if an
        event of a user in an earlier part is later than one in a later part; for global_temporal, if any event is.
    """

    dataset: Dataset
    protocol: str
    seed: int
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    test_history: str = "train+valid"
    notes: tuple[str, ...] = ()
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ProtocolError(f"protocol {self.protocol!r} is unknown; use one of {', '.join(PROTOCOLS)}")
        if self.test_history not in ("train+valid", "train"):
            raise ValueError(f"test_history {self.test_history!r} must be 'train+valid' or 'train'")
        n = len(self.dataset.interactions)
        for part in ("train", "valid", "test"):
            rows = np.asarray(getattr(self, part), dtype=np.int64)
            if len(rows) and (rows.min() < 0 or rows.max() >= n):
                raise ValueError(
                    f"{part} holds row positions outside 0..{n - 1}, the interactions of {self.dataset.name}"
                )
            object.__setattr__(self, part, rows[np.argsort(self._rank[rows], kind="stable")])
        object.__setattr__(self, "seed", int(self.seed))  # numpy's integers must give the same fingerprint
        times = np.bincount(np.concatenate((self.train, self.valid, self.test)), minlength=n)
        if (times > 1).any():
            raise LeakError(
                f"row {int(np.argmax(times > 1))} of the interactions is in more than one part of the split"
            )
        if (times == 0).any():
            raise LeakError(f"row {int(np.argmax(times == 0))} of the interactions is in no part of the split")
        if self.dataset.time is not None and self.protocol != "random_ratio":
            self._prove_order("train", "valid")
            self._prove_order("train", "test")
            self._prove_order("valid", "test")
        rows = (self.train, self.valid, self.test)
        key = content_key(self.dataset.fingerprint, self.protocol, self.seed, self.test_history, *rows)
        object.__setattr__(self, "fingerprint", key)

    def _prove_order(self, earlier: str, later: str) -> None:
        time = self.dataset.interactions["timestamp"].to_numpy()
        if self.protocol == "global_temporal":
            before, after = time[getattr(self, earlier)], time[getattr(self, later)]
            if len(before) and len(after) and before.max() > after.min():
                raise LeakError(f"a {earlier} event at {before.max()} is later than a {later} event at {after.min()}")
            return
        # Parts are sorted by user and time, and of repeated positions numpy keeps the last value written.
        (users, _), (later_users, _) = self.pairs(earlier), self.pairs(later)
        last, known = np.zeros(self.dataset.n_users, dtype=time.dtype), np.zeros(self.dataset.n_users, dtype=bool)
        last[users], known[users] = time[getattr(self, earlier)], True
        wrong = known[later_users] & (last[later_users] > time[getattr(self, later)])
        if wrong.any():
            user = self.dataset.user_ids[later_users[np.argmax(wrong)]]
            raise LeakError(f"user {user!r} has a {earlier} event later than a {later} event")

    @functools.cached_property
    def _rank(self) -> np.ndarray:
        """Place of each interaction in the order user, time, seeded order of ties."""
        rank = np.empty(len(self.dataset.interactions), dtype=np.int64)
        rank[_time_order(self.dataset, self.seed)] = np.arange(len(rank))
        return rank

    @functools.cached_property
    def _cache(self) -> dict:
        return {}

    def rows(self, part: str) -> np.ndarray:
        """Row positions of "train", "valid", "test" or "train+valid", sorted by user, time, seeded order of ties."""
        if part in ("train", "valid", "test"):
            return getattr(self, part)
        if part != "train+valid":
            raise ValueError(f"part {part!r} must be 'train', 'valid', 'test' or 'train+valid'")
        rows = np.concatenate((self.train, self.valid))
        return rows[np.argsort(self._rank[rows])]

    def pairs(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Users and items of a part's events, in the order of `rows`, int64 [n_events] each."""
        events = self.dataset.interactions
        rows = self.rows(part)
        return events["user"].to_numpy()[rows], events["item"].to_numpy()[rows]

    def matrix(self, part: str) -> csr_matrix:
        """Ones where user and item meet in the part, float32 [n_users, n_items]; kept, so do not change it in place."""
        if ("matrix", part) not in self._cache:
            users, items = self.pairs(part)
            shape = (self.dataset.n_users, self.dataset.n_items)
            self._cache["matrix", part] = csr_matrix(
                (np.ones(len(users), dtype=np.float32), (users, items)), shape=shape
            )
        return self._cache["matrix", part]

    def seen(self, phase: str) -> csr_matrix:
        """What is masked before ranking, for every method alike: "valid": train; "test": train and valid."""
        return self.matrix(_of_phase(phase, valid="train", test="train+valid"))

    def history_matrix(self, phase: str) -> csr_matrix:
        """What a method may read as input: "train" and "valid": train; "test": `test_history`."""
        return self.matrix(_of_phase(phase, train="train", valid="train", test=self.test_history))

    def histories(self, users: ArrayLike, phase: str) -> list[np.ndarray]:
        """The items that a method may read for each of `users`, oldest first; the same rule as `history_matrix`."""
        part = _of_phase(phase, train="train", valid="train", test=self.test_history)
        if ("histories", part) not in self._cache:
            owners, items = self.pairs(part)
            self._cache["histories", part] = items, np.searchsorted(owners, np.arange(self.dataset.n_users + 1))
        items, starts = self._cache["histories", part]
        return [items[starts[user] : starts[user + 1]] for user in np.asarray(users).tolist()]

    def targets(self, phase: str) -> csr_matrix:
        """What has to be predicted, float32 [n_users, n_items]: "valid": valid; "test": test."""
        return self.matrix(_of_phase(phase, valid="valid", test="test"))

    def eval_users(self, phase: str, max_users: int = 0) -> np.ndarray:
        """Users with at least one target, ascending, int64; with `max_users` > 0 a sample of at most so many.

        The sample depends on neither seed nor protocol, and smaller samples are parts of larger ones.
        """
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
        """Stop before something that holds these user-item pairs reaches a method.

        Parameters
        ----------
        users, items : array_like of int
            Pairs, of shapes that broadcast; items of PAD are ignored.
        phase : {"train", "valid", "test"}
            "train" and "valid": no pair may be a validation or test event; "test": no pair may be a test event.
        what : str
            What the pairs are, for the message: "prompt history", "training windows" …

        Raises
        ------
        LeakError
            Naming the user, the item and `what`.
        """
        parts = _of_phase(phase, train="valid test", valid="valid test", test="test").split()
        n_users, n_items = self.dataset.n_users, self.dataset.n_items
        pair_users, pair_items = np.broadcast_arrays(
            np.asarray(users, dtype=np.int64), np.asarray(items, dtype=np.int64)
        )
        if pair_users.size == 0:
            return
        if pair_users.min() < 0 or pair_users.max() >= n_users or pair_items.min() < 0 or pair_items.max() >= n_items:
            raise ValueError(f"{what}: internal ids must lie in 0..{n_users - 1} (users) and 0..{n_items - 1} (items)")
        codes = (pair_users * n_items + pair_items).ravel()
        for part in parts:
            if ("codes", part) not in self._cache:
                held_users, held_items = self.pairs(part)
                self._cache["codes", part] = np.sort(held_users * n_items + held_items)
            held = self._cache["codes", part]
            leaks = held[np.minimum(np.searchsorted(held, codes), len(held) - 1)] == codes if len(held) else codes < 0
            if leaks.any():
                user, item = divmod(int(codes[np.argmax(leaks)]), n_items)
                raise LeakError(
                    f"{what} (phase {phase!r}) holds {int(leaks.sum()):,} held-out {part} event(s), the first: user "
                    f"{self.dataset.user_ids[user]!r}, item {self.dataset.item_ids[item]!r}; build it from "
                    "split.histories or split.history_matrix of this phase"
                )


def split(
    dataset: Dataset,
    protocol: str = "temporal_ratio",
    seed: int = 0,
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1),
    test_history: str = "train+valid",
) -> Split:
    """Divide the interactions into training, validation and test.

    Parameters
    ----------
    dataset : Dataset
    protocol : str
        ``temporal_ratio``: of each user's events by time, the first 80 % train, the next 10 % validate, the last 10 %
        test; without timestamps in a seeded random order, with a warning. ``random_ratio``: the same shares at random.
        ``leave_one_out``: the last event tests, the one before validates; of two events the last tests, a single one
        trains. ``global_temporal``: the earliest 80 % of all events train, the next 10 % validate, the last 10 % test,
        for all users together; events at the very instant of a boundary belong to the later part.
    seed : int
        Order of events of one user at one instant, and random orders.
    ratios : tuple of 3 float
        Shares of the three parts, > 0, not used by leave_one_out. Rounded for each user as RecBole 1.2.1 does
        (``Dataset._calcu_split_ids``).
    test_history : {"train+valid", "train"}
        See `Split`.

    Raises
    ------
    ProtocolError
        If the protocol is unknown, needs times that the data set does not have, or leaves a part empty.
    """
    if protocol not in PROTOCOLS:
        raise ProtocolError(f"protocol {protocol!r} is unknown; use one of {', '.join(PROTOCOLS)}")
    if len(ratios) != 3 or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ValueError(f"ratios {ratios} must be three numbers > 0: train, valid, test")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    notes: list[str] = []
    events = dataset.interactions
    order = _time_order(dataset, seed)
    if dataset.time is None and protocol in ("leave_one_out", "global_temporal"):
        raise ProtocolError(
            f"{protocol} needs timestamps, and {dataset.name} has none; possible are random_ratio, "
            "and temporal_ratio, which then falls back to a seeded random order"
        )
    if protocol == "global_temporal":
        if dataset.time == "position":
            raise ProtocolError(
                f"global_temporal compares times between users, and the timestamps of {dataset.name} only count the "
                "events of each user; possible are temporal_ratio, random_ratio and leave_one_out"
            )
        time = events["timestamp"].to_numpy()[order]
        total = math.fsum(ratios)
        shares = (ratios[0] / total, (ratios[0] + ratios[1]) / total)
        boundaries = np.sort(time)[[min(int(round(share * len(time), 6)), len(time) - 1) for share in shares]]
        part = np.searchsorted(boundaries, time, side="right")
    else:
        if protocol == "temporal_ratio" and dataset.time is None:
            notes.append(f"{dataset.name} has no timestamps: temporal_ratio falls back to a seeded random order")
            warnings.warn(notes[-1], stacklevel=2)
        if protocol == "random_ratio":
            order = np.lexsort((_permutation(len(events), seed, _RANDOM), events["user"].to_numpy()))
        sizes = np.bincount(events["user"].to_numpy(), minlength=dataset.n_users)
        position = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        if protocol == "leave_one_out":
            n_test = (sizes >= 2).astype(np.int64)
            n_train = sizes - n_test - (sizes >= 3)
        else:
            n_train, _, n_test = ratio_counts(sizes, ratios)
        part = (position >= np.repeat(n_train, sizes)).astype(int) + (position >= np.repeat(sizes - n_test, sizes))
    parts = [order[part == which] for which in range(3)]
    if not all(map(len, parts)):
        found = ", ".join(f"{name} {len(rows):,}" for name, rows in zip(("train", "valid", "test"), parts, strict=True))
        reason = "too many events share an instant" if protocol == "global_temporal" else "no user has enough events"
        raise ProtocolError(
            f"{protocol} leaves a part of {dataset.name} without events ({found}): {reason}; use another protocol"
        )
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
        counts[which] = counts[which] + more
        counts[0] = counts[0] - more
    return counts[0], counts[1], counts[2]


def _permutation(n: int, seed: int, stream: int) -> np.ndarray:
    return np.random.default_rng([seed, stream]).permutation(n)


def _time_order(dataset: Dataset, seed: int) -> np.ndarray:
    """Rows by user, exact time, and for ties (all events, where there is no time) a seeded random order."""
    users = dataset.interactions["user"].to_numpy()
    ties = _permutation(len(users), seed, _TIES)
    if dataset.time is None:
        return np.lexsort((ties, users))
    return np.lexsort((ties, dataset.interactions["timestamp"].to_numpy(), users))


def _of_phase(phase: str, **parts: str) -> str:
    if phase not in parts:
        raise ValueError(f"phase {phase!r} must be one of {', '.join(map(repr, parts))}")
    return parts[phase]
