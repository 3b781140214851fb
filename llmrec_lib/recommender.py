"""The one interface: whatever can score items for users is a `Recommender`, whether it counts, learns, reads text or fuses."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import FloatTensor, LongTensor

from llmrec_lib.cache import content_key
from llmrec_lib.splits import Split

PHASES = ("valid", "test")


class Recommender(ABC):
    """Scores every item for a batch of users.

    Parameters
    ----------
    split : Split
        Gives the histories that a method may read, and the number of users and items.
    name : str
        How tables and figures call the method.
    """

    def __init__(self, split: Split, name: str) -> None:
        self.split = split
        self.name = name
        self.phase = "test"

    @property
    def n_users(self) -> int:
        """Number of users, the PAD user 0 included."""
        return self.split.dataset.n_users

    @property
    def n_items(self) -> int:
        """Number of items, the PAD item 0 included."""
        return self.split.dataset.n_items

    def at(self, phase: str) -> Recommender:
        """A view of this recommender that reads the histories of `phase` ("valid": train; "test": train and valid)."""
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; it is one of {PHASES}")
        view = copy.copy(self)
        view.phase = phase
        return view

    @abstractmethod
    def score(self, users: LongTensor) -> FloatTensor:
        """Score all items: users [B] -> scores [B, n_items], higher is better, nothing masked; column 0 is PAD."""

    def describe(self) -> dict:
        """The configuration that decides the scores, as plain values and hashes: what a guard and a results file compare.

        All attributes count, but the phase, and those that begin with an underscore, which follow from the others; and of a
        class that is not the library's, what its methods do.
        """
        counts = {n: value for n, value in vars(self).items() if n not in ("phase", "split") and n[0] != "_"}
        methods = [m for kind in type(self).__mro__ for m in vars(kind).values() if isinstance(m, FunctionType)]
        foreign = [m for m in methods if not str(m.__module__).startswith("llmrec_lib")]
        return {n: _described(value) for n, value in {"class": [type(self).__name__, *foreign], **counts}.items()}


def _described(value: Any) -> Any:
    if isinstance(value, Recommender):
        return value.describe()
    if isinstance(value, list | tuple):
        return [_described(part) for part in value]
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__name__} {content_key(dict(value.state_dict()))}"
    if sp.issparse(value):
        return content_key(*(getattr(value.tocsr(), part) for part in ("data", "indices", "indptr")))
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, FunctionType):  # what it does, and what it has been given
        given = [cell.cell_contents for cell in value.__closure__ or ()] + [*(value.__defaults__ or ())]
        parts = [getattr(one, "__code__", one) for one in (value, *given) if not isinstance(one, type | Recommender)]
        return _described(parts)
    if isinstance(value, CodeType):
        inside = [_described(one) if isinstance(one, CodeType) else repr(one) for one in value.co_consts]
        return [value.co_code.hex(), *value.co_names, *inside]
    return content_key(value)


class ItemSimilarityRecommender(Recommender):
    """``score(u, ·) = h_u S``: the items of a history vote for the items similar to them.

    EASE, SLIM and ItemKNN learn S from interactions, a content-based method takes it from text; the rest is the same.

    Parameters
    ----------
    similarity : Tensor or scipy sparse matrix [n_items, n_items]
        Row = item of the history, column = item voted for.
    """

    def __init__(self, split: Split, similarity: torch.Tensor | sp.spmatrix, name: str) -> None:
        super().__init__(split, name)
        if tuple(similarity.shape) != (needed := (self.n_items, self.n_items)):
            raise ValueError(f"similarity is {tuple(similarity.shape)}; this data set needs {needed}")
        if not sp.issparse(similarity):
            similarity = similarity.detach().cpu().numpy()
        self.similarity = similarity.astype(np.float32, copy=False)
        self.half_life: float | None = None

    def recent(self, half_life: float) -> ItemSimilarityRecommender:
        """The same, but the vote of an event halves with every `half_life` newer events of its user; 0 for equal votes."""
        if not half_life >= 0:
            raise ValueError(f"half_life is {half_life}; it must be more than 0, or 0 for votes that do not fade")
        faded = copy.copy(self)
        faded.half_life = half_life or None
        return faded

    def score(self, users: LongTensor) -> FloatTensor:
        history = self.split.history_matrix(self.phase, self.half_life)[users.numpy()]
        if sp.issparse(self.similarity):
            return torch.from_numpy((history @ self.similarity).toarray())
        items, starts = (torch.from_numpy(part).long() for part in (history.indices, history.indptr[:-1]))
        votes, table = torch.from_numpy(history.data), torch.from_numpy(self.similarity)
        return torch.nn.functional.embedding_bag(items, table, starts, mode="sum", per_sample_weights=votes)


class RecBoleRecommender(Recommender):
    """A trained RecBole model (general, sequential or context-aware) seen through the one interface.

    Sequential models read the user's history of the phase. General and context-aware models know a user only by the vector
    that training gave, so the events between training and test cannot reach them.
    """

    def __init__(self, model: torch.nn.Module, split: Split, name: str) -> None:
        super().__init__(split, name)
        self.model = model

    def score(self, users: LongTensor) -> FloatTensor:
        from llmrec_lib import _recbole

        return _recbole.full_sort_scores(self.model, self.split, users, self.phase)


class ScoreTable(Recommender):
    """The scores of another recommender for some users, computed once and kept: for tuning weights, which asks again and again.

    Memory: 4 bytes × len(users) × n_items for each phase that is asked for.

    Raises
    ------
    KeyError
        When scores are asked for a user who is not in `users`.
    """

    def __init__(self, recommender: Recommender, users: Sequence[int], batch_size: int = 256) -> None:
        super().__init__(recommender.split, recommender.name)
        self.recommender = recommender
        self.batch_size = batch_size
        self._rows = torch.full((self.n_users,), -1, dtype=torch.long)
        self._users = torch.as_tensor(np.unique(np.asarray(users, dtype=np.int64)))
        self._rows[self._users] = torch.arange(len(self._users))
        self._tables: dict[str, FloatTensor] = {}  # shared by the views that `at` makes

    def score(self, users: LongTensor) -> FloatTensor:
        rows = self._rows[users]
        if (rows < 0).any():
            raise KeyError(f"user {int(users[rows < 0][0])} is not among the {len(self._users)} users of this table")
        if self.phase not in self._tables:
            arm = self.recommender.at(self.phase)
            self._tables[self.phase] = torch.cat([arm.score(batch) for batch in self._users.split(self.batch_size)])
        return self._tables[self.phase][rows].clone()

    def describe(self) -> dict:
        return self.recommender.describe()


def to_recbole(recommender: Recommender, phase: str = "test") -> torch.nn.Module:
    """Hand a recommender back to RecBole as a `GeneralRecommender` that RecBole's own `Trainer.evaluate` can judge.

    Returns
    -------
    recbole.model.abstract_recommender.GeneralRecommender
        Its ``full_sort_predict`` gives this recommender's scores.
    """
    from llmrec_lib import _recbole

    return _recbole.wrap(recommender.at(phase))


def evaluate_by_recbole(
    recommender: Recommender, metrics: Sequence[str], ks: Sequence[int], phase: str = "test"
) -> dict[str, float]:
    """What RecBole's own ``Trainer.evaluate`` says about a recommender: full ranking, RecBole's mask and metrics.

    Parameters
    ----------
    metrics : RecBole's names, such as ["Recall", "NDCG"].

    Returns
    -------
    dict
        ``"ndcg@10"`` -> value, rounded by RecBole to 10 decimals.
    """
    from llmrec_lib import _recbole

    return _recbole.judge(to_recbole(recommender, phase), recommender.split, list(metrics), list(ks))()
