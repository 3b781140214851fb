"""``python -m benchmarks.whole``: all layers of the language model, fine-tuned on all histories, alone and in fusions.

Chapters 04 and 06 do this with a few layers, a part of the users and three controls. Here the whole model is trained, for longer,
which takes two cores an hour and more, into ``benchmarks/whole.json`` and, NDCG@10 of each user, ``benchmarks/whole.npz``. What was
finished (epochs, prompts, trainings) is read from the cache when it is called again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from llmrec_lib.baselines import train
from llmrec_lib.cache import atomic_write
from llmrec_lib.datasets import load_dataset
from llmrec_lib.evaluation import Evaluation, compare_many, evaluate
from llmrec_lib.evaluation.statistics import with_intervals
from llmrec_lib.fusion import LEARNED_SPACE, best_system
from llmrec_lib.language_models.catalog import load_causal
from llmrec_lib.language_models.compress import transformer_layers
from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.llm_based import TitleLikelihoodRecommender, catalogue_likelihood, finetune_shortened
from llmrec_lib.prs_based import embed_items, text_arms
from llmrec_lib.recommender import Recommender, ScoreTable
from llmrec_lib.splits import split
from llmrec_lib.study.provenance import machine, versions

PATH = Path(__file__).with_name("whole.json")
IDS = ("ease", "sasrec", "gru4rec")
HALF_LIVES, TEXT_WEIGHTS = (0.0, 40.0, 5.0), (30.0, 100.0, 10.0, 300.0)  # as in chapter 06
TRIALS = 10  # of each system's search, with or without the language model
# Declared before anything was looked at: the language model alone, each system with it against the same without it, and
# the best system with it against those with another ID-only arm, or sentence embeddings, in its place.
FAMILY = (
    ("LM", "sasrec"), ("LM", "gru4rec"), *((f"{name} + LM", name) for name in IDS), ("ID + LM", "ID"),
    ("ID + LM", "ID + itemknn"), ("ID + LM", "ID + text"),
)  # fmt: skip


def measure(llm: str, epochs: int, dataset: str, data_dir: str, max_users: int) -> dict:
    parts = split(load_dataset(dataset, data_dir), "temporal_ratio", 0)
    judged, tuned_on = parts.eval_users("test", max_users), parts.eval_users("valid", max_users)
    everyone = np.union1d(judged, tuned_on)
    n_layers = len(transformer_layers(load_causal(llm)[0]))
    tuned = finetune_shortened(parts, llm, n_layers, epochs=epochs)
    likelihood = catalogue_likelihood(parts, (tuned.model, tuned.tokenizer))
    lm = TitleLikelihoodRecommender(parts, likelihood, over="catalogue", name="LM")
    arms: dict[str, list[Recommender]] = {name: [train(name, parts, 0, progress=False)] for name in ("pop", *IDS)}
    arms["sasrec"], arms["gru4rec"] = ([ScoreTable(*arms[name], everyone)] for name in ("sasrec", "gru4rec"))
    arms["LM"] = [ScoreTable(lm, everyone)]
    systems = {name: arms[name][0] for name in ("LM", *IDS)}
    arms["ease"], arms["itemknn"] = (
        [train(name, parts).recent(half_life) for half_life in HALF_LIVES] for name in ("ease", "itemknn")
    )
    items = embed_items(parts, TextEncoder("minilm"))[0]
    members = {f"{name} + LM": (name, "LM") for name in IDS} | {"ID": ("pop", *IDS)}
    members |= {f"ID + {name}": ("pop", *IDS, name) for name in ("LM", "itemknn")} | {"ID + text": ("pop", *IDS)}
    chosen = {}
    for name, own in members.items():

        def build(weight: float = 0.0, own: tuple = own) -> list[Recommender]:
            texts = text_arms(parts, items, "text", HALF_LIVES, weight) if weight else []
            return [arm for member in own for arm in arms[member]] + texts

        space = LEARNED_SPACE | ({"weight": TEXT_WEIGHTS} if name == "ID + text" else {})
        key = ("whole", name, epochs, likelihood.fingerprint)
        systems[name], chosen[name], _ = best_system(build, parts, name, space, TRIALS, tuned_on, key)
        print(name, chosen[name], flush=True)
    runs: dict[str, Evaluation] = {}
    for name, system in systems.items():
        runs[name] = evaluate(system, parts, method=name, users=judged, seed=0)
        print(f"{name}: NDCG@10 {runs[name].mean():.4f}", flush=True)
    compared = compare_many({f"{a} against {b}": (runs[a], runs[b]) for a, b in FAMILY}).rename_axis("comparison")
    means = with_intervals({name: [run] for name, run in runs.items()})
    curve = tuned.curve.dropna(subset=["valid_ndcg"])[["epoch", "tokens", "seconds", "valid_loss", "valid_ndcg"]]
    np.savez_compressed(
        PATH.with_suffix(".npz"), **{n: run.per_user["ndcg@10"].to_numpy(np.float32) for n, run in runs.items()}
    )
    tables = {"means": means, "compared": compared.reset_index(), "curve": curve}
    return {
        **{name: json.loads(table.to_json(orient="records")) for name, table in tables.items()},
        "chosen": chosen,
        "layers": n_layers,
        "tokens_per_second": tuned.tokens_per_second,
        "share_of_roof": tuned.share_of_roof,
        "machine": machine(),
        "versions": versions(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--max-users", type=int, default=0, help="of those judged and tuned on; 0: all")
    found = measure(**vars(parser.parse_args()))
    with atomic_write(PATH) as temporary:
        temporary.write_text(json.dumps(found, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
