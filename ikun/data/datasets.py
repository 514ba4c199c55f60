"""Data sets by name."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ikun.data import cifar10, fashion_mnist, image_folder, n_mnist
from ikun.data import randman as spike_times
from ikun.data.arrays import Int64Array, UInt8Array
from ikun.data.download import DataError as DataError
from ikun.data.download import reason
from ikun.data.lazy import Images

DATASETS = ("digits", "fashion-mnist", "cifar10", "image-folder", "spike-times", "n-mnist")
SPLITS = ("train", "test")
_DIGITS_SEED = 20240229
_DIGITS_TRAIN = 1437


@dataclass(frozen=True)
class Dataset:
    """Labelled samples.

    Two data sets compare equal by their `sha256` and not by their tensors.

    Attributes:
        name: One of DATASETS.
        split: One of SPLITS.
        images: Images [N, C, H, W], float32 in [0, 1], or spike trains or frames of events [N, T, C, H, W].
        labels: Labels [N], int64 in 0..classes-1.
        classes: Number of classes.
        sha256: Hash of the samples in their order.
    """

    name: str
    split: str
    images: Images = field(repr=False, compare=False)
    labels: Tensor = field(repr=False, compare=False)
    classes: int
    sha256: str

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a sample, or of one time step of a spike train."""
        channels, height, width = self.images.shape[-3:]
        return channels, height, width

    @property
    def timesteps(self) -> int | None:
        """Number of time steps T of spike trains and frames; None for images, which fit any number of steps."""
        return self.images.shape[1] if len(self.images.shape) == 5 else None


