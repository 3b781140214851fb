"""Compare two runs of the study, row by row, and print for each chapter where they differ most.

python book/two_runs.py results other/results [--tolerance T] [--out FILE]

Exit status 1 if a value differs by more than the tolerance, or if a chapter that both have has rows in one of them alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from llmrec_lib.evaluation.statistics import direction

ROW = ["dataset", "protocol", "method", "family", "seed", "metric", "k"]
NAMES = ["family", "use", "scope", "variant", "comparison"]  # of a comparison: those that a table has
COMPARISON = [*NAMES, "protocol", "a", "b", "metric"]
TOLERANCE = 0.005  # of a metric between 0 and 1; one that is not is compared in relation to its size


def differences(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The rows of both ``metrics.csv`` side by side with `off`, the difference in units of max(1, value); NaN if one lacks it."""
    both = first.merge(second, on=ROW, how="outer", suffixes=("", "_other"))
    return both.assign(off=(both["value"] - both["value_other"]).abs() / both["value"].abs().clip(lower=1.0))


def mean_ndcg(table: pd.DataFrame) -> dict[str, Any] | None:
    """Where the mean NDCG@10 of a method, over the seeds that both runs have, differs most; None if no row says it."""
    rows = table[(table["metric"] == "ndcg") & (table["k"] == 10)].dropna(subset="off")
    if rows.empty:
        return None
    means = rows.groupby(["protocol", "method"])[["value", "value_other"]].mean()
    off = (means["value"] - means["value_other"]).abs()
    protocol, method = worst = off.idxmax()
    return {"off": float(off[worst]), "where": f"{method}, {protocol}", "values": means.loc[worst].tolist()}


def verdicts(first: Path, second: Path) -> dict[str, Any] | None:
    """Comparisons of both ``comparisons.csv`` that are significant in one run alone, or in the other direction; None without tables."""
    tables = [folder / "comparisons.csv" for folder in (first, second)]
    if not all(table.is_file() for table in tables):
        return None
    one, other = (table.assign(said=table.apply(direction, axis=1)) for table in map(pd.read_csv, tables))
    names = [name for name in COMPARISON if name in one and name in other]
    both = one.merge(other, on=names, suffixes=("", "_other"))
    changed = both.loc[both["said"] != both["said_other"], [name for name in NAMES if name in names]]
    return {"shared": len(both), "changed": [", ".join(map(str, row)) for row in changed.to_numpy()]}


def compared(first: Path, second: Path) -> dict[str, Any]:
    """One chapter of two runs, from its two folders of tables: both runs' day and processor, and where they differ most.

    `off` is of any metric, `mean_ndcg` of NDCG@10 averaged over seeds, `verdicts` counts comparisons that came out otherwise.
    """
    table = differences(*(pd.read_csv(folder / "metrics.csv") for folder in (first, second)))
    worst, facts = table.loc[table["off"].fillna(-1).idxmax()], {}
    for name, folder in (("first", first), ("second", second)):
        run = json.loads((folder / "run.json").read_text()) if (folder / "run.json").is_file() else {}
        facts[name] = {"started": run.get("started"), "cpu": run.get("machine", {}).get("cpu")}
    where = f"{worst['method']}, seed {worst['seed']}, {worst['metric']}@{worst['k']}, {worst['protocol']}"
    values = [float(worst[name]) for name in ("value", "value_other")]
    lacking = int(table["off"].isna().sum())
    return {
        **facts,
        "rows": len(table),
        "lacking": lacking,
        "off": float(worst["off"]),
        "where": where,
        "values": values,
        "mean_ndcg": mean_ndcg(table),
        "verdicts": verdicts(first, second),
    }


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="folder of one run's tables")
    parser.add_argument("second", help="folder of the other run's tables")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write what was found to this JSON file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = argument_parser().parse_args(arguments)
    first, second = (
        {path.parent.relative_to(top).as_posix(): path.parent for path in Path(top).glob("*/*/metrics.csv")}
        for top in (options.first, options.second)
    )
    shared = sorted(first.keys() & second.keys())
    found = {chapter: compared(first[chapter], second[chapter]) for chapter in shared}
    # A chapter that was copied from one folder to the other shows nothing.
    found = {
        chapter: one for chapter, one in found.items() if not one["first"]["started"] or one["first"] != one["second"]
    }
    if not found:
        print(f"{options.first} and {options.second} share no chapter that ran twice", file=sys.stderr)
        return 1
    wrong = 0
    for chapter, one in found.items():
        fine = not one["lacking"] and one["off"] <= options.tolerance
        wrong += not fine
        said = f"{chapter}: {'agrees' if fine else 'DIFFERS'}, {one['rows']} rows, {one['lacking']} in one run alone"
        print(f"{said}, largest {one['off']:.2e} ({one['where']}: {one['values'][0]:.6f} and {one['values'][1]:.6f})")
        if one["verdicts"] and one["verdicts"]["changed"]:
            print(f"  verdicts that changed: {'; '.join(one['verdicts']['changed'])}")
    if options.out:
        options.out.write_text(json.dumps({"tolerance": options.tolerance, "chapters": found}, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
