"""RecBole 1.2.1 on current numpy, scipy and torch: the only file that knows its faults, and that changes anything for its sake.

What is mended, and how to see that it still needs mending, is listed in ``_recbole.yaml``; tests hold each entry.
"""

import contextlib
import copy
import functools
import importlib
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import yaml
from torch import FloatTensor, LongTensor, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llmrec_lib.augment import Augmentation, contrast, with_copies
from llmrec_lib.evaluation.evaluate import evaluate
from llmrec_lib.recommender import RecBoleRecommender, Recommender
from llmrec_lib.splits import Split

_FACTS = yaml.safe_load(Path(__file__).with_name("_recbole.yaml").read_text(encoding="utf-8"))
FAULTS, SETTINGS = _FACTS["faults"], _FACTS["settings"]

UID, IID, SEQ, SEQ_LEN, TARGETS = "user_id", "item_id", "item_id_list", "item_length", "item_target_list"
_CAUSAL = ("SASRec", "GRU4Rec")
_NUMPY_ALIASES = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_, "float": np.float64}
_SET_BY_CONFIG = ("bool", "int", "float", "complex", "object", "str", "long", "unicode")


@contextlib.contextmanager
def contained(seed: int | None = None) -> Iterator[None]:
    """Run RecBole code: what it needs is put in place, and all process-wide state is as before afterwards.

    Parameters
    ----------
    seed : int, optional
        Seeds python, numpy and torch inside; their states are restored at the end.
    """
    anomaly, cudnn = torch.is_anomaly_enabled(), torch.backends.cudnn
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with contextlib.ExitStack() as put_back:
        enter = put_back.enter_context
        enter(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        enter(torch.random.fork_rng())
        enter(mock.patch.dict(os.environ))
        enter(mock.patch.object(sys, "argv", sys.argv[:1] or [""]))
        for name in {*_NUMPY_ALIASES, *_SET_BY_CONFIG}:
            value = _NUMPY_ALIASES.get(name, vars(np).get(name))
            enter(mock.patch.object(np, name, value, create=True))
        if "_update" not in vars(sp.dok_matrix):
            update = lambda self, data: self._dict.update(data)  # noqa: E731
            enter(mock.patch.object(sp.dok_matrix, "_update", update, create=True))
        for flag in ("benchmark", "deterministic"):
            put_back.callback(setattr, cudnn, flag, getattr(cudnn, flag))
        put_back.callback(torch.autograd.set_detect_anomaly, anomaly)
        put_back.callback(random.setstate, python_state)
        put_back.callback(np.random.set_state, numpy_state)
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        yield


def model_names() -> list[str]:
    """Names of RecBole's general, sequential and context-aware models."""
    package = Path(importlib.util.find_spec("recbole").origin).parent / "model"
    kinds = ("general_recommender", "sequential_recommender", "context_aware_recommender")
    files = {file.stem for kind in kinds for file in (package / kind).glob("*.py")}
    listed = {file.stem for file in (package.parent / "properties" / "model").glob("*.yaml")}
    return sorted(name for name in listed if name.lower() in files)


@functools.lru_cache
def _model_class(name: str, all_positions: bool) -> type[nn.Module]:
    """RecBole's model class; with `all_positions`, a subclass whose loss is a full softmax at every position of a window."""
    from recbole.utils import get_model

    if name not in model_names():
        raise ValueError(f"RecBole has no model {name!r}; it has {', '.join(model_names())}")
    base = get_model(name)
    torch.autograd.set_detect_anomaly(False)
    if all_positions and name not in _CAUSAL:
        raise ValueError(f"all_positions needs a model that sees only earlier items: {', '.join(_CAUSAL)}, not {name}")
    return _at_every_position(base) if all_positions else base


def _at_every_position(base: type) -> type:
    class AllPositions(base):
        """A causal sequence model trained to predict the next item at every position of a window (as in nanoGPT or gSASRec).

        RecBole trains one target per row and makes each prefix a row. One window gives the same targets in one pass.
        """

        _gather = True
        augmentation: Augmentation | None = None

        def gather_indexes(self, output: Tensor, gather_index: Tensor) -> Tensor:
            return super().gather_indexes(output, gather_index) if self._gather else output

        def calculate_loss(self, interaction: Any) -> Tensor:
            sequence, length, targets = (interaction[field] for field in (SEQ, SEQ_LEN, TARGETS))
            self._gather = False
            try:
                outputs = self.forward(sequence, length)  # [B, L, d]
            finally:
                self._gather = True
            real = targets > 0
            logits = outputs[real] @ self.item_embedding.weight.T
            loss = cross_entropy(logits, targets[real])
            weight = self.augmentation.views if self.augmentation else 0.0
            return loss + weight * self._contrast(sequence, length) if weight else loss

        def _contrast(self, sequence: Tensor, length: Tensor) -> Tensor:
            """The contrastive loss between two augmented views of each window of the batch."""
            windows = [row[:n] for row, n in zip(sequence.cpu().numpy(), length.tolist(), strict=True)]
            views = []
            for _ in range(2):
                changed = [self.augmentation(row, self.augmentation_rng, self.trained_items)[0] for row in windows]
                newest = [torch.from_numpy(row[-sequence.shape[1] :]).to(sequence.device) for row in changed]
                lengths = torch.tensor([len(row) for row in newest], device=sequence.device)
                views.append(self.forward(pad_sequence(newest, batch_first=True), lengths))
            return contrast(*views)

    return AllPositions


@functools.lru_cache
def _dataset_class() -> type:
    """RecBole's Dataset, filled from a `Split` instead of files: the same ids, the same rows, no time column to round."""
    from recbole.data.dataset import Dataset as RecBoleDataset
    from recbole.utils import FeatureSource, FeatureType

    class SplitDataset(RecBoleDataset):
        def __init__(
            self, config: Any, split: Split, max_length: int, item_columns: list[str], augmentation: Augmentation | None
        ) -> None:
            self._split, self._max_length, self._item_columns = split, max_length, item_columns
            self._augmentation = augmentation
            super().__init__(config)

        def _get_preset(self) -> None:
            super()._get_preset()
            self.benchmark_filename_list = ["train", "valid", "test"]  # the rows come already split

        def _load_data(self, token: str, dataset_path: str) -> None:
            sources = {UID: FeatureSource.USER_ID, IID: FeatureSource.ITEM_ID}
            for field in (UID, IID):
                self._declare(field, FeatureType.TOKEN, sources[field], 1)
            parts = [self._rows(part) for part in ("train", "valid", "test")]
            self.inter_feat = pd.concat(parts, ignore_index=True)
            self.file_size_list = [len(part) for part in parts]
            self.user_feat = None
            self.item_feat = self._item_features() if self._item_columns else None

        def _declare(self, field: str, kind: Any, source: Any, length: int) -> None:
            self.field2type[field], self.field2source[field], self.field2seqlen[field] = kind, source, length

        def _rows(self, part: str) -> pd.DataFrame:
            if not self._max_length:
                users, items = self._split.pairs(part)
                if part == "train":
                    self._split.guard(users, items, "train", "training rows")
                return pd.DataFrame({UID: users, IID: items})
            self._declare(SEQ, FeatureType.TOKEN_SEQ, FeatureSource.INTERACTION, self._max_length)
            self._declare(TARGETS, FeatureType.TOKEN_SEQ, FeatureSource.INTERACTION, self._max_length)
            self._declare(SEQ_LEN, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
            rows = windows(self._split, self._max_length, self._augmentation, self.config["seed"])
            return rows if part == "train" else rows[:0]

        def _item_features(self) -> pd.DataFrame:
            table = self._split.dataset.items
            features = {IID: np.arange(1, len(table))}
            for column in self._item_columns:
                values = table[column].iloc[1:].astype(str)
                if self._split.dataset.item_columns[column] == "token_seq":
                    features[column] = [np.array(value.split() or ["[none]"], dtype=object) for value in values]
                    longest = max(map(len, features[column]))
                    self._declare(column, FeatureType.TOKEN_SEQ, FeatureSource.ITEM, longest)
                else:
                    features[column] = values.to_numpy()
                    self._declare(column, FeatureType.TOKEN, FeatureSource.ITEM, 1)
            return pd.DataFrame(features)

        def _remap_ID_all(self) -> None:
            for field, ids in ((UID, self._split.dataset.user_ids), (IID, self._split.dataset.item_ids)):
                self.field2id_token[field] = ids
                self.field2token_id[field] = {token: number for number, token in enumerate(ids)}
            for column in self._item_columns:
                self._remap(self._get_remap_list(np.array([column])))
            if self._max_length:
                self.field2id_token[SEQ] = self.field2id_token[TARGETS] = self.field2id_token[IID]
                self.field2id_token[SEQ_LEN] = np.arange(self._max_length + 1)

    return SplitDataset


def windows(split: Split, max_length: int, augmentation: Augmentation | None = None, seed: int = 0) -> pd.DataFrame:
    """Training histories cut into windows that share one item: every training event but a user's first is a target once.

    Augmented copies follow, if asked for, drawn by `seed`; nothing in them that is not the user's own is a target.

    Returns
    -------
    DataFrame
        ``user_id``, ``item_id_list`` (up to `max_length` items, oldest first), ``item_length``, ``item_id`` (what follows)
        and ``item_target_list`` (what follows at each position, 0 where that is no target).
    """
    split.guard(*split.pairs("train"), "train", "training windows")
    users = np.flatnonzero(split.user_counts)
    histories, _ = with_copies(split.histories(users, "train"), augmentation, np.random.default_rng(seed))
    rows = []
    for user, (events, real) in zip(np.resize(users, len(histories)), histories, strict=True):
        targets = np.where(real, events, 0)
        position = len(events) - 1  # windows are cut from the newest event backwards: only the oldest one is short
        while position > 0:
            first = max(0, position - max_length)
            window, following = events[first:position], targets[first + 1 : position + 1]
            if following.any():
                rows.append((user, window, position - first, events[position], following))
            position = first
    return pd.DataFrame(rows, columns=[UID, SEQ, SEQ_LEN, IID, TARGETS])


class ItemTable(nn.Module):
    """One vector per item: learned, or projected from the item's text (rows of length 1, which stay), or the sum of both.

    In the place of an ``nn.Embedding``; each part begins with numbers of deviation `std`.
    """

    def __init__(self, n_items: int, size: int, texts: FloatTensor | None, learned: bool, std: float) -> None:
        super().__init__()
        self.ids = nn.Embedding(n_items, size) if learned else None
        self.project = None if texts is None else nn.Linear(texts.shape[1], size)
        self.register_buffer("texts", texts, persistent=False)
        for part in filter(None, (self.ids, self.project)):
            nn.init.normal_(part.weight, std=std)

    def forward(self, items: LongTensor) -> FloatTensor:
        """Items [...] -> vectors [..., size]."""
        text = 0.0 if self.project is None else self.project(self.texts[items])
        return text if self.ids is None else self.ids(items) + text

    @property
    def weight(self) -> FloatTensor:
        """The table of all items, [n_items, size]."""
        text = 0.0 if self.project is None else self.project(self.texts)
        return text if self.ids is None else self.ids.weight + text


def unit_rows(embeddings: FloatTensor | None, n_items: int) -> FloatTensor:
    """Rows of length 1, PAD zero."""
    shape = tuple(embeddings.shape) if embeddings is not None else ()
    if len(shape) != 2 or shape[0] != n_items:
        otherwise = "" if shape else ", or item_input='id'"  # a body can do without
        raise ValueError(f"item vectors are {shape or None}; this data set needs ({n_items}, d){otherwise}")
    if not torch.isfinite(embeddings[1:]).all():
        raise ValueError("item vectors hold NaN or infinite values")
    rows = nn.functional.pad(embeddings[1:].detach().float().cpu(), (0, 0, 1, 0))
    return nn.functional.normalize(rows, dim=1)


def build(model_name: str | type, split: Split, settings: dict, seed: int) -> SimpleNamespace:
    """Make RecBole's config, datasets, training loader and model for a split. Call inside `contained`.

    Parameters
    ----------
    model_name : a RecBole model such as "LightGCN"; or a class of our own, whose settings must then all be given.
    settings : dict
        RecBole parameters; and ``all_positions`` (bool) and ``augmentation`` (`Augmentation`) of sequential models,
        ``item_columns`` (list) of context-aware ones, ``item_vectors`` (FloatTensor [n_items, d]) to add to learned ones.

    Returns
    -------
    SimpleNamespace
        ``config``, ``datasets`` (train, valid, test), ``samplers``, ``loader``, ``model``.
    """
    from recbole.config import Config
    from recbole.data.dataloader import TrainDataLoader
    from recbole.data.utils import create_samplers
    from recbole.utils import ModelType, init_seed

    settings = dict(settings)
    all_positions, item_columns = settings.pop("all_positions", False), settings.pop("item_columns", [])
    augmentation, vectors = settings.pop("augmentation", None), settings.pop("item_vectors", None)
    if augmentation and not all_positions:
        raise ValueError(f"augmentation is for models trained with all_positions: {', '.join(_CAUSAL)}, the backbone")
    if isinstance(model_name, str):
        cls = _model_class(model_name, all_positions)
    else:
        cls = _at_every_position(model_name) if all_positions else model_name
    sequential = cls.type == ModelType.SEQUENTIAL
    fixed = SETTINGS["all"] | {"seed": seed, "repeatable": sequential, "use_gpu": torch.cuda.is_available()}
    fixed |= {"data_path": tempfile.gettempdir(), "checkpoint_dir": tempfile.gettempdir()}
    if sequential or model_name == "Pop":
        fixed["train_neg_sample_args"] = None
    elif cls.type == ModelType.CONTEXT:  # RecBole expects labelled clicks there; here what was not taken is sampled
        fixed |= SETTINGS["context-aware"]
    config = Config(model=model_name, dataset="llmrec", config_dict={**fixed, **settings})
    init_seed(seed, True)
    max_length = config["MAX_ITEM_LIST_LENGTH"] if sequential else 0
    dataset = _dataset_class()(config, split, max_length, item_columns, augmentation)
    if (dataset.user_num, dataset.item_num) != (split.dataset.n_users, split.dataset.n_items):
        raise RuntimeError("RecBole and the split disagree on users or items")
    datasets = dataset.build()
    samplers = create_samplers(config, dataset, datasets)
    loader = TrainDataLoader(config, datasets[0], samplers[0], shuffle=config["shuffle"])
    model = cls(config, loader._dataset).to(config["device"])
    if vectors is not None:
        if not hasattr(model, "item_embedding"):
            raise ValueError(f"item_vectors are for models with a vector for each item; {model_name} has none")
        std, shape = float(model.item_embedding.weight.std()), model.item_embedding.weight.shape
        model.item_embedding = ItemTable(*shape, unit_rows(vectors, shape[0]), True, std).to(config["device"])
    if augmentation:
        model.augmentation, model.augmentation_rng = augmentation, np.random.default_rng(seed)
        model.trained_items = np.flatnonzero(split.item_counts)
    if item_columns:
        # [n_items, …] each, for scoring pairs
        model.item_features = dict(loader._dataset.get_item_feature().interaction)
    return SimpleNamespace(config=config, datasets=datasets, samplers=samplers, loader=loader, model=model)


def make_trainer(built: SimpleNamespace, model_name: str, validate: Callable[[], float]) -> Any:
    """RecBole's own trainer for the model, with our masked validation and the best state kept as tensors in memory."""
    import recbole.trainer.trainer as trainer_module
    from recbole.evaluator import Collector
    from recbole.utils import get_trainer

    class SplitTrainer(get_trainer(built.config["MODEL_TYPE"], model_name)):
        best_state: dict[str, Tensor] | None = None

        def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
            if hasattr(self.model, "parameter_groups"):  # what is trained, and at which learning rates
                kwargs.setdefault("params", self.model.parameter_groups())
            return super()._build_optimizer(**kwargs)

        def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict]:
            self.model.eval()
            score = validate()
            return score, {"ndcg@10": score}

        def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
            self.best_state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

        def resume_checkpoint(self, resume_file: str) -> None:
            raise ValueError(f"{resume_file}: RecBole's checkpoints are pickles, which can run code; they are not read")

    class TensorsOnly(Collector):
        """`Collector` that leaves its counters alone: RecBole calls .cpu() on them as on tensors."""

        def get_data_struct(self) -> Any:
            found = self.data_struct._data_dict
            found |= {key: value.cpu() for key, value in found.items() if isinstance(value, Tensor)}
            struct = copy.deepcopy(self.data_struct)
            for key in ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label"):  # of one evaluation
                found.pop(key, None)
            return struct

    # Stands where RecBole's trainers would open a log folder in the working directory.
    silent = SimpleNamespace(add_scalar=lambda *_, **__: None, add_hparams=lambda *_, **__: None)
    with mock.patch.object(trainer_module, "get_tensorboard", lambda logger: silent):
        trainer = SplitTrainer(built.config, built.model)
    trainer.eval_collector = TensorsOnly(built.config)
    return trainer


def fit(model_name: str | type, split: Split, settings: dict, seed: int, progress: bool = True) -> dict[str, Tensor]:
    """Train a RecBole model with RecBole's trainer; stop by masked NDCG@10 on validation.

    Returns
    -------
    dict name -> Tensor
        What `restore` needs: the best state, or the item–item weights of a linear model; and ``epochs`` and ``valid_curve``.
    """
    with contained(seed):
        built = build(model_name, split, settings, seed)
        if (linear := linear_weights(built.model)) is not None:
            return linear
        if hasattr(built.model, "item_cnt"):  # of Pop, whose own count depends on how events fall into batches
            return {"item_cnt": torch.from_numpy(split.item_counts)[:, None]}
        name = built.config["model"]
        recommender = RecBoleRecommender(built.model, split, name)
        users = split.eval_users("valid", settings.get("valid_users", 0))
        k = min(10, split.dataset.n_items - 1)  # a catalogue may be smaller than the usual cut-off
        trainer = make_trainer(
            built, name, lambda: evaluate(recommender, split, "valid", ks=(k,), users=users).mean(f"ndcg@{k}")
        )
        curve: list[float] = []
        with tqdm(total=trainer.epochs, desc=f"train {name}", unit="epoch", leave=False, disable=not progress) as bar:

            def each_epoch(epoch: int, score: float) -> None:
                curve.append(score)
                bar.update(epoch + 1 - bar.n)
                bar.set_postfix(valid_ndcg=f"{score:.4f}")

            trainer.fit(built.loader, split, verbose=False, saved=True, callback_fn=each_epoch)
        if trainer.best_state is not None:
            built.model.load_state_dict(trainer.best_state)
        state = dict(built.model.state_dict())
        return {**state, "valid_curve": torch.tensor(curve), "epochs": torch.tensor(len(trainer.train_loss_dict))}


def restore(model_name: str | type, split: Split, settings: dict, seed: int, state: dict[str, Tensor]) -> nn.Module:
    """The trained RecBole model (general, sequential, context-aware) from what `fit` returned."""
    state = {name: tensor for name, tensor in state.items() if name not in ("valid_curve", "epochs")}
    with contained(seed):
        model = build(model_name, split, {**settings, "augmentation": None}, seed).model
        if "item_cnt" in state:
            model.item_cnt, model.max_cnt = state["item_cnt"], state["item_cnt"].max(dim=0)[0]
        else:
            model.load_state_dict(state)
        return model.eval()


def linear_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """S of the models that score ``h_u S`` (ItemKNN, EASE, SLIMElastic), for `similarity_from`; else None."""
    weights = getattr(model, "w" if type(model).__name__ == "ItemKNN" else "item_similarity", None)
    if weights is None:
        return None
    if not sp.issparse(weights):
        return {"dense": torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32))}
    weights = sp.csr_matrix(weights)
    at = {"columns": torch.from_numpy(weights.indices).long(), "row_starts": torch.from_numpy(weights.indptr).long()}
    return {"values": torch.from_numpy(weights.data).float(), **at}


