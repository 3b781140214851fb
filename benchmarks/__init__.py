"""Every performance claim, measured beside its peer in one run, with equal output shown."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmrec_lib.cache import cache_dir


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextlib.contextmanager
def empty_cache() -> Iterator[dict[str, str]]:
    """The environment variable of a cache from which nothing can be read back, but models, which are fetched once."""
    models = (cache_dir() / "models").absolute()
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models").symlink_to(models)
        yield {"LLMREC_CACHE": folder}
