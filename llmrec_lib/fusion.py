"""Fusing recommenders: side by side (parallel), one after the other (sequential), weighted (hybrid). Fusions nest.

Early fusion, text inside a model of interactions, is `prs_based.ease_with_text`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from scipy.optimize import minimize
from torch import FloatTensor, LongTensor

from llmrec_lib.cache import cached_tensors, content_key, versions
from llmrec_lib.evaluation.evaluate import evaluate, mask_seen, tie_order, top_k
from llmrec_lib.recommender import Recommender
from llmrec_lib.splits import Split
from llmrec_lib.study.provenance import library_hash


def z_score(scores: FloatTensor) -> FloatTensor:
    """``(s − mean) / std`` of each row over its unmasked (finite) items; a row without spread becomes 0. [B, n_items]"""
    values = torch.where(torch.isfinite(scores), scores.double(), torch.nan)
    mean = values.nanmean(dim=1, keepdim=True)
    std = (values - mean).square().nanmean(dim=1, keepdim=True).sqrt()
    flat = std <= 1e-12 * mean.abs().clamp(min=1.0)
    return torch.where(flat, 0.0 * values, (values - mean) / std).nan_to_num(-torch.inf).float()


def log_z(scores: FloatTensor) -> FloatTensor:
    """``sign(z) · log(1 + |z|)``: z-scores whose heavy tails, as sparse data give them, drown nothing else. [B, n_items]"""
    z = z_score(scores)
    return torch.where(torch.isfinite(z), z.sign() * z.abs().log1p(), -torch.inf)


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


N_TOP, N_RANDOM = 100, 200  # items that stand for all of a user's in `LearnedFusion`
NORMALISERS = {"z": z_score, "log_z": log_z, "minmax": min_max, "borda": borda, "rrf": reciprocal_rank}


class _Fusion(Recommender):
    """What all fusions share: arms of one split, read at one phase."""

    def __init__(self, arms: Sequence[Recommender], name: str) -> None:
        if len(arms) < 2:
            raise ValueError(f"a fusion needs at least two arms; {name!r} got {len(arms)}")
        first = arms[0].split
        for arm in arms:
            if arm.split.fingerprint != first.fingerprint:
                raise ValueError(
                    f"{arms[0].name!r} and {arm.name!r} come from different splits: one knows the other's test"
                )
        super().__init__(first, name)
        self.arms = list(arms)

    def at(self, phase: str) -> Recommender:
        view = super().at(phase)
        view.arms = [arm.at(phase) for arm in self.arms]
        return view

    def comparable(self, users: LongTensor, rule: str) -> list[FloatTensor]:
        """Each arm's scores [B, n_items], seen items at ``-inf`` and the others normalised: what can be recommended counts."""
        masked = [mask_seen(arm.score(users).float().clone(), self.split, users, self.phase) for arm in self.arms]
        return [NORMALISERS[rule](scores) for scores in masked]


class HybridFusion(_Fusion):
    """Weighted: ``s = Σ_a w_a · norm(s_a)``, with a weight for each arm, or for each arm and user.

    Parameters
    ----------
    weights : sequence of float, or callable
        One per arm; or a function of users [B] that gives weights [B, n_arms] (activity, entropy, a learned gate).
        With weight 1 for one arm and 0 for the rest, the ranking is that arm's.
    """

    def __init__(
        self, arms: Sequence[Recommender], weights: Sequence[float] | Callable[[LongTensor], torch.Tensor],
        rule: str = "z", name: str | None = None,
    ) -> None:  # fmt: skip
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
        for position, scores in enumerate(self.comparable(users, self.rule)):
            fused += torch.where(torch.isfinite(scores), per_user[:, position, None] * scores, -torch.inf)
        return masked_last(fused)


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


