"""``python -m benchmarks [NAME …]``: run the benchmarks and write ``benchmarks/results.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks import compression, encoding, evaluation, growth, likelihood, sasrec
from llmrec_lib.cache import atomic_write
from llmrec_lib.study.provenance import machine

BENCHMARKS = {
    "catalogue likelihood": likelihood.measure,
    "compression": compression.measure,
    "encoding": encoding.measure,
    "full-ranking evaluation": evaluation.measure,
    "growth": growth.measure,
    "sasrec epoch": sasrec.measure,
}


def main(names: list[str]) -> int:
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    path = Path(__file__).parent / "results.json"
    results = {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    for name in names or BENCHMARKS:
        for row in BENCHMARKS[name]():
            results[row["name"]] = row | {
                "machine": machine() | {"amx": getattr(torch.cpu, "_is_amx_tile_supported", bool)()}
            }
            print(
                "{name}: {ours:.4g} against {peer:.4g} {unit}, ratio {ratio:.1f}, same output: {same_output}, error {error:.1e}".format(
                    **row
                )
            )
        with atomic_write(path) as temporary:  # what is measured is kept, also when a later one fails
            temporary.write_text(json.dumps(list(results.values()), indent=2) + "\n")
    return 0 if all(results[name]["same_output"] for name in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
