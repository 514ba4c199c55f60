"""Atomic writes, locks, and CSV tables."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """CSV with one line a row; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write through a temporary file in the same folder, then rename: the file is whole or as it was. An OSError names
    `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError names this file, where that of a full disk names none and that of a folder a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of a file system that has none


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: float = 0.0) -> Iterator[bool]:
    """Hold the lock of this file, which need not exist and, unless shared, is removed at the end; its folder must.

    Yields whether it is held: some network file systems have no locks, and there everyone goes on without. A process
    that ends in whatever way holds nothing any more. Raises BlockingIOError if another has it for `wait` seconds, and
    OSError that names the folder where the file cannot be made.
    """
    end = time.monotonic() + wait
    while True:
        try:
            file = path.open("ab")
        except OSError as error:
            error.filename = str(path.parent)
            raise
        with file:
            held = _lock(file, shared)
            if held is None and time.monotonic() >= end:
                raise BlockingIOError(errno.EAGAIN, "another process is at work", str(path))
            if held is None:
                time.sleep(0.1)
            elif _is(file, path):  # else it was removed by the one who had it before: nobody's lock any more
                try:
                    yield held
                finally:
                    if held and not shared:
                        _remove(path)
                return


def _lock(file: IO[bytes], shared: bool) -> bool | None:
    """Whether its lock is ours now; None if another has it."""
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is(file: IO[bytes], path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextlib.contextmanager
def alone(output: Path, temporaries: str) -> Iterator[None]:
    """Be the only process that writes `output`, whose folder is made; .NAME.lock lies beside it meanwhile.

    temporaries: a regular expression of the names that are written along with it: what a killed process left of them
    half-written is removed. Raises BlockingIOError if another process is at it, OSError that names the folder if
    nothing can be written there.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output.with_name(f".{output.name}.lock")) as held:
        form = re.compile(rf"\.({temporaries})\.[0-9a-f]{{32}}\.part")
        for name in filter(form.fullmatch, os.listdir(output.parent) if held else []):
            _remove(output.with_name(name))
        yield


def _remove(path: Path) -> None:
    # Where even this fails the file was never made, and the failure itself is already on its way.
    with contextlib.suppress(OSError, ValueError):
        path.unlink(missing_ok=True)
