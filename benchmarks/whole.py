"""``python -m benchmarks.whole``: all layers of the language model, fine-tuned on all histories, alone and in fusions.

Chapters 04 and 06 do this with a few layers and a part of the users. Here the whole model is trained, for longer, with the same
controls (from random weights; on shuffled titles) and with several seeds, into ``benchmarks/whole.json`` and, NDCG@10 of each
user, ``benchmarks/whole.npz``. A training takes two cores about an hour, a GPU minutes: `--scores-only` fills the cache there,
``<cache>/whole``, which is all that is needed to go on elsewhere. What was finished (epochs, prompts, trainings) is read from the
cache when it is called again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from torch import FloatTensor, LongTensor, Tensor

from llmrec_lib.baselines import train
from llmrec_lib.cache import atomic_write, cached_tensors, content_key
from llmrec_lib.datasets import load_dataset
from llmrec_lib.evaluation import Evaluation, compare_many, evaluate
from llmrec_lib.evaluation.statistics import with_intervals
from llmrec_lib.fusion import LEARNED_SPACE, best_system
from llmrec_lib.language_models.catalog import load_causal
from llmrec_lib.language_models.compress import transformer_layers
from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.llm_based import TitleLikelihoodRecommender, catalogue_likelihood, finetune_shortened
from llmrec_lib.prs_based import embed_items, text_arms
from llmrec_lib.recommender import PHASES, Recommender, ScoreTable
from llmrec_lib.splits import Split, split
from llmrec_lib.study.provenance import machine, versions

PATH = Path(__file__).with_name("whole.json")
LM, RANDOM, SHUFFLED = CONDITIONS = ("LM", "LM from random weights", "LM on shuffled titles")
IDS = ("ease", "sasrec", "gru4rec")
HALF_LIVES, TEXT_WEIGHTS = (0.0, 40.0, 5.0), (30.0, 100.0, 10.0, 300.0)  # as in chapter 06
TRIALS = 10  # of each system's search, with or without the language model
# Declared before anything was looked at: the language model alone, each system with it against the same without it, and
# the best system with it against those with another ID-only arm, sentence embeddings or a control in its place.
FAMILY = (
    (LM, "sasrec"), (LM, "gru4rec"), (LM, RANDOM), (LM, SHUFFLED), *((f"{name} + LM", name) for name in IDS),
    ("ID + LM", "ID"), ("ID + LM", "ID + itemknn"), ("ID + LM", "ID + text"), ("ID + LM", f"ID + {RANDOM}"),
    ("ID + LM", f"ID + {SHUFFLED}"),
)  # fmt: skip


class Scored(Recommender):
    """Scores that were computed before, perhaps elsewhere: [users of the phase, n_items] for each phase."""

    def __init__(self, split: Split, name: str, tables: dict[str, Tensor], users: dict[str, np.ndarray]) -> None:
        super().__init__(split, name)
        self.tables = tables
        self._rows = {phase: torch.full((self.n_users,), -1) for phase in PHASES}  # -1: of whom nothing is known
        for phase, own in users.items():
            self._rows[phase][own] = torch.arange(len(own))

    def score(self, users: LongTensor) -> FloatTensor:
        rows = self._rows[self.phase][users]
        if (rows < 0).any():
            raise KeyError(f"no scores of user {int(users[rows < 0][0])} were computed for {self.phase}")
        return self.tables[self.phase][rows]


def scores(
    condition: str, seed: int, llm: str, epochs: int, dataset: str, data_dir: str, max_users: int, dtype: str
) -> dict[str, Tensor]:
    """What a fine-tuned model finds of every title, float32 [users, n_items] for each phase, and the record of its training.

    The key has neither versions nor device, so that a machine with a GPU can fill a cache from which another one fuses; the
    record has both. A GPU multiplies float32 matrices in TF32, as far as it has that.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    parts = split(load_dataset(dataset, data_dir), "temporal_ratio", 0)
    users = {phase: parts.eval_users(phase, max_users) for phase in PHASES}

    def compute() -> dict[str, Tensor]:
        shuffled = ["", *np.random.default_rng(seed).permutation(parts.dataset.titles[1:])]
        titles = shuffled if condition == SHUFFLED else None
        n_layers = len(transformer_layers(load_causal(llm)[0]))
        about = {"epochs": epochs, "seed": seed, "pretrained": condition != RANDOM}
        tuned = finetune_shortened(parts, llm, n_layers, titles=titles, dtype=dtype, **about)
        likelihood = catalogue_likelihood(parts, (tuned.model, tuned.tokenizer), titles=titles, dtype=dtype)
        arm = TitleLikelihoodRecommender(parts, likelihood, over="catalogue")
        found = {phase: arm.at(phase).score(torch.from_numpy(users[phase])) for phase in PHASES}
        watched = tuned.curve.dropna(subset=["valid_ndcg"])[["epoch", "tokens", "seconds", "valid_loss", "valid_ndcg"]]
        record = {"condition": condition, "seed": seed, "layers": n_layers}
        record |= {"dtype": str(likelihood.dtype), "tf32": likelihood.device.type == "cuda"}
        record |= {"tokens_per_second": tuned.tokens_per_second, "share_of_roof": tuned.share_of_roof}
        record |= {"curve": watched.to_dict("records"), "machine": machine(), "versions": versions()}
        return found | {"record": torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)}

    asked = [condition, seed, llm, epochs, max_users, dtype]
    return cached_tensors("whole", content_key("whole", asked, parts.fingerprint), compute)