class LearnedFusion(_Fusion):
    """Stacking with a gate: what each arm counts is learned on validation, and depends on the item and the user.

    ``s(u, i) = Σ_a (w_a + v_a · g(i) + t_a · h(u)) · norm(s_a(u, i)) + b · g(i)`` with `item_gates` g and `user_gates` h.
    The weights maximise the probability, a softmax over unseen items, of what each validation user took, less
    ``l2 · |weights|²``: a conditional logit, which has one maximum. Sources: McFadden 1974, "Conditional logit analysis of
    qualitative choice behavior"; Wolpert 1992, "Stacked generalization"; Sill et al. 2009, "Feature-weighted linear
    stacking".

    The softmax is estimated by stratified sampling: all of a user's targets, the `N_TOP` items that the arms together
    put first, and about `N_RANDOM` of the others, each counting for as many as it stands for.

    Parameters
    ----------
    arms : recommenders of one split; popularity should be among them, so that no other arm has to stand in for it.
    users : validation users to learn from; all by default.
    gated : False learns one weight per arm: plain stacking.
    rule : name in `NORMALISERS`.
    l2 : ridge penalty; 1 counts as much as one user.
    """

    def __init__(
        self, arms: Sequence[Recommender], users: Sequence[int] | None = None, gated: bool = True, rule: str = "log_z",
        l2: float = 1.0, name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(arms, name or f"learned ({', '.join(arm.name for arm in arms)})")
        self.gated, self.rule, self.l2 = gated, rule, float(l2)
        users = self.split.eval_users("valid") if users is None else np.asarray(users, dtype=np.int64)
        self.weights = self._learn(users)  # [1 + G + H, n_arms + 1]

    def _gates(self, users: LongTensor) -> tuple[FloatTensor, FloatTensor]:
        """1 and the item gates, [n_items, 1 + G]; the user gates, [B, H]."""
        ones = torch.ones(self.n_items, 1)
        if not self.gated:
            return ones, torch.zeros(len(users), 0)
        return torch.cat([ones, item_gates(self.split, self.phase)], 1), user_gates(self.split, self.phase)[users]

    def _learn(self, users: np.ndarray) -> FloatTensor:
        if not len(users) or not np.diff(self.split.targets("valid").indptr)[users].all():
            raise ValueError(f"{self.name}: learn from users with a validation event, from split.eval_users")
        view, generator = self.at("valid"), torch.Generator().manual_seed(0)
        designs, shares, targets = [], [], []
        for batch in torch.from_numpy(users).split(max(1, 2**22 // self.n_items)):
            scores = view.comparable(batch, self.rule)
            scores = torch.stack([*scores, torch.ones_like(scores[0])], dim=2)  # the last for the items' own weights
            items, people = view._gates(batch)
            taken = torch.from_numpy(self.split.targets("valid")[batch.numpy()].toarray()) > 0
            unseen = torch.isfinite(scores[:, :, 0])
            first = scores[:, :, :-1].sum(2).topk(min(N_TOP, self.n_items), dim=1).indices
            certain = taken | torch.zeros_like(taken).scatter(1, first, True)
            share = (N_RANDOM / (unseen & ~certain).sum(1, keepdim=True).clamp(min=1)).clamp(max=1.0)
            drawn = unseen & (certain | (torch.rand(taken.shape, generator=generator) < share))
            row, item = drawn.nonzero(as_tuple=True)
            gates = torch.cat([items[item], people[row]], dim=1)
            designs.append((gates[:, :, None] * scores[row, item][:, None, :]).flatten(1).numpy())
            shares += torch.where(certain, 1.0, share)[row, item].log().split(drawn.sum(1).tolist())
            targets.append((taken.double() / taken.sum(1, keepdim=True))[row, item].numpy())
        design, target = np.concatenate(designs), np.concatenate(targets)
        offset, sizes = torch.cat(shares).numpy(), [len(share) for share in shares]
        starts = np.cumsum([0, *sizes[:-1]])

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            utility = (design @ weights.astype(np.float32)).astype(np.float64) - offset
            utility -= np.repeat(np.maximum.reduceat(utility, starts), sizes)
            log_p = utility - np.repeat(np.log(np.add.reduceat(np.exp(utility), starts)), sizes)
            gradient = (np.exp(log_p) - target).astype(np.float32) @ design
            return self.l2 * weights @ weights - target @ log_p, gradient + 2 * self.l2 * weights

        def solve() -> dict[str, torch.Tensor]:
            found = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 300})
            return {"weights": torch.from_numpy(found.x).float().view(-1, len(self.arms) + 1)}

        key = content_key(sys.modules[__name__], design, target, offset, sizes, self.l2)
        return cached_tensors("fusions", key, solve)["weights"]

    def score(self, users: LongTensor) -> FloatTensor:
        items, people = self._gates(users)
        of_items, of_users = self.weights.split([items.shape[1], people.shape[1]])
        fused = (items @ of_items)[:, -1].repeat(len(users), 1)
        for place, scores in enumerate(self.comparable(users, self.rule)):
            weight = items @ of_items[:, place] + (people @ of_users[:, place])[:, None]
            fused += torch.where(torch.isfinite(scores), weight * scores, -torch.inf)
        return masked_last(fused)


def item_gates(split: Split, phase: str) -> FloatTensor:
    """What may decide how far to trust an arm about an item, from what `phase` may read: standardised, [n_items, G].

    log(1 + events); and with timestamps log(1 + events in the newest tenth) and the place of the first event in time
    (an item without events is as new as can be).
    """
    parts = "train" if phase == "valid" else split.test_history
    events = split.dataset.interactions.iloc[np.concatenate([getattr(split, part) for part in parts.split("+")])]
    n_items = split.dataset.n_items
    columns = [np.log1p(np.bincount(events["item"], minlength=n_items))]
    if split.dataset.time == "timestamp":
        newest = events["item"][events["timestamp"] >= events["timestamp"].quantile(0.9)]
        births = events.groupby("item")["timestamp"].min().reindex(range(n_items))
        columns += [np.log1p(np.bincount(newest, minlength=n_items)), births.rank(pct=True).fillna(1.0)]
    return _standardised(np.stack(columns, axis=1))


def user_gates(split: Split, phase: str) -> FloatTensor:
    """The same of users: log(1 + events), and how popular their items are, mean log(1 + events of the item). [n_users, 2]"""
    history = split.history_matrix(phase)
    n_events, support = np.diff(history.indptr), np.log1p(np.asarray(history.sum(axis=0)).ravel())
    return _standardised(np.stack([np.log1p(n_events), history @ support / np.maximum(n_events, 1)], axis=1))


def _standardised(columns: np.ndarray) -> FloatTensor:
    """Mean 0 and deviation 1 over all rows but PAD's; a column without spread becomes 0."""
    mean, deviation = columns[1:].mean(axis=0), columns[1:].std(axis=0)
    return torch.from_numpy((columns - mean) / np.where(deviation > 1e-9, deviation, np.inf)).float()


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
        self, arms: Sequence[Recommender], n_candidates: int | Sequence[int] = 100,
        weights: float | Sequence[float] = 1.0, name: str | None = None,
    ) -> None:  # fmt: skip
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
        retriever, *rerankers = self.arms
        accumulated = mask_seen(retriever.score(users).float().clone(), self.split, users, self.phase)
        kept = top_k(accumulated, min(self.n_candidates[0], self.n_items - 1), tie_order(self.n_items))
        total = z_score(accumulated.gather(1, kept))
        for stage in range(last_stage):
            scores = mask_seen(rerankers[stage].score(users).float().clone(), self.split, users, self.phase)
            added = z_score(scores.gather(1, kept))
            total = total + self.weights[stage] * torch.where(torch.isfinite(added), added, 0.0)
            n_next = (*self.n_candidates[stage + 1 :], kept.shape[1])[0]
            best = torch.sort(total, dim=1, descending=True, stable=True).indices[:, :n_next]
            kept, total = kept.gather(1, best), total.gather(1, best)
        # Candidates first, in their accumulated order; everything else behind them, in the retriever's order.
        self_order = masked_last(z_score(accumulated))
        total = masked_last(total)  # where less than n_candidates items are unseen, masked ones are among the kept
        lift = (self_order.amax(dim=1, keepdim=True) - total.amin(dim=1, keepdim=True)).clamp(min=0) + 1.0
        return self_order.scatter(1, kept, total + lift), kept

    def score(self, users: LongTensor) -> FloatTensor:
        return self._run(users, len(self.arms) - 1)[0]


