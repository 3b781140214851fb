"""The table of baselines: what they learn, where results are kept, what decides that they are made again."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from llmrec_lib import _recbole, baselines
from llmrec_lib.baselines import BASELINES, Baseline, tfidf_similarity, train
from llmrec_lib.splits import split
from tests.contract.test_recommenders import item_embeddings

USERS = torch.arange(1, 25)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def fits(own_cache, monkeypatch):
    """How often RecBole was asked to train."""
    calls, fit = [], _recbole.fit
    monkeypatch.setattr(_recbole, "fit", lambda *args, **kwargs: calls.append(args[0]) or fit(*args, **kwargs))
    return calls


def test_unknown_names_are_answered_with_the_known_ones(checkerboard_split):
    with pytest.raises(ValueError, match="no baseline 'eaze'; there are pop, itemknn, ease"):
        train("eaze", checkerboard_split)


def test_the_table_names_kinds_and_sources():
    assert {entry.kind for entry in BASELINES.values()} == {"collaborative", "content-based", "hybrid"}
    assert all(entry.source for entry in BASELINES.values())
    known = _recbole.model_names()
    assert all(entry.recbole_model in known for entry in BASELINES.values() if entry.recbole_model)


@pytest.mark.parametrize("name, fixed", [("bpr", {}), ("sasrec", {"eval_step": 1})])
def test_an_own_version_of_a_model_can_be_entered_in_the_table(own_cache, monkeypatch, checkerboard_split, name, fixed):
    """As chapter 06 does: vectors that start elsewhere, of a class with RecBole's name, whose settings RecBole then finds."""
    usual = train(name, checkerboard_split, progress=False, epochs=1, learning_rate=1e-12, **fixed)
    base, start = _recbole._model_class(BASELINES[name].recbole_model, False), usual.model.item_embedding.weight + 3.0

    def begin(model, *given):
        base.__init__(model, *given)
        model.item_embedding.weight.data.copy_(start)

    own = dataclasses.replace(BASELINES[name], recbole_model=type(base.__name__, (base,), {"__init__": begin}))
    monkeypatch.setitem(BASELINES, "own", own)
    for _ in range(2):  # trained, and read back
        found = train("own", checkerboard_split, progress=False, epochs=1, learning_rate=1e-12, **fixed)
        assert torch.allclose(found.model.item_embedding.weight[1:], start[1:], atol=1e-6)


def test_another_model_of_recbole_can_be_entered_in_the_table(own_cache, monkeypatch, checkerboard_split):
    monkeypatch.setitem(BASELINES, "simplex", Baseline("collaborative", "SimpleX", {"epochs": 2}, "Mao et al. 2021"))
    scores = train("simplex", checkerboard_split, progress=False).score(USERS)
    assert scores.shape == (len(USERS), checkerboard_split.dataset.n_items) and scores[:, 1:].std() > 0


def test_the_same_is_trained_once(fits, checkerboard_split, checkerboard):
    first = train("ease", checkerboard_split)
    again = train("ease", split(checkerboard))  # equal content, another object
    assert fits == ["EASE"]
    assert torch.equal(first.score(USERS), again.score(USERS))
    train("ease", checkerboard_split, reg_weight=9.0)
    train("ease", checkerboard_split, seed=1)
    train("ease", split(checkerboard, "leave_one_out", seed=5))
    assert fits == ["EASE"] * 4


@pytest.mark.parametrize("name", ["bpr", "sasrec", "fm", "pop"])
def test_a_restored_model_is_the_trained_one(fits, checkerboard_split, name):
    settings = {} if name == "pop" else {"epochs": 2, "eval_step": 1}
    trained, restored = (train(name, checkerboard_split, progress=False, **settings) for _ in range(2))
    assert len(fits) == 1
    assert torch.equal(trained.score(USERS), restored.score(USERS))
    assert len(set(np.round(trained.score(USERS)[0, 1:].tolist(), 7))) > 1 or name == "pop"


@pytest.mark.parametrize("name", ["bpr", "lightgcn", "sasrec", "fm"])
def test_seeds_decide(checkerboard_split, name):
    settings = {**BASELINES[name].settings, "epochs": 2, "eval_step": 1}
    if name == "fm":
        settings["item_columns"] = ["genre"]
    model = BASELINES[name].recbole_model
    torch.manual_seed(1)
    first = _recbole.fit(model, checkerboard_split, settings, 7, progress=False)
    torch.manual_seed(2)  # what the process did before must not matter
    np.random.seed(3)
    second = _recbole.fit(model, checkerboard_split, settings, 7, progress=False)
    other = _recbole.fit(model, checkerboard_split, settings, 8, progress=False)
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    assert not all(torch.allclose(first[key], other[key], atol=1e-6) for key in first)
    assert int(first["epochs"]) == 2 and len(first["valid_curve"]) == 2


def test_the_best_epoch_is_kept_and_training_stops_after_it(checkerboard_split, monkeypatch):
    """Validation is at its best after the second epoch; it may fail to improve twice, and the third time ends it."""
    said, states = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.9]), []

    class Judged:
        def __init__(self, recommender):
            states.append({name: tensor.clone() for name, tensor in recommender.model.state_dict().items()})

        def mean(self, metric):
            assert metric == "ndcg@10"
            return next(said)

    monkeypatch.setattr(_recbole, "evaluate", lambda recommender, *args, **kwargs: Judged(recommender))
    settings = {**BASELINES["bpr"].settings, "epochs": 60, "eval_step": 1, "stopping_step": 2}
    state = _recbole.fit("BPR", checkerboard_split, settings, 0, progress=False)
    assert state["valid_curve"].tolist() == pytest.approx([0.1, 0.5, 0.4, 0.3, 0.2])
    assert int(state["epochs"]) == 5
    assert all(torch.equal(state[name], tensor) for name, tensor in states[1].items())
    assert not any(torch.equal(state[name], tensor) for name, tensor in states[4].items())


