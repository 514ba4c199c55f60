"""A folder of images, a folder a class, of any size: files are decoded when they are asked for, and never kept.

DIR/train/CLASS/* and DIR/test/CLASS/* (or DIR/val); the classes are the folders' names under train, sorted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ikun.data.download import DataError, expand, reason

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FOLDERS = {"train": ("train",), "test": ("test", "val")}
MAX_IMAGE_SIZE = 4096
MAX_PIXELS = 2**27  # of one file, 384 MiB decoded
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Images [N,3,S,S] float32 in [0,1] of the files root/names[i]; see `decoded` for what becomes of a file."""

    root: Path
    names: Sequence[str]
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), 3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Decoded in threads, as many as there are processors. Raises DataError for a file that is no image."""
        paths = [self.root / self.names[i] for i in torch.arange(len(self))[index].tolist()]
        images = np.empty((len(paths), self.size, self.size, 3), np.uint8)
        for i, image in enumerate(_pool().map(partial(decoded, size=self.size), paths)):
            images[i] = image
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Listing:
    """The image files of a split in order: names [N] relative to `root`, sizes in bytes [N], labels [N]."""

    root: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: Int64Array
    classes: int

    def chosen(self, order: npt.NDArray[np.intp]) -> Listing:
        """The files at these positions."""
        names, sizes = (tuple(values[i] for i in order) for values in (self.names, self.sizes))
        return Listing(self.root, names, sizes, self.labels[order], self.classes)

    def digest(self, size: int) -> str:
        """SHA-256 of the image size, and of every file's name, size and label: not of the pixels, which would take a
        pass over all of them. A file changed without a change of its size is not noticed."""
        digest = hashlib.sha256(f"image-folder {size}\n".encode())
        for name, length, label in zip(self.names, self.sizes, self.labels, strict=True):
            digest.update(os.fsencode(name) + f"\0{length} {label}\n".encode())
        return digest.hexdigest()


def listing(split: str, data_dir: str | Path | None) -> Listing:
    """The files of a split, by class, then by name. Raises DataError for folders that are not as they should be."""
    if data_dir is None:
        raise DataError("image-folder needs the folder that holds train/CLASS/ and test/CLASS/: give it as --data-dir")
    root = expand(data_dir)
    train = _existing(root, "train")
    place = _existing(root, split)
    classes = {name: label for label, (name, _) in enumerate(_entries(train, folders=True))}
    if not classes:
        raise DataError(f"no folders of classes in {train}: put images into {train}/CLASS/")
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    for name, _ in _entries(place, folders=True):
        if name not in classes:
            raise DataError(f"{place / name} is a class that {train} does not have: rename or remove it")
        files = _entries(place / name, folders=False)
        if not files:
            raise DataError(f"no images ({', '.join(ENDINGS)}) in {place / name}: add some or remove the folder")
        names += [f"{place.name}/{name}/{file}" for file, _ in files]
        sizes += [size for _, size in files]
        labels += [classes[name]] * len(files)
    if not names:
        raise DataError(f"no folders of classes in {place}: put images into {place}/CLASS/")
    return Listing(root, tuple(names), tuple(sizes), np.array(labels, np.int64), len(classes))


def decoded(path: Path, size: int) -> UInt8Array:
    """A file as RGB [size, size, 3]: the shorter side resized to `size` (bilinear, antialiased), then the centre.

    Raises DataError for a file that cannot be decoded, in full, as one of the formats, or has more than MAX_PIXELS or
    grey values of more than 8 bits.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            if image.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
                raise ValueError(f"its pixels, of mode {image.mode}, have more than 8 bits")
            scaled = max(size, width * size // height), max(size, height * size // width)
            rgb = image.convert("RGB").resize(scaled, Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise DataError(f"cannot decode {path} ({reason(error)}): replace or remove the file") from error
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "decode")


def _existing(root: Path, split: str) -> Path:
    for name in FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"no folder {' or '.join(FOLDERS[split])} in {root}: give the folder that holds it as --data-dir")


def _entries(folder: Path, folders: bool) -> list[tuple[str, int]]:
    """(name, size) of the folders, or of the image files, in a folder, sorted by name; hidden ones are passed over."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry.name, entry.stat().st_size)
                for entry in entries
                if not entry.name.startswith(".")
                and (entry.is_dir() if folders else entry.name.lower().endswith(ENDINGS) and entry.is_file())
            )
    except OSError as error:
        raise DataError(f"cannot read {folder} ({reason(error)}): check the folder and its permissions") from error
