"""Folders of data sets, bounded reading of files, and downloads that are verified by their checksum."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
import uuid
from pathlib import Path
from typing import IO

from hessian_tools.io.errors import ParameterError
from hessian_tools.io.files import _remove

MAX_DOWNLOAD_BYTES = 256 * 2**20
DOWNLOAD_TIMEOUT_S = 60.0
_CHUNK = 2**20


class DataError(ParameterError):
    """Data that cannot be used. The message is one line that says what is wrong, in which file, and what to do."""


def default_data_dir(name: str) -> Path:
    """Return the folder of a data set when the user names none.

    It is `ikun-hessian/NAME` in XDG_CACHE_HOME if that is set, else in ~/.cache.

    Raises:
        DataError: If there is no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG Base Directory Specification says that a relative path must be ignored.
    root = Path(cache) if os.path.isabs(cache) else expand("~/.cache")
    return root / "ikun-hessian" / name


def system_folders(name: str) -> list[Path]:
    """Return the folders where a package of the operating system puts a data set.

    They are `datasets/NAME` in every folder of XDG_DATA_DIRS if that is set, else in /usr/local/share and /usr/share.
    """
    roots = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [Path(root) / "datasets" / name for root in roots.split(":") if os.path.isabs(root)]


def data_folder(name: str, data_dir: str | Path | None) -> Path:
    """Return the folder that the user named, or the default folder of the data set `name`.

    Raises:
        DataError: If the path is not a folder.
    """
    folder = default_data_dir(name) if data_dir is None else expand(data_dir)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise DataError(
            "{} is not a folder: pass the folder that holds the files of {} as {data_dir}", folder, name, data_dir=...
        )
    return folder


def fetch(url: str, target: Path, md5: str, *, timeout: float = DOWNLOAD_TIMEOUT_S, most: int | None = None) -> None:
    """Download a file. `target` appears only when the download is complete and its checksum is right.

    Args:
        url: The address to download.
        target: The file to write. Its folder is created if it does not exist.
        md5: The expected MD5 sum, in hexadecimal.
        timeout: Seconds to wait for the server.
        most: Largest number of bytes to accept (default: MAX_DOWNLOAD_BYTES).

    Raises:
        DataError: If the address cannot be read, the checksum differs, or the file cannot be written.
    """
    # The temporary file is next to the target, so that the rename stays within one file system.
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        found = _save(url, part, timeout, most or MAX_DOWNLOAD_BYTES)
        if found == md5:
            os.replace(part, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _download_failed(url, target, reason(error)) from error
    finally:
        _remove(part)
    if found != md5:
        raise _download_failed(url, target, f"its MD5 is {found}, not {md5}")


def read_up_to(stream: IO[bytes], count: int) -> bytearray:
    """Read at most `count` bytes, or up to the end of the stream.

    It reads in pieces, because read(count) may allocate all `count` bytes at once.
    """
    data = bytearray()
    while len(data) < count:
        piece = stream.read(min(_CHUNK, count - len(data)))
        if not piece:
            break
        data += piece
    return data


def reason(error: BaseException) -> str:
    """Return the text of an error, or the name of its class if it has no text."""
    return str(error) or type(error).__name__


def expand(path: str | Path) -> Path:
    """Replace a leading ~ with the home folder.

    Raises:
        DataError: If there is no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            "cannot find the home folder in {} ({}): pass the full path as {data_dir}",
            path,
            reason(error),
            data_dir=...,
        ) from error


def _save(url: str, part: Path, timeout: float, most: int) -> str:
    """Download at most `most` bytes of `url` to the new file `part` and return its MD5 sum in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    total = 0
    with urllib.request.urlopen(url, timeout=timeout) as response:
        part.parent.mkdir(parents=True, exist_ok=True)  # after the request: a failed one leaves no empty folder
        with part.open("xb") as file:
            while piece := response.read(_CHUNK):
                total += len(piece)
                if total > most:
                    raise OSError(f"it is longer than {most} bytes")
                digest.update(piece)
                file.write(piece)
    return digest.hexdigest()


def _download_failed(url: str, target: Path, why: str) -> DataError:
    return DataError(
        "cannot download {} ({}): put {} into {} by hand, or pass a folder that holds it as {data_dir}",
        *(url, why, target.name, target.parent),
        data_dir=...,
    )
