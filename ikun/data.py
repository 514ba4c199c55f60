"""Image data sets, their files, and the coding of pixels into spikes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import math
import os
import urllib.request
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import torch

NAMES = ("digits", "fashion-mnist")
SPLITS = ("train", "test")
CODINGS = ("direct", "poisson")

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# split -> (images file, labels file); the sums are those of the published .gz files.
FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}

MAX_IDX_BYTES = 4 * 2**30
MAX_DOWNLOAD_BYTES = 256 * 2**20
DOWNLOAD_TIMEOUT_S = 60.0

_CLASSES = 10
_DIGITS_SEED = 20240229
_DIGITS_TRAIN = 1437
_CHUNK = 2**20
_MAX_RANK = 32  # numpy's limit before version 2
_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UBYTE = 0x08

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


class DataError(ValueError):
    """A failure the user can mend: one line saying what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        # Reasons quoted from the system, and file names, may hold line breaks.
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class Dataset:
    """Labelled images: `images` [N,C,H,W] float32 in [0,1], `labels` [N] int64 in 0..classes-1.

    `sha256` identifies the very samples in their order, so two sets compare equal by it and not by their tensors.
    """

    name: str
    split: str
    images: torch.Tensor = field(repr=False, compare=False)
    labels: torch.Tensor = field(repr=False, compare=False)
    classes: int
    sha256: str

    def __len__(self) -> int:
        return int(self.labels.shape[0])


def load(
    name: str,
    split: str = "train",
    *,
    subset: int | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    download: bool = True,
    base_url: str = FASHION_MNIST_URL,
) -> Dataset:
    """Load one split of a data set, all of it in file order or a seeded random subset.

    digits: scikit-learn's copy of the UCI digits, [1797,1,8,8], split 1437/360 once and for all; the arguments about
    files do not matter. fashion-mnist: IDX files (Xiao et al. 2017, arXiv:1708.07747) from `data_dir`, any count of
    images of any one size; files not found there are downloaded into it from `base_url` if `download`.
    The first k samples of a subset are the subset of size k with the same seed.
    Raises DataError for an unknown name or split, a bad subset or seed, and missing, unreachable or malformed files.
    """
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r} of {name}: choose one of {', '.join(SPLITS)}")
    if seed < 0:
        raise DataError(f"the seed of a subset is {seed}: give a whole number >= 0")
    if name == "digits":
        pixels, labels, top = _digits(split)
    else:
        pixels, labels, top = _fashion_mnist(split, data_dir, download, base_url)
    if subset is not None:
        count = len(labels)
        if not 1 <= subset <= count:
            raise DataError(f"a subset of {subset} of {name} {split} ({count} images): choose a size from 1 to {count}")
        chosen = _permutation(count, seed)[:subset]
        pixels, labels = pixels[chosen], labels[chosen]
    images = pixels[:, None].astype(np.float32)
    images /= np.float32(top)
    return Dataset(
        name=name,
        split=split,
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        classes=_CLASSES,
        sha256=_digest(images, labels),
    )


