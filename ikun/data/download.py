"""Files of data sets: folders, bounded reading, downloads with checksums; and locks, one process at a time."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
import uuid
from pathlib import Path
from typing import IO

from hessian_tools.io.files import _remove

MAX_DOWNLOAD_BYTES = 256 * 2**20
DOWNLOAD_TIMEOUT_S = 60.0
_CHUNK = 2**20


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


def _download_failed(url: str, target: Path, why: str) -> DataError:
    return DataError(
        f"cannot download {url} ({why}): put {target.name} into {target.parent} by hand, "
        "or name a folder that holds it with --data-dir"
    )
