"""What each fusion promises: invariances, limits, order of stages, and weights chosen without a look at test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_lib import fusion
from llmrec_lib.datasets import load_folder
from llmrec_lib.evaluation.evaluate import evaluate, mask_seen, tie_order, top_k
from llmrec_lib.fusion import (
    LEARNED_SPACE,
    NORMALISERS,
    HybridFusion,
    LearnedFusion,
    ParallelFusion,
    SequentialFusion,
    best_system,
    borda,
    item_gates,
    log_z,
    min_max,
    ranks,
    reciprocal_rank,
    retrieval_ceiling,
    search,
    tune,
    user_gates,
    z_score,
)
from llmrec_lib.splits import split
from tests.checkerboard import write_checkerboard
from tests.unit.test_evaluate import Table

USERS = torch.arange(1, 25)
INF = float("inf")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """40 items, of which each user has met 12 in training and 3 for validation."""
    return split(load_folder(write_checkerboard(tmp_path_factory.mktemp("wide"), n_items=40)), ratios=(0.8, 0.1, 0.1))


def arm(parts, seed, name=None, transform=lambda scores: scores):
    scores = np.random.default_rng(seed).standard_normal((parts.dataset.n_users, parts.dataset.n_items))
    return Table(parts, transform(scores), name or f"arm {seed}")


def ranking(recommender, phase="test", users=USERS):
    """All unseen items of each user, best first."""
    parts = recommender.split
    masked = mask_seen(recommender.at(phase).score(users).clone(), parts, users, phase)
    fewest = parts.dataset.n_items - 1 - int(parts.seen(phase)[users.numpy()].sum(axis=1).max())
    return top_k(masked, fewest, tie_order(parts.dataset.n_items))


def test_normalisers_by_hand():
    scores = torch.tensor([[-INF, 1.0, 3.0, 3.0, 5.0], [-INF, 2.0, 2.0, 2.0, -INF]])
    z = z_score(scores)
    assert z[0, 1:].tolist() == pytest.approx([-(2**0.5), 0, 0, 2**0.5])
    assert z[1].tolist() == [-INF, 0, 0, 0, -INF]
    assert log_z(scores)[0, 1:].tolist() == pytest.approx([-np.log1p(2**0.5), 0, 0, np.log1p(2**0.5)])
    assert min_max(scores).tolist() == [[-INF, 0, 0.5, 0.5, 1], [-INF, 0, 0, 0, -INF]]
    assert ranks(scores).tolist() == [[5, 4, 2.5, 2.5, 1], [4.5, 2, 2, 2, 4.5]]
    assert borda(scores)[0].tolist() == pytest.approx([-INF, 0, 1.5 / 4, 1.5 / 4, 3 / 4])
    assert reciprocal_rank(scores)[0].tolist() == pytest.approx([-INF, 1 / 64, 1 / 62.5, 1 / 62.5, 1 / 61])


@pytest.mark.parametrize("rule", NORMALISERS)
def test_normalisers_leave_their_input_and_stay_finite(rule):
    scores = torch.tensor(
        [[-INF, 1e30, -1e30, 3.0], [-INF, 1e-30, 0.0, 2e-30], [-INF, 1e6, 1e6 + 0.5, 1e6], [-INF] * 4]
    )
    before = scores.clone()
    result = NORMALISERS[rule](scores)
    assert torch.equal(scores, before)
    assert torch.equal(torch.isfinite(result), torch.isfinite(scores))
    assert not torch.isnan(result).any()


@pytest.mark.parametrize("rule", NORMALISERS)
@pytest.mark.parametrize("phase", ["valid", "test"])
def test_all_weight_on_one_arm_is_that_arm(parts, rule, phase):
    arms = [arm(parts, 1), arm(parts, 2)]
    assert not torch.equal(ranking(arms[0], phase), ranking(arms[1], phase))
    for chosen in (0, 1):
        fused = HybridFusion(arms, [float(chosen == 0), float(chosen == 1)], rule)
        assert torch.equal(ranking(fused, phase), ranking(arms[chosen], phase))


@pytest.mark.parametrize("rule", NORMALISERS)
def test_parallel_is_hybrid_with_equal_weights(parts, rule):
    arms = [arm(parts, 1), arm(parts, 2), arm(parts, 3)]
    fused = ParallelFusion(arms, rule)
    assert torch.equal(ranking(fused), ranking(HybridFusion(arms, [1, 1, 1], rule)))
    assert torch.equal(ranking(fused), ranking(HybridFusion(arms, [2, 2, 2], rule)))


@pytest.mark.parametrize(
    ("rule", "transform"),
    [
        ("z", lambda scores: 1000 * scores - 300),
        ("log_z", lambda scores: 1000 * scores - 300),
        ("minmax", lambda scores: 1000 * scores - 300),
        ("borda", np.exp),
        ("rrf", lambda scores: scores**3),
    ],
)
def test_scale_of_an_arm_does_not_matter(parts, rule, transform):
    plain = ParallelFusion([arm(parts, 1), arm(parts, 2)], rule)
    other = ParallelFusion([arm(parts, 1, transform=transform), arm(parts, 2)], rule)
    if rule in ("borda", "rrf"):
        assert torch.equal(plain.score(USERS), other.score(USERS))
    else:
        assert torch.allclose(plain.score(USERS), other.score(USERS), atol=1e-4)
    assert torch.equal(ranking(plain), ranking(other))


def test_scores_of_seen_items_do_not_reach_the_fusion(parts):
    """Calibration looks at what can be recommended: high scores of seen items do not squash the others."""
    shouting = arm(parts, 1)
    shouting.table += 1e4 * torch.from_numpy(parts.seen("test").toarray())
    for rule in NORMALISERS:
        fused, plain = (ParallelFusion([first, arm(parts, 2)], rule) for first in (shouting, arm(parts, 1)))
        assert torch.equal(fused.score(USERS), plain.score(USERS))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_raising_a_score_never_lowers_the_fused_rank(data):
    """True of ranks and of min–max scores. Not of z-scores: an outlier widens the scale that it is measured on."""
    n_items = data.draw(st.integers(3, 9))
    rule = data.draw(st.sampled_from(["minmax", "borda", "rrf"]))
    values = st.lists(st.integers(-9, 9), min_size=n_items, max_size=n_items)
    first, second = (torch.tensor([data.draw(values)], dtype=torch.float32) for _ in range(2))
    item, rise = data.draw(st.integers(0, n_items - 1)), data.draw(st.integers(1, 12))
    raised = first.clone()
    raised[0, item] += rise
    before, after = (NORMALISERS[rule](scores) + NORMALISERS[rule](second) for scores in (first, raised))
    worse_before = before[0, item] > before[0] + 1e-5
    assert (after[0, item] >= after[0][worse_before] - 1e-5).all()


def test_a_weight_for_each_user(parts):
    arms = [arm(parts, 1), arm(parts, 2)]

    def gate(users):
        first = (users % 2).float()
        return torch.stack([first, 1 - first], dim=1)

    fused = ranking(HybridFusion(arms, gate))
    for row, user in enumerate(USERS.tolist()):
        assert torch.equal(fused[row], ranking(arms[(user + 1) % 2])[row])


def test_sequential_with_weight_zero_is_the_retriever(parts):
    first, second = arm(parts, 1), arm(parts, 2)
    for n in (1, 5, 20, 1000):
        fused = SequentialFusion([first, second], n_candidates=n, weights=0.0)
        assert torch.equal(ranking(fused), ranking(first))


def test_sequential_by_hand(parts):
    """Top 5 of the retriever, then z + w · z over these five; the others behind, in the retriever's order."""
    first, second = arm(parts, 1), arm(parts, 2)
    fused = SequentialFusion([first, second], n_candidates=5, weights=0.7)
    retrieved, result = ranking(first), ranking(fused)
    assert torch.equal(fused.candidates(USERS), retrieved[:, :5])
    for row, user in enumerate(USERS.tolist()):
        five = retrieved[row, :5].tolist()
        a, b = first.table[user, five].double().numpy(), second.table[user, five].double().numpy()
        accumulated = (a - a.mean()) / a.std() + 0.7 * (b - b.mean()) / b.std()
        assert result[row, :5].tolist() == [five[place] for place in np.argsort(-accumulated)]
        assert result[row, 5:].tolist() == retrieved[row, 5:].tolist()
    assert not torch.equal(result, retrieved)


