"""evaluate(): streamed, masked, ties broken by a fixed lot, and strict about what it judges and how often."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_lib.evaluation import evaluate
from llmrec_lib.evaluation.evaluate import TestReuseError, mask_seen, tie_order, top_k
from llmrec_lib.recommender import ItemSimilarityRecommender, Recommender
from llmrec_lib.splits import split
from tests.unit.test_metrics import of_one_user

KS = (3, 5)


class Table(Recommender):
    """Scores from a matrix [n_users, n_items]."""

    def __init__(self, parts, table, name="table"):
        super().__init__(parts, name)
        self.table = torch.as_tensor(table, dtype=torch.float32)
        self._asked = []

    def score(self, users):
        self._asked.append(len(users))
        return self.table[users]


@pytest.fixture
def random_table(checkerboard_split):
    shape = (checkerboard_split.dataset.n_users, checkerboard_split.dataset.n_items)
    return Table(checkerboard_split, np.random.default_rng(0).integers(0, 6, shape))  # few levels: many ties


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_all_values_against_loops(random_table, checkerboard_split, phase):
    result = evaluate(random_table, checkerboard_split, phase, ks=KS)
    lot = tie_order(17).tolist()
    counts = checkerboard_split.item_counts.tolist()
    seen, targets = checkerboard_split.seen(phase).toarray(), checkerboard_split.targets(phase).toarray()
    assert result.per_user.index.tolist() == list(range(1, 25))
    for user in range(1, 25):
        candidates = [item for item in range(1, 17) if not seen[user, item]]
        ranking = sorted(candidates, key=lambda item: (-float(random_table.table[user, item]), lot[item]))
        wanted = {item for item in range(1, 17) if targets[user, item]}
        for k in KS:
            for metric, value in of_one_user(ranking, wanted, counts, k).items():
                assert result.per_user.loc[user, f"{metric}@{k}"] == pytest.approx(value, abs=1e-9), (user, metric)


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_batches_make_no_difference(random_table, checkerboard_split, phase):
    whole = evaluate(random_table, checkerboard_split, phase, ks=KS)
    assert random_table._asked == [24]
    for size in (1, 7):
        random_table._asked.clear()
        parts = evaluate(random_table, checkerboard_split, phase, ks=KS, batch_size=size)
        assert max(random_table._asked) == size  # never more than a batch at once
        pd.testing.assert_frame_equal(parts.per_user, whole.per_user, check_exact=True)
        assert parts.catalogue == whole.catalogue


def test_batches_shrink_as_the_catalogue_grows(random_table, checkerboard_split, monkeypatch):
    whole = evaluate(random_table, checkerboard_split, ks=KS)
    for scores, expected in ((5 * 17 + 16, [5, 5, 5, 5, 4]), (1, [1] * 24)):  # at least one user at once
        random_table._asked.clear()
        monkeypatch.setitem(evaluate.__globals__, "BATCH_SCORES", scores)
        parts = evaluate(random_table, checkerboard_split, ks=KS)
        assert random_table._asked == expected
        pd.testing.assert_frame_equal(parts.per_user, whole.per_user, check_exact=True)


def test_seen_items_are_never_recommended(checkerboard_split):
    """Seen items get 100 times the score of the target, and the target is still found first."""
    seen_at = {phase: checkerboard_split.seen(phase).toarray() for phase in ("valid", "test")}
    assert (seen_at["test"].sum(1) - seen_at["valid"].sum(1))[1:].tolist() == [1] * 24
    for phase in ("valid", "test"):
        method = Table(checkerboard_split, 100 * seen_at["test"] + checkerboard_split.targets(phase).toarray())
        result = evaluate(method, checkerboard_split, phase, ks=(1,), method=phase)
        assert result.mean("recall@1") == 1.0
    masked = mask_seen(torch.zeros(24, 17), checkerboard_split, torch.arange(1, 25), "test")
    assert torch.equal(torch.isinf(masked[:, 1:]), torch.from_numpy(seen_at["test"][1:, 1:] > 0))
    assert torch.isinf(masked[:, 0]).all()


def test_validation_items_are_masked_at_test_only(checkerboard_split):
    valid = Table(checkerboard_split, checkerboard_split.targets("valid").toarray())
    assert evaluate(valid, checkerboard_split, "valid", ks=(1,)).mean("hit@1") == 1.0
    masked = mask_seen(valid.score(torch.arange(1, 25)).clone(), checkerboard_split, torch.arange(1, 25), "test")
    assert not (masked == 1).any()


def test_scores_handed_out_are_not_written_to(random_table, checkerboard_split):
    before = random_table.table.clone()
    whole = Table(checkerboard_split, random_table.table)
    whole.score = lambda users: whole.table[1:25]  # a view of the method's own memory
    evaluate(whole, checkerboard_split, ks=KS)
    assert torch.equal(whole.table, before)


def test_constant_scores_are_ranked_by_lot(checkerboard_split):
    """Not by id: items that come early in the file would win."""
    users = torch.arange(1, 25)
    masked = mask_seen(torch.ones(24, 17), checkerboard_split, users, "test")
    lot = tie_order(17)
    ranked = top_k(masked, 5, lot)
    for row, user in enumerate(users.tolist()):
        free = [item for item in range(1, 17) if not checkerboard_split.seen("test")[user, item]]
        assert ranked[row].tolist() == sorted(free, key=lambda item: int(lot[item]))[:5]
        assert ranked[row].tolist() != free[:5]
    assert torch.equal(tie_order(17), lot)
    assert sorted(lot.tolist()) == list(range(17))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_top_k_is_the_head_of_a_full_stable_sort(data):
    n_items, rows = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 5))
    levels = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 0.5000001, 2.0])
    scores = torch.tensor([data.draw(st.lists(levels, min_size=n_items, max_size=n_items)) for _ in range(rows)])
    order = torch.tensor(data.draw(st.permutations(range(n_items))))
    k = data.draw(st.integers(1, n_items))
    expected = [sorted(range(n_items), key=lambda item: (-row[item], int(order[item])))[:k] for row in scores.tolist()]
    before = scores.clone()
    assert top_k(scores, k, order).tolist() == expected
    assert torch.equal(scores, before)


def test_column_of_pad_may_hold_anything(random_table, checkerboard_split):
    expected = evaluate(random_table, checkerboard_split, "valid", ks=KS).per_user
    for value in (np.nan, np.inf, -np.inf):
        random_table.table[:, 0] = value
        pd.testing.assert_frame_equal(evaluate(random_table, checkerboard_split, "valid", ks=KS).per_user, expected)


def test_broken_scores_are_refused_by_name(random_table, checkerboard_split):
    random_table.table[7, 3] = np.nan
    with pytest.raises(ValueError, match="table: scores of user 7 contain NaN"):
        evaluate(random_table, checkerboard_split, "valid", ks=KS)
    short = Table(checkerboard_split, np.zeros((25, 16)), "short")
    with pytest.raises(ValueError, match=r"short: score\(\) gave \(24, 16\) instead of \(24, 17\)"):
        evaluate(short, checkerboard_split, "valid", ks=KS)
    with pytest.raises(ValueError, match="another name: score"):
        evaluate(short, checkerboard_split, "valid", ks=KS, method="another name")


def test_impossible_requests(random_table, checkerboard_split):
    with pytest.raises(ValueError, match="ks asks for 20 items; the catalogue has 16"):
        evaluate(random_table, checkerboard_split)
    with pytest.raises(ValueError, match="phase is 'train'|phase 'train'"):
        evaluate(random_table, checkerboard_split, "train", ks=KS)
    with pytest.raises(ValueError, match="no users.*eval_users"):
        evaluate(random_table, checkerboard_split, ks=KS, users=[])
    with pytest.raises(ValueError, match="some users.*eval_users"):
        evaluate(random_table, checkerboard_split, ks=KS, users=[0, 3])
    with pytest.raises((ValueError, IndexError)):
        evaluate(random_table, checkerboard_split, ks=KS, users=[25])


def test_some_users_only(random_table, checkerboard_split):
    everyone = evaluate(random_table, checkerboard_split, "valid", ks=KS)
    some = evaluate(random_table, checkerboard_split, "valid", ks=KS, users=[9, 4, 17])
    pd.testing.assert_frame_equal(some.per_user, everyone.per_user.loc[[9, 4, 17]])
    for users in (torch.tensor([9, 4, 17]), torch.tensor([9, 4, 17]).numpy(), np.array([9, 4, 17])):
        again = evaluate(random_table, checkerboard_split, "valid", ks=KS, users=users)
        pd.testing.assert_frame_equal(again.per_user, some.per_user)


def test_a_second_look_at_test_under_other_settings_is_refused(checkerboard_split):
    def method(scale):
        return ItemSimilarityRecommender(checkerboard_split, scale * torch.eye(17), "tuned")

    first = evaluate(method(1.0), checkerboard_split, ks=KS)
    again = evaluate(method(1.0), checkerboard_split, ks=KS)  # the same configuration: a repetition
    pd.testing.assert_frame_equal(first.per_user, again.per_user)
    for scale in (2.0, 3.0):
        evaluate(method(scale), checkerboard_split, "valid", ks=KS)  # validation may be asked as often as one likes
    with pytest.raises(TestReuseError, match="'tuned'.*similarity.*phase='valid'"):
        evaluate(method(2.0), checkerboard_split, ks=KS)
    evaluate(method(2.0), checkerboard_split, ks=KS, method="tuned, scale 2")
    evaluate(method(2.0), checkerboard_split, ks=KS, seed=1)
    evaluate(method(2.0), split(checkerboard_split.dataset, "leave_one_out"), ks=KS)


def test_reuse_is_noticed_for_trained_baselines(checkerboard_split):
    from llmrec_lib.baselines import train

    for name, settings_ in {
        "ease": ({"reg_weight": 250.0}, {"reg_weight": 10.0}),
        "bpr": ({"epochs": 1}, {"epochs": 2}),
        "tfidf": ({"neighbours": 3}, {"neighbours": 2}),
    }.items():
        first, second = (train(name, checkerboard_split, progress=False, **chosen) for chosen in settings_)
        evaluate(first, checkerboard_split, ks=KS)
        with pytest.raises(TestReuseError, match=name):
            evaluate(second, checkerboard_split, ks=KS)


def test_tidy_tables(random_table, checkerboard_split):
    result = evaluate(random_table, checkerboard_split, "valid", ks=KS, family="control", method="lots", seed=3)
    table = result.tidy()
    assert table.columns.tolist() == (
        ["dataset", "protocol", "method", "family", "seed", "metric", "k", "value", "n_users", "seconds"]
    )
    fixed = table[["dataset", "protocol", "method", "family", "seed", "n_users"]].drop_duplicates()
    assert fixed.to_numpy().tolist() == [["checkerboard", "temporal_ratio", "lots", "control", 3, 24]]
    assert set(zip(table["metric"], table["k"], strict=True)) == {
        (metric, k)
        for metric in ("precision", "recall", "f1", "ndcg", "map", "mrr", "hit", "popularity", "coverage", "gini")
        for k in KS
    }
    for row in table.itertuples():
        assert row.value == pytest.approx(result.mean(f"{row.metric}@{row.k}"))

    long = result.per_user_tidy()
    assert long.columns.tolist() == ["method", "seed", "user", "metric", "k", "value"]
    assert len(long) == 24 * 8 * len(KS)
    assert (long["method"].unique().tolist(), long["seed"].unique().tolist()) == (["lots"], [3])
    assert (long["k"].dtype.kind, long["value"].dtype) == ("i", np.float32)
    back = long[(long["metric"] == "ndcg") & (long["k"] == 5)].set_index("user")["value"]
    assert back.to_numpy() == pytest.approx(result.per_user["ndcg@5"].to_numpy(), abs=1e-6)
    with pytest.raises(KeyError, match="ndcg@10.*ndcg@3.*coverage@3"):
        result.mean("ndcg@10")


def test_only_some_targets_count(random_table):
    """Judged among some items: as if nobody had taken the others, while all are ranked and masked as before."""
    parts = random_table.split
    some = np.array([1, 4, 6, 7, 9, 12])
    found = evaluate(random_table, parts, method="some", among=some, ks=(5, 10))
    targets = [set(parts.targets("test")[user].indices) & set(some.tolist()) for user in parts.eval_users("test")]
    expected = [user for user, left in zip(parts.eval_users("test"), targets, strict=True) if left]
    assert found.per_user.index.tolist() == expected and len(expected) < 24
    whole = evaluate(random_table, parts, method="all", ks=(5, 10))
    alone = [user for user in expected if parts.targets("test")[user].nnz == 1]
    assert alone and found.per_user.loc[alone].equals(whole.per_user.loc[alone])
    everything = evaluate(random_table, parts, method="everything", among=range(1, 17), ks=(5, 10))
    assert everything.per_user.equals(whole.per_user)
    with pytest.raises(ValueError, match="no users to judge"):
        evaluate(random_table, parts, method="none", among=[], ks=(5, 10))


def test_only_some_items_are_ranked(random_table):
    """As if all others were masked: the lists hold candidates first, in the order of their scores."""
    parts, some = random_table.split, np.array([1, 4, 6, 7, 9, 12, 14])
    found = evaluate(random_table, parts, method="some", among=some, candidates=some, ks=(1, 3))
    order = tie_order(parts.dataset.n_items)
    for user in found.per_user.index:
        left = [item for item in some if not parts.seen("test")[user, item]]
        best = max(left, key=lambda item: (random_table.table[user, item].item(), -order[item].item()))
        assert found.per_user.loc[user, "hit@1"] == float(parts.targets("test")[user, best] > 0)
    few = evaluate(random_table, parts, method="few", candidates=some[:2], ks=(5, 10))
    possible = parts.targets("test")[few.per_user.index][:, some[:2]].sum(axis=1).A1
    assert (few.per_user["hit@10"] <= possible).all()  # lists end where the candidates do
    assert few.mean("coverage@10") == pytest.approx(2 / (parts.dataset.n_items - 1))
    whole = evaluate(random_table, parts, method="whole", among=some, ks=(1, 3))
    assert (found.per_user["mrr@3"] >= whole.per_user["mrr@3"]).all()
    assert found.mean("mrr@3") > whole.mean("mrr@3")


def test_what_an_own_class_does_is_part_of_its_description(checkerboard_split):
    """Or a class that was edited in a notebook would get the results of the one before."""

    def own(sign):
        class Mine(Recommender):
            def score(self, users):
                return sign * torch.arange(self.n_items).float().expand(len(users), -1)

        return Mine(checkerboard_split, "mine").describe()

    class Mine(Recommender):
        def score(self, users):
            return torch.zeros(len(users), self.n_items)

    assert own(1) == own(1) != own(-1)
    assert own(1) != Mine(checkerboard_split, "mine").describe()
