"""Tests of reading CIFAR-10: both formats, plain and in archives, valid and hostile."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ikun.data import cifar10
from ikun.data.datasets import Dataset, load_dataset
from ikun.data.download import DataError

UInt8Array = npt.NDArray[np.uint8]
STEMS = (*cifar10.FILES["train"], "test_batch")


def samples(seed: int, count: int = 3) -> tuple[UInt8Array, list[int]]:
    """Images [n,32,32,3], as a painter sees them, and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count).tolist()


def rows(images: UInt8Array) -> list[bytes]:
    """Every image as its red, its green and its blue plane."""
    return [b"".join(image[:, :, colour].tobytes() for colour in range(3)) for image in images]


def binary(images: UInt8Array, labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + row for label, row in zip(labels, rows(images), strict=True))


def string(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


def python2(images: UInt8Array, labels: list[int], dtype: bytes = b"u1", columns_first: bytes = b"\x89") -> bytes:
    """As published: protocol 2, written by Python 2, strings of bytes; put together by hand."""
    raw, n = b"".join(rows(images)), len(images)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01bq\x06\x87Rq\x07"
        b"(K\x01K"
        + bytes([n])
        + b"M"
        + struct.pack("<H", 3072)
        + b"\x86cnumpy\ndtype\nq\x08U"
        + bytes([len(dtype)])
        + dtype
        + b"q\x09K\x00K\x01\x87Rq\x0a(K\x03U\x01|q\x0bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + columns_first
        + string(raw)
        + b"tb"
    )
    numbers = b"]q\x02(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    name = string(b"training batch 1 of 5")
    return (
        b"\x80\x02}q\x01("
        + string(b"batch_label")
        + name
        + string(b"labels")
        + numbers
        + string(b"data")
        + array
        + b"u."
    )


def python3(images: UInt8Array, labels: list[int], protocol: int = 4) -> bytes:
    data = np.frombuffer(b"".join(rows(images)), np.uint8).reshape(len(images), 3072)
    return pickle.dumps({b"data": data.copy(), b"labels": labels}, protocol)


FORMATS: dict[str, tuple[str, str, Callable[[UInt8Array, list[int]], bytes]]] = {
    "binary": ("cifar-10-batches-bin", ".bin", binary),
    "python 2": ("cifar-10-batches-py", "", python2),
    "python 3": ("cifar-10-batches-py", "", python3),
}


def files(kind: str = "binary") -> dict[str, bytes]:
    """Name in the archive -> content, of all six batches."""
    folder, ending, write = FORMATS[kind]
    return {f"{folder}/{stem}{ending}": write(*samples(i)) for i, stem in enumerate(STEMS)}


