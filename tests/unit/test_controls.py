"""Controls keep what they should keep and lose what they should lose; groups are what they say."""

from __future__ import annotations

import numpy as np
import torch

from llmrec_lib.evaluation.controls import random_items, shuffled_items, untrained_encoder, word_items
from llmrec_lib.evaluation.groups import activity_groups, popularity_groups


def test_shuffled_items_are_the_same_vectors_elsewhere():
    vectors = torch.arange(40.0).view(20, 2)
    shuffled = shuffled_items(vectors, 0)
    assert torch.equal(shuffled[0], vectors[0])
    assert not torch.equal(shuffled, vectors)
    assert torch.equal(shuffled.sort(dim=0).values, vectors)
    assert torch.equal(shuffled, shuffled_items(vectors, 0)) and not torch.equal(shuffled, shuffled_items(vectors, 1))
    assert random_items(vectors, 3).shape == vectors.shape
    assert torch.equal(random_items(vectors, 3), random_items(vectors, 3))


def test_words_bring_items_together_that_share_them(checkerboard_split):
    """On the checkerboard the words of an item are its parity, "story" and its number."""
    vectors = torch.nn.functional.normalize(word_items(checkerboard_split, 3), dim=1)
    titles = checkerboard_split.dataset.titles
    similarity = vectors @ vectors.T
    same = torch.tensor([[a[:3] == b[:3] for b in titles[1:]] for a in titles[1:]])
    off = ~torch.eye(len(same), dtype=torch.bool)
    assert similarity[1:, 1:][same & off].mean() > similarity[1:, 1:][~same].mean() + 0.5
    assert torch.isfinite(word_items(checkerboard_split)).all()


def test_an_untrained_encoder_has_the_shape_and_none_of_the_weights():
    from llmrec_lib.language_models.encoder import TextEncoder

    trained, untrained = TextEncoder("minilm"), untrained_encoder("minilm")
    texts = ["a film about a shark", "a movie with a great white shark", "tea cup with roses"]
    known, unknown = (one.encode(texts, progress=False) for one in (trained, untrained))
    assert known.shape == unknown.shape and torch.isfinite(unknown).all()
    assert known[0] @ known[1] > known[0] @ known[2] + 0.3
    assert abs(unknown[0] @ unknown[1] - unknown[0] @ unknown[2]) < 0.3
    assert torch.equal(unknown, untrained_encoder("minilm").encode(texts, progress=False))
    assert not torch.equal(unknown, untrained_encoder("minilm", 1).encode(texts, progress=False))


def test_popularity_groups_share_the_events(ml100k_split):
    groups, counts = popularity_groups(ml100k_split), ml100k_split.item_counts
    assert list(groups) == ["head", "middle", "tail", "unseen"]
    assert sorted(np.concatenate([*groups.values()]).tolist()) == list(range(1, ml100k_split.dataset.n_items))
    shares = {name: counts[items].sum() / counts.sum() for name, items in groups.items()}
    assert all(0.3 < shares[name] < 0.37 for name in ("head", "middle", "tail")) and shares["unseen"] == 0
    assert counts[groups["head"]].min() >= counts[groups["middle"]].max() >= counts[groups["tail"]].max() > 0
    assert len(groups["head"]) < len(groups["middle"]) < len(groups["tail"])


def test_activity_groups_are_thirds(ml100k_split):
    users = ml100k_split.eval_users("test")
    groups, counts = activity_groups(ml100k_split, users), ml100k_split.user_counts
    assert sorted(np.concatenate([*groups.values()]).tolist()) == users.tolist()
    assert max(map(len, groups.values())) - min(map(len, groups.values())) <= 1
    assert counts[groups["few"]].max() <= counts[groups["some"]].min() <= counts[groups["many"]].min()
