"""Run batches in parallel, one thread each, instead of spreading single operations over all threads.

Most operations of a small network are too short to spread. Two batches in two threads run twice as fast as one after
the other, and the threads do not wait for each other at every operation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the thread pool. Operations in a worker use one thread."""
    return ThreadPoolExecutor(threads, "batch", initializer=torch.set_num_threads, initargs=(1,))


@contextmanager
def as_in_threads(count: int) -> Iterator[None]:
    """Compute with as many threads per operation as `in_threads` uses for this number of items, for the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if count < threads else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_threads(function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Yield function(item) for every item, in order, computed in torch's number of threads.

    At most that number of results wait to be consumed. With fewer items than threads, the items run one after the other
    in the calling thread, and their operations use all threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < threads:
        yield from map(function, items)
        return
    pending: deque[Future[T]] = deque()
    torch.set_num_threads(1)  # some libraries have one setting for all threads
    try:
        for item in items:
            pending.append(_pool(threads).submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        torch.set_num_threads(threads)