def read_idx(path: str | Path) -> UInt8Array:
    """Read an IDX file of unsigned bytes, gzipped or not (told by its content), as an array of the header's shape.

    The format: bytes 0, 0, 8, rank, then rank sizes as big-endian 32-bit integers, then the data in C order
    (http://yann.lecun.com/exdb/mnist). Memory grows with the bytes found, never with what the header claims.
    Raises DataError if the file is missing, unreadable, no such IDX, truncated, too long, or over 4 GiB.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file raises where a folder may not be searched
        raise DataError(f"no file {path} that can be read: check the path and its permissions")
    try:
        with path.open("rb") as raw:
            if raw.read(2) == _GZIP_MAGIC:
                raw.seek(0)
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    return _parse_idx(cast(IO[bytes], unpacked), path)
            raw.seek(0)
            return _parse_idx(raw, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({_reason(error)}): replace it with a good copy") from error


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
        raise _download_failed(url, target, _reason(error)) from error
    finally:
        _remove(part)
    if found != md5:
        raise _download_failed(url, target, f"its MD5 is {found}, not {md5}")


def encode(images: torch.Tensor, timesteps: int, coding: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Code images [N,...] for a spiking network that runs `timesteps` steps.

    direct: the images unchanged, [N,...]; the network repeats them itself. poisson: independent Bernoulli spikes,
    0 or 1 in the images' dtype, [N,T,...], each with the pixel value as its probability. Drawn from `generator`
    (default: torch's own) on the CPU, so that one seed gives the same spikes on every device.
    Raises DataError for an unknown coding, timesteps < 1, a generator off the CPU, or pixels outside [0,1].
    """
    if coding not in CODINGS:
        raise DataError(f"unknown coding {coding!r}: choose one of {', '.join(CODINGS)}")
    if timesteps < 1:
        raise DataError(f"{timesteps} timesteps: give a whole number >= 1")
    if coding == "direct":
        return images
    if generator is not None and generator.device.type != "cpu":
        raise DataError(f"poisson coding with a generator on {generator.device}: give one on the cpu")
    # Always float32 draws: another dtype would consume the generator differently.
    probability = images.detach().to("cpu", torch.float32)
    if not bool(((probability >= 0) & (probability <= 1)).all()):
        raise DataError("poisson coding of pixels outside [0,1]: scale the images first")
    draws = torch.rand(
        (len(images), timesteps, *images.shape[1:]), generator=generator, dtype=torch.float32, device="cpu"
    )
    dtype = images.dtype if images.is_floating_point() else torch.float32
    return (draws < probability[:, None]).to(images.device, dtype)