def masked_last(scores: FloatTensor) -> FloatTensor:
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
    build: Callable[[float], Recommender], values: Sequence[float], split: Split, users: Sequence[int] | None = None
) -> tuple[float, pd.DataFrame]:
    """Choose one value (a weight, a depth) on validation, never on test.

    Parameters
    ----------
    build : value -> Recommender
    values : candidates; the first of the best wins, so put the plainest first.

    Returns
    -------
    best, table
        The chosen value; ``value`` and NDCG@10 of every candidate.
    """
    rows = [(value, evaluate(build(value), split, "valid", users=users, ks=[10]).mean()) for value in values]
    table = pd.DataFrame(rows, columns=["value", "ndcg@10"])
    return values[int(table["ndcg@10"].to_numpy().argmax())], table


def search(
    build: Callable[..., Recommender], space: Mapping[str, Sequence], split: Split, trials: int = 10,
    users: Sequence[int] | None = None, key: Any = (),
) -> tuple[dict[str, Any], pd.DataFrame]:  # fmt: skip
    """Choose several settings at once on validation (tree-structured Parzen estimator, Bergstra et al. 2011, by Optuna).

    Each trial is cross-fitted: a half of the users is judged by what was learned from the other half, so that methods that
    learn much and methods that learn nothing are chosen between fairly. Trials are kept on disk: a search that was cut off
    goes on where it was.

    Parameters
    ----------
    build : (users, one value of each setting by name) -> Recommender, learned from these validation users alone.
    space : setting -> values, the plainest first: the first trial takes the first of each.
    trials : the budget, at most as many as there are combinations; give every method the same.
    key : whatever else decides what `build` makes.

    Returns
    -------
    best, table
        The chosen settings; settings and NDCG@10 of every trial, in their order.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    users = split.eval_users("valid") if users is None else np.asarray(users, dtype=np.int64)
    halves, rows = np.array_split(np.random.default_rng(0).permutation(users), 2), {}

    def judge(trial: optuna.Trial) -> float:
        chosen = tuple(values[trial.suggest_categorical(name, range(len(values)))] for name, values in space.items())
        if chosen not in rows:
            settings = dict(zip(space, chosen, strict=True))

            def value() -> dict[str, torch.Tensor]:
                pairs = (halves, halves[::-1])
                found = [evaluate(build(fit, **settings), split, "valid", users=of, ks=[10]) for fit, of in pairs]
                return {"value": torch.cat([torch.from_numpy(one.per_user["ndcg@10"].to_numpy()) for one in found])}

            about = content_key("trial", key, settings, split.fingerprint, users, library_hash(True), versions())
            rows[chosen] = cached_tensors("trials", about, value)["value"].mean().item()
        return rows[chosen]

    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=max(1, trials // 2))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(dict.fromkeys(space, 0))
    budget = min(trials, np.prod([len(values) for values in space.values()], dtype=int))
    # Asked more often than the budget says, since a combination that comes up again is not counted.
    study.optimize(judge, n_trials=10 * budget, callbacks=[lambda study, _: len(rows) >= budget and study.stop()])
    table = pd.DataFrame([(*chosen, value) for chosen, value in rows.items()], columns=[*space, "ndcg@10"])
    return dict(zip(space, max(rows, key=rows.get), strict=True)), table


LEARNED_SPACE = {"gated": [True, False], "l2": [1.0, 10.0, 100.0], "rule": ["log_z", "z"]}


def best_system(
    arms: Callable[..., Sequence[Recommender]], split: Split, name: str, space: Mapping[str, Sequence] = LEARNED_SPACE,
    trials: int = 10, users: Sequence[int] | None = None, key: Any = (),
) -> tuple[Recommender, dict[str, Any], pd.DataFrame]:  # fmt: skip
    """The best that validation can make of some arms: a `LearnedFusion`, its settings from `search`, or one arm alone.

    Parameters
    ----------
    arms : gives the arms, for one value of each name in `space` that is not in `LEARNED_SPACE`.
    name : of the system.
    space : values of the fusion's settings, and of whatever else `arms` depends on; single values are not searched.
    trials, users, key : see `search`.

    Returns
    -------
    system, best, table
        `best` are the chosen settings; `table` is that of `search`, with a row for each arm alone.
    """

    def build(users: Sequence[int], gated: bool, l2: float, rule: str, **chosen: Any) -> LearnedFusion:
        return LearnedFusion(arms(**chosen), users, gated, rule, l2, name=name)

    users = split.eval_users("valid") if users is None else users
    best, table = search(build, space, split, trials, users, (name, key))
    learned = build(users, **best)
    alone = [evaluate(a, split, "valid", method=a.name, users=users, ks=[10]).mean() for a in learned.arms]
    system = learned if table["ndcg@10"].max() > max(alone) else learned.arms[int(np.argmax(alone))]
    table = pd.concat([table, pd.DataFrame({"arm alone": [arm.name for arm in learned.arms], "ndcg@10": alone})])
    return system, best, table
