"""Full-ranking evaluation: users stream through in batches, one mask for all methods, values per user first."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from tqdm import tqdm

from llmrec_lib.evaluation.metrics import PER_USER, catalogue_metrics, per_user_metrics
from llmrec_lib.recommender import Recommender
from llmrec_lib.splits import Split

KS = (5, 10, 20)
BATCH_SCORES = 2**20  # users × items at once by default: 4 MB of scores, whatever the catalogue


class TestReuseError(ValueError):
    """One method name was judged on test data under two configurations: the second was chosen after a look at the answer."""

    __test__ = False  # for pytest: not a test


@dataclass(eq=False)
class Evaluation:
    """What one method reached on one split: a table of users × metrics, and metrics of all lists together."""

    method: str
    family: str
    dataset: str
    protocol: str
    seed: int
    phase: str
    per_user: pd.DataFrame  # index "user"; columns "ndcg@10", …
    catalogue: dict[str, float]  # "coverage@10", "gini@10", …
    seconds: float

    def mean(self, metric: str = "ndcg@10") -> float:
        """Mean over users of a per-user metric, or the value of a catalogue metric."""
        if metric in self.catalogue:
            return self.catalogue[metric]
        if metric not in self.per_user:
            raise KeyError(f"no metric {metric!r}; this evaluation has {', '.join([*self.per_user, *self.catalogue])}")
        return float(self.per_user[metric].mean())

    def tidy(self) -> pd.DataFrame:
        """One row per metric and cut-off: dataset, protocol, method, family, seed, metric, k, value, n_users, seconds."""
        values = {**self.per_user.mean().to_dict(), **self.catalogue}
        rows = [(*name.split("@"), value) for name, value in values.items()]
        table = pd.DataFrame(rows, columns=["metric", "k", "value"]).astype({"k": int})
        for position, column in enumerate(("dataset", "protocol", "method", "family", "seed")):
            table.insert(position, column, getattr(self, column))
        return table.assign(n_users=len(self.per_user), seconds=self.seconds)

    def per_user_tidy(self) -> pd.DataFrame:
        """One row per user, metric and cut-off: method, seed, user, metric, k, value (float32)."""
        long = self.per_user.melt(ignore_index=False, var_name="name").reset_index()
        long[["metric", "k"]] = long.pop("name").str.split("@", expand=True)
        long = long.astype({"k": int, "value": np.float32}).assign(method=self.method, seed=self.seed)
        return long[["method", "seed", "user", "metric", "k", "value"]]


def top_k(scores: torch.Tensor, k: int, order: torch.Tensor) -> torch.Tensor:
    """Item ids of the k highest scores, best first; equal scores are ranked by `order`, so that no method gains by its ids.

    Parameters
    ----------
    scores : Tensor [B, n_items]
        Masked items hold ``-inf``.
    order : LongTensor [n_items]
        A fixed random rank for each item, the same for all methods.

    Returns
    -------
    LongTensor [B, k]
    """
    values, items = torch.topk(scores, min(k + 1, scores.shape[1]), dim=1)
    # Where the best item left out has the score of the last one chosen, torch.topk picked arbitrarily: such rows are sorted whole.
    ambiguous = (values[:, k - 1] == values[:, -1]).nonzero().squeeze(1)
    values, items = values[:, :k], items[:, :k]
    if len(ambiguous):
        by_order = torch.argsort(order)
        ranked = torch.sort(scores[ambiguous][:, by_order], dim=1, descending=True, stable=True).indices[:, :k]
        items[ambiguous] = by_order[ranked]
        values[ambiguous] = scores[ambiguous].gather(1, items[ambiguous])
    by_tie = torch.argsort(order[items], dim=1)
    by_value = torch.sort(values.gather(1, by_tie), dim=1, descending=True, stable=True).indices
    return items.gather(1, by_tie).gather(1, by_value)


def tie_order(n_items: int) -> torch.Tensor:
    """A fixed random rank for each item, by which ties are broken."""
    return torch.from_numpy(np.random.default_rng(20_240_611).permutation(n_items))


def mask_seen(scores: torch.Tensor, split: Split, users: torch.Tensor, phase: str) -> torch.Tensor:
    """Set PAD and what each user has seen before `phase` to ``-inf``, in place; returns scores [B, n_items]."""
    seen = split.seen(phase)[users.numpy()]
    rows = np.repeat(np.arange(len(users)), np.diff(seen.indptr))
    scores.numpy()[rows, seen.indices] = -np.inf  # shares the memory, and is faster at this than torch
    scores[:, 0] = -torch.inf
    return scores


def evaluate(
    recommender: Recommender, split: Split, phase: str = "test", *, family: str = "id", method: str | None = None,
    seed: int | None = None, ks: Sequence[int] = KS, users: Sequence[int] | None = None,
    among: Sequence[int] | None = None, candidates: Sequence[int] | None = None, batch_size: int | None = None,
    progress: bool = False,
) -> Evaluation:  # fmt: skip
    """Rank the whole catalogue for each user and compare the top of the list with what the user took next.

    Parameters
    ----------
    recommender : Recommender
    split : Split
        Gives targets and mask: seen training items, at test time validation items too, for all methods alike.
    phase : "valid" | "test"
        Choose on "valid"; each method name may be judged on "test" under one configuration only.
    family : "id" | "llm" | "prs" | "fusion" | "control"
    method : name in the tables; `recommender.name` by default.
    seed : the run's seed; the split's by default.
    ks : cut-offs.
    users : user ids to judge; all with at least one target by default.
    among : item ids; only these count as targets, and only users with such a target are judged. All items are ranked.
    candidates : item ids; only these are ranked, all by default. For questions about a group of items, not for headlines.
    batch_size : users scored at once, which takes about ``8 · batch_size · n_items`` bytes; by default as many as make
        `BATCH_SCORES` scores, so that memory does not grow with users or items.

    Raises
    ------
    ValueError
        Scores of a wrong shape or with NaN; no user to judge.
    TestReuseError
        The method name has been judged on test data under another configuration.
    """
    method = method or recommender.name
    seed = split.seed if seed is None else seed
    n_items = split.dataset.n_items
    users = split.eval_users(phase) if users is None else np.asarray(users, dtype=np.int64).copy()
    targets = split.targets(phase)
    if among is not None:
        targets = csr_matrix(targets.multiply(np.isin(np.arange(n_items), among)))
        targets.eliminate_zeros()
        users = users[np.diff(targets.indptr)[users] > 0]
    n_targets = np.diff(targets.indptr)[users]
    if not len(users) or not n_targets.all():
        who = "some users have nothing" if len(users) else "no users"
        raise ValueError(f"{who} to judge at phase {phase!r}: take users from split.eval_users({phase!r})")
    if phase == "test":
        look, configuration = (split.fingerprint, method, seed), recommender.describe()
        _check_first_look(look, configuration)
    if (k := max(ks)) >= n_items:
        raise ValueError(f"ks asks for {k} items; the catalogue has {n_items - 1}")

    view = recommender.at(phase)
    order = tie_order(n_items)
    batch_size = batch_size or max(1, BATCH_SCORES // n_items)
    lists, seconds = np.empty((len(users), k), dtype=np.int32), 0.0
    table = np.empty((len(users), len(PER_USER) * len(set(ks))), order="F")
    for first in tqdm(range(0, len(users), batch_size), desc=method, unit="batch", leave=False, disable=not progress):
        rows = slice(first, first + batch_size)
        batch = torch.from_numpy(users[rows])
        start = time.perf_counter()
        scores = view.score(batch).float()
        seconds += time.perf_counter() - start
        if scores.shape != (len(batch), n_items):
            raise ValueError(f"{method}: score() gave {tuple(scores.shape)} instead of ({len(batch)}, {n_items})")
        if (broken := scores[:, 1:].amax(dim=1).isnan()).any():  # the maximum of a row with a NaN is NaN
            raise ValueError(f"{method}: scores of user {batch[broken][0]} contain NaN; look at its history and inputs")
        masked = mask_seen(scores.clone(), split, batch, phase)
        if candidates is not None:
            masked[:, np.isin(np.arange(n_items), candidates, invert=True)] = -torch.inf
        best = top_k(masked, k, order)
        lists[rows] = torch.where(masked.gather(1, best) > -torch.inf, best, 0)  # PAD: nothing is left
        hits = targets[users[rows, None], lists[rows]].toarray() > 0
        values = per_user_metrics(hits, n_targets[rows], split.item_counts[lists[rows]], ks)
        table[rows] = np.stack([*values.values()], axis=1)
    if phase == "test":
        _judged[look] = configuration
    per_user = pd.DataFrame(table, columns=[*values], index=pd.Index(users, name="user"))
    about = (method, family, split.dataset.name, split.protocol, seed, phase)
    return Evaluation(*about, per_user, catalogue_metrics(lists, n_items - 1, ks), seconds)


_judged: dict[tuple[str, str, int], dict] = {}


def _check_first_look(look: tuple[str, str, int], configuration: dict) -> None:
    """Refuse a second configuration of a method that has been judged on this test set."""
    known = _judged.get(look)
    if known not in (None, configuration):
        changed = sorted(key for key in {*known, *configuration} if known.get(key) != configuration.get(key))
        before = f"{look[1]!r} has been judged on this test set with other settings ({', '.join(changed)})"
        raise TestReuseError(f"{before}; choose settings with phase='valid', or give the variant a name of its own")
