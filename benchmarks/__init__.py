"""Every performance claim, measured beside its peer in one run, with equal output shown."""

import time
from collections.abc import Callable
from typing import Any


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
