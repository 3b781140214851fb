"""Paired comparisons over users: difference, interval, permutation p, effect size, Holm over a declared family."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from llmrec_lib.evaluation.evaluate import Evaluation

Runs = Evaluation | Sequence[Evaluation]


def per_user_mean(runs: Runs, metric: str) -> pd.Series:
    """Mean over seeds of each user's value; index: users judged in every run. Runs must share data set, protocol and phase."""
    runs = [runs] if isinstance(runs, Evaluation) else list(runs)
    settings = {(run.dataset, run.protocol, run.phase) for run in runs}
    if len(settings) != 1:
        raise ValueError(f"runs of different settings cannot be averaged or compared: {sorted(settings)}")
    if metric not in runs[0].per_user:
        raise KeyError(f"no metric {metric!r}; these runs have {', '.join(runs[0].per_user.columns)}")
    return pd.concat([run.per_user[metric] for run in runs], axis=1, join="inner").mean(axis=1)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Interval of a mean over users, from the bootstrap (percentile, 9,999 resamples of users, fixed seed)."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap((values,), np.mean, confidence_level=level, method="percentile", **_resampling(values))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _resampling(values: np.ndarray) -> dict:
    """Number of resamples, a fixed seed, and how many are made at once, so that memory stays bounded."""
    return {"n_resamples": 9_999, "batch": max(1, 5_000_000 // len(values)), "rng": np.random.default_rng(0)}


def with_intervals(runs: Mapping[str, Runs], metric: str = "ndcg@10") -> pd.DataFrame:
    """One row per method: method, family, value (mean over users), low, high (95 % interval); for `plotting.metric_bars`."""
    rows = []
    for name, evaluations in runs.items():
        values = per_user_mean(evaluations, metric)
        family = (evaluations if isinstance(evaluations, Evaluation) else evaluations[0]).family
        rows.append((name, family, values.mean(), *interval(values.to_numpy())))
    return pd.DataFrame(rows, columns=["method", "family", "value", "low", "high"])


def compare(a: Runs, b: Runs, metric: str = "ndcg@10") -> dict[str, float | str | int]:
    """Is `a` better than `b` for the same users?

    Parameters
    ----------
    a, b : Evaluation or list of Evaluations
        Several are the seeds of one method: each user's values are averaged over them first. Users judged in both count.
    metric : a per-user metric such as "ndcg@10".

    Returns
    -------
    dict
        ``a``, ``b`` (names), ``metric``, ``n_users``, ``mean_a``, ``mean_b``, ``difference`` (a − b), ``low``, ``high`` (95 %
        bootstrap interval over users), ``relative`` (difference / mean_b), ``p`` (two-sided paired permutation test by sign
        flips, 9,999 resamples), ``p_seeds`` (two-sided t-test over the seeds' mean differences: does it hold from one training
        to the next? NaN for one seed, or where nothing differs between seeds), ``effect`` (Cohen's d of the differences).

    Raises
    ------
    ValueError
        No user was judged in both, or the runs come from different data, protocol or phase.
    """
    first, second = ([runs] if isinstance(runs, Evaluation) else list(runs) for runs in (a, b))
    per_user_mean([*first, *second], metric)  # only if all are of one data set, protocol and phase
    values = pd.concat([per_user_mean(a, metric), per_user_mean(b, metric)], axis=1, join="inner").to_numpy(np.float64)
    if not len(values):
        raise ValueError(f"{first[0].method} and {second[0].method} share no judged user")
    difference = values[:, 0] - values[:, 1]
    low, high = interval(difference)
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    gain, (mean_a, mean_b) = difference.mean(), values.mean(axis=0)
    names = {"a": first[0].method, "b": second[0].method, "metric": metric, "n_users": len(values)}
    means = {"mean_a": mean_a, "mean_b": mean_b, "difference": gain, "low": low, "high": high}
    by_seed = [one.mean(metric) - other.mean(metric) for one, other in zip(first, second, strict=False)]
    p_seeds = stats.ttest_1samp(by_seed, 0).pvalue if len(first) == len(second) and np.ptp(by_seed) > 1e-9 else np.nan
    relative, effect = gain / mean_b if mean_b else np.nan, gain / deviation if deviation else 0.0
    return names | means | {"relative": relative, "p": _sign_flip_p(difference), "p_seeds": p_seeds, "effect": effect}


def _sign_flip_p(difference: np.ndarray) -> float:
    nonzero = difference[np.abs(difference) > 1e-7]  # less is rounding; and a flipped zero changes nothing
    if len(nonzero) < 2:
        return 1.0
    return float(stats.permutation_test((nonzero,), np.sum, permutation_type="samples", **_resampling(nonzero)).pvalue)


def compare_many(
    pairs: Mapping[str, tuple[Runs, Runs]] | Sequence[tuple[Runs, Runs]], metric: str = "ndcg@10"
) -> pd.DataFrame:
    """`compare` for a family of hypotheses, with Holm's correction over the family.

    Parameters
    ----------
    pairs : list of (a, b), or dict label -> (a, b)
        The whole family, declared before the results are looked at.

    Returns
    -------
    DataFrame
        One row per pair: the values of `compare`, ``p_holm`` (Holm 1979) and ``significant`` (p_holm < .05).
    """
    labels, family = (list(pairs), pairs.values()) if isinstance(pairs, Mapping) else (None, pairs)
    rows = [compare(a, b, metric) for a, b in family]
    if not rows:
        raise ValueError("compare_many needs at least one pair")
    table = pd.DataFrame(rows, index=labels)
    table["p_holm"] = multipletests(table["p"], method="holm")[1]
    table["significant"] = table["p_holm"] < 0.05
    return table


def direction(row: pd.Series) -> int:
    """1 where a row of `compare_many` shows `a` to be better, -1 where it shows it to be worse, 0 where neither is shown."""
    return int(row["significant"] * np.sign(row["difference"]))


def as_expected(claims: Mapping[str, int]) -> str:
    """What one would have expected, and whether it came out, in Markdown: yes (1), no (-1) or not shown (0), as from `direction`."""
    said = [f"{claim}: *{('not shown', 'yes', 'no')[found]}*" for claim, found in claims.items()]
    return f"**As one would expect?** {'; '.join(said)}."
