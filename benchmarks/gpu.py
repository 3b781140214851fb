"""``python -m benchmarks.gpu``: what a GPU changes, and what it lets one do with the whole model, into ``benchmarks/gpu.json``.

*speed*: the same calls on the GPU and on two threads of the processor beside it, at the same time, outputs compared.
*whole*: what the study does with a few layers on two cores, with all thirty: bodies that are shortened and trained on,
and fine-tuning on augmented histories. Each measurement is a process of its own and several share the GPU, so nothing of
*whole* is a claim about time. What is measured is kept; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks import empty_cache, seconds_of
from llmrec_lib.augment import Augmentation
from llmrec_lib.baselines import train
from llmrec_lib.cache import atomic_write
from llmrec_lib.datasets import load_dataset
from llmrec_lib.evaluation import Evaluation, compare_many, evaluate
from llmrec_lib.language_models.backbone import train_backbone
from llmrec_lib.language_models.compress import shorten
from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.language_models.finetune import finetune
from llmrec_lib.llm_based import TitleLikelihoodRecommender, catalogue_likelihood
from llmrec_lib.prompts import user_prompts
from llmrec_lib.prs_based import embed_items, text_similarity
from llmrec_lib.splits import Split, split
from llmrec_lib.study.provenance import machine, versions

PATH = Path(__file__).with_name("gpu.json")
PER_USER = PATH.with_suffix(".npz")
LAYERS = (30, 12, 5)
SEEDS = (0, 1, 2)
EPOCHS = 14  # of the bodies, as in chapter 08
WAYS = ("no copies", "unchanged copies", "slice", "insert similar text", "replace similar text", "mask views")
RATE, NEIGHBOURS, VIEWS_WEIGHT = 0.2, 20, 0.1  # as in chapter 07


def _data() -> Split:
    return split(load_dataset("ml-100k"), "temporal_ratio", 0)


# Speed: each step gives {variant: (seconds of one, unit, output)}


def encoding(gpu: bool) -> dict:
    texts = list(dict.fromkeys(_data().dataset.item_text))
    found = {}
    for dtype in ("float32", "bfloat16") if gpu else ("float32",):
        one = TextEncoder("minilm", dtype=dtype)
        ids = one._tokenize(texts)
        rows = one._embed(ids, progress=False).numpy()
        seconds = statistics.median(
            seconds_of(lambda one=one, ids=ids: one._embed(ids, progress=False)) for _ in range(3)
        )
        found[dtype] = seconds / len(texts), "texts", rows
    return found


def likelihood(gpu: bool) -> dict:
    parts = _data()
    prompts = user_prompts(parts, parts.eval_users("test", 8), "test")
    found = {}
    for dtype, chunk in [("float32", 256), ("float32", None), ("bfloat16", None)] if gpu else [("float32", None)]:
        scorer = catalogue_likelihood(parts, dtype=dtype, chunk_tokens=chunk)
        for over in ("vocabulary", "catalogue"):
            first = scorer.log_likelihood(prompts[0], over).numpy()
            asked = prompts if gpu else prompts[:1]
            seconds = seconds_of(lambda s=scorer, o=over, a=asked: [s.log_likelihood(p, o) for p in a]) / len(asked)
            found[f"{dtype}, over the {over}{', chunks of 256' if chunk else ''}"] = seconds, "users", first
    return found


def finetuning(gpu: bool) -> dict:
    found = {}
    for dtype in ("float32", "bfloat16") if gpu else ("float32",):
        tuned = finetune(_data(), train_users=30, dtype=dtype, progress=False)
        found[dtype] = 1 / tuned.tokens_per_second, "tokens", tuned.curve["loss"].to_numpy(), tuned.share_of_roof
    return found


def sequential(gpu: bool) -> dict:
    parts, found = _data(), {}
    for name in ("sasrec", "gru4rec"):
        begin = time.perf_counter()
        arm = train(name, parts, 0, progress=False, epochs=15)
        seconds = time.perf_counter() - begin
        found[name] = seconds, "trainings of 15 epochs", evaluate(arm, parts).per_user["ndcg@10"].to_numpy()
    return found


STEPS: dict[str, Callable[[bool], dict]] = {
    "encoding": encoding, "likelihood": likelihood, "fine-tuning": finetuning, "sequential": sequential,
}  # fmt: skip


def _difference(step: str, own: np.ndarray, other: np.ndarray) -> dict:
    if step == "encoding":
        cosine = (own * other).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(other, axis=1)
        return {"what": "1 - lowest cosine", "error": float(1 - cosine.min())}
    if step == "likelihood":
        return {
            "what": "nats, most of any title",
            "error": float(np.abs(own - other).max()),
            "spearman": float(spearmanr(own, other)[0]),
        }
    if step == "fine-tuning":
        return {"what": "nats per title, most of any step", "error": float(np.nanmax(np.abs(own - other)))}
    return {"what": "mean NDCG@10", "error": float(own.mean() - other.mean()), "cpu": float(other.mean())}


# The whole model


def body(n_layers: int, seed: int) -> list[float]:
    parts = _data()
    items = embed_items(parts, TextEncoder("minilm"))[0]
    calibration = user_prompts(parts, parts.eval_users("valid", 20), "valid")
    model, _ = shorten("smollm2-135m", calibration, n_layers)
    options = {"tuning": "lora", "item_input": "text+id", "epochs": EPOCHS, "progress": False, "seed": seed}
    arm = train_backbone(parts, items, model, **options)
    return evaluate(arm, parts).per_user["ndcg@10"].tolist()


def augmented(way: str, seed: int) -> list[float]:
    parts = _data()
    operation, _, how = way.partition(" ")
    change = Augmentation("slice", 0.0) if way == "unchanged copies" else None
    if how == "views":
        change = Augmentation(operation, RATE, views=VIEWS_WEIGHT)
    elif "copies" not in way:
        texts = embed_items(parts, TextEncoder("minilm"))[0]
        similar = text_similarity(parts, texts, NEIGHBOURS).similarity if how == "similar text" else None
        change = Augmentation(operation, RATE, similar)
    tuned = finetune(parts, augmentation=change, seed=seed, progress=False)
    scorer = catalogue_likelihood(parts, (tuned.model, tuned.tokenizer))
    arm = TitleLikelihoodRecommender(parts, scorer, over="catalogue", progress=False)
    return evaluate(arm, parts).per_user["ndcg@10"].tolist()


JOBS = {f"body, {n} layers, seed {seed}": (body, n, seed) for seed in SEEDS for n in LAYERS}
JOBS |= {f"{way}, seed {seed}": (augmented, way, seed) for seed in SEEDS for way in WAYS}


def one(what: str) -> None:
    """What a process of its own does, a step of speed on its device or a job; prints one line of JSON."""
    kind, _, name = what.partition(":")
    if kind == "job":
        work, *arguments = JOBS[name]
        print(json.dumps(work(*arguments)))
        return
    torch.set_num_threads(2)
    found = STEPS[name](kind == "gpu")
    print(json.dumps({variant: [*row[:2], row[2].tolist(), *row[3:]] for variant, row in found.items()}))


def _process(what: str) -> Any:
    """What `one` printed, in a process of its own; None if it failed. Of speed nothing is read back from a cache."""
    command = [sys.executable, "-c", "import sys; from benchmarks.gpu import one; one(sys.argv[1])", what]
    device = {"CUDA_VISIBLE_DEVICES": ""} if what.startswith("cpu:") else {}
    with nullcontext({}) if what.startswith("job:") else empty_cache() as cache:
        environment = os.environ | {"OMP_NUM_THREADS": "2"} | device | cache
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(f"{what} failed:\n{done.stderr[-1500:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure_speed() -> tuple[list[dict], list[str]]:
    """The CPU's steps one after the other on its two threads, beside the GPU's; rows, and what failed."""
    rows, failed = [], []
    with ThreadPoolExecutor(1) as slow, ThreadPoolExecutor(1) as fast:
        others = {name: slow.submit(_process, f"cpu:{name}") for name in STEPS}
        own = {name: fast.submit(_process, f"gpu:{name}") for name in STEPS}
        for name in STEPS:
            mine, theirs = own[name].result(), others[name].result()
            if mine is None or theirs is None:
                failed.append(name)
                continue
            for variant, (seconds, unit, output, *of_roof) in mine.items():
                peer = theirs[variant.removesuffix(", chunks of 256").replace("bfloat16", "float32")]
                row = {"step": name, "variant": variant, "unit": unit, "gpu": seconds, "cpu": peer[0]}
                row |= {"ratio": peer[0] / seconds, "of_roof": of_roof[0] if of_roof else None}
                rows.append(row | _difference(name, np.array(output), np.array(peer[2])))
                print(json.dumps(rows[-1]), flush=True)
    return rows, failed


def summary(values: dict[str, np.ndarray]) -> dict:
    """Means of each seed, and each method against its control: bodies against all layers, changed copies against unchanged ones."""
    runs: dict[str, list[Evaluation]] = {}
    for name in filter(values.__contains__, JOBS):
        method, _, seed = name.rpartition(", seed ")
        per_user = pd.DataFrame({"ndcg@10": values[name]}).rename_axis("user")
        run = Evaluation(method, "", "ml-100k", "temporal_ratio", int(seed), "test", per_user, {}, 0.0)
        runs.setdefault(method, []).append(run)
    families = {
        f"body, {LAYERS[0]} layers": [f"body, {n} layers" for n in LAYERS[1:]],
        "unchanged copies": [way for way in WAYS if way not in ("no copies", "unchanged copies", "mask views")],
        "no copies": ["unchanged copies", "mask views"],
    }
    compared = []
    for control, methods in families.items():
        pairs = {}
        for method in methods:
            n = min(len(runs.get(method, [])), len(runs.get(control, [])))
            if n:
                pairs[method] = runs[method][:n], runs[control][:n]
        if pairs:
            table = compare_many(pairs).rename_axis("method").reset_index()
            compared += [
                {"control": control, "seeds": len(pairs[row["method"]][0]), **row}
                for row in json.loads(table.to_json(orient="records"))
            ]
    return {"ndcg@10": {method: [run.mean() for run in found] for method, found in runs.items()}, "compared": compared}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="speed, whole; both by default")
    parser.add_argument("--at-once", type=int, default=10, help="processes that share the GPU in `whole`")
    options = parser.parse_args()

    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    asked = options.parts or ["speed", "whole"]
    kept = json.loads(PATH.read_text()) if PATH.exists() else {}
    values = dict(np.load(PER_USER)) if PER_USER.exists() else {}
    failed = []

    def keep(**new: Any) -> None:
        kept.update(new, machine=machine(), versions=versions())
        with atomic_write(PATH) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n")

    if "speed" in asked:
        rows, failed = measure_speed()
        keep(speed=rows)
    if "whole" in asked:
        with ThreadPoolExecutor(options.at_once) as pool:
            waiting = {pool.submit(_process, f"job:{name}"): name for name in JOBS if name not in values}
            for done in as_completed(waiting):
                name, found = waiting[done], done.result()
                if found is None:
                    failed.append(name)
                    continue
                values[name] = np.array(found, dtype=np.float32)
                print(f"{name}: NDCG@10 {values[name].mean():.4f}", flush=True)
                # An open file, since savez adds a suffix to a name.
                with atomic_write(PER_USER) as temporary, open(temporary, "wb") as file:
                    np.savez_compressed(file, **values)
                keep(whole=summary(values))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
