"""Read .pt files from untrusted sources without running code, in memory bounded by a small multiple of the file size.

torch.load(weights_only=True) runs no code, but a file of a few bytes can still make it exhaust the memory: by
compressed or overlapping entries, by calls such as bytearray(10**11), or by a million nested containers. The zip
archive and its pickle are therefore checked first. A file is refused unless torch.save could have written it.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

MOST_PICKLE = 2**26  # largest pickle in bytes
MOST_STEPS = 10_000_000  # opcodes of the pickle; a log of 1,000 epochs with 40 layers takes 2 million
MOST_DIRECTORY = 2**24  # largest table of contents of the zip archive, in bytes
DEEPEST = 50  # largest nesting depth of containers
# The names that a pickle may use. Others that weights_only allows can exhaust the memory or replace the methods of a
# tensor.
_PLAIN = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.[A-Z][A-Za-z0-9]*Storage"
    r"|torch\.(Size|device|bool|u?int\d+|b?float\d+|complex\d+)"
)
# Number of argument bytes after each opcode of protocol 2 that torch.save writes and weights_only reads.
# -1: preceded by a length of one byte; -4: preceded by a length of four bytes; -2: two lines of text.
_BEHIND = {
    **dict.fromkeys(b"RbasueNt()]}.Q\x85\x86\x87\x88\x89", 0),
    **dict.fromkeys(b"Kqh", 1),
    b"M"[0]: 2,
    **dict.fromkeys(b"Jrj", 4),
    b"G"[0]: 8,
    **dict.fromkeys(b"U\x8a", -1),
    b"X"[0]: -4,
    b"c"[0]: -2,
}
_STOP = b"."[0]
_SIZES = {  # bytes per element
    f"{name}Storage": size
    for size, names in {
        1: ("Untyped", "Byte", "Char", "Bool"),
        2: ("Short", "Half", "BFloat16"),
        4: ("Int", "Float"),
        8: ("Long", "Double", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for name in names
}


class ArchiveError(ValueError):
    """A file cannot be read. The message is a short reason without the name of the file."""


class CodeError(ArchiveError):
    """The file contains an object that is neither a tensor nor a plain value."""


def read_archive(path: str | Path) -> Any:
    """Read a file that torch.save wrote.

    Args:
        path: The file.

    Returns:
        Its contents. Dicts, lists and tuples are plain ones; tensors are on the CPU and detached.

    Raises:
        CodeError: If the file contains objects of other types.
        ArchiveError: If the file is damaged or would take too much memory.
        FileNotFoundError: If the file does not exist.
        PermissionError: If the file may not be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ArchiveError("not a regular file")
    with path.open("rb") as file:
        pickled, sizes = _pickle(file)
        steps = _check_pickle(pickled)
        _check_storages(pickled, sizes)
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a damaged file can cause warnings
                values = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types on damaged files
            raise ArchiveError("damaged, or not a .pt file") from error
    return _plain(values, 0, iter(range(1000 + 10 * steps)))


def _pickle(file: IO[bytes]) -> tuple[bytes, dict[str, int]]:
    """Return the pickle of an archive, and the bytes of every storage by its key.

    Every entry must occur once, be uncompressed and not overlap another, so that the zip readers of torch and Python
    agree.
    """
    if file.read(2) == b"\x80\x02":
        raise ArchiveError(
            "in the format of torch before 1.6: load it with torch.load(weights_only=True) and save it with torch.save"
        )
    size = file.seek(0, 2)
    try:
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = [entry.orig_filename for entry in entries]
            if not names or len({name.lower() for name in names}) < len(names) or not all(map(str.isascii, names)):
                raise ArchiveError("damaged: entries have no names or duplicate names")
            if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
                raise ArchiveError("its entries are compressed, but torch.save never compresses")
            if sum(e.file_size for e in entries) > size:
                raise ArchiveError("damaged: its entries claim more bytes than the file has")
            top = names[0].partition("/")[0]
            sizes = {name.removeprefix(f"{top}/data/"): e.file_size for name, e in zip(names, entries, strict=True)}
            entry = archive.getinfo(f"{top}/data.pkl")
            if entry.file_size > MOST_PICKLE:
                raise ArchiveError(f"more than {MOST_PICKLE:,} bytes in addition to the weights")
            return archive.read(entry), sizes
    except ArchiveError:
        raise
    except Exception as error:  # zipfile raises many types too, such as NotImplementedError
        raise ArchiveError("truncated or not a .pt file") from error


