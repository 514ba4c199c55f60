"""Files of data sets: folders, bounded reading, downloads with checksums; and locks, one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

MAX_DOWNLOAD_BYTES = 256 * 2**20
DOWNLOAD_TIMEOUT_S = 60.0

_CHUNK = 2**20
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of a file system that has none


class DataError(ValueError):
    """A failure the user can mend: one line saying what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        # Reasons quoted from the system, and file names, may hold line breaks.
        super().__init__(" ".join(message.splitlines()))


def default_data_dir(name: str) -> Path:
    """Where a data set is kept if the user names no folder: under XDG_CACHE_HOME, else under ~/.cache.

    Raises DataError if there is no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # A relative value is to be ignored (XDG Base Directory Specification).
    root = Path(cache) if os.path.isabs(cache) else expand("~/.cache")
    return root / "ikun-hessian" / name


def data_folder(name: str, data_dir: str | Path | None) -> Path:
    """The folder that the user named, or the default one. Raises DataError for a file."""
    folder = default_data_dir(name) if data_dir is None else expand(data_dir)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise DataError(f"{folder} is not a folder: give the folder of the files of {name} as --data-dir")
    return folder


def fetch(url: str, target: Path, md5: str, *, timeout: float = DOWNLOAD_TIMEOUT_S) -> None:
    """Download `url` to `target`, which appears only when complete and of the given MD5 sum; `timeout` in seconds.

    Raises DataError if the address cannot be read, the sum differs or the file cannot be written.
    """
    # Beside the target, so that the final replacement is a rename within one file system.
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        found = _save(url, part, timeout)
        if found == md5:
            os.replace(part, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _download_failed(url, target, reason(error)) from error
    finally:
        _remove(part)
    if found != md5:
        raise _download_failed(url, target, f"its MD5 is {found}, not {md5}")


def read_up_to(stream: IO[bytes], count: int) -> bytearray:
    """At most `count` bytes, fewer at the end of the stream; in pieces, as read(count) may allocate count at once."""
    data = bytearray()
    while len(data) < count:
        piece = stream.read(min(_CHUNK, count - len(data)))
        if not piece:
            break
        data += piece
    return data


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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError names this file, where that of a full disk names none and that of a folder a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def expand(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"cannot find the home folder in {path} ({reason(error)}): give --data-dir in full") from error


def _save(url: str, part: Path, timeout: float) -> str:
    """Write what `url` holds to the new file `part`; returns its MD5 sum in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    total = 0
    with urllib.request.urlopen(url, timeout=timeout) as response:
        part.parent.mkdir(parents=True, exist_ok=True)  # only now: an unreachable address leaves no empty folder
        with part.open("xb") as file:
            while piece := response.read(_CHUNK):
                total += len(piece)
                if total > MAX_DOWNLOAD_BYTES:
                    raise OSError(f"it is longer than {MAX_DOWNLOAD_BYTES} bytes")
                digest.update(piece)
                file.write(piece)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    # Where even this fails the file was never made, and the failure itself is already on its way.
    with contextlib.suppress(OSError, ValueError):
        path.unlink(missing_ok=True)


def _download_failed(url: str, target: Path, why: str) -> DataError:
    return DataError(
        f"cannot download {url} ({why}): put {target.name} into {target.parent} by hand, "
        "or name a folder that holds it with --data-dir"
    )
