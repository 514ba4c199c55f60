"""Tests of reading and downloading Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import struct
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ikun.data import datasets as data
from ikun.data import download as files
from ikun.data import fashion_mnist
from ikun.data.datasets import Dataset, load_dataset
from ikun.data.download import DataError, fetch
from ikun.data.fashion_mnist import read_idx

UInt8Array = npt.NDArray[np.uint8]
STEMS = fashion_mnist.FILES["train"]


def idx_bytes(array: UInt8Array) -> bytes:
    return idx_header(*array.shape) + array.tobytes()


def idx_header(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def as_is(content: bytes) -> bytes:
    return content


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def outcome(path: Path) -> UInt8Array | DataError:
    try:
        return read_idx(path)
    except DataError as error:
        return error


def samples(count: int, labels: int | None = None) -> tuple[UInt8Array, UInt8Array]:
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (count, 5, 4), dtype=np.uint8)
    return images, (np.arange(count if labels is None else labels) % 10).astype(np.uint8)


def put(folder: Path, images: UInt8Array, labels: UInt8Array, split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in zip(fashion_mnist.FILES[split], (images, labels), strict=True):
        (folder / f"{stem}.gz").write_bytes(zipped(idx_bytes(array)))
    return folder


def local(folder: Path) -> Dataset:
    return load_dataset("fashion-mnist", data_dir=folder, download=False)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of downloadable files, whose sums are taken for the published ones."""
    folder = put(tmp_path / "served", *samples(12))
    for stem in STEMS:
        content = (folder / f"{stem}.gz").read_bytes()
        monkeypatch.setitem(fashion_mnist.MD5, stem, hashlib.md5(content).hexdigest())
    return folder


# --- IDX files


@pytest.mark.parametrize("pack", [as_is, zipped])
@settings(max_examples=60)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_an_idx_file_round_trips(pack: Callable[[bytes], bytes], shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(pack(idx_bytes(array)))
        found = read_idx(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, array)


@settings(max_examples=200)
@given(content=st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(lambda tail: b"\0\0\x08" + tail)))
def test_arbitrary_bytes_are_an_idx_or_a_data_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        found = outcome(path)
    if isinstance(found, DataError):
        assert str(path) in str(found)
        assert "\n" not in str(found)
    else:
        assert idx_bytes(found) == content


@pytest.mark.parametrize("pack", [as_is, zipped])
def test_every_proper_prefix_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    content = pack(idx_bytes(samples(2)[0]))
    path = tmp_path / "file"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="file"):
            read_idx(path)
    path.write_bytes(content)
    assert read_idx(path).shape == (2, 5, 4)


@pytest.mark.parametrize("pack", [as_is, zipped])
def test_trailing_bytes_are_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(samples(2)[0]) + b"\0"))
    with pytest.raises(DataError, match="has more than the 40 data bytes"):
        read_idx(path)


def test_rubbish_after_and_damage_within_gzip_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = zipped(idx_bytes(samples(2)[0]))
    flipped = bytearray(content)
    flipped[-6] ^= 1  # the checksum
    broken = bytearray(content)
    broken[10] = 0xFF  # the type of the first deflate block
    for bad in (content + b"rubbish", flipped, broken):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"cannot read .*file"):
            read_idx(path)