def _check_directory(file: IO[bytes], size: int) -> None:
    """Require the table of contents right before the end records, so that all zip readers find the same one."""
    file.seek(max(0, size - 98))
    end = file.read(98).rjust(98, b"\0")
    if end[76:80] != b"PK\5\6" or end[96:] != b"\0\0":
        raise ArchiveError("truncated or not a .pt file")
    length, offset = struct.unpack("<II", end[88:96])
    first = size - 22
    if end[56:60] == b"PK\6\7":
        first = size - 98
        length, offset = struct.unpack("<QQ", end[40:56])
        if end[:4] != b"PK\6\6" or struct.unpack("<Q", end[64:72]) != (first,):
            raise ArchiveError("damaged: its end records are inconsistent")
    if offset + length != first or length > MOST_DIRECTORY:
        raise ArchiveError("damaged: its table of contents is misplaced or too long")


def _check_pickle(data: bytes) -> int:
    """Count the steps of a pickle. Raises if it has too many values, or any but plain ones and tensors."""
    place, steps, size = 2, 0, len(data)
    if data[:2] != b"\x80\x02":
        raise ArchiveError("damaged, or not written by torch.save")
    try:
        while True:
            opcode = data[place]
            behind = _BEHIND[opcode]
            place += 1
            if behind >= 0:
                place += behind
            elif behind == -1:
                place += 1 + data[place]
            elif behind == -4:
                place += 4 + int.from_bytes(data[place : place + 4], "little")
            else:
                module, name, place = _lines(data, place)
                if not _PLAIN.fullmatch(f"{module}.{name}"):
                    raise CodeError(f"it contains objects that need code to load ({module}.{name})")
            steps += 1
            if opcode == _STOP or place > size:
                return steps
            if steps > MOST_STEPS:
                raise ArchiveError(f"more than {MOST_STEPS:,} values in addition to the weights")
    except (IndexError, KeyError):
        raise ArchiveError("damaged, or not written by torch.save") from None


class _Inert:
    """Stands for every object that a pickle names. It accepts any arguments and does nothing."""

    def __init__(self, *arguments: object) -> None: ...

    def __call__(self, *arguments: object) -> _Inert:
        return self

    def __setitem__(self, key: object, value: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Storages(pickle.Unpickler):
    """Checks the sizes of the storages in a pickle that _check_pickle has passed.

    Older versions of torch trust the sizes in the pickle and would read beyond the end of a storage.
    """

    def __init__(self, pickled: bytes, sizes: dict[str, int]) -> None:
        super().__init__(io.BytesIO(pickled))
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        return _SIZES[name] if module == "torch" and name in _SIZES else _Inert()

    def persistent_load(self, pid: Any) -> _Inert:
        _, each, key, _, count = pid
        if not (type(count) is int and 0 <= count * each <= self.sizes[key]):
            raise ArchiveError("damaged: a tensor claims more bytes than are stored")
        return _Inert()


def _check_storages(pickled: bytes, sizes: dict[str, int]) -> None:
    """Raise if a tensor claims more bytes than the archive stores for it."""
    try:
        _Storages(pickled, sizes).load()
    except ArchiveError:
        raise
    except Exception as error:  # pickle raises many types on damaged files
        raise ArchiveError("damaged, or not a .pt file") from error


def _lines(data: bytes, place: int) -> tuple[str, str, int]:
    """Return the two lines that start at `place`, and the position after them."""
    words = []
    for _ in range(2):
        end = data.find(b"\n", place)
        if not 0 <= end - place <= 200:
            raise IndexError
        words.append(data[place:end].decode("ascii", "replace"))
        place = end + 1
    return words[0], words[1], place


def _plain(value: Any, depth: int, left: Iterator[int]) -> Any:
    """Copy a value into plain containers: an OrderedDict can carry its own methods, and a tensor hooks.

    Containers can contain each other and can be shared a thousand times. `left` bounds the number of visits.
    """
    if depth > DEEPEST or next(left, None) is None:
        raise ArchiveError(f"containers nested more than {DEEPEST} levels deep, or repeated too many times")
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        return {key: _plain(item, depth + 1, left) for key, item in dict.items(value)}
    if kind is list:
        return [_plain(item, depth + 1, left) for item in value]
    if kind is tuple:
        return tuple(_plain(item, depth + 1, left) for item in value)
    return value.detach() if isinstance(value, Tensor) else value