def put(folder: Path, contents: dict[str, bytes], flat: bool = False) -> Path:
    for name, content in contents.items():
        path = folder / (Path(name).name if flat else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def pack(path: Path, contents: dict[str, bytes], extra: Callable[[tarfile.TarFile], None] | None = None) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        if extra is not None:
            extra(archive)
        for name, content in {"cifar-10-batches-bin/readme.html": b"hello", **contents}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def local(folder: Path, split: str = "train") -> Dataset:
    return load_dataset("cifar10", split, data_dir=folder, download=False)


def check(found: Dataset, split: str = "train") -> None:
    parts = [samples(i) for i, stem in enumerate(STEMS) if (stem == "test_batch") == (split == "test")]
    images = np.concatenate([images for images, _ in parts]).transpose(0, 3, 1, 2)
    assert found.images.shape == (len(images), 3, 32, 32)
    np.testing.assert_array_equal((found.images[:] * 255).round().numpy(), images)
    assert found.labels.tolist() == [label for _, labels in parts for label in labels]
    assert (found.classes, found.input_shape, found.timesteps) == (10, (3, 32, 32), None)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("place", ["folder", "flat", "archive", "the archive itself"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_location_and_format_is_read(tmp_path: Path, kind: str, place: str, split: str) -> None:
    contents = files(kind)
    where = tmp_path
    if place in ("folder", "flat"):
        put(tmp_path, contents, flat=place == "flat")
    else:
        name = cifar10.ARCHIVES[0 if kind == "binary" else 1] if place == "archive" else "any name"
        where = pack(tmp_path / name, dict(reversed(contents.items())))  # members in any order
        where = tmp_path if place == "archive" else where
    check(local(where, split), split)


def test_all_formats_are_the_same_data(tmp_path: Path) -> None:
    found = {local(put(tmp_path / kind, files(kind))).sha256 for kind in FORMATS}
    assert len(found) == 1


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3_are_read(tmp_path: Path, protocol: int) -> None:
    put(tmp_path, {f"cifar-10-batches-py/{s}": python3(*samples(i), protocol) for i, s in enumerate(STEMS)})
    check(local(tmp_path))


def test_a_download_is_verified_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "served").mkdir()
    archive = pack(tmp_path / "served" / cifar10.ARCHIVES[0], files())
    monkeypatch.setitem(cifar10.MD5, archive.name, hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check(load_dataset("cifar10", base_url=archive.parent.as_uri()))
    assert [path.name for path in (tmp_path / "cache/ikun-hessian/cifar10").iterdir()] == [archive.name]
    check(load_dataset("cifar10", base_url="file:///nowhere"))  # from the folder
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(DataError, match="its MD5 is"):
        load_dataset("cifar10", base_url=archive.parent.as_uri(), data_dir=tmp_path / "other")


def test_checksum_and_address_are_the_published_ones() -> None:
    assert cifar10.MD5 == {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    }
    assert cifar10.URL == "https://www.cs.toronto.edu/~kriz/"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data_batch_1.bin, data_batch_1, cifar-10-binary.tar.gz or .*data_dir="):
        local(tmp_path)
    assert list(tmp_path.iterdir()) == []
    contents = files()
    del contents["cifar-10-batches-bin/data_batch_3.bin"]
    with pytest.raises(DataError, match=r"no file .*data_batch_3.bin"):
        local(put(tmp_path, contents))
    archive = pack(tmp_path / "some.tar.gz", contents)
    with pytest.raises(DataError, match=r"some.tar.gz holds no cifar-10-batches-bin/data_batch_3.bin"):
        local(archive)
    check(local(archive, "test"), "test")
    with pytest.raises(DataError, match=r"holds no cifar-10-batches-bin/data_batch_1.bin and no cifar-10-batches-py/d"):
        local(pack(tmp_path / "other.tar.gz", {}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, not a whole number"),
        (binary(*samples(0))[:-1], "9218 bytes, not a whole number of 3073-byte records"),
        (binary(*samples(0)) + b"\0", "9220 bytes"),
        (binary(samples(0)[0], [1, 10, 255]), "label 10 at index 1 of .*test_batch.bin is not in 0..9"),
    ],
    ids=["empty", "truncated", "longer", "label"],
)
def test_wrong_binary_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        local(put(tmp_path, {"cifar-10-batches-bin/test_batch.bin": content}), "test")


def wrong(**changes: Any) -> bytes:
    values = pickle.loads(python3(*samples(0)))
    return pickle.dumps({**{k.decode(): v for k, v in values.items()}, **changes}, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a CIFAR-10 batch"),
        (python2(*samples(0))[:-30], "not a CIFAR-10 batch"),
        (b"hello", "not a CIFAR-10 batch"),
        (pickle.dumps([1, 2], 4), "not a CIFAR-10 batch"),
        (pickle.dumps({}, 4), "'data'|data"),
        (wrong(data=3), "'data' is not an array"),
        (wrong(labels=[1, 2]), r"2 labels, but 'data' of shape \(3, 3072\)"),
        (wrong(labels=[1, 2, 10]), "label 10 at index 2"),
        (wrong(labels=[1, 2, -1]), "whole numbers from 0 to 255"),
        (wrong(labels=[1, 2, 1.0]), "not a CIFAR-10 batch"),
        (wrong(labels=["1", "2", "3"]), "whole numbers from 0 to 255"),
        (wrong(data=np.zeros((3, 3072), np.int8)), "not an array of bytes"),
        (wrong(data=np.zeros((3, 3072), np.float64)), "not an array of bytes"),
        (wrong(data=np.zeros((3072, 3), np.uint8).T), "not an array of bytes"),
        (wrong(data=np.zeros((3, 32, 32, 3), np.uint8)), "3 labels, but 'data' of shape"),
        (wrong(data=np.array([[{}] * 3072] * 3, object)), "not an array of bytes"),
        (wrong(data=np.zeros((0, 3072), np.uint8), labels=[]), "0 labels"),
        (python2(*samples(0), dtype=b"f8"), "not an array of bytes"),
        (python2(*samples(0), columns_first=b"\x88"), "not an array of bytes"),
        (python2(samples(0)[0][:2], [1, 2, 3]), "3 labels"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R.", "an encoding other than latin1"),
        (b"\x80\x02c_codecs\nencode\nU\x01aX\x06\x00\x00\x00latin1\x86R.", "an encoding other than latin1"),
    ],
)
def test_wrong_pickles_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        local(put(tmp_path, {"cifar-10-batches-py/test_batch": content}), "test")
    assert "\n" not in str(caught.value)
    assert "test_batch" in str(caught.value)


class Evil:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


HOSTILE = {
    "exec": pickle.dumps({b"data": Evil(exec, "open('executed', 'w')")}, 4),
    "eval, protocol 0": b'cbuiltins\neval\n(S\'open("executed","w")\'\ntR.',
    "eval, protocol 2": b"\x80\x02c__builtin__\neval\nU\x13open('executed','w')\x85R.",
    "getattr": pickle.dumps(Evil(getattr, np.ndarray, "dump"), 4),
    "numpy's own loader": b"\x80\x02cnumpy\nload\nU\x08executed\x85R.",
    "a method of an allowed class": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93)R.",
    "instance": b"(ios\nsystem\n(lp0\n.",
    "new object": b"\x80\x02cio\nFileIO\n)\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "another function of the codecs": b"\x80\x02c_codecs\ndecode\nU\x01aX\x06\x00\x00\x00latin1\x86R.",
    "a deep key": b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"K\x01s.",
    "deep keys": b"\x80\x02}()" + b"\x85" * 500_000 + b"K\x01u.",
    "persistent id": b"\x80\x02U\x01aQ.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_code_in_a_pickle_is_not_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not a CIFAR-10 batch"):
        local(put(tmp_path, {"cifar-10-batches-py/test_batch": HOSTILE[name]}), "test")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x96" + struct.pack("<Q", 2**33) + b".",  # a byte array of 8 GiB
        b"\x80\x04\x8e" + struct.pack("<Q", 2**33) + b".",
        b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**33) + b".",  # a frame
        b"\x80\x02}r" + struct.pack("<I", 2**30) + b".",  # an entry far out in the memo
        python2(samples(0)[0], [1, 2, 3]).replace(b"M\x00\x0c\x86", b"J\xff\xff\xff\x7f\x86"),  # a shape
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R.",
        # the same 64 KiB of text encoded 1,000 times
        b"\x80\x02X\x00\x00\x01\x00" + b"a" * 2**16 + b"X\x06\x00\x00\x00latin1\x86q\x00]("
        b"c_codecs\nencode\nq\x01h\x00R" + b"h\x01h\x00R" * 999 + b"e.",
    ],
    ids=["bytearray", "bytes", "string", "frame", "memo", "shape", "array", "encode"],
)
def test_what_a_pickle_claims_takes_no_memory(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, {"cifar-10-batches-py/test_batch": content})
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            local(tmp_path, "test")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["binary", "python 2"])
def test_a_file_that_is_too_large_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "MAX_FILE_BYTES", 9000)
    with pytest.raises(DataError, match="more than 9000 bytes"):
        local(put(tmp_path, files(kind)))
    with pytest.raises(DataError, match="more than 9000 bytes"):
        local(pack(tmp_path / "a.tar.gz", files(kind)))


