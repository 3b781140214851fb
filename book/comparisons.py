"""Compute every published comparison again, from per_user.parquet alone, and say where a table says something else.

python book/comparisons.py [results]      exit status 1 if a table cannot be reproduced
"""

import sys
from pathlib import Path

import pandas as pd
from statsmodels.stats.multitest import multipletests

from llmrec_lib.evaluation import Evaluation, compare
from llmrec_lib.evaluation.statistics import per_user_mean

TOLERANCE = {"mean_a": 1e-6, "mean_b": 1e-6, "difference": 1e-6, "low": 1e-5, "high": 1e-5, "p": 2e-3, "p_holm": 2e-2}
RELATIVE = {"map.csv"}  # its interval is divided by mean_b


def evaluations(folder: Path) -> dict[tuple[str, str], list[Evaluation]]:
    """(protocol, method) -> its seeds, with the per-user values as they were published."""
    table = pd.read_parquet(folder / "per_user.parquet")
    table["name"] = table["metric"].astype(str) + "@" + table["k"].astype(str)
    found: dict[tuple[str, str], list[Evaluation]] = {}
    for (protocol, method, seed), rows in table.groupby(["protocol", "method", "seed"], observed=True):
        per_user = rows.pivot(index="user", columns="name", values="value").astype(float)
        labels = {"method": method, "family": "", "dataset": folder.parent.name, "protocol": protocol, "seed": seed}
        one = Evaluation(**labels, phase="test", per_user=per_user, catalogue={}, seconds=0.0)
        found.setdefault((protocol, method), []).append(one)
    return found


def recomputed(table: pd.DataFrame, runs: dict[tuple[str, str], list[Evaluation]]) -> pd.DataFrame:
    """The same rows in the same order; Holm's correction over each declared family (by scope, family or use, where named)."""
    rows = []
    for row in table.to_dict("records"):
        own = row.get("protocol")
        protocol = own or next((protocol for protocol, method in runs if method == row["a"]), None)
        if missing := [row[side] for side in ("a", "b") if (protocol, row[side]) not in runs]:
            raise SystemExit(f"per_user.parquet has no values of {missing[0]!r} under {protocol or 'any protocol'}")
        pair = runs[protocol, row["a"]], runs[protocol, row["b"]]
        first, second = (per_user_mean(one, row["metric"]) for one in pair)
        # Few users who differ make few sign flips, and equal sums among them are not equal any more in 32 bits.
        n_differing = int(((first - second).abs() > 1e-7).sum())
        rows.append({**compare(*pair, row["metric"]), "one_flip": 2.0 ** (1 - n_differing)})
    again = pd.DataFrame(rows, index=table.index)
    split_by = next((column for column in ("scope", "family", "use") if column in table), None)
    families = table.groupby(split_by).groups.values() if split_by else [table.index]
    for family in families:
        again.loc[family, "p_holm"] = multipletests(again.loc[family, "p"], method="holm")[1]
    return again


def main(results: str = "results") -> int:
    n_rows = n_wrong = 0
    for folder in sorted(path.parent for path in Path(results).glob("*/*/per_user.parquet")):
        runs = None
        for path in sorted(folder.glob("*.csv")):
            table = pd.read_csv(path)
            if not {"a", "b", "p", "mean_a"} <= set(table.columns):
                continue
            runs = runs or evaluations(folder)
            again = recomputed(table, runs)
            if path.name in RELATIVE:
                again[["low", "high"]] = again[["low", "high"]].div(again["mean_b"], axis=0)
            off = {name: (again[name] - table[name]).abs() for name in TOLERANCE if name in table}
            off["p"] = (off["p"] - 2 * again["one_flip"]).clip(lower=0)
            off = {name: values.max() for name, values in off.items()}
            bad = {name: value for name, value in off.items() if not value <= TOLERANCE[name]}
            n_rows += len(table)
            n_wrong += bool(bad)
            print(f"{path}: {len(table)} comparisons, {f'NOT reproduced {bad}' if bad else 'reproduced'}", flush=True)
    if not n_rows:
        print(f"{results} holds no table of comparisons", file=sys.stderr)
    return int(n_wrong > 0 or not n_rows)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
