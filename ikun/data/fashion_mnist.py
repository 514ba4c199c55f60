"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), and a reader of its file format, IDX."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from ikun.data.arrays import Int64Array, UInt8Array
from ikun.data.download import DataError, data_folder, fetch, read_up_to, reason, system_folders

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# split -> (images file, labels file). The MD5 sums are those of the published .gz files.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
MAX_IDX_BYTES = 4 * 2**30
_CLASSES = 10
_MAX_RANK = 32  # the largest number of axes before NumPy 2
_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UBYTE = 0x08


def read_fashion_mnist(
    split: str, data_dir: str | Path | None, download: bool, base_url: str | None
) -> tuple[UInt8Array, Int64Array]:
    """Read one split of Fashion-MNIST. The files may hold any number of images, of any one size.

    Args:
        split: "train" or "test".
        data_dir: The folder of the IDX files, gzipped or not. None: the default folder, or else that of the package
            `dataset-fashion-mnist` of Debian and Ubuntu (see `download.system_folders`).
        download: Download missing files into the folder.
        base_url: Address to download from (default: URL).

    Returns:
        Pixels [N, 1, H, W] in 0..255 and labels [N] in 0..9.

    Raises:
        DataError: If files are missing, unreadable or malformed, do not fit together, or the download fails.
    """
    folder = data_folder("fashion-mnist", data_dir)
    if data_dir is None:
        places = [folder, *system_folders("fashion-mnist")]
        folder = next((place for place in places if _complete(place, split)), folder)
    images_path, labels_path = (_locate(folder, stem, download, base_url) for stem in FILES[split])
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
    return pixels[:, None], labels.astype(np.int64)


def read_idx(path: str | Path) -> UInt8Array:
    """Read an IDX file of unsigned bytes as an array of the shape in its header.

    The format is: bytes 0, 0, 8, rank, then `rank` sizes as big-endian 32-bit integers, then the data in C order
    (http://yann.lecun.com/exdb/mnist). Gzipped files are recognized by their content. The memory used depends on the
    number of bytes in the file and not on the sizes that the header claims.

    Raises:
        DataError: If the file is missing or unreadable, is not such an IDX file, is truncated or too long, or its
            header claims more than 4 GiB.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file may raise PermissionError
        raise DataError(f"no file {path}, or it cannot be read: check the path and its permissions")
    try:
        with path.open("rb") as raw:
            if raw.read(2) == _GZIP_MAGIC:
                raw.seek(0)
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    return _parse_idx(cast(IO[bytes], unpacked), path)
            raw.seek(0)
            return _parse_idx(raw, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({reason(error)}): replace it with a good copy") from error


def _complete(folder: Path, split: str) -> bool:
    """Return whether a folder has the files of a split."""
    return all(any(os.path.isfile(folder / name) for name in (stem, f"{stem}.gz")) for stem in FILES[split])


def _locate(folder: Path, stem: str, download: bool, base_url: str | None) -> Path:
    """Return the path of an IDX file: the plain one, else the gzipped one, which is downloaded if necessary."""
    packed = folder / f"{stem}.gz"
    for path in (folder / stem, packed):
        if os.path.isfile(path):
            return path
    if not download:
        raise DataError(
            "no {} or {} in {}: put it there, pass another folder as {data_dir}, or allow the download",
            *(stem, packed.name, folder),
            data_dir=...,
        )
    fetch(f"{(base_url or URL).rstrip('/')}/{packed.name}", packed, MD5[stem])
    return packed


def _parse_idx(stream: IO[bytes], path: Path) -> UInt8Array:
    """Read an IDX stream to its end, or to one byte after the size that its header claims."""
    head = read_up_to(stream, 4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _IDX_UBYTE or not 1 <= head[3] <= _MAX_RANK:
        raise DataError(
            f"{path} starts with bytes {head.hex() or 'none'}, not 000008 and a rank from 1 to {_MAX_RANK}: "
            "give an IDX file of unsigned bytes"
        )
    rank = head[3]
    sizes = read_up_to(stream, 4 * rank)
    if len(sizes) < 4 * rank:
        raise DataError(f"{path} is truncated in its header: replace it with a complete copy")
    shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * rank, 4))
    # An axis of size 0 does not make the other sizes valid: NumPy rejects such a shape too.
    if math.prod(max(size, 1) for size in shape) > MAX_IDX_BYTES:
        raise DataError(f"{path} claims the shape {shape}, which is more than {MAX_IDX_BYTES} bytes: replace it")
    count = math.prod(shape)
    found = read_up_to(stream, count + 1)  # one byte more, to detect extra data
    if len(found) < count:
        raise DataError(f"{path} is truncated: {len(found)} of the {count} data bytes of shape {shape}; replace it")
    if len(found) > count:
        raise DataError(f"{path} has more than the {count} data bytes of shape {shape}: replace it with a good copy")
    return np.frombuffer(found, dtype=np.uint8).reshape(shape)
