"""A long computation in shards: one after the other here, or side by side on the workers of a Dask cluster."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def in_shards(function: Callable[[Any, Any], Any], whole: Any, shards: Iterable[Any]) -> Iterator[Any]:
    """``function(whole, shard)`` of each shard, in order, as soon as it is known.

    Where the environment's ``LLMREC_SCHEDULER`` names a Dask scheduler, such as ``tcp://127.0.0.1:8786``, its workers compute;
    what a lost worker had not given back is computed by another one.

    Parameters
    ----------
    whole : what every shard needs, such as a model; sent to each worker once for all shards of a call.
    """
    if not (scheduler := os.environ.get("LLMREC_SCHEDULER")):
        yield from (function(whole, shard) for shard in shards)
        return
    from distributed import Client

    with Client(scheduler, set_as_default=False) as client:
        there = client.scatter(whole, broadcast=True, hash=False)
        futures = [client.submit(function, there, shard, pure=False) for shard in shards][::-1]
        while futures:
            yield futures.pop().result()


def in_advance(function: Callable[[Any, Any], Any], whole: Any, shards: Iterable[Any]) -> None:
    """On a cluster, let the workers put into the cache what this process asks for later on; without one, do nothing."""
    if os.environ.get("LLMREC_SCHEDULER"):
        for _ in in_shards(function, whole, shards):
            pass
