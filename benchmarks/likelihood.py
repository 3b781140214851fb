"""Log-likelihood of every title of ml-100k under one prompt, against one prompt + title per candidate in padded batches."""

from __future__ import annotations

import time

import torch

from llmrec_lib.datasets import load_dataset
from llmrec_lib.language_models.likelihood import naive_log_likelihood
from llmrec_lib.llm_based import catalogue_likelihood
from llmrec_lib.prompts import user_prompts
from llmrec_lib.splits import split

PEER_TITLES = 256  # the peer's time is linear in titles: a sample, scaled up, and compared title by title


def measure(llm: str = "smollm2-135m", repeats: int = 3) -> list[dict]:
    """One row per dtype: seconds for the whole catalogue under one user's prompt."""
    parts = split(load_dataset("ml-100k"), "leave_one_out", 0)
    prompt = user_prompts(parts, parts.eval_users("test", 1), "test")[0]
    rows = []
    for dtype in ("float32", "bfloat16"):
        scorer = catalogue_likelihood(parts, llm, dtype=dtype)
        sample = torch.linspace(0, len(scorer.titles) - 1, PEER_TITLES).long().tolist()
        scorer.log_likelihood(prompt)
        ours = []
        for _ in range(repeats):
            start = time.perf_counter()
            scores = scorer.log_likelihood(prompt).sum
            ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        reference = naive_log_likelihood(scorer, prompt, rows=sample, batch_size=64).sum
        peer = (time.perf_counter() - start) * len(scorer.titles) / len(sample)
        error = float((scores[sample] - reference).abs().max())
        same = (
            error <= 2e-4
            if dtype == "float32"
            else bool(torch.corrcoef(torch.stack([scores[sample], reference]))[0, 1] > 0.999)
        )
        seconds = sorted(ours)[len(ours) // 2]
        row = {"name": f"catalogue likelihood, {dtype}", "ours": seconds, "peer": peer, "unit": "seconds per user"}
        rows.append(row | {"ratio": peer / seconds, "same_output": same, "error": error})
    return rows