def test_nothing_overtakes_the_candidates(parts):
    """However strongly a re-ranker speaks for what was not retrieved, or against what was."""
    first = arm(parts, 1)
    second = arm(parts, 2, transform=lambda scores: 1e6 * scores)
    for weight in (0.5, 50.0, -50.0):
        for n in (1, 3, 10):
            fused = SequentialFusion([first, second], n_candidates=n, weights=weight)
            assert torch.equal(ranking(fused)[:, :n].sort().values, ranking(first)[:, :n].sort().values)


@pytest.mark.parametrize(
    "transform", [lambda scores: 1e4 * scores, lambda scores: scores - 70, lambda scores: 0.02 * scores + 3]
)
def test_scales_do_not_matter_to_a_sequence_or_a_learned_fusion(parts, transform):
    def fused(first, second):
        pair = [arm(parts, 1, transform=first), arm(parts, 2, transform=second)]
        learned = LearnedFusion(pair, gated=False, rule="z", name="learned")
        return ranking(SequentialFusion(pair, n_candidates=7, weights=0.7)), ranking(learned)

    plain = fused(lambda scores: scores, lambda scores: scores)
    for other in (fused(transform, lambda scores: scores), fused(lambda scores: scores, transform)):
        assert all(torch.equal(one, another) for one, another in zip(plain, other, strict=True))


