"""Fusing recommenders: side by side (parallel), one after the other (sequential), weighted (hybrid). Fusions nest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import FloatTensor, LongTensor

from llmrec_lib.evaluation.evaluate import evaluate, mask_seen, tie_order, top_k
from llmrec_lib.recommender import Recommender

if TYPE_CHECKING:
    from llmrec_lib.splits import Split


def z_score(scores: FloatTensor) -> FloatTensor:
    """``(s − mean) / std`` of each row over its unmasked (finite) items; a row without spread becomes 0. [B, n_items]"""
    finite = torch.isfinite(scores)
    count = finite.sum(dim=1, keepdim=True).clamp(min=1)
    values = torch.where(finite, scores.double(), 0.0)
    mean = values.sum(dim=1, keepdim=True) / count
    deviation = torch.where(finite, scores.double() - mean, 0.0)
    std = (deviation.square().sum(dim=1, keepdim=True) / count).sqrt()
    flat = std <= 1e-12 * mean.abs().clamp(min=1.0)
    return torch.where(finite, torch.where(flat, 0.0, deviation / std.clamp(min=1e-300)), -torch.inf).float()


def min_max(scores: FloatTensor) -> FloatTensor:
    """``(s − min) / (max − min)`` of each row over its unmasked items. [B, n_items]"""
    finite = torch.isfinite(scores)
    low = torch.where(finite, scores, torch.inf).amin(dim=1, keepdim=True)
    high = torch.where(finite, scores, -torch.inf).amax(dim=1, keepdim=True)
    span = high - low
    return torch.where(finite, torch.where(span > 0, (scores - low) / span.clamp(min=1e-30), 0.0), -torch.inf)


def ranks(scores: FloatTensor) -> FloatTensor:
    """Rank of each item in its row, best = 1; equal scores share their mean rank; masked items come last. [B, n_items]"""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(-scores.numpy(), method="average", axis=1)).float()


def borda(scores: FloatTensor) -> FloatTensor:
    """Borda count: how many unmasked items an item beats, divided by their number (de Borda 1781; Aslam & Montague 2001)."""
    finite = torch.isfinite(scores)
    count = finite.sum(dim=1, keepdim=True)
    return torch.where(finite, (count - ranks(scores)) / count, -torch.inf)


def reciprocal_rank(scores: FloatTensor, k: int = 60) -> FloatTensor:
    """``1 / (k + rank)`` (reciprocal rank fusion, Cormack, Clarke & Büttcher 2009)."""
    return torch.where(torch.isfinite(scores), 1 / (k + ranks(scores)), -torch.inf)


NORMALISERS: dict[str, Callable[[FloatTensor], FloatTensor]] = {
    "z": z_score,
    "minmax": min_max,
    "borda": borda,
    "rrf": reciprocal_rank,
}


class _Fusion(Recommender):
    """What all fusions share: arms of one split, read at one phase."""

    def __init__(self, arms: Sequence[Recommender], name: str) -> None:
        if len(arms) < 2:
            raise ValueError(f"a fusion needs at least two arms; {name!r} got {len(arms)}")
        first = arms[0].split
        for arm in arms:
            if arm.split.fingerprint != first.fingerprint:
                raise ValueError(
                    f"arms {arms[0].name!r} and {arm.name!r} come from different splits: one would know the other's test"
                )
        super().__init__(first, name)
        self.arms = list(arms)

    def at(self, phase: str) -> Recommender:
        view = super().at(phase)
        view.arms = [arm.at(phase) for arm in self.arms]
        return view

    def masked_arm_scores(self, users: LongTensor) -> list[FloatTensor]:
        """Each arm's scores [B, n_items] with seen items at ``-inf``: calibration looks at what can be recommended."""
        return [mask_seen(arm.score(users).float().clone(), self.split, users, self.phase) for arm in self.arms]

    def describe(self) -> dict:
        return {**super().describe(), "arms": [arm.describe() for arm in self.arms]}


class HybridFusion(_Fusion):
    """Weighted: ``s = Σ_a w_a · norm(s_a)``, with a weight for each arm, or for each arm and user.

    Parameters
    ----------
    weights : sequence of float, or callable
        One per arm; or a function of users [B] that gives weights [B, n_arms] (activity, entropy, a learned gate).
        With weight 1 for one arm and 0 for the rest, the ranking is that arm's.
    """

    def __init__(
        self,
        arms: Sequence[Recommender],
        weights: Sequence[float] | Callable[[LongTensor], torch.Tensor],
        rule: str = "z",
        name: str | None = None,
    ) -> None:
        if rule not in NORMALISERS:
            raise ValueError(f"no rule {rule!r}; there are {', '.join(NORMALISERS)}")
        super().__init__(arms, name or " + ".join(arm.name for arm in arms))
        if not callable(weights) and len(weights) != len(arms):
            raise ValueError(f"{len(arms)} arms need {len(arms)} weights; got {len(weights)}")
        self.weights = weights if callable(weights) else tuple(float(weight) for weight in weights)
        self.rule = rule

    def score(self, users: LongTensor) -> FloatTensor:
        per_user = self.weights(users) if callable(self.weights) else torch.tensor(self.weights).expand(len(users), -1)
        fused = torch.zeros(len(users), self.n_items)
        for position, scores in enumerate(self.masked_arm_scores(users)):
            normalised = NORMALISERS[self.rule](scores)
            fused += torch.where(torch.isfinite(normalised), per_user[:, position, None] * normalised, -torch.inf)
        return _unmasked(fused)

    def describe(self) -> dict:
        return {**super().describe(), "weights": "callable" if callable(self.weights) else list(self.weights)}


