"""Recommendation without a language model: RecBole's models with tuned settings, and a TF-IDF profile."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import yaml

from llmrec_lib import _recbole
from llmrec_lib.cache import cached_tensors, content_key
from llmrec_lib.recommender import ItemSimilarityRecommender, RecBoleRecommender, Recommender
from llmrec_lib.splits import Split
from llmrec_lib.study.provenance import versions


@dataclass(frozen=True)
class Baseline:
    """One entry of ``baselines.yaml``."""

    kind: str
    """"collaborative", "content-based" or "hybrid"."""
    recbole_model: str | None
    """RecBole's model, None for TF-IDF."""
    settings: dict[str, Any]
    """RecBole parameters that differ from its defaults."""
    source: str


_FACTS = yaml.safe_load(Path(__file__).with_name("baselines.yaml").read_text(encoding="utf-8"))
BASELINES = {name: Baseline(**facts) for name, facts in _FACTS.items()}


def train(name: str, split: Split, seed: int = 0, *, progress: bool = True, **settings: Any) -> Recommender:
    """Train a baseline on the training part of a split; a second call with equal inputs reads the result from the cache.

    Parameters
    ----------
    name : a key of `BASELINES`, such as "ease".
    split : Split
    seed : seeds initialisation, sampling and batch order.
    **settings : RecBole parameters that replace the tuned ones, such as ``epochs=5``; and for models with a vector for each item
        (BPR, LightGCN, GRU4Rec, SASRec) ``item_vectors`` [n_items, d], such as whitened embeddings of the texts from `embed_items`:
        early fusion, each item's vector is the learned one plus a learned projection of the given one, which stays as it is.

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
    known = BASELINES[name]
    settings = {**known.settings, **settings}
    if known.recbole_model is None:
        return ItemSimilarityRecommender(split, tfidf_similarity(split, **settings), name)
    if known.kind == "hybrid":
        settings.setdefault("item_columns", _token_columns(split))
    made_by = sys.modules[__name__], _recbole, _recbole.SETTINGS, versions()
    key = content_key(name, settings, split.fingerprint, seed, split.dataset.n_items, made_by)
    state = cached_tensors("baselines", key, lambda: _recbole.fit(known.recbole_model, split, settings, seed, progress))
    if "dense" in state or "row_starts" in state:
        return ItemSimilarityRecommender(split, _recbole.similarity_from(state, split.dataset.n_items), name)
    model = _recbole.restore(known.recbole_model, split, settings, seed, state)
    return RecBoleRecommender(model, split, name)


def _token_columns(split: Split) -> list[str]:
    """Item columns that a factorisation machine can use as features; a column of distinct ids says nothing new."""
    items = split.dataset.items.iloc[1:]
    kinds = split.dataset.item_columns
    return [n for n in items if kinds[n] == "token_seq" or kinds[n] == "token" and items[n].nunique() < len(items)]


def tfidf_similarity(split: Split, min_df: int = 1, neighbours: int = 100) -> sp.csr_matrix:
    """Cosine of TF-IDF vectors of the item texts, the `neighbours` highest of each item kept, [n_items, n_items].

    A history scored with it is a TF-IDF user profile: the sum of its items' vectors, compared with each item.
    """
    vectors = tfidf_vectors(split, min_df)
    return keep_neighbours((vectors @ vectors.T).tocsr(), neighbours)


def tfidf_vectors(split: Split, min_df: int = 1) -> sp.csr_matrix:
    """TF-IDF of the item texts, with the logarithm of counts, rows of length 1, [n_items, n_words]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    counter = TfidfVectorizer(sublinear_tf=True, min_df=min_df, token_pattern=r"(?u)\b\w+\b")
    return counter.fit_transform(split.dataset.item_text)


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