def test_a_re_ranker_that_likes_an_item_more_never_moves_it_down(parts):
    first, second = arm(parts, 1), arm(parts, 2)
    fused = SequentialFusion([first, second], n_candidates=7, weights=0.7)
    places = ranking(fused)
    for row, user in enumerate(USERS.tolist()):
        for item in places[row, [1, 4, 6, 9]].tolist():
            liked = second.table.clone()
            liked[user, item] += 0.3
            more = ranking(SequentialFusion([first, Table(parts, liked)], n_candidates=7, weights=0.7))[row]
            assert more.tolist().index(item) <= places[row].tolist().index(item)


def test_users_with_few_unseen_items_are_ranked_too(parts):
    """More candidates than unseen items: the seen ones among them must not disturb the rest."""
    first, second = arm(parts, 1), arm(parts, 2)
    n_unseen = parts.dataset.n_items - 1 - int(parts.seen("test")[1].sum())
    exactly = SequentialFusion([first, second], n_candidates=n_unseen, weights=1.0)
    more = SequentialFusion([first, second], n_candidates=parts.dataset.n_items, weights=1.0)
    assert torch.isfinite(more.score(USERS)[:, 1:]).all()
    assert torch.equal(ranking(more), ranking(exactly))
    assert torch.equal(ranking(exactly), ranking(ParallelFusion([first, second])))


def test_stages_narrow_down(parts):
    fused = SequentialFusion([arm(parts, 1), arm(parts, 2), arm(parts, 3)], n_candidates=(10, 4), weights=(1.0, 2.0))
    stages = [fused.candidates(USERS, stage) for stage in (0, 1)]
    assert [stage.shape[1] for stage in stages] == [10, 4]
    two = SequentialFusion([arm(parts, 1), arm(parts, 2)], n_candidates=10, weights=1.0)
    assert torch.equal(stages[1], ranking(two)[:, :4])
    assert torch.equal(ranking(fused)[:, :4].sort().values, stages[1].sort().values)
    assert not torch.equal(ranking(fused)[:, :4], stages[1])


