"""Say which published chapters no longer are what their sources would give, and which part changed (`make stale`)."""

from __future__ import annotations

import sys
from pathlib import Path

from llmrec_lib.study.runner import _out_of_date, _plan


def stale() -> dict[str, str]:
    """For the project in the current folder: chapter -> what changed, "" where nothing did.

    Looked at are notebook, parameters, library, lock, data, versions, and the result files. The library is the source of what
    a notebook imports of it, directly or not: a change elsewhere makes nothing stale.
    """
    jobs = _plan((), "full", {}, Path("notebooks"), Path("book/executed"), 0, False, 1)
    return {job.chapter: _out_of_date(job) for job in jobs}


def main(strict: bool) -> int:
    """Print the list; with `strict`, 1 if anything is stale."""
    reasons = stale()
    for chapter, reason in reasons.items():
        print(f"{chapter}: {f'stale ({reason})' if reason else 'up to date'}")
    return int(strict and any(reasons.values()))


if __name__ == "__main__":
    sys.exit(main("--strict" in sys.argv[1:]))