def batches(images: torch.Tensor, labels: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut images [N,...] and labels [N] into views of `size` samples in order, the last one possibly smaller.

    Raises DataError if size < 1 or the counts differ.
    """
    if size < 1:
        raise DataError(f"a batch size of {size}: give a whole number >= 1")
    count = len(images)
    if len(labels) != count:
        raise DataError(f"{count} images but {len(labels)} labels to cut into batches: give one label per image")
    return [(images[start : start + size], labels[start : start + size]) for start in range(0, count, size)]


def default_data_dir() -> Path:
    """Where Fashion-MNIST is kept if the user names no folder: under XDG_CACHE_HOME, else under ~/.cache.

    Raises DataError if there is no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # A relative value is to be ignored (XDG Base Directory Specification).
    root = Path(cache) if os.path.isabs(cache) else _expand("~/.cache")
    return root / "ikun-hessian" / "fashion-mnist"


def _digits(split: str) -> tuple[UInt8Array, Int64Array, int]:
    """Pixels [N,8,8] in 0..16, labels [N], and the largest pixel value."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"digits needs scikit-learn ({_reason(error)}): install scikit-learn") from error
    bunch = load_digits()
    order = _permutation(len(bunch.target), _DIGITS_SEED)
    chosen = order[:_DIGITS_TRAIN] if split == "train" else order[_DIGITS_TRAIN:]
    return bunch.images[chosen].astype(np.uint8), bunch.target[chosen].astype(np.int64), 16


def _fashion_mnist(
    split: str, data_dir: str | Path | None, download: bool, base_url: str
) -> tuple[UInt8Array, Int64Array, int]:
    """Pixels [N,H,W] in 0..255, labels [N] in 0..9, and the largest pixel value."""
    folder = default_data_dir() if data_dir is None else _expand(data_dir)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise DataError(f"{folder} is not a folder: give the folder of the Fashion-MNIST files as --data-dir")
    images_path, labels_path = (_locate(folder, stem, download, base_url) for stem in FASHION_MNIST_FILES[split])
    pixels, labels = read_idx(images_path), read_idx(labels_path)
    if pixels.ndim != 3 or pixels.size == 0:
        raise DataError(f"{images_path} has shape {pixels.shape}, not [images, height, width]: replace it")
    if labels.ndim != 1:
        raise DataError(f"{labels_path} has shape {labels.shape}, not [labels]: replace it")
    if len(pixels) != len(labels):
        raise DataError(
            f"{len(pixels)} images in {images_path} but {len(labels)} labels in {labels_path}: replace the wrong one"
        )
    wrong = np.flatnonzero(labels >= _CLASSES)
    if wrong.size:
        where = int(wrong[0])
        raise DataError(f"label {labels[where]} at index {where} of {labels_path} is not in 0..9: replace the file")
    return pixels, labels.astype(np.int64), 255


def _locate(folder: Path, stem: str, download: bool, base_url: str) -> Path:
    """The plain file, else the gzipped one, else the gzipped one after downloading it."""
    packed = folder / f"{stem}.gz"
    for path in (folder / stem, packed):
        if os.path.isfile(path):
            return path
    if not download:
        raise DataError(f"no {stem} or {stem}.gz in {folder}: put it there, give another --data-dir or allow download")
    fetch(f"{base_url.rstrip('/')}/{packed.name}", packed, FASHION_MNIST_MD5[stem])
    return packed


def _parse_idx(stream: IO[bytes], path: Path) -> UInt8Array:
    """Read an IDX stream to its end, or to the first byte beyond what its header claims."""
    head = _read_up_to(stream, 4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _IDX_UBYTE or not 1 <= head[3] <= _MAX_RANK:
        raise DataError(
            f"{path} starts with bytes {head.hex() or 'none'}, not 000008 and a rank from 1 to {_MAX_RANK}: "
            "give an IDX file of unsigned bytes"
        )
    rank = head[3]
    sizes = _read_up_to(stream, 4 * rank)
    if len(sizes) < 4 * rank:
        raise DataError(f"{path} is truncated in its header: replace it with a complete copy")
    shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * rank, 4))
    # An axis of 0 does not excuse the others: numpy refuses such a shape too.
    if math.prod(max(size, 1) for size in shape) > MAX_IDX_BYTES:
        raise DataError(f"{path} claims the shape {shape}, more than {MAX_IDX_BYTES} bytes: replace it")
    count = math.prod(shape)
    found = _read_up_to(stream, count + 1)  # one more, to see that the end is there
    if len(found) < count:
        raise DataError(f"{path} is truncated: {len(found)} of the {count} data bytes of shape {shape}; replace it")
    if len(found) > count:
        raise DataError(f"{path} goes on after the {count} data bytes of shape {shape}: replace it with a good copy")
    return np.frombuffer(found, dtype=np.uint8).reshape(shape)


def _read_up_to(stream: IO[bytes], count: int) -> bytearray:
    """At most `count` bytes, fewer at the end of the stream; in pieces, as read(count) may allocate count at once."""
    data = bytearray()
    while len(data) < count:
        piece = stream.read(min(_CHUNK, count - len(data)))
        if not piece:
            break
        data += piece
    return data


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


def _remove(path: Path) -> None:
    # Where even this fails the file was never made, and the failure itself is already on its way.
    with contextlib.suppress(OSError, ValueError):
        path.unlink(missing_ok=True)


def _download_failed(url: str, target: Path, reason: str) -> DataError:
    return DataError(
        f"cannot download {url} ({reason}): put {target.name} into {target.parent} by hand, "
        "or name a folder that holds it with --data-dir"
    )


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _expand(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"cannot find the home folder in {path} ({_reason(error)}): give --data-dir in full") from error


def _permutation(count: int, seed: int) -> npt.NDArray[np.intp]:
    """A permutation [count] of 0..count-1.

    By sorting raw draws: numpy keeps PCG64's raw stream the same for ever, but not Generator.permutation (NEP 19).
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _digest(images: npt.NDArray[np.float32], labels: Int64Array) -> str:
    """SHA-256 of the shape, the float32 image bytes and the int64 label bytes, all little-endian in C order."""
    digest = hashlib.sha256(repr(tuple(int(size) for size in images.shape)).encode())
    digest.update(np.ascontiguousarray(images, dtype="<f4").data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()
