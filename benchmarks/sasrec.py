"""One epoch of SASRec with a loss at every position of a window, against RecBole's own: each prefix of a history is a row."""

from __future__ import annotations

import itertools
import tempfile
import time

from llmrec_lib import _recbole
from llmrec_lib.baselines import BASELINES
from llmrec_lib.datasets import load_dataset
from llmrec_lib.splits import split

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
