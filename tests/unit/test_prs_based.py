"""Similarity, filter, rank: each of the three steps where it can be seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmrec_lib.baselines import keep_neighbours
from llmrec_lib.evaluation.evaluate import mask_seen, tie_order, top_k
from llmrec_lib.language_models.encoder import Whitening
from llmrec_lib.prompts import StatedNeeds
from llmrec_lib.prs_based import (
    NeedFilter,
    UserTextRecommender,
    ease_with_text,
    embed_items,
    embed_users,
    text_similarity,
)

USERS = torch.arange(1, 25)


@pytest.fixture
def vectors(checkerboard_split):
    generator = np.random.default_rng(0)
    items = torch.from_numpy(generator.standard_normal((17, 4))).float()
    users = {phase: torch.from_numpy(generator.standard_normal((25, 4))).float() for phase in ("valid", "test")}
    return users, items


def ranking(recommender, phase="test"):
    masked = mask_seen(recommender.at(phase).score(USERS).clone(), recommender.split, USERS, phase)
    return top_k(masked, 11, tie_order(17))


def test_neighbours_by_hand():
    similarity = np.array(
        [[9, 9, 9, 9, 9], [9, 9, 0.5, 0.2, 0.3], [9, 0.5, 9, 0.1, -0.4], [9, 0.2, 0.1, 9, 0.0], [9, 0.3, -0.4, 0.0, 9]]
    )
    expected = np.zeros((5, 5))
    expected[1, [2, 4]], expected[2, [1, 3]], expected[3, [1, 2]], expected[4, 1] = (
        [0.5, 0.3],
        [0.5, 0.1],
        [0.2, 0.1],
        0.3,
    )
    from scipy.sparse import csr_matrix

    for form in (similarity, csr_matrix(similarity)):
        assert keep_neighbours(form, 2).toarray() == pytest.approx(expected)
    assert keep_neighbours(np.zeros((3, 3)), 2).nnz == 0


def test_text_similarity_is_the_cosine_of_the_nearest(checkerboard_split, vectors):
    _, items = vectors
    kept = text_similarity(checkerboard_split, 3 * items, neighbours=4).similarity.toarray()
    cosine = np.array([[float(torch.cosine_similarity(a, b, dim=0)) for b in items] for a in items])
    for item in range(1, 17):
        nearest = [other for other in np.argsort(-cosine[item]) if other not in (0, item) and cosine[item, other] > 0][
            :4
        ]
        assert set(np.flatnonzero(kept[item])) == set(nearest)
        assert kept[item, nearest] == pytest.approx(cosine[item, nearest], abs=1e-6)
    assert not kept[0].any() and not kept[:, 0].any()


@pytest.mark.parametrize("n_candidates", [1, 4, 16, 200])
def test_without_popularity_the_ranking_is_by_similarity(checkerboard_split, vectors, n_candidates):
    users, items = vectors
    method = UserTextRecommender(checkerboard_split, users, items, n_candidates)
    for phase in ("valid", "test"):
        order = ranking(method, phase)
        for row, user in enumerate(USERS.tolist()):
            cosine = torch.cosine_similarity(users[phase][user][None], items)
            ranked = cosine[order[row]]
            assert (ranked.diff() < 1e-6).all()


def test_candidates_stay_in_front_and_popularity_orders_them(checkerboard_split, vectors, monkeypatch):
    users, items = vectors
    similarity = ranking(UserTextRecommender(checkerboard_split, users, items, 4))
    popular = UserTextRecommender(checkerboard_split, users, items, 4, popularity_weight=1e4)
    ascending = torch.arange(17.0)  # on the checkerboard all items are equally popular
    monkeypatch.setattr(type(popular.arms[1]), "score", lambda self, users: ascending.expand(len(users), -1))
    order = ranking(popular)
    assert torch.equal(order[:, :4], similarity[:, :4].sort(descending=True).values)
    assert torch.equal(order[:, 4:], similarity[:, 4:])
    assert torch.isfinite(popular.score(USERS)).all()


def test_popularity_is_that_of_training(checkerboard_split, vectors):
    method = UserTextRecommender(checkerboard_split, *vectors)
    popularity = method.arms[1].score(USERS)[0].numpy()
    assert popularity == pytest.approx(np.log1p(checkerboard_split.item_counts))


class Letters:
    """Stands for a text encoder: a text becomes its counts of a, e, i, o, u."""

    def __init__(self):
        self.read = []

    def encode(self, texts, progress=True):
        self.read += texts
        return torch.tensor([[float(text.count(letter)) for letter in "aeiou"] for text in texts])


def test_items_are_embedded_from_their_texts(checkerboard_split):
    encoder = Letters()
    embeddings, whitening = embed_items(checkerboard_split, encoder, whiten=False)
    assert whitening is None
    assert encoder.read == checkerboard_split.dataset.item_text
    assert embeddings.shape == (17, 5)


def test_whitening_is_learned_from_items_of_training_alone(checkerboard_split):
    """Whatever is written about the others, the space stays the same."""

    class Drawn:
        """Each text its own vector."""

        def encode(self, texts, progress=False):
            return torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(hash(text))) for text in texts])

    parts, known = checkerboard_split, checkerboard_split.item_counts > 0
    assert (~known).sum() > 0  # PAD at least
    raw = Drawn().encode(parts.dataset.item_text)
    white, whitening = embed_items(parts, Drawn())
    assert torch.equal(whitening.mean, raw[known].double().mean(0))
    assert not torch.equal(whitening.mean, raw.double().mean(0))
    assert torch.equal(white, Whitening().fit(raw[known]).transform(raw))


def test_users_are_embedded_from_what_the_phase_knows(checkerboard_split):
    encoder = Letters()
    embeddings = embed_users(checkerboard_split, encoder, [3, 9])
    assert set(embeddings) == {"valid", "test"}
    for phase in embeddings:
        assert embeddings[phase].shape == (25, 5)
        assert embeddings[phase].abs().sum(dim=1).nonzero().flatten().tolist() == [3, 9]
    titles = checkerboard_split.dataset.titles
    for phase, first in (("valid", 0), ("test", 2)):
        for text, user in zip(encoder.read[first : first + 2], (3, 9), strict=True):
            known = set(checkerboard_split.histories([user], phase)[0].tolist())
            quoted = {
                item for item in range(1, 17) if f"{titles[item]};" in f"{text};".replace(",", ";").replace(".", ";")
            }
            target = int(checkerboard_split.targets(phase)[user].indices[0])
            assert titles[target] not in text or any(titles[target] in titles[item] for item in known)
            assert quoted <= known


def test_a_need_puts_fitting_items_first_and_keeps_both_orders(checkerboard_split, vectors):
    arm = UserTextRecommender(checkerboard_split, *vectors)
    needs = StatedNeeds(checkerboard_split, min_items=4)
    filtered, plain = NeedFilter(arm, needs).score(USERS), arm.score(USERS)
    for row, fits in enumerate(torch.from_numpy(needs.fitting(USERS, "test"))):
        order = filtered[row].argsort(descending=True, stable=True)
        assert fits[order].tolist() == sorted(fits.tolist(), reverse=True)
        before = plain[row].argsort(descending=True, stable=True)
        assert order.tolist() == [*before[fits[before]].tolist(), *before[~fits[before]].tolist()]


def test_a_need_is_read_with_the_user(checkerboard_split):
    encoder, needs = Letters(), StatedNeeds(checkerboard_split, min_items=4)
    embeddings = embed_users(checkerboard_split, encoder, [3, 9], needs=needs)
    plain = Letters()
    embed_users(checkerboard_split, plain, [3, 9])
    stated = [word for phase in ("valid", "test") for word in needs.texts([3, 9], phase)]
    assert set(stated) <= {"odd", "even"}
    assert encoder.read == [f"{word}. {text}" for word, text in zip(stated, plain.read, strict=True)]
    assert embeddings["test"].abs().sum(dim=1).nonzero().flatten().tolist() == [3, 9]


def test_ease_with_text_is_ease_with_more_rows(checkerboard_split):
    """Weight 0 gives RecBole's EASE; else the closed form on the matrix with the text's dimensions as further rows."""
    from llmrec_lib.baselines import train

    parts = checkerboard_split
    vectors = torch.from_numpy(np.random.default_rng(2).standard_normal((parts.dataset.n_items, 5))).float()
    plain = train("ease", parts, progress=False).similarity[1:, 1:]
    assert np.abs(ease_with_text(parts, vectors, 0.0).similarity[1:, 1:] - plain).max() < 1e-5
    unit = torch.nn.functional.normalize(vectors, dim=1).double().numpy()
    rows = np.concatenate([parts.matrix("train").toarray(), np.sqrt(30.0) * unit.T])[:, 1:]
    inverse = np.linalg.inv(rows.T @ rows + 250.0 * np.eye(rows.shape[1]))
    expected = inverse / -np.diag(inverse)
    np.fill_diagonal(expected, 0.0)
    found = ease_with_text(parts, vectors, 30.0).similarity[1:, 1:]
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - plain).max() > 1e-3


def test_fading_votes(checkerboard_split):
    """With a very short half-life only the newest event votes; with none the votes are equal; the original stays."""
    from llmrec_lib.baselines import train

    ease, users = train("ease", checkerboard_split, progress=False), torch.arange(1, 25)
    newest = [history[-1] for history in checkerboard_split.histories(users.numpy(), "test")]
    assert np.allclose(ease.recent(1e-3).score(users).numpy(), ease.similarity[newest], atol=1e-6)
    assert torch.equal(ease.recent(0).score(users), ease.score(users))
    assert torch.allclose(ease.recent(1e9).score(users), ease.score(users), atol=1e-6)
    assert ease.half_life is None and ease.recent(4).describe() != ease.describe()
    sparse = text_similarity(checkerboard_split, torch.eye(checkerboard_split.dataset.n_items)[:, :9] + 0.1, 5)
    assert not torch.equal(sparse.recent(1).score(users), sparse.score(users))
    with pytest.raises(ValueError, match="half_life is -1"):
        ease.recent(-1)
