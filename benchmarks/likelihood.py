"""Log-likelihood of every title of ml-100k under one prompt, against one prompt + title per candidate in padded batches."""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
from scipy.stats import spearmanr

from benchmarks import seconds_of
from llmrec_lib.datasets import load_dataset
from llmrec_lib.language_models.finetune import gemm_rate
from llmrec_lib.language_models.likelihood import TitleLikelihood, _padded_scores, followers
from llmrec_lib.llm_based import catalogue_likelihood
from llmrec_lib.prompts import user_prompts
from llmrec_lib.splits import split

PEER_TITLES = 256  # the peer's time is linear in titles: a sample, scaled up, and compared title by title
PROMPT_TOKENS = 190  # wanted; the user whose prompt comes nearest is taken


def measure(llm: str = "smollm2-135m", repeats: int = 3) -> list[dict]:
    """Rows for both dtypes and both distributions; the peer of all is the float32 loop, on the same cores in the same run.

    ``roof_share`` is the rate at which the floating-point operations of the title tree's matrix products are done (nodes read
    once per prompt, head once per scored node; attention not counted), over that of a square matrix product of the dtype.
    """
    parts = split(load_dataset("ml-100k"), "leave_one_out", 0)
    exact = catalogue_likelihood(parts, llm, dtype="float32")
    prompts = user_prompts(parts, parts.eval_users("test"), "test")
    prompt = min(prompts, key=lambda text: abs(len(exact.prompt_tokens(text)) - PROMPT_TOKENS))
    sample = torch.linspace(0, len(exact.titles) - 1, PEER_TITLES).long().tolist()
    reference, peer = {}, {}
    for over in ("vocabulary", "catalogue"):
        start = time.perf_counter()
        allowed = followers(exact.title_tokens) if over == "catalogue" else None
        titles = [exact.title_tokens[row] for row in sample]
        reference[over] = _padded_scores(exact, exact.prompt_tokens(prompt), titles, 64, allowed)
        peer[over] = (time.perf_counter() - start) * len(exact.titles) / len(sample)
    rows = []
    for dtype in ("float32", "bfloat16"):
        scorer = exact if dtype == "float32" else catalogue_likelihood(parts, llm, dtype=dtype)
        roof = gemm_rate(scorer.dtype, scorer.device)
        for over in ("vocabulary", "catalogue"):
            scores = scorer.log_likelihood(prompt, over)[sample]
            seconds = statistics.median(
                seconds_of(partial(scorer.log_likelihood, prompt, over)) for _ in range(repeats)
            )
            error = float((scores - reference[over]).abs().max())
            rank = float(spearmanr(scores, reference[over]).statistic)
            same = error <= 2e-4 and rank > 0.999999 if dtype == "float32" else rank >= 0.999
            row = {"name": f"likelihood over the {over}, {dtype}", "ours": seconds, "peer": peer[over]}
            row |= {"unit": "seconds per user", "ratio": peer[over] / seconds, "same_output": same, "error": error}
            share = _operations(scorer, prompt, over) / seconds / roof
            rows.append(
                row | {"rank_correlation": rank, "prompt_tokens": len(exact.prompt_tokens(prompt)), "roof_share": share}
            )
    return rows


def _operations(scorer: TitleLikelihood, prompt: str, over: str) -> float:
    head = scorer.model.get_output_embeddings().weight
    body = sum(part.weight.numel() for part in scorer.model.modules() if isinstance(part, torch.nn.Linear))
    body -= head.numel()  # counted once: the head is a linear layer too
    tree = scorer._tree
    inner = tree.inner if over == "vocabulary" else tree.before_forks
    scored = len(inner) + 1 if over == "vocabulary" else 0
    return 2.0 * body * (len(inner) + len(scorer.prompt_tokens(prompt))) + 2.0 * head.numel() * scored