def similarity_from(state: dict[str, Tensor], n_items: int) -> Tensor | sp.csr_matrix:
    """The item–item weights that `fit` returned for a linear model, [n_items, n_items]."""
    if "dense" in state:
        return state["dense"]
    parts = (state[name].numpy() for name in ("values", "columns", "row_starts"))
    return sp.csr_matrix(tuple(parts), shape=(n_items, n_items))


def full_sort_scores(model: nn.Module, split: Split, users: LongTensor, phase: str) -> FloatTensor:
    """Scores [B, n_items] of a RecBole model; sequential models read the histories of `phase`."""
    from recbole.data.interaction import Interaction
    from recbole.utils import ModelType

    device = next(model.parameters()).device
    with contained(), torch.no_grad():
        model.eval()
        fields = {UID: users}
        if model.type == ModelType.SEQUENTIAL:
            fields |= _sequences(split, users, phase, model.max_seq_length)
        try:
            scores = model.full_sort_predict(Interaction(fields).to(device))
        except NotImplementedError:
            scores = torch.cat([_score_all_items(model, user, split, device) for user in users])
    return scores.view(len(users), split.dataset.n_items).float().cpu()


def _sequences(split: Split, users: LongTensor, phase: str, max_length: int) -> dict[str, LongTensor]:
    sequences = torch.zeros(len(users), max_length, dtype=torch.long)
    lengths = torch.ones(len(users), dtype=torch.long)  # without a history: one PAD
    for row, history in enumerate(split.histories(users.numpy(), phase)):
        recent = torch.from_numpy(np.asarray(history[-max_length:], dtype=np.int64))
        sequences[row, : len(recent)] = recent
        lengths[row] = max(len(recent), 1)
    return {SEQ: sequences, SEQ_LEN: lengths}


