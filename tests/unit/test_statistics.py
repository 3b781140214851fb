"""Paired comparisons: right under the null, right when there is a difference, and only between what can be paired."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from llmrec_lib.evaluation import Evaluation, compare, compare_many
from llmrec_lib.evaluation.statistics import as_expected, direction, interval, per_user_mean


def judged(values, method="a", users=None, **changes) -> Evaluation:
    users = np.arange(1, len(values) + 1) if users is None else users
    table = pd.DataFrame({"ndcg@10": np.asarray(values, dtype=float)}, index=pd.Index(users, name="user"))
    facts = {"family": "id", "dataset": "toy", "protocol": "leave_one_out", "seed": 0, "phase": "test"} | changes
    return Evaluation(method=method, per_user=table, catalogue={}, seconds=0.0, **facts)


@pytest.fixture
def noise():
    return np.random.default_rng(0)


def test_values_by_hand(noise):
    a, b = noise.random(80), noise.random(80)
    result = compare(judged(a, "first"), judged(b, "second"))
    assert (result["a"], result["b"], result["metric"], result["n_users"]) == ("first", "second", "ndcg@10", 80)
    assert result["mean_a"] == pytest.approx(a.mean())
    assert result["mean_b"] == pytest.approx(b.mean())
    assert result["difference"] == pytest.approx((a - b).mean())
    assert result["relative"] == pytest.approx((a - b).mean() / b.mean())
    assert result["effect"] == pytest.approx((a - b).mean() / (a - b).std(ddof=1))


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.05, 0.1])
def test_p_and_interval_are_close_to_those_of_a_t_test(noise, shift):
    a = noise.normal(shift, 0.3, 400)
    b = noise.normal(0, 0.05, 400)
    result, t_test = compare(judged(a), judged(b)), stats.ttest_rel(a, b)
    assert result["p"] == pytest.approx(t_test.pvalue, abs=0.02)
    interval_of_t = t_test.confidence_interval()
    assert (result["low"], result["high"]) == pytest.approx((interval_of_t.low, interval_of_t.high), abs=0.005)
    assert result["low"] < result["difference"] < result["high"]


def test_few_users_are_enumerated():
    """Five positive differences: of 32 sign patterns, two are as extreme."""
    assert compare(judged([1, 2, 3, 4, 5]), judged([0, 0, 0, 0, 0]))["p"] == pytest.approx(2 / 32)
    # Users without a difference say nothing about its sign.
    assert compare(judged([1, 2, 3, 4, 5, 7, 7]), judged([0, 0, 0, 0, 0, 7, 7]))["p"] == pytest.approx(2 / 32)


def test_p_is_uniform_when_there_is_no_difference():
    generator = np.random.default_rng(1)
    p = [compare(judged(generator.random(12)), judged(generator.random(12)))["p"] for _ in range(150)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(p) < 0.05) < 0.1


def test_a_clear_difference_and_its_mirror_image(noise):
    a = noise.random(200)
    b = a - 0.1 + 0.05 * noise.standard_normal(200)
    better, worse = compare(judged(a), judged(b)), compare(judged(b), judged(a))
    assert better["p"] == worse["p"] < 0.001
    assert better["difference"] == pytest.approx(-worse["difference"]) and better["difference"] > 0
    assert better["effect"] == pytest.approx(-worse["effect"])
    assert 0 < better["low"] == pytest.approx(-worse["high"], abs=2e-3)
    assert worse["high"] < 0


def test_p_over_seeds_asks_whether_a_difference_holds_from_one_training_to_the_next(noise):
    base, shifts = noise.random(200), np.array([0.05, -0.04, 0.06, 0.01])
    a, b = [judged(base + shift) for shift in shifts], [judged(base) for _ in shifts]
    result = compare(a, b)
    assert result["p_seeds"] == pytest.approx(stats.ttest_1samp(shifts, 0).pvalue)
    assert result["p"] < 0.001 < 0.05 < result["p_seeds"]  # sure over users, and a matter of luck over seeds
    assert np.isnan(compare(a[0], b[0])["p_seeds"]) and np.isnan(compare(a, b[:2])["p_seeds"])
    assert np.isnan(compare(b, [judged(base - 0.1) for _ in shifts])["p_seeds"])  # no seed says more than another


def test_identical_runs(noise):
    a = judged(noise.random(50))
    result = compare(a, a)
    assert (result["p"], result["difference"], result["low"], result["high"], result["effect"]) == (1.0, 0, 0, 0, 0)


def test_repeating_it_gives_the_same_numbers(noise):
    a, b = judged(noise.random(60)), judged(noise.random(60))
    assert compare(a, b) == compare(a, b)


def test_users_are_matched_by_id_and_only_common_ones_count():
    a = judged([0.1, 0.2, 0.3, 0.9], users=[1, 2, 3, 9])
    b = judged([0.3, 0.2, 0.1], users=[3, 2, 1])
    result = compare(a, b)
    assert result["n_users"] == 3
    assert result["difference"] == pytest.approx(0)
    with pytest.raises(ValueError, match="first and second share no judged user"):
        compare(judged([1.0], "first", users=[1]), judged([1.0], "second", users=[2]))


def test_seeds_are_averaged_before_the_test(noise):
    runs = [judged(noise.random(40), seed=seed) for seed in range(3)]
    other = judged(noise.random(40), "b")
    mean = judged(np.mean([run.per_user["ndcg@10"] for run in runs], axis=0))
    assert compare(runs, other) == pytest.approx(compare(mean, other), nan_ok=True)
    assert per_user_mean(runs, "ndcg@10").to_numpy() == pytest.approx(mean.per_user["ndcg@10"].to_numpy())


@pytest.mark.parametrize("change", [{"protocol": "random_ratio"}, {"phase": "valid"}, {"dataset": "other"}])
def test_different_settings_are_refused(noise, change):
    a, b = judged(noise.random(9)), judged(noise.random(9), **change)
    with pytest.raises(ValueError, match="averaged or compared"):
        compare(a, b)
    with pytest.raises(ValueError, match="different settings"):
        per_user_mean([a, b], "ndcg@10")
    with pytest.raises(ValueError, match="different settings"):
        compare([a, b], a)


def test_unknown_metrics_are_named(noise):
    a = judged(noise.random(9))
    with pytest.raises(KeyError, match="recall@10.*ndcg@10"):
        compare(a, a, "recall@10")


def holm(p: list[float]) -> list[float]:
    """Holm 1979, step by step."""
    order = np.argsort(p)
    corrected, running = np.empty(len(p)), 0.0
    for place, position in enumerate(order):
        running = max(running, min(1.0, (len(p) - place) * p[position]))
        corrected[position] = running
    return corrected.tolist()


def test_holm_over_the_family(noise):
    base = noise.random(60)
    pairs = {
        f"shift {shift}": (judged(base + shift + 0.2 * noise.standard_normal(60)), judged(base, "b"))
        for shift in (0.0, 0.05, 0.06, 0.2)
    }
    table = compare_many(pairs)
    assert table.index.tolist() == list(pairs)
    single = [compare(*pair)["p"] for pair in pairs.values()]
    assert table["p"].tolist() == single
    assert table["p_holm"].tolist() == pytest.approx(holm(single))
    assert (table["p_holm"] >= table["p"]).all() and (table["p_holm"] > table["p"]).any()
    assert table["significant"].tolist() == [value < 0.05 for value in holm(single)]
    assert table["significant"].nunique() == 2
    assert compare_many(list(pairs.values()))["p"].tolist() == single
    with pytest.raises(ValueError, match="at least one pair"):
        compare_many([])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_interval_of_constants_is_a_point():
    assert interval(np.full(20, 0.25)) == (0.25, 0.25)
    assert interval(np.array([0.5])) == (0.5, 0.5)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(5)
    samples = [generator.exponential(1.0, 60) for _ in range(60)]
    covered = sum(low < 1.0 < high for low, high in map(interval, samples))
    assert covered >= 50


def test_an_expectation_is_met_only_by_what_is_shown(noise):
    base = noise.random(60)
    better, noisy = judged(base + 0.2), judged(base + noise.standard_normal(60), "c")
    rows = compare_many(
        {"above": (better, judged(base, "b")), "below": (judged(base, "b"), better), "near": (noisy, judged(base, "b"))}
    )
    assert [direction(rows.loc[label]) for label in rows.index] == [1, -1, 0]
    claims = {"text helps": direction(rows.loc["above"]), "ids help": direction(rows.loc["below"]), "luck helps": 0}
    assert as_expected(claims) == "**As one would expect?** text helps: *yes*; ids help: *no*; luck helps: *not shown*."
