"""Run functions in parallel on the OpenMP threads of torch.

After each torch operation these threads keep spinning on their cores for a few milliseconds. A separate thread pool
would compete with them for the cores and be slower than a single thread. On two cores, a curvature product took 30 ms
with a separate pool and 11 ms with a single thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

R = TypeVar("R")
REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_state = {"forked": False}


@cache
def _library() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch loaded if it has the GNU entry point GOMP_parallel, else None."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    own = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
    for name in (*own, "libgomp.so.1", "libiomp5.so", "libomp.so.5"):
        try:
            found = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            found.GOMP_parallel.argtypes = (REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            found.GOMP_parallel.restype = None
        except (OSError, AttributeError):
            continue
        return found
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return a thread pool, for systems without such a library."""
    return ThreadPoolExecutor(threads, thread_name_prefix="slice")


def _after_fork() -> None:
    """Switch to a thread pool in a forked child process."""
    _state["forked"] = True  # OpenMP's threads do not survive a fork, and GOMP_parallel would wait for them forever
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def side_by_side(functions: Sequence[Callable[[], R]]) -> list[R]:
    """Run functions that release the GIL in parallel, one thread each. The calling thread is one of them.

    Args:
        functions: Functions without arguments.

    Returns:
        Their results in order.

    Raises:
        BaseException: As raised by one of the functions.
    """
    if len(functions) == 1:
        return [functions[0]()]
    if (library := None if _state["forked"] else _library()) is None:
        others = [_pool(len(functions) - 1).submit(function) for function in functions[1:]]
        return [functions[0](), *(other.result() for other in others)]
    left, results, errors = iter(enumerate(functions)), dict[int, R](), list[BaseException]()
    ended: list[int] = []

    def region(_: object) -> None:
        try:
            for i, function in left:
                results[i] = function()
            ended.append(threading.get_ident())
        except BaseException as error:  # the caller is C code and would lose the exception
            errors.append(error)

    library.GOMP_parallel(REGION(region), None, len(functions), 0)
    if errors:
        raise errors[0]
    if threading.get_ident() not in ended:
        raise KeyboardInterrupt  # it was raised on entry to the region, before the try block
    return [results[i] for i in range(len(functions))]
