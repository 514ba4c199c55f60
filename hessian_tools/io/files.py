"""Atomic writes, file locks, and CSV tables."""

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


def without_control_codes(text: str) -> str:
    """Replace control codes of terminals, and all other unprintable characters but newlines and tabs, by "?"."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def csv_cell(value: object) -> object:
    """Return a value for a CSV file. Texts that a spreadsheet would run as a formula get an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = without_control_codes(value)
    if text[:1] in ("=", "+", "-", "@", "\t") and len(text) > 1 and not _is_number(text):
        return f"'{text}"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file with one line per row. Columns appear in the order in which the rows first name them.

    Control characters are replaced, and a text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([csv_cell(name) for name in columns])
    writer.writerows([csv_cell(row.get(name, "")) for name in columns] for row in rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically, through a temporary file in the same folder that is then renamed.

    On failure the old file is unchanged and the temporary file is removed.

    Args:
        path: The file to write. Its folder is created if it is missing.
        write: Called with the open binary file.

    Raises:
        OSError: If the file cannot be written. Its `filename` is `path`.
    """
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
    """Set the `filename` of any OSError raised inside to `path`.

    The operating system may report no name (a full disk) or the name of a temporary file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # raised by file systems without locks


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: float = 0.0) -> Iterator[bool]:
    """Hold an advisory lock on a file.

    The file is created if it is missing; its folder must exist. An exclusive lock deletes the file when it is released.
    The lock of a process that ends for any reason is released.

    Args:
        path: The lock file.
        shared: Acquire a shared lock instead of an exclusive one.
        wait: How long to wait for another process, in seconds.

    Yields:
        True if the lock is held, False on a file system without locks (some network file systems), where nothing is
        locked.

    Raises:
        BlockingIOError: If another process holds the lock for `wait` seconds.
        OSError: If the file cannot be created. Its `filename` is the folder.
    """
    end = time.monotonic() + wait
    while True:
        with _lock_file(path) as file:
            held = _lock(file, shared)
            if held is None and time.monotonic() >= end:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(path))
            if held is None:
                time.sleep(0.1)
            elif _is(file, path):  # otherwise its previous holder has deleted it: open it again
                try:
                    yield held
                finally:
                    if held and not shared:
                        _remove(path)
                return


def _lock_file(path: Path) -> IO[bytes]:
    """Open a lock file. Opening a pipe of that name would wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "not a regular file, so it cannot be locked", str(path))
    try:
        return path.open("ab")
    except OSError as error:
        error.filename = str(path.parent)
        raise


def _lock(file: IO[bytes], shared: bool) -> bool | None:
    """Try to lock the file: True if it is locked now, None if another process holds it, False without lock support."""
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
    """Return whether `file` is still the file at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextlib.contextmanager
def alone(output: Path, temporaries: str) -> Iterator[None]:
    """Hold an exclusive lock for writing `output`.

    The folder of `output` is created, and the lock file is `.NAME.lock` in it. Temporary files that a killed process
    left behind are removed.

    Args:
        output: The file that only this process may write.
        temporaries: Regular expression of the names of all files that are written atomically along with `output`.

    Raises:
        BlockingIOError: If another process holds the lock.
        OSError: If the lock file cannot be created. Its `filename` is the folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output.with_name(f".{output.name}.lock")) as held:
        form = re.compile(rf"\.({temporaries})\.[0-9a-f]{{32}}\.part")
        for name in filter(form.fullmatch, os.listdir(output.parent) if held else []):
            _remove(output.with_name(name))
        yield


def _remove(path: Path) -> None:
    # If deleting fails, the file was never created, and the original error is already being raised.
    """Delete a file if it exists, and ignore errors."""
    with contextlib.suppress(OSError, ValueError):
        path.unlink(missing_ok=True)