def test_wrong_settings(parts, checkerboard_split):
    two = [arm(parts, 1), arm(parts, 2)]
    for make in (
        lambda: ParallelFusion(two[:1]),
        lambda: ParallelFusion(two, "sum"),
        lambda: HybridFusion(two, [1.0, 1.0], "sum"),
        lambda: HybridFusion(two, [1.0]),
        lambda: SequentialFusion(two, n_candidates=(5, 5)),
        lambda: SequentialFusion(two, weights=(1.0, 1.0)),
        lambda: SequentialFusion(two, n_candidates=0),
        lambda: SequentialFusion([*two, two[0]], n_candidates=(5, 9)),
    ):
        with pytest.raises(ValueError, match="arms|rule|weights|n_candidates"):
            make()
    with pytest.raises(ValueError, match="'arm 1' and 'elsewhere' come from different splits"):
        ParallelFusion([two[0], arm(checkerboard_split, 1, "elsewhere")])


def test_ceiling_is_recall_and_never_falls(parts):
    retriever = arm(parts, 1)
    for phase in ("valid", "test"):
        table = retrieval_ceiling(retriever, parts, [1, 5, 10, 20, 40, 500], phase)
        assert table.columns.tolist() == ["n", "recall"]
        assert (np.diff(table["recall"]) >= 0).all()
        assert table["recall"].iloc[-2:].tolist() == [1.0, 1.0]
        judged = evaluate(retriever, parts, phase, ks=(1, 5, 10, 20))
        assert table["recall"].tolist()[:4] == pytest.approx([judged.mean(f"recall@{k}") for k in (1, 5, 10, 20)])
    some = retrieval_ceiling(retriever, parts, [5], users=[3, 8])["recall"][0]
    assert some == pytest.approx(evaluate(retriever, parts, ks=(5,), users=[3, 8]).mean("recall@5"))
    # And no re-ranker of the top n finds more than the ceiling says.
    best = SequentialFusion([retriever, Table(parts, parts.targets("test").toarray())], n_candidates=10, weights=99.0)
    ceiling = retrieval_ceiling(retriever, parts, [10])["recall"][0]
    assert evaluate(best, parts, ks=(10,)).mean("recall@10") == pytest.approx(ceiling)


def test_fusions_nest(parts):
    inner = HybridFusion([arm(parts, 2), arm(parts, 3)], [1.0, 0.4])
    outer = ParallelFusion([SequentialFusion([arm(parts, 1), inner], 8), inner])
    assert torch.isfinite(outer.score(USERS)[:, 1:]).all()
    description = outer.describe()
    assert description["arms"][0]["arms"][1] == description["arms"][1] == inner.describe()
    assert description["arms"][0]["n_candidates"] == [8]
    # An outer fusion that listens to one arm only says what that arm says.
    assert torch.equal(ranking(HybridFusion([inner, arm(parts, 1)], [1.0, 0.0])), ranking(inner))


def test_arms_are_read_at_the_phase_of_the_fusion(parts):
    phases = []

    class Listening(Table):
        def score(self, users):
            phases.append(self.phase)
            return super().score(users)

    arms = [Listening(parts, arm(parts, seed).table, f"arm {seed}") for seed in (1, 2)]
    fusions = ParallelFusion(arms), HybridFusion(arms, [1, 1]), SequentialFusion(arms)
    for fused in (*fusions, ParallelFusion([fusions[0], fusions[2]])):
        phases.clear()
        view = fused.at("valid")
        view.score(USERS)
        assert set(phases) == {"valid"}
        assert [one.phase for one in fused.arms] == ["test", "test"]
        phases.clear()
        fused.score(USERS)
        assert set(phases) == {"test"}


