"""Compare two runs of the study, row by row, and print for each chapter where they differ most.

python book/two_runs.py results other/results [tolerance]

Exit status 1 if a value differs by more than the tolerance, or if a chapter that both have has rows in one of them alone.
"""

import sys
from pathlib import Path

import pandas as pd

ROW = ["dataset", "protocol", "method", "family", "seed", "metric", "k"]
TOLERANCE = 0.005  # of a metric between 0 and 1; one that is not is compared in relation to its size


def differences(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The rows of both ``metrics.csv`` side by side with `off`, the difference in units of max(1, value); NaN if one lacks it."""
    both = first.merge(second, on=ROW, how="outer", suffixes=("", "_other"))
    return both.assign(off=(both["value"] - both["value_other"]).abs() / both["value"].abs().clip(lower=1.0))


def main(first: str = "results", second: str = "", tolerance: float = TOLERANCE) -> int:
    folders = [
        {path.parent.relative_to(top): path for path in Path(top).glob("*/*/metrics.csv")} for top in (first, second)
    ]
    shared = sorted(folders[0].keys() & folders[1].keys())
    if not shared:
        other = second or "(no second folder given)"
        print(f"{first} and {other} share no chapter of a data set: there is nothing to compare", file=sys.stderr)
        return 1
    wrong = 0
    for chapter in shared:
        table = differences(*(pd.read_csv(folder[chapter]) for folder in folders))
        lacking, worst = int(table["off"].isna().sum()), table.loc[table["off"].fillna(-1).idxmax()]
        fine = not lacking and worst["off"] <= float(tolerance)
        wrong += not fine
        where = f"{worst['method']}, seed {worst['seed']}, {worst['metric']}@{worst['k']}, {worst['protocol']}"
        values = f"{worst['value']:.6f} and {worst['value_other']:.6f}"
        said = f"{chapter}: {'agrees' if fine else 'DIFFERS'}, {len(table)} rows, {lacking} in one run alone"
        print(f"{said}, largest {worst['off']:.2e} ({where}: {values})")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
