"""Data augmentation: slicing, insertion and replacement, and masking and reordering beside them, of histories and of texts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from llmrec_lib.cache import content_key

OPERATIONS = ("slice", "insert", "replace", "mask", "reorder")
VIEW_TEMPERATURE = 0.2


@dataclass(frozen=True, eq=False)
class Augmentation:
    """Changes ``round(rate · n)`` of the n elements of a sequence at random, but never all of them.

    - "slice": a contiguous part stays, what is before and behind it is cut off;
    - "insert": other elements are put behind some of its own;
    - "replace": other elements take the place of some, never of the last;
    - "mask": some are taken out: a model that reads from left to right has no token for what is hidden;
    - "reorder": a contiguous part is shuffled.

    Nothing is put in that the sequence has already. Rate 0 changes nothing: training on such copies is the control, as many
    more steps without augmentation. Sources: slice (crop), mask, reorder, views: Xie et al. 2022, "Contrastive Learning for
    Sequential Recommendation" (CL4SRec); insert, replace by similar items: Liu et al. 2021, "Contrastive Self-supervised
    Sequential Recommendation with Robust Augmentation" (CoSeRec); of texts: Wei & Zou 2019, "EDA".

    Parameters
    ----------
    operation : one of `OPERATIONS`
    rate : share of the elements to change, 0 to 1
    similar : csr_matrix [n_items, n_items], optional
        Informed insertion and replacement: only items with an entry in the row of the item that they stand behind, or for,
        such as `baselines.keep_neighbours` leaves. Where a row has none, nothing is changed. Without it: any.
    copies : augmented copies of each history, beside the history itself
    views : weight of a contrastive loss between two augmented views of each history, instead of copies; 0 for none
    """

    operation: str
    rate: float = 0.2
    similar: csr_matrix | None = None
    copies: int = 1
    views: float = 0.0

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation {self.operation!r} must be one of {', '.join(OPERATIONS)}")
        if not (0 <= self.rate <= 1 and self.copies >= 0 and self.views >= 0):
            given = f"rate {self.rate}, copies {self.copies}, views {self.views}"
            raise ValueError(f"{given}: rate must lie in 0..1, copies and views must not be negative")

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides what is changed."""
        similar = () if self.similar is None else (self.similar.indptr, self.similar.indices)
        return content_key(self.operation, self.rate, similar, self.copies, self.views, sys.modules[__name__])

    def __call__(
        self, sequence: Sequence, rng: np.random.Generator, others: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The changed sequence [m], and which of its elements a model may learn to predict from those before, bool [m].

        Left out are elements that were put in, and those of a shuffled part: what came later might stand before them.

        Parameters
        ----------
        others : what may be put in without `similar`: the items of the training part, or words.
        """
        sequence = np.array(sequence)
        n = len(sequence)
        n_changed = min(round(self.rate * n), n - 1)
        real = np.ones(n, dtype=bool)
        if n_changed < 1:
            return sequence, real
        if self.operation == "slice":
            start = rng.integers(n_changed + 1)
            return sequence[start : start + n - n_changed], real[n_changed:]
        if self.operation == "mask":
            return sequence[np.sort(rng.permutation(n)[n_changed:])], real[n_changed:]
        if self.operation == "reorder":
            start = rng.integers(n - n_changed + 1)
            part = slice(start, start + n_changed)
            sequence[part], real[part] = rng.permutation(sequence[part]), n_changed == 1
            return sequence, real
        others = np.setdiff1d(others, sequence)
        places, chosen = [], []
        for place in np.sort(rng.permutation(n - 1)[:n_changed]):
            options = others if self.similar is None else np.setdiff1d(self.similar[sequence[place]].indices, sequence)
            if len(options):
                places.append(place)
                chosen.append(rng.choice(options))
        if self.operation == "insert":
            behind = np.array(places, dtype=int) + 1
            return np.insert(sequence, behind, chosen), np.insert(real, behind, False)
        sequence[places], real[places] = chosen, False
        return sequence, real

    def text(self, text: str, rng: np.random.Generator, words: np.ndarray) -> str:
        """The same of the words of a text; `words` (str objects) are what may be put in."""
        return " ".join(self(np.array(text.split(), dtype=object), rng, words)[0]) if text.strip() else text


def with_copies(
    histories: Sequence[np.ndarray], augmentation: Augmentation | None, rng: np.random.Generator
) -> tuple[list[tuple[np.ndarray, np.ndarray]], float]:
    """Training histories, then augmented copies of each: events, and which may be predicted; and the share changed.

    The share is that of the copies: events that were cut off, taken out, put in or shuffled, by events of the histories.
    """
    rows = [(history, np.ones(len(history), dtype=bool)) for history in histories]
    if augmentation is None or augmentation.views:
        return rows, 0.0
    items, changed = np.unique(np.concatenate(histories)), 0
    for history in [*histories] * augmentation.copies:
        events, real = augmentation(history, rng, items)
        rows.append((events, real))
        changed += max(len(history) - len(events), 0) + np.count_nonzero(~real)
    return rows, changed / max(sum(map(len, histories)) * augmentation.copies, 1)


def contrast(first: Tensor, second: Tensor) -> Tensor:
    """InfoNCE of two views of n histories, float [n, d] each: of all second views its own is most like a first (cosine).

    Source: Xie et al. 2022 (CL4SRec), equation 4, with the second views alone as negatives.
    """
    likeness = normalize(first, dim=1) @ normalize(second, dim=1).T
    return cross_entropy(likeness / VIEW_TEMPERATURE, torch.arange(len(first), device=first.device))