def test_tar_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of zeros, a header that claims a long name, and very many members."""
    monkeypatch.setattr(cifar10, "MAX_UNPACKED_BYTES", 4 * 2**20)

    def zeros(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo("zeros")
        member.size = 64 * 2**20
        archive.addfile(member, io.BytesIO(bytes(member.size)))

    path = tmp_path / "bomb.tar.gz"
    name = tarfile.TarInfo("long")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 64 * 2**20
    header = name.tobuf(tarfile.USTAR_FORMAT)
    bombs = [
        lambda: pack(path, files(), zeros),
        lambda: path.write_bytes(gzip.compress(header + bytes(64 * 2**20), 1)),
        lambda: pack(path, {f"{i}": b"" for i in range(200)} | files()),
    ]
    for make, message in zip(bombs, ("unpacks to more", "unpacks to more", "more than 100 members"), strict=True):
        make()
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=rf"cannot read .*bomb.tar.gz \(it .*{message}|{message}"):
                local(path)
            assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
        finally:
            tracemalloc.stop()


def test_members_are_files_of_fixed_names(tmp_path: Path) -> None:
    """Paths that lead outside and links are not followed, nothing is unpacked to disk."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(binary(*samples(9)))
    folder = tmp_path / "data"
    folder.mkdir()

    def links(archive: tarfile.TarFile) -> None:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)

    escaping = {f"../{name}": content for name, content in files().items()}
    absolute = {f"/{name}": content for name, content in files().items()}
    archive = pack(folder / cifar10.ARCHIVES[0], escaping | absolute, links)
    with pytest.raises(DataError, match="holds no cifar-10-batches-bin/test_batch"):
        local(folder, "test")
    check(local(pack(archive, escaping | files(), links), "test"), "test")  # the real member follows the links
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["secret.bin", "data", archive.name])


@pytest.mark.parametrize("cut", [1, 20, 600, 3000])
def test_truncated_archives_are_refused(tmp_path: Path, cut: int) -> None:
    content = pack(tmp_path / "whole.tar.gz", files()).read_bytes()
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(content[: len(content) // 2 - cut])
    with pytest.raises(DataError, match=r"cut.tar.gz"):
        local(path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match=r"cannot read .*cut.tar.gz"):
        local(path)


def test_arbitrary_damage_is_a_data_error_or_other_pixels(tmp_path: Path) -> None:
    content = python2(*samples(0))
    rng = np.random.default_rng(0)
    refused = 0
    for at in [*range(120), *rng.integers(0, len(content), 30).tolist()]:
        damaged = bytearray(content)
        damaged[at] ^= int(rng.integers(1, 256))
        put(tmp_path, {"cifar-10-batches-py/test_batch": bytes(damaged)})
        try:
            assert local(tmp_path, "test").images.shape[1:] == (3, 32, 32)
        except DataError:
            refused += 1
    assert refused > 60