def test_tuning_never_asks_for_test(parts, monkeypatch):
    asked, phases = [], []
    valid, test = parts.targets("valid").toarray(), parts.targets("test").toarray()

    class Recording(Table):
        def score(self, users):
            phases.append(self.phase)
            return super().score(users)

    def build(weight):
        asked.append(weight)
        return Recording(parts, weight * valid + (1 - weight) * test + 0.5 * valid * test)

    original = type(parts).targets
    monkeypatch.setattr(type(parts), "targets", lambda self, phase: phases.append(phase) or original(self, phase))
    best, table = tune(build, [0.0, 0.25, 0.75, 1.0], parts)
    assert set(phases) == {"valid"}
    assert asked == [0.0, 0.25, 0.75, 1.0]
    assert table.columns.tolist() == ["value", "ndcg@10"]
    assert table["value"].tolist() == asked
    assert best == 0.75  # the first of the best
    assert table["ndcg@10"].tolist()[2:] == [1.0, 1.0] and table["ndcg@10"][:2].max() < 1
    few, _ = tune(build, [1.0, 0.0], parts, users=[2, 3])
    assert few == 1.0


@pytest.fixture(scope="module")
def one_each(tmp_path_factory):
    """40 items, and one validation event for each user."""
    data = load_folder(write_checkerboard(tmp_path_factory.mktemp("one"), n_items=40))
    return split(data, "leave_one_out")


def hinted(parts, seed, strength):
    """Noise, and a little of what validation users really took."""
    noise = np.random.default_rng(seed).standard_normal((parts.dataset.n_users, parts.dataset.n_items))
    return Table(parts, noise + strength * parts.targets("valid").toarray(), f"hint {strength}")


def test_learned_weights_are_those_of_a_conditional_logit(one_each, monkeypatch):
    """statsmodels, given every unseen item of each user and its z-scores, finds the same weights."""
    from statsmodels.discrete.conditional_models import ConditionalLogit

    parts, arms = one_each, [hinted(one_each, 1, 2.0), hinted(one_each, 2, 0.7), hinted(one_each, 3, 0.0)]
    monkeypatch.setattr(fusion, "N_TOP", parts.dataset.n_items)
    learned = LearnedFusion(arms, gated=False, rule="z", l2=0.0)
    columns, taken, groups = [], [], []
    targets = parts.targets("valid").toarray()
    for user in parts.eval_users("valid"):
        one = torch.tensor([user])
        masked = [mask_seen(each.score(one).float().clone(), parts, one, "valid") for each in arms]
        unseen = torch.isfinite(masked[0][0])
        columns.append(np.stack([z_score(scores)[0, unseen].numpy() for scores in masked], axis=1))
        taken.append(targets[user, unseen.numpy()])
        groups += [user] * int(unseen.sum())
    peer = ConditionalLogit(np.concatenate(taken), np.concatenate(columns), groups=np.array(groups)).fit(disp=False)
    assert learned.weights.shape == (1, 4)
    assert learned.weights[0, :3].numpy() == pytest.approx(peer.params, rel=1e-3, abs=1e-3)
    assert abs(learned.weights[0, 3]) < 1e-6  # the same for every item: it decides nothing
    assert learned.weights[0, 0] > 2 * abs(learned.weights[0, 2])
    held = LearnedFusion(arms, gated=False, rule="z", l2=1e6)
    assert held.weights.abs().max() < 1e-3


def test_nothing_is_learned_from_users_without_a_target(one_each):
    without = np.flatnonzero(np.diff(one_each.targets("valid").indptr) == 0)[:1]  # PAD, if nobody else
    for users in (without, []):
        with pytest.raises(ValueError, match="learn from users with a validation event"):
            LearnedFusion([hinted(one_each, 1, 2.0), hinted(one_each, 2, 0.7)], users, name="of nobody")