class ParallelFusion(HybridFusion):
    """Arms run side by side and are judged together: ``s = Σ_a norm(s_a)``, each arm the same weight.

    Parameters
    ----------
    arms : recommenders of one split.
    rule : "z" | "minmax" | "borda" | "rrf"
        CombSUM over z-scores or min–max scores (Fox & Shaw 1994), Borda count, or reciprocal rank fusion.
    """

    def __init__(self, arms: Sequence[Recommender], rule: str = "z", name: str | None = None) -> None:
        super().__init__(arms, [1.0] * len(arms), rule, name or f"{' + '.join(arm.name for arm in arms)} ({rule})")


class SequentialFusion(_Fusion):
    """One after the other, accumulating: the first arm retrieves, each further arm re-ranks what is left.

    After stage t the candidates are the top ``n_candidates[t]`` of stage t; stage t + 1 adds ``weight · z(s_{t+1})``, z taken
    over the candidates, to the accumulated score: interpolation, not replacement. With weight 0 the ranking is the retriever's.

    Parameters
    ----------
    arms : retriever first.
    n_candidates : int or one per re-ranking stage.
    weights : float or one per re-ranking stage.
    """

    def __init__(
        self,
        arms: Sequence[Recommender],
        n_candidates: int | Sequence[int] = 100,
        weights: float | Sequence[float] = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(arms, name or " → ".join(arm.name for arm in arms))
        stages = len(arms) - 1
        self.n_candidates = (n_candidates,) * stages if isinstance(n_candidates, int) else tuple(n_candidates)
        self.weights = (float(weights),) * stages if isinstance(weights, int | float) else tuple(weights)
        if len(self.n_candidates) != stages or len(self.weights) != stages:
            raise ValueError(f"{stages} re-ranking stages need {stages} n_candidates and {stages} weights")
        if list(self.n_candidates) != sorted(self.n_candidates, reverse=True) or min(self.n_candidates) < 1:
            raise ValueError(f"n_candidates must be positive and not grow from stage to stage; got {self.n_candidates}")

    def candidates(self, users: LongTensor, stage: int = 0) -> LongTensor:
        """Item ids [B, n_candidates] that enter re-ranking stage `stage`, best first."""
        return self._run(users, stage)[1]

    def _run(self, users: LongTensor, last_stage: int) -> tuple[FloatTensor, LongTensor]:
        order = tie_order(self.n_items)
        retriever, *rerankers = self.arms
        accumulated = mask_seen(retriever.score(users).float().clone(), self.split, users, self.phase)
        n_first = min(self.n_candidates[0], self.n_items - 1)
        kept = top_k(accumulated, n_first, order)
        total = z_score(accumulated.gather(1, kept))
        for stage in range(last_stage):
            scores = mask_seen(rerankers[stage].score(users).float().clone(), self.split, users, self.phase)
            added = z_score(scores.gather(1, kept))
            total = total + self.weights[stage] * torch.where(torch.isfinite(added), added, 0.0)
            n_next = (
                min(self.n_candidates[stage + 1], kept.shape[1])
                if stage + 1 < len(self.n_candidates)
                else kept.shape[1]
            )
            best = torch.sort(total, dim=1, descending=True, stable=True).indices[:, :n_next]
            kept, total = kept.gather(1, best), total.gather(1, best)
        # Candidates first, in their accumulated order; everything else behind them, in the retriever's order.
        self_order = _unmasked(z_score(accumulated))
        total = _unmasked(total)  # where less than n_candidates items are unseen, masked ones are among the kept
        lift = (self_order.amax(dim=1, keepdim=True) - total.amin(dim=1, keepdim=True)).clamp(min=0) + 1.0
        return self_order.scatter(1, kept, total + lift), kept

    def score(self, users: LongTensor) -> FloatTensor:
        return self._run(users, len(self.arms) - 1)[0]

    def describe(self) -> dict:
        return {**super().describe(), "n_candidates": list(self.n_candidates), "weights": list(self.weights)}


def _unmasked(scores: FloatTensor) -> FloatTensor:
    """Put masked items below all others with a finite value, so that a fusion can be an arm of another one."""
    finite = torch.isfinite(scores)
    floor = torch.where(finite, scores, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(finite, scores, torch.where(torch.isfinite(floor), floor, 0.0) - 1.0)


def retrieval_ceiling(
    retriever: Recommender, split: Split, ns: Sequence[int], phase: str = "test", users: Sequence[int] | None = None
) -> pd.DataFrame:
    """The best that any re-ranker of the top n could reach: mean recall of the candidates, for each n.

    Returns
    -------
    DataFrame
        ``n``, ``recall``: share of each user's targets among the top n, mean over users.
    """
    sizes = [min(n, split.dataset.n_items - 1) for n in ns]
    found = evaluate(retriever, split, phase, method=f"{retriever.name} (ceiling)", ks=sizes, users=users)
    return pd.DataFrame({"n": list(ns), "recall": [found.mean(f"recall@{size}") for size in sizes]})


def tune(
    build: Callable[[float], Recommender],
    values: Sequence[float],
    split: Split,
    metric: str = "ndcg@10",
    users: Sequence[int] | None = None,
) -> tuple[float, pd.DataFrame]:
    """Choose one value (a weight, a depth) on validation, never on test.

    Parameters
    ----------
    build : value -> Recommender
    values : candidates; the first of the best wins, so put the plainest first.

    Returns
    -------
    best, table
        The chosen value; ``value`` and `metric` of every candidate.
    """
    rows = [(value, evaluate(build(value), split, "valid", users=users).mean(metric)) for value in values]
    table = pd.DataFrame(rows, columns=["value", metric])
    return values[int(table[metric].to_numpy().argmax())], table
