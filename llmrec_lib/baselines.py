"""Recommendation without a language model: RecBole's models with tuned settings, and a TF-IDF profile."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from llmrec_lib import _recbole
from llmrec_lib.cache import cached_tensors, content_key
from llmrec_lib.recommender import ItemSimilarityRecommender, RecBoleRecommender, Recommender

if TYPE_CHECKING:
    from llmrec_lib.splits import Split


@dataclass(frozen=True)
class Baseline:
    """One row of the table of baselines."""

    kind: str
    """"collaborative", "content-based" or "hybrid"."""
    recbole_model: str | None
    """RecBole's model, None for TF-IDF."""
    settings: dict[str, Any] = field(default_factory=dict)
    """RecBole parameters that differ from its defaults."""
    source: str = ""


_SEQUENTIAL = {"all_positions": True, "MAX_ITEM_LIST_LENGTH": 50, "loss_type": "CE", "train_batch_size": 128}

BASELINES: dict[str, Baseline] = {
    "pop": Baseline("collaborative", "Pop", {"epochs": 1}, "popularity in training"),
    "itemknn": Baseline("collaborative", "ItemKNN", {"k": 100, "shrink": 10.0}, "Deshpande & Karypis 2004"),
    "ease": Baseline("collaborative", "EASE", {"reg_weight": 250.0}, "Steck 2019"),
    "slim": Baseline("collaborative", "SLIMElastic", {"alpha": 0.2, "l1_ratio": 0.02}, "Ning & Karypis 2011"),
    "bpr": Baseline(
        "collaborative",
        "BPR",
        {"embedding_size": 64, "learning_rate": 0.002, "epochs": 100, "eval_step": 5, "stopping_step": 3},
        "Rendle et al. 2009",
    ),
    "lightgcn": Baseline(
        "collaborative",
        "LightGCN",
        {"n_layers": 2, "learning_rate": 0.005, "reg_weight": 1e-4, "epochs": 100, "eval_step": 5, "stopping_step": 3},
        "He et al. 2020",
    ),
    "gru4rec": Baseline(
        "collaborative",
        "GRU4Rec",
        {**_SEQUENTIAL, "learning_rate": 0.005, "epochs": 30, "eval_step": 3, "stopping_step": 3},
        "Hidasi et al. 2016, full softmax at every position",
    ),
    "sasrec": Baseline(
        "collaborative",
        "SASRec",
        {
            **_SEQUENTIAL,
            "learning_rate": 0.002,
            "hidden_dropout_prob": 0.3,
            "attn_dropout_prob": 0.3,
            "epochs": 60,
            "eval_step": 3,
            "stopping_step": 4,
        },
        "Kang & McAuley 2018, full softmax at every position",
    ),
    "tfidf": Baseline("content-based", None, {"min_df": 1}, "Salton & Buckley 1988"),
    "fm": Baseline(
        "hybrid",
        "FM",
        {
            "embedding_size": 32,
            "learning_rate": 0.005,
            "weight_decay": 1e-6,
            "epochs": 20,
            "eval_step": 5,
            "stopping_step": 2,
        }
        | {"valid_users": 300},
        "Rendle 2010, with item features",
    ),
}


def train(name: str, split: Split, seed: int = 0, *, progress: bool = True, **settings: Any) -> Recommender:
    """Train a baseline on the training part of a split; a second call with equal inputs reads the result from the cache.

    Parameters
    ----------
    name : a key of `BASELINES`, such as "ease".
    split : Split
    seed : seeds initialisation, sampling and batch order.
    **settings : RecBole parameters that replace the tuned ones, such as ``epochs=5``.

    Returns
    -------
    Recommender

    Raises
    ------
    ValueError
        Unknown name.
    """
    if name not in BASELINES:
        raise ValueError(f"no baseline {name!r}; there are {', '.join(BASELINES)}")
    baseline = BASELINES[name]
    settings = {**baseline.settings, **settings}
    if baseline.recbole_model is None:
        return ItemSimilarityRecommender(split, tfidf_similarity(split, **settings), name)
    if baseline.kind == "hybrid":
        settings.setdefault("item_columns", _token_columns(split))
    key = content_key(
        name, settings, split.fingerprint, seed, sys.modules[__name__], _recbole, _versions(), split.dataset.n_items
    )
    state = cached_tensors(
        "baselines", key, lambda: _recbole.fit(baseline.recbole_model, split, settings, seed, progress=progress)
    )
    if "dense" in state or "row_starts" in state:
        return ItemSimilarityRecommender(split, _recbole.similarity_from(state, split.dataset.n_items), name)
    model = _recbole.restore(baseline.recbole_model, split, settings, seed, state)
    return RecBoleRecommender(model, split, name)


def _token_columns(split: Split) -> list[str]:
    """Item columns that a factorisation machine can use as features; a column of distinct ids says nothing new."""
    items = split.dataset.items.iloc[1:]
    kinds = split.dataset.item_columns
    return [
        name
        for name in items
        if kinds[name] == "token_seq" or (kinds[name] == "token" and items[name].nunique() < len(items))
    ]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("recbole", "torch", "numpy", "scipy", "scikit-learn")}


def tfidf_similarity(split: Split, min_df: int = 1, neighbours: int = 100) -> sp.csr_matrix:
    """Cosine of TF-IDF vectors of the item texts, the `neighbours` highest of each item kept, [n_items, n_items].

    A history scored with it is a TF-IDF user profile: the sum of its items' vectors, compared with each item.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = split.dataset.item_text
    vectors = TfidfVectorizer(sublinear_tf=True, min_df=min_df, token_pattern=r"(?u)\b\w+\b").fit_transform(texts)
    return keep_neighbours((vectors @ vectors.T).tocsr(), neighbours)


def keep_neighbours(similarity: sp.csr_matrix | np.ndarray, neighbours: int) -> sp.csr_matrix:
    """Keep each row's highest positive entries, the diagonal and PAD left out.

    Parameters
    ----------
    similarity : [n_items, n_items], sparse or dense.
    neighbours : entries kept per row.
    """
    n_items = similarity.shape[0]
    rows, columns, values = [], [], []
    for item in range(1, n_items):
        if sp.issparse(similarity):
            start, end = similarity.indptr[item : item + 2]
            others, row = similarity.indices[start:end], similarity.data[start:end]
        else:
            others, row = np.arange(n_items), np.asarray(similarity[item])
        usable = (others != item) & (others != 0) & (row > 0)
        others, row = others[usable], row[usable]
        if len(row) > neighbours:
            best = np.argpartition(-row, neighbours)[:neighbours]
            others, row = others[best], row[best]
        rows.append(np.full(len(row), item))
        columns.append(others)
        values.append(row)
    entries = np.concatenate(values).astype(np.float32), (np.concatenate(rows), np.concatenate(columns))
    return sp.csr_matrix(entries, shape=(n_items, n_items))