def make_scores(seeds: int, at_once: int, options: dict) -> None:
    """All conditions and seeds, several at once where asked for: on a GPU a single training leaves most of it idle."""
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
        jobs = [(condition, seed) for seed, condition in itertools.product(range(seeds), CONDITIONS)]
        waiting = {pool.submit(_make, job, options): job for job in jobs}
        for done in as_completed(waiting):
            print(*waiting[done], f"{done.result():,.0f} tokens/s", flush=True)


def _make(job: tuple[str, int], options: dict) -> float:
    return _record(scores(*job, **options))["tokens_per_second"]


def _record(found: dict[str, Tensor]) -> dict:
    return json.loads(bytes(found["record"].tolist()))


def systems_of(
    seed: int, encoder: str, options: dict, chosen: dict[str, dict]
) -> tuple[dict[str, Recommender], Split, list[dict]]:
    """Every arm and every system of one seed, the split they were made on, and the records of the trainings.

    Settings that are not in `chosen` yet are searched and put there: with the first seed, as in chapter 06.
    """
    parts = split(load_dataset(options["dataset"], options["data_dir"]), "temporal_ratio", seed)
    users = {phase: parts.eval_users(phase, options["max_users"]) for phase in PHASES}
    everyone = np.union1d(*users.values())
    arms: dict[str, list[Recommender]] = {name: [train(name, parts, seed)] for name in ("pop", *IDS)}
    for name in ("sasrec", "gru4rec"):
        arms[name] = [ScoreTable(*arms[name], everyone)]
    found = {condition: scores(condition, seed, **options) for condition in CONDITIONS}
    tables = {condition: {phase: one[phase] for phase in PHASES} for condition, one in found.items()}
    arms |= {condition: [Scored(parts, condition, own, users)] for condition, own in tables.items()}
    systems = {name: arms[name][0] for name in (*CONDITIONS, *IDS)}
    for name in ("ease", "itemknn"):
        arms[name] = [train(name, parts, seed).recent(half_life) for half_life in HALF_LIVES]
    items = embed_items(parts, TextEncoder(encoder))[0]
    members = {f"{name} + LM": (name, LM) for name in IDS} | {"ID": ("pop", *IDS), "ID + text": ("pop", *IDS)}
    members |= {f"ID + {name}": ("pop", *IDS, name) for name in (*CONDITIONS, "itemknn")}
    for name, own in members.items():

        def build(weight: float = 0.0, own: tuple = own) -> list[Recommender]:
            texts = text_arms(parts, items, "text", HALF_LIVES, weight) if weight else []
            return [arm for member in own for arm in arms[member]] + texts

        space = LEARNED_SPACE | ({"weight": TEXT_WEIGHTS} if name == "ID + text" else {})
        space = {setting: [chosen[name][setting]] for setting in space} if name in chosen else space
        made_of = {f"{c} {phase}": tables[c][phase] for c in own if c in CONDITIONS for phase in PHASES}
        key = content_key("whole", name, seed, made_of)
        systems[name], chosen[name], _ = best_system(build, parts, name, space, TRIALS, users["valid"], key)
        print(name, chosen[name], flush=True)
    return systems, parts, [_record(one) for one in found.values()]


def measure(seeds: int, encoder: str, options: dict) -> dict:
    """Every system with every seed; means, comparisons, chosen settings and the records of the trainings."""
    runs: dict[str, list[Evaluation]] = {}
    records, chosen = [], {}
    for seed in range(seeds):
        systems, parts, trained = systems_of(seed, encoder, options, chosen)
        records += trained
        judged = parts.eval_users("test", options["max_users"])
        for name, system in systems.items():
            one = evaluate(system, parts, method=name, users=judged, seed=seed, ks=[10])
            runs.setdefault(name, []).append(one)
            print(f"seed {seed}, {name}: NDCG@10 {one.mean():.4f}", flush=True)
    compared = compare_many({f"{a} against {b}": (runs[a], runs[b]) for a, b in FAMILY}).rename_axis("comparison")
    values = {name: np.stack([run.per_user["ndcg@10"] for run in own]).astype(np.float32) for name, own in runs.items()}
    with atomic_write(PATH.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **values)
    tables = {"means": with_intervals(runs), "compared": compared.reset_index()}
    return {
        **{name: json.loads(table.to_json(orient="records")) for name, table in tables.items()},
        "chosen": chosen,
        "trainings": records,
        "machine": machine(),
        "versions": versions(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--max-users", type=int, default=0, help="of those judged and tuned on; 0: all")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="trainings that share a GPU")
    parser.add_argument("--scores-only", action="store_true", help="stop after the trainings: all that a GPU is for")
    options = vars(parser.parse_args())
    seeds, at_once, only, encoder = (options.pop(name) for name in ("seeds", "at_once", "scores_only", "encoder"))
    make_scores(seeds, at_once, options)
    if not only:
        found = measure(seeds, encoder, options)
        with atomic_write(PATH) as temporary:
            temporary.write_text(json.dumps(found, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
