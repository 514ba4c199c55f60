"""Functions side by side on the threads of torch's own OpenMP.

Those threads stay awake on their cores for some milliseconds after each operation of torch: threads of a pool of our
own would wait for them, and take longer than one thread alone (on two cores, 30 ms of a curvature product in place
of 11).
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
    """The library that torch loaded, if it has the entry of GNU's OpenMP (as Intel's and LLVM's have); else None."""
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
    return ThreadPoolExecutor(threads, thread_name_prefix="slice")


def _after_fork() -> None:
    _state["forked"] = True  # OpenMP's threads do not survive, and it waits for them
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def side_by_side(functions: Sequence[Callable[[], R]]) -> list[R]:
    """The results of functions that release the interpreter's lock, one thread each, the calling one among them.

    Raises what one of them raised.
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
        except BaseException as error:  # would be lost: nothing above it is Python
            errors.append(error)

    library.GOMP_parallel(REGION(region), None, len(functions), 0)
    if errors:
        raise errors[0]
    if threading.get_ident() not in ended:
        raise KeyboardInterrupt  # it came as the region was entered, before anything could catch it
    return [results[i] for i in range(len(functions))]
