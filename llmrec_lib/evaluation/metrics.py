"""Metrics of ranked lists: one value per user and cut-off, and the metrics of a whole set of lists."""

from collections.abc import Sequence

import numpy as np

PER_USER = ("precision", "recall", "f1", "ndcg", "map", "mrr", "hit", "popularity")


def per_user_metrics(
    hits: np.ndarray, n_targets: np.ndarray, popularity: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Values for each user at each cut-off.

    Parameters
    ----------
    hits : bool [B, K]
        Whether the item at each rank is a target; K >= max(ks).
    n_targets : int [B]
        Number of targets of each user, >= 1.
    popularity : float [B, K]
        Training events of the item at each rank.
    ks : cut-offs.

    Returns
    -------
    dict
        ``"ndcg@10"`` -> float64 [B], for each metric of `PER_USER` and each k:

        - precision ``|hits| / k``, recall ``|hits| / |targets|``, f1 ``2 |hits| / (k + |targets|)`` (per user, the mean is taken later);
        - ndcg with binary gains and ``log2(rank + 1)`` (Järvelin & Kekäläinen 2002), ideal list cut at k;
        - map ``Σ precision@rank · hit / min(|targets|, k)``, mrr ``1 / rank of the first hit`` (0 without one), hit 0/1;
        - popularity: mean training events of the recommended items.
    """
    ranks = np.arange(1, hits.shape[1] + 1)
    gains = hits / np.log2(ranks + 1)
    ideal = np.cumsum(1 / np.log2(ranks + 1))
    cumulative = np.cumsum(hits, axis=1)
    values = {}
    for k in ks:
        found = cumulative[:, k - 1].astype(np.float64)
        reachable = np.minimum(n_targets, k)
        values[f"precision@{k}"] = found / k
        values[f"recall@{k}"] = found / n_targets
        values[f"f1@{k}"] = 2 * found / (k + n_targets)
        values[f"ndcg@{k}"] = gains[:, :k].sum(axis=1) / ideal[reachable - 1]
        values[f"map@{k}"] = (cumulative[:, :k] / ranks[:k] * hits[:, :k]).sum(axis=1) / reachable
        values[f"mrr@{k}"] = (hits[:, :k] / ranks[:k]).max(axis=1)
        values[f"hit@{k}"] = (found > 0).astype(np.float64)
        values[f"popularity@{k}"] = popularity[:, :k].mean(axis=1)
    return values


def catalogue_metrics(recommended: np.ndarray, n_items: int, ks: Sequence[int]) -> dict[str, float]:
    """Metrics of all lists together.

    Parameters
    ----------
    recommended : int [n_users, K]
        Item ids, best first; ids start at 1.
    n_items : int
        Items that could be recommended, without PAD. (RecBole counts PAD too, so its coverage is ``n / (n + 1)`` of this.)

    Returns
    -------
    dict
        ``"coverage@k"``: share of the catalogue in at least one list; ``"gini@k"``: 0 when all items are recommended equally
        often, near 1 when few take all (Gini index of the recommendation counts).
    """
    values = {}
    for k in ks:
        counts = np.sort(np.bincount(recommended[:, :k].ravel(), minlength=n_items + 1)[1:])
        position = np.arange(1, n_items + 1)
        values[f"coverage@{k}"] = float((counts > 0).mean())
        values[f"gini@{k}"] = float(((2 * position - n_items - 1) * counts).sum() / (n_items * counts.sum()))
    return values
