"""Compressed encoders and language models of ml-100k, each against its own float32, with what the recommendation loses.

An encoder is used as an arm beside EASE (temporal ratio, every user, all items), a language model by the likelihood of the
whole catalogue. Times leave the cache out, and all variants take turns, since a busy minute must hit them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.stats import spearmanr

from benchmarks import seconds_of
from llmrec_lib.baselines import train
from llmrec_lib.datasets import load_dataset
from llmrec_lib.evaluation import Evaluation, compare, evaluate
from llmrec_lib.evaluation.statistics import interval
from llmrec_lib.fusion import HybridFusion, tune
from llmrec_lib.language_models.compress import size
from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.language_models.likelihood import TitleLikelihood
from llmrec_lib.llm_based import TitleLikelihoodRecommender, catalogue_likelihood
from llmrec_lib.prompts import user_prompts
from llmrec_lib.prs_based import embed_items, text_similarity
from llmrec_lib.splits import Split, split

ENCODERS = ("int8", "int4-weights", "layers3+int8", "layers3+neurons50+int8", "layers2+int8", "layers2+bfloat16")
LLMS = ("int8", "int4-weights")
WEIGHTS = (0.05, 0.1, 0.2, 0.5)  # of the text beside EASE, chosen on validation with float32
LLM_USERS = 40


def measure(encoder: str = "minilm", llm: str = "smollm2-135m", repeats: int = 5) -> list[dict]:
    """``same_output``: whether NDCG@10 (of an encoder: beside EASE; of a language model: alone, for `LLM_USERS` users) lies in
    the 95 % interval of the uncompressed system; ``error``: the share of it that is lost; ``ndcg_low``, ``ndcg_high``: paired
    interval of the difference. ``mb`` and ``mb_peer`` are the weights; ``rank_correlation`` is the lowest of some prompts.
    """
    parts = split(load_dataset("ml-100k"), "temporal_ratio", 0)
    return [*_encoders(parts, encoder, repeats), *_llms(parts, llm, repeats)]


def _encoders(parts: Split, name: str, repeats: int) -> list[dict]:
    models = {"": TextEncoder(name, dtype="float32")}
    for recipe in ENCODERS:  # bfloat16 is a dtype, all else is part of a model's name
        kept = recipe.removesuffix("+bfloat16")
        models[recipe] = TextEncoder(f"{name}@{kept}", dtype="float32" if kept == recipe else "bfloat16")
    texts = list(dict.fromkeys(parts.dataset.item_text))
    work = {recipe: lambda one=one: one._embed(one._tokenize(texts), progress=False) for recipe, one in models.items()}
    seconds = _taking_turns(work, repeats)
    ease = train("ease", parts, progress=False)
    arms = {recipe: text_similarity(parts, embed_items(parts, one)[0], name=recipe) for recipe, one in models.items()}
    weight, _ = tune(lambda w: HybridFusion([ease, arms[""]], [1.0, w]), WEIGHTS, parts)
    judged = {
        recipe: evaluate(HybridFusion([ease, arm], [1.0, weight], name=f"fused, {recipe}"), parts)
        for recipe, arm in arms.items()
    }
    rows = []
    for recipe in ENCODERS:
        row = _row(f"encoder, {recipe}", "items/s", len(texts), seconds, recipe)
        row |= _loss(judged[recipe], judged[""])
        rows.append(row | _sizes(models[recipe].model, models[""].model))
    return rows


def _llms(parts: Split, name: str, repeats: int) -> list[dict]:
    models = {"": catalogue_likelihood(parts, name, dtype="float32")}
    models |= {recipe: catalogue_likelihood(parts, f"{name}@{recipe}", dtype="float32") for recipe in LLMS}
    prompts = user_prompts(parts, parts.eval_users("test", 3), "test")

    def score(one: TitleLikelihood) -> torch.Tensor:
        return torch.stack([one.log_likelihood(prompt, "catalogue") for prompt in prompts])

    work = {recipe: lambda one=one: score(one) for recipe, one in models.items()}
    scores = {recipe: job() for recipe, job in work.items()}
    seconds = _taking_turns(work, max(1, repeats // 2))
    arms = {
        recipe: TitleLikelihoodRecommender(parts, one, over="catalogue", name=f"likelihood, {recipe}")
        for recipe, one in models.items()
    }
    users = parts.eval_users("test", LLM_USERS)
    judged = {recipe: evaluate(arm, parts, users=users) for recipe, arm in arms.items()}
    rows = []
    for recipe in LLMS:
        lowest = min(spearmanr(*pair).statistic for pair in zip(scores[recipe], scores[""], strict=True))
        row = _row(f"likelihood over the catalogue, {recipe}", "users/s", len(prompts), seconds, recipe)
        row |= _loss(judged[recipe], judged[""]) | {"rank_correlation": float(lowest)}
        rows.append(row | _sizes(models[recipe].model, models[""].model))
    return rows


def _loss(ours: Evaluation, peer: Evaluation) -> dict:
    low, high = interval(peer.per_user["ndcg@10"].to_numpy())
    gain = compare(ours, peer)
    row = {"same_output": bool(low <= gain["mean_a"] <= high), "error": max(0.0, -float(gain["relative"]))}
    return row | {f"ndcg_{key}": float(gain[key]) for key in ("difference", "low", "high")}


def _taking_turns(work: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    rounds = [{name: seconds_of(job) for name, job in work.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(one[name] for one in rounds) for name in work}


def _row(name: str, unit: str, n: int, seconds: Mapping[str, float], recipe: str) -> dict:
    ours, peer = n / seconds[recipe], n / seconds[""]
    return {"name": f"compressed {name}", "ours": ours, "peer": peer, "unit": unit, "ratio": ours / peer}


def _sizes(model: torch.nn.Module, whole: torch.nn.Module) -> dict[str, float]:
    return {"mb": size(model)["bytes"] / 1e6, "mb_peer": size(whole)["bytes"] / 1e6}