def test_validation_is_masked_and_on_validation_data(checkerboard_split, monkeypatch):
    asked, evaluate = [], _recbole.evaluate
    monkeypatch.setattr(
        _recbole,
        "evaluate",
        lambda *args, **kwargs: asked.append((args[2], kwargs["users"])) or evaluate(*args, **kwargs),
    )
    settings = {**BASELINES["sasrec"].settings, "epochs": 1, "eval_step": 1, "valid_users": 6}
    _recbole.fit("SASRec", checkerboard_split, settings, 0, progress=False)
    assert [phase for phase, _ in asked] == ["valid"]
    assert asked[0][1].tolist() == checkerboard_split.eval_users("valid", 6).tolist()


def test_ease_is_the_closed_form(own_cache, checkerboard_split):
    """Steck 2019, equation 8: B = I − P · diag(1/diag(P)), P the inverse of the regularised Gram matrix."""
    x = checkerboard_split.matrix("train").toarray().astype(float)
    p = np.linalg.inv(x.T @ x + 7.0 * np.eye(17))
    b = -p / np.diag(p)
    np.fill_diagonal(b, 0.0)
    assert train("ease", checkerboard_split, reg_weight=7.0).similarity == pytest.approx(b, abs=1e-5)


def test_popularity_is_training_events(own_cache, ml100k_split):
    scores = train("pop", ml100k_split, progress=False).score(torch.tensor([1, 7]))
    counts = torch.from_numpy(ml100k_split.item_counts).float()
    assert torch.allclose(scores[0], counts / counts.max(), atol=1e-6)
    assert torch.equal(scores[0], scores[1])


def test_tfidf_prefers_what_shares_words(checkerboard_split):
    similarity = tfidf_similarity(checkerboard_split).toarray()
    parity = np.array([-1, *(int(token[1:]) % 2 for token in checkerboard_split.dataset.item_ids[1:])])
    same = (parity[:, None] == parity) & (parity >= 0)
    np.fill_diagonal(same, False)
    different = (parity[:, None] != parity) & (parity[:, None] >= 0) & (parity >= 0)
    assert similarity[same].min() > similarity[different].max()
    assert tfidf_similarity(checkerboard_split, neighbours=3).getnnz(axis=1).max() == 3


def test_columns_of_distinct_values_are_no_features(checkerboard_split):
    assert baselines._token_columns(checkerboard_split) == ["title", "genre"]


@pytest.mark.parametrize("name", ["bpr", "lightgcn", "gru4rec", "sasrec"])
def test_given_vectors_are_projected_beside_learned_ones(checkerboard_split, name):
    vectors = item_embeddings(checkerboard_split.dataset)
    settings = {"epochs": 2, "eval_step": 1, "progress": False}
    arm = train(name, checkerboard_split, item_vectors=vectors, **settings)
    table = arm.model.item_embedding
    unit = torch.nn.functional.normalize(vectors, dim=1)
    assert torch.allclose(table.texts[1:].cpu(), unit[1:], atol=1e-6) and not table.texts[0].any()
    items = torch.tensor([3, 1, 16]).to(table.texts.device)
    assert torch.allclose(table(items), table.ids.weight[items] + table.project(table.texts[items]), atol=1e-6)
    assert torch.allclose(table(items), table.weight[items], atol=1e-6)
    users = torch.tensor([5, 1, 24])
    again = train(name, checkerboard_split, item_vectors=vectors, **settings).score(users)  # read from the cache
    assert torch.equal(again, arm.score(users))
    for other in ({"item_vectors": vectors.flip(0)}, {}):
        assert not torch.allclose(train(name, checkerboard_split, **other, **settings).score(users), again, atol=1e-4)


def test_with_vectors_an_item_that_nobody_took_is_where_its_text_says(checkerboard_split):
    """Users like items of one parity: an item that is nothing but its vector suits those who like its parity better."""
    parts = checkerboard_split
    settings = {"epochs": 120, "stopping_step": 99, "progress": False}
    model = train("bpr", parts, item_vectors=item_embeddings(parts.dataset), **settings).model
    with torch.no_grad():
        texts = torch.eye(2, model.item_embedding.texts.shape[1], device=model.item_embedding.texts.device)
        even, odd = (model.user_embedding.weight @ model.item_embedding.project(texts).T).T.cpu()
    parity = np.array([-1, *(int(token[1:]) % 2 for token in parts.dataset.item_ids[1:])])
    likes_odd = [parity[history].mean() > 0.5 for history in parts.histories(USERS.numpy(), "train")]
    agree = (odd > even)[1:].numpy() == np.array(likes_odd)
    assert agree.mean() > 0.9


@pytest.mark.parametrize(
    ("name", "vectors", "message"),
    [
        ("sasrec", torch.zeros(5, 2), "item vectors are (5, 2); this data set needs (17, d)"),
        ("bpr", torch.full((17, 2), torch.nan), "NaN or infinite"),
        ("pop", torch.ones(17, 2), "Pop has none"),
    ],
)
def test_vectors_that_cannot_be_used(checkerboard_split, name, vectors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(name, checkerboard_split, item_vectors=vectors, progress=False)
