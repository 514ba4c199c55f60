"""Read .pt and .safetensors files from untrusted sources without running code, in memory bounded by the file size.

A .pt file contains a pickle, and loading a pickle usually runs whatever code it names. Here the pickle is interpreted
as data (see `hessian_tools.io.inert_pickle`): only tensors, numbers, texts and plain containers are built. Even then a
file of a few bytes could exhaust the memory: by compressed or overlapping entries, by tensors that claim more than is
stored, or by a million nested containers. Such files are refused.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from hessian_tools.io import numpy_pickle
from hessian_tools.io.inert_pickle import ArchiveError, CodeError, Foreign, InertUnpickler, count_steps
from hessian_tools.io.safetensors_file import is_safetensors, read_safetensors
from hessian_tools.io.torch_pickle import DAMAGED, Storage, TorchUnpickler, View, view_of

__all__ = ["ArchiveError", "CodeError", "Foreign", "read_archive"]

MOST_PICKLE = 2**26  # largest pickle in bytes
MOST_DIRECTORY = 2**24  # largest table of contents of the zip archive, in bytes
DEEPEST = 50  # largest nesting depth of containers
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in the files of torch before 1.6
_LEGACY_PROTOCOL = 1001
_NUMPY = {numpy_pickle.Array: "numpy.ndarray", numpy_pickle.Kind: "numpy.dtype", numpy_pickle.Latin: "_codecs.encode"}
_Read = Callable[[str], bytes]  # the bytes of a storage


def read_archive(path: str | Path, foreign: bool = False) -> Any:
    """Read a file that torch.save wrote, in its present or its old format, or a .safetensors file.

    Args:
        path: The file.
        foreign: Accept objects of other types, such as `argparse.Namespace`. No code runs for them: a mapping becomes
            a dict, a NumPy array becomes a tensor, and every other object becomes a `Foreign` object that only has its
            name.

    Returns:
        Its contents. Dicts, lists and tuples are plain ones; tensors are on the CPU and detached. A torch.device is a
        text.

    Raises:
        CodeError: If the file contains objects of other types, unless `foreign`.
        ArchiveError: If the file is damaged or would take too much memory.
        FileNotFoundError: If the file does not exist.
        PermissionError: If the file may not be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ArchiveError("not a regular file")
    with path.open("rb") as file:
        head, size = file.read(32), file.seek(0, 2)
        if is_safetensors(head[:9], size):
            return read_safetensors(file, size)
        if _is_legacy(head):
            values, steps, read = _legacy(file, size, foreign)
        elif head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
            raise ArchiveError(
                "a pickle, but neither the format of torch.save nor that of torch before 1.6: load it where it was "
                "made and save model.state_dict() with torch.save"
            )
        else:
            values, steps, read = _zipped(file, size, foreign)
        return _Plain(read, foreign, iter(range(1000 + 10 * steps))).copy(values, 0)


# ---------------------------------------------------------------- the file around it
def _is_legacy(head: bytes) -> bool:
    """Whether a file begins with the magic number of torch before 1.6, in any protocol of pickle."""
    with contextlib.suppress(ArchiveError):
        return head[:1] == b"\x80" and _value(head, 0)[0] == _LEGACY_MAGIC
    return False


def _legacy(file: IO[bytes], size: int, foreign: bool) -> tuple[Any, int, _Read]:
    """Return the contents of a file of torch before 1.6, the steps of its pickle, and how to read a storage.

    The file consists of five pickles (a magic number, the protocol, the machine, the contents, the keys of the
    storages), then of the storages: each is its number of elements and its bytes.
    """
    file.seek(0)
    data = file.read(MOST_PICKLE)
    _, place = _value(data, 0)
    protocol, place = _value(data, place)
    machine, place = _value(data, place)
    if protocol != _LEGACY_PROTOCOL or type(machine) is not dict:
        raise ArchiveError(DAMAGED)
    if machine.get("little_endian") is not (sys.byteorder == "little"):
        raise ArchiveError("written on a machine with another order of bytes: save it again on this kind of machine")
    steps, _ = count_steps(data, place)
    unpickler = TorchUnpickler(data, place, foreign)
    values = unpickler.load()
    keys, place = _value(data, unpickler.place)
    if type(keys) is not list or not all(type(key) is str and key in unpickler.storages for key in keys):
        raise ArchiveError("it contains tensors that are not dense: save the weights of the network only")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        file.seek(place)
        count = int.from_bytes(file.read(8), "little")
        length = count * unpickler.storages[key].dtype.itemsize
        places[key] = (place + 8, length)
        place += 8 + length
        if place > size:
            break
    if place != size or len(places) < len(keys):
        raise ArchiveError("damaged: the file is too short or too long for its tensors")

    def read(key: str) -> bytes:
        start, length = places[key]
        file.seek(start)
        return file.read(length)

    return values, steps, read


def _value(data: bytes, place: int) -> tuple[Any, int]:
    """Return the value of a pickle of plain values, and the position after it."""
    count_steps(data, place)
    unpickler = InertUnpickler(data, place)
    return unpickler.load(), unpickler.place


