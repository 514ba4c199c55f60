"""N-MNIST: recordings of MNIST digits by an event camera that moves in three saccades (Orchard et al. 2015,
https://www.garrickorchard.com/datasets/n-mnist), in frames.

The data set has two archives, Train.zip and Test.zip, with one file per recording, such as Train/5/00001.bin; 5 is the
label. A file is a sequence of events of five bytes: x, y, and three bytes, most significant first, with one bit of
polarity and 23 bits of time in microseconds. An event with y = 240 is not a spike: it adds 2^13 microseconds to its own
time and to those that follow.

Recordings are read and divided into frames each time they are indexed, and are not kept in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessian_tools.runtime.cores import available_cores
from ikun.data.arrays import Int64Array
from ikun.data.download import DataError, data_folder, fetch, read_up_to, reason

URL = "https://data.mendeley.com/public-files/datasets/468j46mzdv/files/"
# split -> (archive, path below URL, MD5 sum of the archive)
ARCHIVES = {
    "train": (
        "Train.zip",
        "39c25547-014b-4137-a934-9d29fa53c7a0/file_downloaded",
        "20959b8e626244a1b502305a9e6e2031",
    ),
    "test": (
        "Test.zip",
        "05a4d654-7e03-4c15-bdfa-9bb2bcbea494/file_downloaded",
        "69ca8762b2fe404d9b9bad1103e97832",
    ),
}
FOLDERS = {"train": "Train", "test": "Test"}
SIDE, CLASSES = 34, 10
FRAMES, MOST_FRAMES = 10, 10_000  # default and largest number of frames
MAX_RECORDING_BYTES = 16 * 2**20  # 400 times the largest published file
MAX_ARCHIVE_BYTES = 2 * 2**30
MAX_RECORDINGS = 10_000_000
_OVERFLOW_ROW, _OVERFLOW_US = 240, 2**13
_NAME = re.compile(r"(?:^|/)(Train|Test)/(\d)/([^/]+\.bin)$")


@dataclass(frozen=True)
class Recordings:
    """The recordings of a split, in order.

    Attributes:
        place: The archive, or the folder that holds Train and Test.
        names: Names [N] of the files in `place`.
        sizes: Sizes [N] of the files in bytes.
        labels: Labels [N].
    """

    place: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: Int64Array

    def chosen(self, order: npt.NDArray[np.intp]) -> Recordings:
        """Return the recordings at the positions `order` [n]."""
        names, sizes = (tuple(values[i] for i in order) for values in (self.names, self.sizes))
        return Recordings(self.place, names, sizes, self.labels[order])

    def digest(self, frames: int) -> str:
        """Return the SHA-256 of the number of frames and of every file's name, size in bytes and label.

        It is the same for an archive and for its unpacked folder. The events are not hashed, because that would need a
        pass over all files. A file that changes but keeps its size is not noticed.
        """
        digest = hashlib.sha256(f"n-mnist {frames}\n".encode())
        for name, size, label in zip(self.names, self.sizes, self.labels, strict=True):
            match = cast(re.Match[str], _NAME.search(name))
            digest.update(f"{match[1]}/{match[2]}/{match[3]}\0{size} {label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class EventFrames:
    """Recordings as frames [N, T, 2, 34, 34], float32, that are read when they are indexed (see `frames_of`).

    Attributes:
        place: The archive or folder of the recordings.
        names: Names [N] of the files in it.
        frames: Number of frames T.
    """

    place: Path
    names: Sequence[str]
    frames: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), self.frames, 2, SIDE, SIDE)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Read the recordings at some positions [n] or in a slice, in one thread per processor.

        Raises:
            DataError: If a file cannot be read or is malformed.
        """
        names = [self.names[i] for i in torch.arange(len(self))[index].tolist()]
        found = np.empty((len(names), *self.shape[1:]), np.float32)
        for i, frames in enumerate(_pool().map(partial(_read_frames, self.place, self.frames), names)):
            found[i] = frames
        return torch.from_numpy(found)


def recordings(
    split: str, data_dir: str | Path | None = None, download: bool = True, base_url: str | None = None
) -> Recordings:
    """List the recordings of a split, sorted by label and then by name. No recording is read.

    Args:
        split: "train" or "test".
        data_dir: The folder of the archives or of the unpacked folders Train and Test. None: the default folder.
        download: Download a missing archive (1 GB for the training split) into the folder.
        base_url: Address to download from (default: URL).

    Raises:
        DataError: If files are missing, unreadable or empty, or the download fails.
    """
    folder = data_folder("n-mnist", data_dir)
    name, path, md5 = ARCHIVES[split]
    if (folder / FOLDERS[split]).is_dir():
        return _listed(folder, split, _files(folder, split))
    archive = next((p for p in (folder / name, folder / name.lower()) if os.path.isfile(p)), folder / name)
    if not os.path.isfile(archive):
        if not download:
            raise DataError(
                "no {} and no folder {} in {}: put one there, pass another folder as {data_dir}, or allow the download",
                *(name, FOLDERS[split], folder),
                data_dir=...,
            )
        fetch(f"{(base_url or URL).rstrip('/')}/{path}", archive, md5, most=MAX_ARCHIVE_BYTES)
    try:
        members = [(i.filename, i.file_size) for i in _archive(archive).infolist()]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DataError(f"cannot read {archive} ({reason(error)}): replace it with a good copy") from error
    return _listed(archive, split, members)


