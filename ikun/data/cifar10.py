"""CIFAR-10 (Krizhevsky 2009, Learning multiple layers of features from tiny images) in its two published formats.

The binary format has records of 1 label byte and 3072 pixel bytes, in files NAME.bin. The Python format has a pickled
dict with 'data' [N, 3072] and 'labels' [N], in files NAME. The 3072 pixel bytes are the red, the green and the blue
plane, each 32 x 32 in row-major order (https://www.cs.toronto.edu/~kriz/cifar.html).

The files are not trusted: unpickling never imports or calls anything that a pickle names.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import numpy as np

from ikun.data.arrays import Int64Array, UInt8Array
from ikun.data.download import DataError, data_folder, expand, fetch, read_up_to, reason

URL = "https://www.cs.toronto.edu/~kriz/"
FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
FORMATS = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}  # folder -> suffix of its files
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
MD5 = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
}
MAX_FILE_BYTES = 64 * 2**20  # twice the size of a published file
MAX_UNPACKED_BYTES = 256 * 2**20  # one and a half times the unpacked size of a published archive
MAX_MEMBERS = 100
_CLASSES = 10
_SHAPE = (3, 32, 32)
_PIXELS = 3072
_Batch = tuple[UInt8Array, UInt8Array]  # pixels [n, 3072], labels [n]


def read_cifar10(
    split: str, data_dir: str | Path | None, download: bool, base_url: str | None
) -> tuple[UInt8Array, Int64Array]:
    """Read one split of CIFAR-10. The files may hold any number of images.

    Args:
        split: "train" or "test".
        data_dir: The folder of the .bin files or of the pickled files, its parent folder, a folder that holds one of
            the .tar.gz archives, or an archive itself. Archives are not unpacked to disk. None: the default folder.
        download: Download the binary archive into the folder if there are no files.
        base_url: Address to download from (default: URL).

    Returns:
        Pixels [N, 3, 32, 32] in 0..255 and labels [N] in 0..9.

    Raises:
        DataError: If files are missing, unreadable, too large or malformed, or the download fails.
    """
    parts = [_parse(content, where) for where, content in _contents(split, data_dir, download, base_url)]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return pixels.reshape(-1, *_SHAPE), labels.astype(np.int64)


def _contents(
    split: str, data_dir: str | Path | None, download: bool, base_url: str | None
) -> list[tuple[str, bytearray]]:
    """Return (name for messages, content) of every file of a split, in order."""
    if data_dir is not None and os.path.isfile(expand(data_dir)):
        return _from_archive(expand(data_dir), split)
    folder = data_folder("cifar10", data_dir)
    for name, ending in FORMATS.items():
        for place in (folder / name, folder):
            paths = [place / (stem + ending) for stem in FILES[split]]
            missing = [path for path in paths if not os.path.isfile(path)]
            if missing and len(missing) < len(paths):
                raise DataError(f"no file {missing[0]}, but other files of the split are there: put it into the folder")
            if not missing:
                return [(str(path), _from_file(path)) for path in paths]
    for archive in ARCHIVES:
        if os.path.isfile(folder / archive):
            return _from_archive(folder / archive, split)
    if not download:
        stem = FILES[split][0]
        raise DataError(
            "no {}.bin, {}, {} in {}: put them there, pass another folder as {data_dir}, or allow the download",
            *(stem, stem, " or ".join(ARCHIVES), folder),
            data_dir=...,
        )
    target = folder / ARCHIVES[0]
    fetch(f"{(base_url or URL).rstrip('/')}/{target.name}", target, MD5[target.name])
    return _from_archive(target, split)


def _from_file(path: Path) -> bytearray:
    """Return the content of a file, or one byte more than MAX_FILE_BYTES of it."""
    try:
        with path.open("rb") as file:
            return read_up_to(file, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path} ({reason(error)}): replace it with a good copy") from error


def _from_archive(path: Path, split: str) -> list[tuple[str, bytearray]]:
    """Return the same as `_contents`, from the members of an archive. Members with other names are ignored."""
    choices = [[f"{folder}/{stem}{ending}" for stem in FILES[split]] for folder, ending in FORMATS.items()]
    found: dict[str, bytearray] = {}
    try:
        with gzip.open(path) as packed:
            stream = cast(IO[bytes], _Bounded(cast(IO[bytes], packed)))
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for i, member in enumerate(archive):
                    if i == MAX_MEMBERS:
                        raise OSError(f"it has more than {MAX_MEMBERS} members")
                    if member.isreg() and member.name not in found and any(member.name in names for names in choices):
                        content = archive.extractfile(member)
                        assert content is not None  # it is a regular file
                        found[member.name] = read_up_to(content, MAX_FILE_BYTES + 1)
                    if any(found.keys() >= set(names) for names in choices):
                        break
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"cannot read {path} ({reason(error)}): replace it with a good copy") from error
    for names in choices:
        if found.keys() >= set(names):
            return [(f"{path}: {name}", found[name]) for name in names]
    wanted = next((name for names in choices if found.keys() & set(names) for name in names if name not in found), "")
    raise DataError(f"{path} holds no {wanted or ' and no '.join(names[0] for names in choices)}: replace the archive")


class _Bounded:
    """A stream that raises OSError after MAX_UNPACKED_BYTES."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.left = stream, MAX_UNPACKED_BYTES

    def read(self, count: int) -> bytes:
        data = self.stream.read(min(count, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise OSError(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        return data


def _parse(content: bytearray, where: str) -> _Batch:
    """Return the pixels and labels of one file in either format."""
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{where} has more than {MAX_FILE_BYTES} bytes: replace it with a good copy")
    if where.endswith(".bin"):
        if not content or len(content) % (1 + _PIXELS):
            raise DataError(
                f"{where} has {len(content)} bytes, not a whole number of {1 + _PIXELS}-byte records: replace it"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
        pixels, labels = records[:, 1:], records[:, 0]
    else:
        try:
            pixels, labels = _batch(_Unpickler(content).load())
        except Exception as error:  # a damaged pickle can fail in any way
            raise DataError(
                f"{where} is not a CIFAR-10 batch in the Python format ({reason(error)}): replace it with a good copy"
            ) from error
    if (labels >= _CLASSES).any():
        at = int(np.flatnonzero(labels >= _CLASSES)[0])
        raise DataError(f"label {labels[at]} at index {at} of {where} is not in 0..9: replace the file")
    return pixels, labels


class _Inert:
    """A placeholder for an object that a pickle names. It records its call's arguments and its state."""

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args = name, args
        self.state: Any = ()

    def __call__(self, *args: Any) -> _Inert:
        return _Inert(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Encode(_Inert):
    """A restricted _codecs.encode, which Python 3 uses to write bytes in protocol 2.

    It encodes only latin1, and in total no more characters than the file has bytes: a small file could ask for the
    same text again and again.
    """

    def __init__(self, left: int) -> None:
        super().__init__("encode")
        self.left = left

    def __call__(self, *args: Any) -> Any:
        text, encoding = args
        self.left -= len(text)
        if type(text) is not str or encoding != "latin1" or self.left < 0:
            raise pickle.UnpicklingError("it asks for an encoding other than latin1, or for too much text")
        return text.encode("latin1")


# The opcodes for a dict of bytes, integers, lists and arrays, as Python 2 (the published files) or Python 3 writes it.
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD),
)
_GLOBALS = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
}


class _Names(dict[Any, Any]):
    """A dict that accepts only strings as keys: the hash of a deeply nested tuple would overflow the stack."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, bytes | str):
            raise pickle.UnpicklingError("a key is not a string")
        super().__setitem__(key, value)


class _Unpickler(pickle._Unpickler):
    """A restricted unpickler. Unlike the C implementation, Python's does not allocate sizes that a file only claims."""

    dispatch: ClassVar = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES} | {
        pickle.EMPTY_DICT[0]: lambda self: self.append(_Names())
    }

    def __init__(self, content: bytearray) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.encode = _Encode(len(content))

    def find_class(self, module: str, name: str) -> _Inert:
        if (module, name) == ("_codecs", "encode"):
            return self.encode
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _Inert(name)


def _batch(loaded: Any) -> _Batch:
    """Return the arrays of an unpickled batch. It may raise any Exception if the object is not a batch."""
    values = {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    array, labels = values["data"], values["labels"]
    if not isinstance(array, _Inert) or array.name != "_reconstruct":
        raise ValueError("'data' is not an array")
    _, shape, dtype, columns_first, raw = array.state
    if not isinstance(dtype, _Inert) or dtype.name != "dtype" or dtype.args[0] not in ("u1", b"u1") or columns_first:
        raise ValueError("'data' is not an array of bytes in row-major order")
    if shape != (len(labels), _PIXELS) or not labels:
        raise ValueError(f"{len(labels)} labels, but 'data' of shape {shape} instead of [labels, {_PIXELS}]")
    if not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise ValueError("'labels' is not a list of whole numbers from 0 to 255")
    return np.frombuffer(raw, np.uint8).reshape(shape), np.array(labels, np.uint8)