def load_dataset(
    name: str,
    split: str = "train",
    *,
    subset: int | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    frames: int | None = None,
    download: bool = True,
    base_url: str | None = None,
) -> Dataset:
    """Load one split of a data set: all samples in their own order, or a random subset.

    The data sets are:

    - digits: scikit-learn's copy of the UCI digits, [1797, 1, 8, 8], in a fixed split of 1437 and 360 samples.
    - fashion-mnist: see `fashion_mnist.read_fashion_mnist`.
    - cifar10: see `cifar10.read_cifar10`.
    - image-folder: RGB images in a folder with one subfolder per class, decoded when they are used (see
      `image_folder`). Their order is random even without a subset, because the files are sorted by class.
    - spike-times: spike trains (see `randman`).
    - n-mnist: recordings of events in frames, read when they are used (see `n_mnist`). Their order is random too.

    The hash of a data set covers the shape, pixels and labels of its samples. Those of an image folder and of n-mnist
    are `image_folder.Listing.digest` and `n_mnist.Recordings.digest`.

    Args:
        name: One of DATASETS.
        split: One of SPLITS.
        subset: Number of samples to draw; None for all. The first k samples of a subset are the subset of size k with
            the same seed.
        seed: Seed of the subset, and of the order of an image folder or of n-mnist.
        data_dir: Folder of the files. None: the default folder; image-folder has none. digits and spike-times need no
            files.
        image_size: Side in pixels of the images of an image folder; None for other data sets.
        frames: Number of frames of every recording of n-mnist; None for other data sets.
        download: Download missing files of fashion-mnist, cifar10 and n-mnist into the folder.
        base_url: Address to download from (default: the official one).

    Returns:
        The samples.

    Raises:
        DataError: If the name or split is unknown, the subset, seed, image size or number of frames is not valid, or
            files are missing, unreachable or malformed.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r} of {name}: choose one of {', '.join(SPLITS)}")
    if seed < 0:
        raise DataError(f"the seed of a subset is {seed}: give a whole number >= 0")
    if name == "image-folder":
        return _image_folder(split, subset, seed, data_dir, image_size)
    if image_size is not None:
        raise DataError(
            "{image_size}: {} has images of a fixed size; set a size only for image-folder", name, image_size=image_size
        )
    if name == "n-mnist":
        return _n_mnist(split, subset, seed, frames, n_mnist.recordings(split, data_dir, download, base_url))
    if frames is not None:
        raise DataError("{frames}: {} has no events; set it only for n-mnist", name, frames=frames)
    classes, top = 10, 255  # top: the largest pixel value
    if name == "digits":
        (pixels, labels), top = _digits(split), 16
    elif name == "fashion-mnist":
        pixels, labels = fashion_mnist.read_fashion_mnist(split, data_dir, download, base_url)
    elif name == "cifar10":
        pixels, labels = cifar10.read_cifar10(split, data_dir, download, base_url)
    else:
        (pixels, labels), top = spike_times.generate(split), 1
    if subset is not None:
        chosen = _chosen(name, split, len(labels), subset, seed)
        pixels, labels = pixels[chosen], labels[chosen]
    images = pixels.astype(np.float32)
    images /= np.float32(top)
    return Dataset(
        name=name,
        split=split,
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        classes=classes,
        sha256=_digest(images, labels),
    )


def _digits(split: str) -> tuple[UInt8Array, Int64Array]:
    """Return pixels [N, 1, 8, 8] in 0..16 and labels [N]."""
    table = _digits_table()
    pixels, labels = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1]
    order = _permutation(len(labels), _DIGITS_SEED)
    chosen = order[:_DIGITS_TRAIN] if split == "train" else order[_DIGITS_TRAIN:]
    return pixels[chosen].astype(np.uint8), labels[chosen].astype(np.int64)


def _digits_table() -> Any:
    """Return the pixels and the label of every digit of scikit-learn [1797, 65], without the imports of scikit-learn.

    They take a second, and its file is the table.
    """
    try:
        found = importlib.util.find_spec("sklearn")
        file = Path(found.origin if found and found.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
        from sklearn.datasets import load_digits
    except (ImportError, ValueError) as error:
        raise DataError(f"digits needs scikit-learn ({reason(error)}): install scikit-learn") from error
    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def _image_folder(
    split: str, subset: int | None, seed: int, data_dir: str | Path | None, image_size: int | None
) -> Dataset:
    """Load a split of an image folder in random order."""
    if image_size is None or not 1 <= image_size <= image_folder.MAX_IMAGE_SIZE:
        raise DataError(
            "image-folder with images of size {}: give a number of pixels from 1 to {} as {image_size}",
            *(image_size, image_folder.MAX_IMAGE_SIZE),
            image_size=...,
        )
    files = image_folder.listing(split, data_dir)
    count = len(files.names)
    files = files.chosen(_chosen("image-folder", split, count, count if subset is None else subset, seed))
    return Dataset(
        name="image-folder",
        split=split,
        images=image_folder.FolderImages(files.root, files.names, image_size),
        labels=torch.from_numpy(files.labels),
        classes=files.classes,
        sha256=files.digest(image_size),
    )


def _n_mnist(split: str, subset: int | None, seed: int, frames: int | None, files: n_mnist.Recordings) -> Dataset:
    """Load a split of N-MNIST in random order."""
    frames = n_mnist.FRAMES if frames is None else frames
    if not 1 <= frames <= n_mnist.MOST_FRAMES:
        raise DataError("{frames}: give a number of frames from 1 to {}", n_mnist.MOST_FRAMES, frames=frames)
    count = len(files.names)
    files = files.chosen(_chosen("n-mnist", split, count, count if subset is None else subset, seed))
    return Dataset(
        name="n-mnist",
        split=split,
        images=n_mnist.EventFrames(files.place, files.names, frames),
        labels=torch.from_numpy(files.labels),
        classes=n_mnist.CLASSES,
        sha256=files.digest(frames),
    )


def _chosen(name: str, split: str, count: int, subset: int, seed: int) -> npt.NDArray[np.intp]:
    """Return the positions [subset] of a random subset of `count` samples."""
    if not 1 <= subset <= count:
        raise DataError(f"a subset of {subset} of {name} {split} ({count} samples): choose a size from 1 to {count}")
    return _permutation(count, seed)[:subset]


def _permutation(count: int, seed: int) -> npt.NDArray[np.intp]:
    """Return a random permutation [count] of 0..count-1.

    It sorts raw draws, because NumPy guarantees the raw stream of PCG64 not to change, unlike Generator.permutation
    (NEP 19).
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _digest(images: npt.NDArray[np.float32], labels: Int64Array) -> str:
    """Return the SHA-256 of the shape, the float32 images and the int64 labels, little-endian and in C order."""
    digest = hashlib.sha256(repr(tuple(int(size) for size in images.shape)).encode())
    digest.update(np.ascontiguousarray(images, dtype="<f4").data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()