def frames_of(content: bytes | bytearray, frames: int, name: str) -> npt.NDArray[np.float32]:
    """Divide the events of a recording into frames.

    Args:
        content: The bytes of the file.
        frames: Number of frames T. They divide the time from the first to the last event into equal parts.
        name: Name of the file, for error messages.

    Returns:
        Number of events [T, 2, 34, 34] by frame, polarity (0: darker, 1: brighter), y and x.

    Raises:
        DataError: If the file has no events, is not a whole number of events, or has events outside 34 x 34 pixels.
    """
    if len(content) > MAX_RECORDING_BYTES:
        raise DataError(f"{name} has more than {MAX_RECORDING_BYTES} bytes: replace it with a good copy")
    if not content or len(content) % 5:
        raise DataError(f"{name} has {len(content)} bytes, not a whole number of 5-byte events: replace the file")
    x, y, *rest = np.frombuffer(content, np.uint8).reshape(-1, 5).astype(np.int64).T
    time = ((rest[0] & 127) << 16 | rest[1] << 8 | rest[2]) + _OVERFLOW_US * np.cumsum(y == _OVERFLOW_ROW)
    spike = y != _OVERFLOW_ROW
    x, y, polarity, time = x[spike], y[spike], rest[0][spike] >> 7, time[spike]
    if not len(x):
        raise DataError(f"{name} has no events: replace or remove the file")
    if x.max() >= SIDE or y.max() >= SIDE:
        raise DataError(
            f"{name} has an event at x = {x.max()}, y = {y.max()}, outside 34 x 34 pixels: replace the file"
        )
    first = time.min()
    frame = (time - first) * frames // (time.max() - first + 1)
    place = ((frame * 2 + polarity) * SIDE + y) * SIDE + x
    counts = np.bincount(place, minlength=frames * 2 * SIDE * SIDE)
    return counts.reshape(frames, 2, SIDE, SIDE).astype(np.float32)


def _read_frames(place: Path, frames: int, name: str) -> npt.NDArray[np.float32]:
    """Read one recording from an archive or a folder."""
    try:
        with (place / name).open("rb") if place.is_dir() else _archive(place).open(name) as file:
            content = read_up_to(file, MAX_RECORDING_BYTES + 1)
    except (OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {name} of {place} ({reason(error)}): replace it with a good copy") from error
    return frames_of(content, frames, f"{place}: {name}")


def _archive(path: Path) -> zipfile.ZipFile:
    """Return an open archive, the same one in every call. Several threads may read from it."""
    found = path.stat()
    return _opened(path, os.getpid(), found.st_size, found.st_mtime_ns)


@lru_cache(4)
def _opened(path: Path, process: int, size: int, modified: int) -> zipfile.ZipFile:
    """Open an archive. A forked process opens its own, because the position in the file is shared."""
    return zipfile.ZipFile(path)


@cache
def _pool() -> ThreadPoolExecutor:
    """Return the threads that read, the same ones in every call."""
    return ThreadPoolExecutor(available_cores(), "events")


def _files(folder: Path, split: str) -> list[tuple[str, int]]:
    """Return (name, size) of the files of an unpacked split. The names are relative to `folder`."""
    found = []
    try:
        for label in range(CLASSES):
            place = folder / FOLDERS[split] / str(label)
            if place.is_dir():
                with os.scandir(place) as entries:
                    found += [(f"{FOLDERS[split]}/{label}/{e.name}", e.stat().st_size) for e in entries if e.is_file()]
    except OSError as error:
        raise DataError(f"cannot read {folder} ({reason(error)}): check the folder and its permissions") from error
    return found


def _listed(place: Path, split: str, members: Sequence[tuple[str, int]]) -> Recordings:
    """Sort the files of a split. Files with other names are ignored."""
    if len(members) > MAX_RECORDINGS:
        raise DataError(f"{place} has more than {MAX_RECORDINGS:,} files: replace it with a good copy")
    known = [(match, size) for name, size in members if (match := _NAME.search(name)) and match[1] == FOLDERS[split]]
    if not known:
        raise DataError(f"no recordings {FOLDERS[split]}/LABEL/NAME.bin in {place}: replace it with a good copy")
    known.sort(key=lambda one: (one[0][2], one[0][3]))
    names, sizes = tuple(match.string for match, _ in known), tuple(size for _, size in known)
    return Recordings(place, names, sizes, np.array([int(match[2]) for match, _ in known], np.int64))