def test_what_a_gate_does_is_part_of_its_description(one_each):
    arms = [hinted(one_each, 1, 2.0), hinted(one_each, 2, 0.7)]

    def gated(strength):
        return HybridFusion(arms, lambda users: torch.full((len(users), 2), strength)).describe()

    assert gated(0.5) == gated(0.5) != gated(5.0)


def test_items_that_are_drawn_stand_for_all(one_each, monkeypatch):
    arms = [hinted(one_each, 1, 2.0), hinted(one_each, 2, 0.7)]

    def learned(n_top, n_random, **options):
        monkeypatch.setattr(fusion, "N_TOP", n_top)
        monkeypatch.setattr(fusion, "N_RANDOM", n_random)
        return LearnedFusion(arms, **options).weights

    assert torch.allclose(learned(40, 1), learned(5, 40), atol=1e-4)
    some, every = learned(5, 8, gated=False), learned(40, 200, gated=False)
    assert not torch.allclose(some, every, atol=1e-3)  # it is a sample
    assert torch.allclose(some, every, atol=0.4)


def test_a_learned_fusion_of_noise_and_sense_listens_to_sense(one_each):
    sense, noise = hinted(one_each, 1, 9.0), hinted(one_each, 2, 0.0)
    fused = LearnedFusion([noise, sense]).at("valid")
    assert evaluate(fused, one_each, "valid").mean() == pytest.approx(1.0)
    assert torch.equal(ranking(LearnedFusion([sense, sense], gated=False)), ranking(sense))
    half = one_each.eval_users("valid")[:12]
    assert not torch.equal(LearnedFusion([noise, sense], half).weights, LearnedFusion([noise, sense]).weights)


def test_the_gate_knows_popular_from_rare(ml100k_split):
    """One arm is right about popular items and the other one about rare ones: only a gate can tell."""
    parts, users = ml100k_split, ml100k_split.eval_users("valid", 200)
    popular, rng = parts.item_counts > np.median(parts.item_counts), np.random.default_rng(0)
    truth = parts.targets("valid").toarray()
    arms = []
    for right in (popular, ~popular):
        wrong = 3.0 * rng.permuted(truth, axis=1)
        noise = rng.standard_normal(truth.shape)
        arms.append(Table(parts, noise + np.where(right, 3.0 * truth, wrong), f"arm {len(arms)}"))
    reached = {
        gated: evaluate(LearnedFusion(arms, users, gated=gated), parts, "valid", users=users).mean()
        for gated in (True, False)
    }
    assert reached[True] > reached[False] + 0.05


def test_gates_are_what_the_phase_may_read(parts, tmp_path):
    events = parts.dataset.interactions
    for phase, known in (("valid", parts.train), ("test", np.concatenate([parts.train, parts.valid]))):
        gates, read = item_gates(parts, phase), events.iloc[known]
        assert gates.shape == (41, 3)
        assert gates[1:].mean(0).numpy() == pytest.approx([0, 0, 0], abs=1e-6)
        counts = np.log1p(np.bincount(read["item"], minlength=41))
        assert gates[:, 0].numpy() == pytest.approx((counts - counts[1:].mean()) / counts[1:].std(), abs=1e-5)
        births = read.groupby("item")["timestamp"].min()
        assert gates[births.index.to_numpy(), 2].argsort().tolist() == births.to_numpy().argsort().tolist()
        lengths = np.log1p(np.diff(parts.history_matrix(phase).indptr))
        people = user_gates(parts, phase)
        assert people.shape == (25, 2) and torch.isfinite(people).all()
        spread = lengths[1:].std()  # on the checkerboard all histories are equally long: nothing to tell them apart
        assert people[1:, 0].numpy() == pytest.approx(
            (lengths[1:] - lengths[1:].mean()) / (spread if spread > 1e-9 else np.inf), abs=1e-5
        )
    timeless = split(load_folder(write_checkerboard(tmp_path, with_time=False)), "random_ratio")
    assert item_gates(timeless, "valid").shape == (17, 1)
    fused = LearnedFusion([arm(timeless, 1), arm(timeless, 2)])
    assert torch.isfinite(fused.score(USERS)).all()