def _zipped(file: IO[bytes], size: int, foreign: bool) -> tuple[Any, int, _Read]:
    """Return the contents of a zip archive, the steps of its pickle, and how to read a storage.

    Every entry must occur once, be uncompressed and not overlap another, so that all zip readers agree.
    """
    try:
        _check_directory(file, size)
        archive = zipfile.ZipFile(file)  # does not own the file
        entries = archive.infolist()
        names = [entry.orig_filename for entry in entries]
        if not names or len({name.lower() for name in names}) < len(names) or not all(map(str.isascii, names)):
            raise ArchiveError("damaged: entries have no names or duplicate names")
        if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
            raise ArchiveError("its entries are compressed, but torch.save never compresses")
        if sum(e.file_size for e in entries) > size:
            raise ArchiveError("damaged: its entries claim more bytes than the file has")
        top = names[0].partition("/")[0]
        entry = archive.getinfo(f"{top}/data.pkl")
        if entry.file_size > MOST_PICKLE:
            raise ArchiveError(f"more than {MOST_PICKLE:,} bytes in addition to the weights")
        pickled = archive.read(entry)
        order = archive.read(f"{top}/byteorder")[:10] if f"{top}/byteorder" in names else b"little"
    except ArchiveError:
        raise
    except Exception as error:  # zipfile raises many types, such as NotImplementedError
        raise ArchiveError("truncated or not a .pt file") from error
    if order != sys.byteorder.encode():
        raise ArchiveError("written on a machine with another order of bytes: save it again on this kind of machine")
    if pickled[:1] != b"\x80" or pickled[1:2] not in (b"\2", b"\3", b"\4", b"\5"):
        raise ArchiveError("damaged, or not written by torch.save")
    steps, _ = count_steps(pickled)
    unpickler = TorchUnpickler(pickled, 0, foreign)
    values = unpickler.load()
    return values, steps, lambda key: archive.read(f"{top}/data/{key}")


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


# ---------------------------------------------------------------- the contents
class _Plain:
    """Copies values into plain containers and reads the tensors. Each storage is read once and stays shared.

    Containers can contain each other and can be shared a thousand times. `left` bounds the number of visits.
    """

    def __init__(self, read: _Read, foreign: bool, left: Iterator[int]) -> None:
        self.read = read
        self.foreign = foreign
        self.left = left
        self.storages: dict[str, Tensor] = {}
        self.kept: list[bytes | str] = []  # so that their ids stay theirs

    def copy(self, value: Any, depth: int) -> Any:
        if depth > DEEPEST or next(self.left, None) is None:
            raise ArchiveError(f"containers nested more than {DEEPEST} levels deep, or repeated too many times")
        kind = type(value)
        if kind is numpy_pickle.Array and value.content is not None:
            return self.array(value.content)
        if kind is Foreign and value.content is not None:
            kind, value = dict, value.content
        if kind is dict:
            return {self.alone(key): self.copy(item, depth + 1) for key, item in value.items()}
        if kind is list:
            return [self.copy(item, depth + 1) for item in value]
        if kind is tuple:
            return tuple(self.copy(item, depth + 1) for item in value)
        return self.tensor(value) if kind is View else self.alone(value)

    def alone(self, value: Any) -> Any:
        """Return a value that is neither a container nor a tensor."""
        if type(value) in _NUMPY:
            value = Foreign(_NUMPY[type(value)])
        if type(value) is Storage:
            value = Foreign("torch.UntypedStorage")
        if type(value) is Foreign:
            if not self.foreign:
                raise CodeError(f"it contains objects that need code to load ({value.name})")
            return Foreign(value.name)
        return value

    def array(self, content: numpy_pickle.Content) -> Tensor:
        """Return a NumPy array as a tensor. Its bytes are a storage, so that arrays with the same bytes share them."""
        key = f"numpy {id(content.raw)}"
        if key not in self.storages:
            try:
                raw = bytearray(content.raw.encode("latin1") if isinstance(content.raw, str) else content.raw)
            except UnicodeEncodeError as error:
                raise ArchiveError(DAMAGED) from error
            self.storages[key] = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0).byte()
            self.kept.append(content.raw)
        count = len(self.storages[key]) // content.dtype.itemsize
        return self.tensor(
            view_of(Storage(key, content.dtype, count), 0, content.shape, content.strides, content.dtype)
        )

    def tensor(self, view: View) -> Tensor:
        key, needed = view.storage.key, view.storage.count * view.storage.dtype.itemsize
        try:
            if key not in self.storages:
                raw = bytearray(self.read(key))
                self.storages[key] = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0).byte()
            stored = self.storages[key]
            if needed > len(stored):
                raise ArchiveError("damaged: a tensor claims more bytes than are stored")
            whole = needed // view.dtype.itemsize * view.dtype.itemsize
            return stored[:whole].view(view.dtype).as_strided(view.size, view.stride, view.offset)
        except ArchiveError:
            raise
        except Exception as error:  # zipfile and torch raise many types on damaged files
            raise ArchiveError(DAMAGED) from error
