"""Placebos: what a fusion would reach if the text said nothing. "Helps" may be written only where they are beaten."""

from __future__ import annotations

import torch
from torch import Tensor


def shuffled_items(embeddings: Tensor, seed: int) -> Tensor:
    """The embeddings of the items given to other items at random; PAD (row 0) stays. [n_items, d]

    Keeps everything of the text arm (distribution, neighbours, number of votes) but which item says what.
    """
    generator = torch.Generator().manual_seed(seed)
    order = 1 + torch.randperm(len(embeddings) - 1, generator=generator)
    return embeddings[torch.cat([torch.zeros(1, dtype=torch.long), order])]


def random_items(embeddings: Tensor, seed: int) -> Tensor:
    """Gaussian vectors in the place of the embeddings. [n_items, d]"""
    return torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seed))
