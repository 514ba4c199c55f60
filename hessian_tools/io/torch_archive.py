"""Reading .pt files of strangers: no code, and no more memory than a small multiple of the file.

torch.load(weights_only=True) runs no code, but a file of a few bytes can still make it fill the memory: compressed or
overlapping entries, calls like bytearray(10**11), a million containers in one another. So the zip archive and the
pickle in it are looked at first, and refused unless torch.save writes the like. ikun and hessian_tools know nothing of
each other: both have this file, and a test keeps the two alike.
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

MOST_PICKLE = 2**26  # bytes
MOST_STEPS = 10_000_000  # of the pickle: 1,000 epochs of a log with 40 layers take 2 million
MOST_DIRECTORY = 2**24  # bytes of the zip archive's table of contents
DEEPEST = 50  # containers in one another
# What a pickle may name. Everything else that weights_only lets through can be made to fill the memory, or to change
# what a tensor's methods do.
_PLAIN = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.[A-Z][A-Za-z0-9]*Storage"
    r"|torch\.(Size|device|bool|u?int\d+|b?float\d+|complex\d+)"
)
# Bytes behind each opcode of protocol 2 that torch.save writes and weights_only reads; -1: a length of one byte before
# them, -4: of four, -2: two lines
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
_SIZES = {  # bytes of an entry
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
    """Why a file cannot be read, in a few words without its name."""


class CodeError(ArchiveError):
    """The file holds something that is neither a tensor nor a plain value."""


def read_archive(path: str | Path) -> Any:
    """What torch.save wrote, its dicts, lists and tuples as plain ones and its tensors on the CPU, without history.

    Raises ArchiveError for a damaged file and for one that would take too much memory, CodeError for one with objects
    of other kinds; FileNotFoundError and PermissionError.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ArchiveError("a folder or device, and no file")
    with path.open("rb") as file:
        pickled, sizes = _pickle(file)
        steps = _check_pickle(pickled)
        _check_storages(pickled, sizes)
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what damage looks like
                values = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds on damaged files
            raise ArchiveError("damaged, or not a .pt file") from error
    return _plain(values, 0, iter(range(1000 + 10 * steps)))


def _pickle(file: IO[bytes]) -> tuple[bytes, dict[str, int]]:
    """(the pickle, bytes of every storage by its key) of an archive that holds what it says it does: every entry once,
    uncompressed and in a place of its own. Torch's reader and Python's agree about such an archive."""
    if file.read(2) == b"\x80\x02":
        raise ArchiveError("in the format of torch before 1.6: torch.load it with weights_only=True and torch.save it")
    size = file.seek(0, 2)
    try:
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = [entry.orig_filename for entry in entries]
            if not names or len({name.lower() for name in names}) < len(names) or not all(map(str.isascii, names)):
                raise ArchiveError("damaged: its entries have no names, or the same one")
            if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
                raise ArchiveError("its entries are compressed, which torch.save never does")
            if sum(e.file_size for e in entries) > size:
                raise ArchiveError("damaged: its entries claim more bytes than it has")
            top = names[0].partition("/")[0]
            sizes = {name.removeprefix(f"{top}/data/"): e.file_size for name, e in zip(names, entries, strict=True)}
            entry = archive.getinfo(f"{top}/data.pkl")
            if entry.file_size > MOST_PICKLE:
                raise ArchiveError(f"more than {MOST_PICKLE:,} bytes beside the weights")
            return archive.read(entry), sizes
    except ArchiveError:
        raise
    except Exception as error:  # zipfile raises many kinds too, NotImplementedError and struct.error among them
        raise ArchiveError("truncated or not a .pt file") from error


def _check_directory(file: IO[bytes], size: int) -> None:
    """The table of contents lies right before the end records, so that no reader can find another one."""
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
            raise ArchiveError("damaged: its end records do not agree")
    if offset + length != first or length > MOST_DIRECTORY:
        raise ArchiveError("damaged: its table of contents is not where it says, or too long")


def _check_pickle(data: bytes) -> int:
    """The steps of a pickle; raises unless it has plain values and tensors alone, and not too many of them."""
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
                    raise CodeError(f"it holds objects that need code to load ({module}.{name})")
            steps += 1
            if opcode == _STOP or place > size:
                return steps
            if steps > MOST_STEPS:
                raise ArchiveError(f"more than {MOST_STEPS:,} values beside the weights")
    except (IndexError, KeyError):
        raise ArchiveError("damaged, or not written by torch.save") from None


class _Inert:
    """Stands for everything that a pickle names: made of anything, filled with anything, without effect."""

    def __init__(self, *arguments: object) -> None: ...

    def __call__(self, *arguments: object) -> _Inert:
        return self

    def __setitem__(self, key: object, value: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Storages(pickle.Unpickler):
    """Goes through a pickle that _check_pickle has passed, for the sizes of its storages alone: older versions of torch
    take them as they are said, and read beyond the end."""

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
    try:
        _Storages(pickled, sizes).load()
    except ArchiveError:
        raise
    except Exception as error:  # pickle raises many kinds on damaged files
        raise ArchiveError("damaged, or not a .pt file") from error


def _lines(data: bytes, place: int) -> tuple[str, str, int]:
    """The two lines from `place`, and where they end."""
    words = []
    for _ in range(2):
        end = data.find(b"\n", place)
        if not 0 <= end - place <= 200:
            raise IndexError
        words.append(data[place:end].decode("ascii", "replace"))
        place = end + 1
    return words[0], words[1], place


def _plain(value: Any, depth: int, left: Iterator[int]) -> Any:
    """A copy in plain containers: an OrderedDict can bring methods of its own, a tensor hooks. Containers can hold one
    another, and be held a thousand times each: every visit is one of those left."""
    if depth > DEEPEST or next(left, None) is None:
        raise ArchiveError(f"more than {DEEPEST} containers in one another, or one that is there many times")
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        return {key: _plain(item, depth + 1, left) for key, item in dict.items(value)}
    if kind is list:
        return [_plain(item, depth + 1, left) for item in value]
    if kind is tuple:
        return tuple(_plain(item, depth + 1, left) for item in value)
    return value.detach() if isinstance(value, Tensor) else value
