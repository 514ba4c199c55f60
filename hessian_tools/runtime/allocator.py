"""The memory that a process has freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory(size: int = 2**30) -> None:
    """Keep up to `size` bytes of freed memory for the next tensors, where the C library is glibc.

    glibc returns freed memory beyond 64 MiB to the system, so that every product writes to new pages, which takes time
    in the kernel. Tensors of 32 MiB and more are not kept.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, 32 * 2**20)
        library.mallopt(TRIM_THRESHOLD, size)
