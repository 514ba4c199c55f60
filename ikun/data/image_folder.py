"""A data set in a folder of image files, with one subfolder per class.

The files are DIR/train/CLASS/* and DIR/test/CLASS/* (or DIR/val/CLASS/*). The classes are the sorted names of the
folders in DIR/train. Files are decoded each time they are indexed and are not kept in memory.
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

from hessian_tools.runtime.cores import available_cores
from ikun.data.arrays import Int64Array, UInt8Array
from ikun.data.download import DataError, expand, reason

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FOLDERS = {"train": ("train",), "test": ("test", "val")}
MAX_IMAGE_SIZE = 4096
MAX_PIXELS = 2**27  # of one file: 384 MiB when decoded
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Images [N, 3, S, S], float32 in [0, 1], that are decoded when they are indexed (see `decoded`).

    Attributes:
        root: Folder of the data set.
        names: Names [N] of the files, relative to `root`.
        size: Side S of the images in pixels.
    """

    root: Path
    names: Sequence[str]
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), 3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Decode the images at some positions [n] or in a slice, in one thread per processor.

        Raises:
            DataError: If a file cannot be decoded.
        """
        paths = [self.root / self.names[i] for i in torch.arange(len(self))[index].tolist()]
        images = np.empty((len(paths), self.size, self.size, 3), np.uint8)
        for i, image in enumerate(_pool().map(partial(decoded, size=self.size), paths)):
            images[i] = image
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Listing:
    """The image files of a split, in order.

    Attributes:
        root: Folder of the data set.
        names: Names [N] of the files, relative to `root`.
        sizes: Sizes [N] of the files in bytes.
        labels: Labels [N].
        classes: Number of classes.
    """

    root: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: Int64Array
    classes: int

    def chosen(self, order: npt.NDArray[np.intp]) -> Listing:
        """Return the files at the positions `order` [n]."""
        names, sizes = (tuple(values[i] for i in order) for values in (self.names, self.sizes))
        return Listing(self.root, names, sizes, self.labels[order], self.classes)

    def digest(self, size: int) -> str:
        """Return the SHA-256 of the image size and of every file's name, size in bytes and label.

        The pixels are not hashed, because that would need a pass over all files. A file that changes but keeps its
        size is not noticed.
        """
        digest = hashlib.sha256(f"image-folder {size}\n".encode())
        for name, length, label in zip(self.names, self.sizes, self.labels, strict=True):
            digest.update(os.fsencode(name) + f"\0{length} {label}\n".encode())
        return digest.hexdigest()


def listing(split: str, data_dir: str | Path | None) -> Listing:
    """List the files of a split, sorted by class and then by name.

    Raises:
        DataError: If a folder is missing, unreadable or empty, or the test split has a class that the training split
            does not have.
    """
    if data_dir is None:
        raise DataError(
            "image-folder needs the folder that holds train/CLASS/ and test/CLASS/: give it as {data_dir}", data_dir=...
        )
    root = expand(data_dir)
    train = _existing(root, "train")
    place = _existing(root, split)
    classes = {name: label for label, (name, _) in enumerate(_entries(train, folders=True))}
    if not classes:
        raise DataError(f"no class folders in {train}: put images into {train}/CLASS/")
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
        raise DataError(f"no class folders in {place}: put images into {place}/CLASS/")
    return Listing(root, tuple(names), tuple(sizes), np.array(labels, np.int64), len(classes))


def decoded(path: Path, size: int) -> UInt8Array:
    """Decode a file as an RGB image [size, size, 3].

    The shorter side is resized to `size` pixels (bilinear, antialiased), and the centre is cropped.

    Raises:
        DataError: If the file cannot be decoded completely as PNG, JPEG, BMP or WebP, has more than MAX_PIXELS pixels,
            or has grey values of more than 8 bits.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            if image.mode.startswith(("I", "F")):  # Pillow would clip the values at 255
                raise ValueError(f"its pixels, of mode {image.mode}, have more than 8 bits")
            scaled = max(size, width * size // height), max(size, height * size // width)
            if scaled[0] * scaled[1] > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too thin: crop it to a ratio nearer to 1")
            rgb = image.convert("RGB").resize(scaled, Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow raises many types of errors for damaged files
        raise DataError(f"cannot decode {path} ({reason(error)}): replace or remove the file") from error
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


@cache
def _pool() -> ThreadPoolExecutor:
    """Return the threads that decode, the same ones in every call."""
    return ThreadPoolExecutor(available_cores(), "decode")


def _existing(root: Path, split: str) -> Path:
    """Return the folder of a split."""
    for name in FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        "no folder {} in {}: give the folder that holds it as {data_dir}",
        *(" or ".join(FOLDERS[split]), root),
        data_dir=...,
    )


def _entries(folder: Path, folders: bool) -> list[tuple[str, int]]:
    """Return (name, size) of the subfolders or of the image files of a folder, sorted. Hidden names are ignored."""
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