@pytest.mark.parametrize(
    "head",
    [
        b"\0\0\x0d\x01\0\0\0\0",
        b"\x01\0\x08\x01\0\0\0\0",
        b"\0\0\x08\0",
        b"\0\0\x08\xff" + 1020 * b"\0",
        b"<html></html>",
    ],
    ids=["float", "first byte", "rank 0", "rank 255", "html"],
)
def test_wrong_magic_is_refused(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(head)
    with pytest.raises(DataError, match="unsigned bytes"):
        read_idx(path)


@pytest.mark.parametrize("pack", [as_is, zipped])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**20, 2**20), "more than 4294967296 bytes"),
        ((2**32 - 1,), "truncated: 3 of the 4294967295 data bytes"),
        ((2**16, 2**15), "truncated: 3 of the 2147483648 data bytes"),
        ((0, 2**32 - 1, 2**32 - 1), "more than 4294967296 bytes"),
        ((2**32 - 1,) * 32, "more than 4294967296 bytes"),
    ],
    ids=["2^40", "just under the cap", "2^31", "zero times much", "rank 32"],
)
def test_a_hostile_header_allocates_nothing(
    tmp_path: Path, shape: tuple[int, ...], message: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(pack(idx_header(*shape) + b"few"))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb_is_read_no_further_than_claimed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(zipped(idx_header(10) + bytes(32 * 2**20)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="has more than"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["none", ".", "x" * 300], ids=["missing", "folder", "long name"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no file"):
        read_idx(tmp_path / name)


# --- Fashion-MNIST from files


def test_local_files_plain_and_gzipped_are_the_same_data(tmp_path: Path) -> None:
    images, labels = samples(23)
    packed = local(put(tmp_path / "packed", images, labels))
    plain = tmp_path / "plain"
    plain.mkdir()
    for stem, array in zip(STEMS, (images, labels), strict=True):
        (plain / stem).write_bytes(idx_bytes(array))
    found = local(plain)
    assert found == packed  # by sha256
    assert found.images.shape == (23, 1, 5, 4)
    assert found.images.dtype == torch.float32
    assert found.labels.dtype == torch.int64
    assert (len(found), found.name, found.split, found.classes) == (23, "fashion-mnist", "train", 10)
    np.testing.assert_array_equal((found.images[:, 0] * 255).round().numpy(), images)
    np.testing.assert_array_equal(found.labels.numpy(), labels)


def test_hash_is_of_shape_pixels_and_labels(tmp_path: Path) -> None:
    images, labels = samples(6)
    found = local(put(tmp_path, images, labels))
    expected = hashlib.sha256(b"(6, 1, 5, 4)")
    expected.update((images.astype("<f4") / np.float32(255)).tobytes() + labels.astype("<i8").tobytes())
    assert found.sha256 == expected.hexdigest()
    others = [(images ^ np.uint8(1), labels), (images, labels[::-1]), (images.reshape(6, 4, 5), labels)]
    assert len({found.sha256, *(local(put(tmp_path, *other)).sha256 for other in others)}) == 4


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (*samples(7, 6), "7 images in .* but 6 labels"),
        (samples(3)[0], np.array([1, 10, 255], np.uint8), "label 10 at index 1 .* not in 0..9"),
        (samples(3)[0][0], samples(5)[1], r"train-images.* shape \(5, 4\)"),
        (samples(3)[0][:, None], samples(3)[1], r"train-images.* shape \(3, 1, 5, 4\)"),
        (samples(3)[0], samples(3)[1][:, None], r"train-labels.* shape \(3, 1\)"),
        (*samples(0), r"train-images.* shape \(0, 5, 4\)"),
    ],
    ids=["counts", "label", "rank 2", "rank 4", "label rank", "empty"],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, images: UInt8Array, labels: UInt8Array, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        local(put(tmp_path, images, labels))


def test_missing_files_are_named_if_nothing_may_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte or .*\.gz in .*none") as caught:
        local(tmp_path / "none")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is not a folder"):
        load_dataset("fashion-mnist", data_dir=path)


def test_the_default_folder_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(tmp_path / "cache" / "ikun-hessian" / "fashion-mnist", *samples(4))
    assert len(load_dataset("fashion-mnist", download=False)) == 4
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert files.default_data_dir("fashion-mnist") == tmp_path / ".cache" / "ikun-hessian" / "fashion-mnist"


def test_installed_files_are_found_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of Debian and Ubuntu has the training and the test files in /usr/share/datasets/fashion-mnist."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_DIRS", f"relative:{tmp_path / 'empty'}:{tmp_path / 'share'}")
    put(tmp_path / "share" / "datasets" / "fashion-mnist", *samples(4))
    assert len(load_dataset("fashion-mnist", download=False)) == 4
    with pytest.raises(DataError, match="t10k-images"):  # a split that is not installed
        load_dataset("fashion-mnist", "test", download=False)
    put(tmp_path / "cache" / "ikun-hessian" / "fashion-mnist", *samples(5))  # one's own files come first
    assert len(load_dataset("fashion-mnist", download=False)) == 5
    monkeypatch.delenv("XDG_DATA_DIRS")
    assert Path("/usr/share/datasets/fashion-mnist") in files.system_folders("fashion-mnist")


def test_the_real_files_have_their_known_hash() -> None:
    beside = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "fashion-mnist-subset"
    folder = Path(os.environ.get("IKUN_FASHION_MNIST") or beside)
    if not folder.is_dir():
        pytest.skip("no Fashion-MNIST files: name their folder in IKUN_FASHION_MNIST")
    found = [load_dataset("fashion-mnist", split, data_dir=folder, download=False) for split in data.SPLITS]
    for dataset in found:
        assert dataset.images.shape == (len(dataset), 1, 28, 28)
        assert (float(dataset.images.min()), float(dataset.images.max())) == (0.0, 1.0)
        assert float(dataset.images.mean()) == pytest.approx(0.286, abs=0.01)  # 0.2860 on the full train split
        assert np.unique(dataset.labels.numpy()).tolist() == list(range(10))
    assert found[0].sha256 != found[1].sha256


# --- downloads


def test_download_fills_the_folder_once(served: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    first = load_dataset("fashion-mnist", data_dir=target, base_url=served.as_uri())
    assert first == local(served)
    assert sorted(path.name for path in target.iterdir()) == sorted(f"{stem}.gz" for stem in STEMS)
    assert load_dataset("fashion-mnist", data_dir=target, base_url="file:///nowhere") == first


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content + b"\0"])
def test_a_download_with_a_wrong_checksum_leaves_nothing(
    served: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    bad = served / f"{STEMS[1]}.gz"
    bad.write_bytes(damage(bad.read_bytes()))
    target = tmp_path / "new"
    with pytest.raises(DataError, match="its MD5 is") as caught:
        load_dataset("fashion-mnist", data_dir=target, base_url=served.as_uri())
    for part in (served.as_uri(), bad.name, str(target), "data_dir=", "by hand"):
        assert part in str(caught.value)
    assert [path.name for path in target.iterdir()] == [f"{STEMS[0]}.gz"]  # the good one stays


def test_download_keeps_the_file_it_cannot_replace(served: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept"
    target.write_bytes(b"old")
    with pytest.raises(DataError, match="its MD5 is"):
        fetch((served / f"{STEMS[0]}.gz").as_uri(), target, "0" * 32)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "served"]


def test_a_download_longer_than_the_limit_is_refused(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_DOWNLOAD_BYTES", 10)
    with pytest.raises(DataError, match="longer than 10 bytes"):
        load_dataset("fashion-mnist", data_dir=tmp_path / "new", base_url=served.as_uri())
    assert list((tmp_path / "new").iterdir()) == []


def test_interrupted_download_leaves_nothing(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("fashion-mnist", data_dir=tmp_path / "new", base_url=served.as_uri())
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("url", ["file:///nowhere/at/all", "nonsense", "http://[broken", "http://white space/"])
def test_an_unusable_address_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match="cannot download") as caught:
        load_dataset("fashion-mnist", data_dir=tmp_path / "new", base_url=url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:  # bound but not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"cannot download http://127\.0\.0\.1"):
            load_dataset(
                "fashion-mnist", data_dir=tmp_path / "new", base_url=f"http://127.0.0.1:{taken.getsockname()[1]}"
            )
    assert list(tmp_path.iterdir()) == []


class Handler(BaseHTTPRequestHandler):
    """Breaks off within the images and knows no other file."""

    def do_GET(self) -> None:
        if not self.path.endswith(f"{STEMS[0]}.gz"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize(("split", "reason"), [("train", "its MD5 is|IncompleteRead"), ("test", "404")])
def test_a_failing_server_is_reported(tmp_path: Path, server: str, split: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load_dataset("fashion-mnist", split, data_dir=tmp_path, base_url=server)
    assert list(tmp_path.iterdir()) == []
