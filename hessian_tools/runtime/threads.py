"""Batches side by side: one thread each, in place of one operation spread over all threads.

Most operations of a small network are too short to be worth spreading; two batches in two threads are twice as fast
as one after the other, and do not wait for each other at every operation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # a worker's own operations run in its thread alone
    return ThreadPoolExecutor(threads, "batch", initializer=torch.set_num_threads, initargs=(1,))


def in_threads(function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """function(item) for every item, in order, computed in torch's number of threads; at most so many wait for use.

    In the calling thread, one after the other, where there are fewer items than threads: their operations spread then.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < threads:
        yield from map(function, items)
        return
    pending: deque[Future[T]] = deque()
    torch.set_num_threads(1)  # for libraries that keep one number for all threads
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