def _score_all_items(model: nn.Module, user: Tensor, split: Split, device: torch.device) -> Tensor:
    """A context-aware model predicts pairs: one user with every item and its features."""
    from recbole.data.interaction import Interaction

    features = {column: values.to(device) for column, values in model.item_features.items()}
    return model.predict(Interaction({UID: user.expand(split.dataset.n_items).to(device), **features}))


def wrap(recommender: Recommender) -> nn.Module:
    """A recommender as a RecBole `GeneralRecommender` without trainable parts (``ModelType.TRADITIONAL``)."""
    from recbole.model.abstract_recommender import GeneralRecommender
    from recbole.utils import InputType, ModelType

    class Wrapped(GeneralRecommender):
        type = ModelType.TRADITIONAL
        input_type = InputType.POINTWISE

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.n_users, self.n_items = recommender.n_users, recommender.n_items
            self.recommender, self.phase = recommender, recommender.phase
            self.no_parameter = nn.Parameter(torch.zeros(1))

        def calculate_loss(self, interaction: Any) -> Tensor:
            return nn.Parameter(torch.zeros(1))

        def full_sort_predict(self, interaction: Any) -> Tensor:
            return recommender.score(interaction[UID].cpu()).view(-1)

    return Wrapped()


def judge(model: nn.Module, split: Split, metrics: list[str], ks: list[int]) -> Callable[[], dict[str, float]]:
    """RecBole's own ``Trainer.evaluate``, ready to be called, for a model from `to_recbole`: full ranking, RecBole's masking.

    Returns
    -------
    callable
        Gives ``"ndcg@10"`` -> value, in RecBole's lower-case names; rounded by RecBole to 10 decimals.
    """
    from recbole.data.dataloader import FullSortEvalDataLoader
    from recbole.sampler import Sampler

    with contained(0):
        built = build("Pop", split, {"metrics": metrics, "topk": ks, "valid_metric": f"{metrics[0]}@{ks[0]}"}, 0)
        position = ("train", "valid", "test").index(model.phase)
        # RecBole's sampler knows which items a user has used up to a phase, and that is RecBole's mask.
        sampler = Sampler(["train", "valid", "test"], built.datasets, "uniform", 1.0).set_phase(model.phase)
        loader = FullSortEvalDataLoader(built.config, built.datasets[position], sampler, shuffle=False)
        built.model = model
        trainer = make_trainer(built, "Pop", lambda: 0.0)
        trainer.eval_collector.data_collect(built.loader)

    def evaluate_by_recbole() -> dict[str, float]:
        with contained(0):
            return dict(trainer.evaluate(loader, load_best_model=False))

    return evaluate_by_recbole