def test_search_is_cross_fitted_resumed_and_blind_to_test(parts, monkeypatch, tmp_path):
    """A method that only knows the users it learned from must not look good."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    asked, phases = [], []
    valid = parts.targets("valid").toarray()

    def build(users, kind, strength):
        asked.append((kind, strength))
        table = np.random.default_rng(0).standard_normal(valid.shape)
        rows = users if kind == "by heart" else slice(None)
        table[rows] += strength * valid[rows]
        return Table(parts, table, "built")

    original = type(parts).targets
    monkeypatch.setattr(type(parts), "targets", lambda self, phase: phases.append(phase) or original(self, phase))
    space = {"kind": ["honest", "by heart"], "strength": [0.0, 1.0, 2.0]}
    best, table = search(build, space, parts, trials=6, key="first")
    assert set(phases) == {"valid"}
    assert best == {"kind": "honest", "strength": 2.0}
    assert len(table) == 6 and len(asked) == 12  # each combination once, and each half of the users once
    assert table.iloc[0, :2].tolist() == ["honest", 0.0]
    by_heart = table[table.kind == "by heart"]["ndcg@10"]
    assert by_heart.to_numpy() == pytest.approx(table["ndcg@10"][0])
    again, same = search(build, space, parts, trials=6, key="first")
    assert again == best and same.equals(table) and len(asked) == 12  # read back
    few, table = search(build, space, parts, trials=2, key="second")
    assert len(table) == 2 and few in table[["kind", "strength"]].to_dict("records")


def test_the_best_system_is_a_fusion_or_an_arm(one_each, monkeypatch, tmp_path):
    """Two halves of the truth are best fused; beside the whole truth nothing is needed."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    truth, rng = one_each.targets("valid").toarray(), np.random.default_rng(5)
    side = rng.integers(2, size=truth.shape[1])
    halves = [
        Table(one_each, rng.standard_normal(truth.shape) + 4 * truth * (side == part), f"{part}") for part in (0, 1)
    ]

    system, best, table = best_system(lambda: halves, one_each, "both", trials=4, key="halves")
    assert set(best) == {"gated", "l2", "rule"}
    assert isinstance(system, LearnedFusion) and system.name == "both"
    assert table["arm alone"].dropna().tolist() == ["0", "1"] and len(table) == 6
    whole = Table(one_each, rng.standard_normal(truth.shape) + 99 * truth, "whole")
    space = {**LEARNED_SPACE, "n": [2, 1]}
    system, best, table = best_system(lambda n: [whole, *halves[:n]], one_each, "three", space, 3, key="whole")
    assert system is whole and set(table["n"].dropna()) <= {1, 2}


def test_trials_of_another_system_are_not_taken_and_a_small_catalogue_will_do(
    checkerboard_split, monkeypatch, tmp_path
):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    assert checkerboard_split.dataset.n_items < 20
    rng, truth = np.random.default_rng(0), checkerboard_split.targets("valid").toarray()
    good, poor = (
        [Table(checkerboard_split, rng.standard_normal(truth.shape) + size * truth, f"{size} {n}") for n in range(2)]
        for size in (9, 0)
    )
    tables = [best_system(lambda arms=arms: arms, checkerboard_split, name, trials=2)[2] for name, arms in
              (("good", good), ("poor", poor))]  # fmt: skip
    assert tables[0]["ndcg@10"].max() > tables[1]["ndcg@10"].max() + 0.1
    value, table = tune(lambda w: HybridFusion(good, [1.0, w]), [0.0, 1.0], checkerboard_split)
    assert value in (0.0, 1.0) and len(table) == 2
