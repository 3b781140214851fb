"""One epoch of SASRec with a loss at every position of a window, against RecBole's own: each prefix of a history is a row.

``python -m benchmarks.sasrec`` trains both to the end and compares what they recommend, into ``benchmarks/sasrec.json``.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

from llmrec_lib import _recbole
from llmrec_lib.augment import Augmentation
from llmrec_lib.baselines import BASELINES
from llmrec_lib.cache import atomic_write
from llmrec_lib.datasets import load_dataset
from llmrec_lib.evaluation import compare, evaluate
from llmrec_lib.recommender import RecBoleRecommender
from llmrec_lib.splits import Split, split
from llmrec_lib.study.provenance import machine

PEER_BATCHES = 6  # of RecBole's epoch; its time is linear in batches


def measure() -> list[dict]:
    """Seconds per epoch at length 50 on ml-100k, leave-one-out; the same settings but for RecBole's own batch size."""
    ours, our_targets = _our_epoch()
    peer, peer_targets = _recbole_epoch()
    error = abs(our_targets - peer_targets) / peer_targets
    row = {"name": "sasrec epoch", "ours": ours, "peer": peer, "unit": "seconds per epoch", "ratio": peer / ours}
    return [row | {"same_output": bool(error < 1e-3), "error": float(error)}]  # the same number of predicted events


def _our_epoch() -> tuple[float, int]:
    parts = split(load_dataset("ml-100k"), "leave_one_out", 0)
    with _recbole.contained(0):
        built = _recbole.build("SASRec", parts, BASELINES["sasrec"].settings, 0)
        trainer = _recbole.make_trainer(built, "SASRec", lambda: 0.0)
        trainer._train_epoch(built.loader, 0)  # warm-up
        start = time.perf_counter()
        trainer._train_epoch(built.loader, 1)
        seconds = time.perf_counter() - start
        lengths = sum(int(batch["item_length"].sum()) for batch in built.loader)
    return seconds, lengths


def _recbole_epoch() -> tuple[float, int]:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.utils import init_seed

    with _recbole.contained(0), tempfile.TemporaryDirectory() as folder:
        tuned = {key: value for key, value in BASELINES["sasrec"].settings.items() if key != "all_positions"}
        own = {
            "train_batch_size": 2048,
            "train_neg_sample_args": None,
            "checkpoint_dir": folder,
            "show_progress": False,
        }
        own |= {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}}
        config = Config(model="SASRec", dataset="ml-100k", config_dict=tuned | own)
        init_seed(0, True)
        loader = data_preparation(config, create_dataset(config))[0]
        model = SASRec(config, loader._dataset)
        trainer = _recbole.make_trainer(_recbole.SimpleNamespace(config=config, model=model), "SASRec", lambda: 0.0)
        batches = list(itertools.islice(loader, PEER_BATCHES + 1))
        trainer._train_epoch(batches[:1], 0)  # warm-up
        start = time.perf_counter()
        trainer._train_epoch(batches[1:], 1)
        seconds = (time.perf_counter() - start) / PEER_BATCHES * len(loader)
        return seconds, len(loader._dataset)


def prefixes(split: Split, max_length: int, augmentation: Augmentation | None = None, seed: int = 0) -> pd.DataFrame:
    """Training rows as RecBole makes them: each event of a history but the first, with up to `max_length` before it.

    In the place of `_recbole.windows`. Targets at each position have a column there; RecBole's own loss does not read it.
    """
    rows = []
    for user, events in enumerate(split.histories(range(split.dataset.n_users), "train")):
        for end in range(1, len(events)):
            window = events[max(0, end - max_length) : end]
            rows.append((user, window, len(window), events[end], window))
    fields = [_recbole.UID, _recbole.SEQ, _recbole.SEQ_LEN, _recbole.IID, _recbole.TARGETS]
    return pd.DataFrame(rows, columns=fields)


def measure_trained(parts: Split, **settings: int) -> dict:
    """Both trained until validation no longer gains, on one split, with one validation: NDCG@10, epochs, seconds.

    RecBole's has RecBole's rows, loss, batch size and learning rate; all else is equal.
    """
    ours = BASELINES["sasrec"].settings | settings
    own = {"train_batch_size": 2048, "learning_rate": 0.001}
    recboles = {name: value for name, value in ours.items() if name != "all_positions"} | own
    found, runs = {}, []
    for name, chosen, rows in (("ours", ours, _recbole.windows), ("RecBole's", recboles, prefixes)):
        start = time.perf_counter()
        with mock.patch.object(_recbole, "windows", rows):
            state = _recbole.fit("SASRec", parts, chosen, 0)
        seconds = time.perf_counter() - start
        model = _recbole.restore("SASRec", parts, chosen, 0, state)
        runs.append(evaluate(RecBoleRecommender(model, parts, name), parts, method=name, ks=(10,)))
        curve = [round(value, 5) for value in state["valid_curve"].tolist()]
        found[name] = {
            "ndcg@10": runs[-1].mean(),
            "epochs": int(state["epochs"]),
            "seconds": seconds,
            "valid_curve": curve,
        }
    pair = {
        name: value for name, value in compare(*runs).items() if name in ("n_users", "difference", "low", "high", "p")
    }
    return {"models": found, "ours less RecBole's": pair, "machine": machine() | {"threads": torch.get_num_threads()}}


if __name__ == "__main__":
    result = measure_trained(split(load_dataset("ml-100k"), "leave_one_out", 0))
    with atomic_write(Path(__file__).with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    json.dump(result, sys.stdout, indent=2)
