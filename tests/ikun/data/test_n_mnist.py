"""Tests of N-MNIST: events against a loop over bytes, archives and folders, streaming, hashes, damage, downloads."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ikun.checkpoint import load_checkpoint
from ikun.data import n_mnist
from ikun.data.datasets import Dataset, load_dataset
from ikun.data.download import DataError
from ikun.data.n_mnist import frames_of, recordings
from ikun.data.spec import DataSpec
from ikun.networks import Spec
from ikun.training.loop import train
from ikun.training.spec import TrainingSpec

Event = tuple[int, int, int, int]  # x, y, polarity, time
BESIDE = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "n-mnist-subset"
REAL = Path(os.environ.get("IKUN_N_MNIST") or BESIDE)


def recording(events: list[Event]) -> bytes:
    """The bytes of a recording."""
    return b"".join(bytes([x, y]) + (p << 23 | t).to_bytes(3, "big") for x, y, p, t in events)


def draw(seed: int, count: int = 200) -> list[Event]:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(0, 300_000, count))
    return [(int(rng.integers(34)), int(rng.integers(34)), int(rng.integers(2)), int(t)) for t in times]


def oracle(content: bytes, frames: int) -> npt.NDArray[np.float32]:
    """Frames by a loop over the bytes, as the authors' reader does it."""
    events, added = [], 0
    for i in range(0, len(content), 5):
        x, y, a, b, c = content[i : i + 5]
        if y == 240:
            added += 8192
        else:
            events.append((x, y, a // 128, (a % 128) * 65536 + b * 256 + c + added))
    first, last = min(e[3] for e in events), max(e[3] for e in events)
    found = np.zeros((frames, 2, 34, 34), np.float32)
    for x, y, p, t in events:
        found[(t - first) * frames // (last - first + 1), p, y, x] += 1
    return found


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """40 training and 8 test recordings, and files that are none."""
    for name, count in (("Train", 40), ("Test", 8)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/readme.txt", "nothing")
            for i in range(count):
                archive.writestr(f"{name}/{i % 10}/{i:05}.bin", recording(draw(i, 100 + i)))
    return tmp_path


def unpacked(archives: Path, place: Path) -> Path:
    for name in ("Train", "Test"):
        with zipfile.ZipFile(archives / f"{name}.zip") as archive:
            archive.extractall(place)
    return place


def local(folder: Path, split: str = "train", **options: Any) -> Dataset:
    return load_dataset("n-mnist", split, data_dir=folder, download=False, **options)


# --- one recording


@pytest.mark.parametrize("frames", [1, 4, 7])
def test_events_are_counted_in_equal_times(frames: int) -> None:
    content = recording(draw(3))
    assert np.array_equal(frames_of(content, frames, "a"), oracle(content, frames))
    assert frames_of(content, frames, "a").sum() == 200


def test_the_clock_overflows_at_row_240() -> None:
    """Times start again, and 2^13 microseconds are added from the marker on."""
    content = recording([(1, 2, 1, 8000), (0, 240, 0, 0), (3, 4, 0, 100), (0, 240, 1, 5), (5, 6, 1, 9)])
    found = frames_of(content, 10, "a")
    assert np.array_equal(found, oracle(content, 10))
    assert np.argwhere(found).tolist() == [[0, 0, 4, 3], [0, 1, 2, 1], [9, 1, 6, 5]]


def test_one_event_and_more_frames_than_microseconds() -> None:
    assert frames_of(recording([(33, 33, 0, 7)]), 5, "a")[0, 0, 33, 33] == 1
    content = recording([(0, 0, 0, 7), (0, 0, 1, 9)])
    assert np.array_equal(frames_of(content, 50, "a"), oracle(content, 50))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, not a whole number of 5-byte events"),
        (b"1234", "4 bytes, not a whole number of 5-byte events"),
        (recording([(0, 240, 0, 0)]), "has no events"),
        (recording([(34, 0, 0, 0)]), "an event at x = 34, y = 0, outside 34 x 34 pixels"),
        (recording([(0, 35, 0, 0)]), "an event at x = 0, y = 35, outside 34 x 34 pixels"),
    ],
)
def test_malformed_recordings_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        frames_of(content, 3, "a")
    (tmp_path / "Train" / "0").mkdir(parents=True)
    (tmp_path / "Train" / "0" / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"Train/0/a.bin.*{message}"):
        local(tmp_path).images[:]


def test_a_recording_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive may claim any size."""
    monkeypatch.setattr(n_mnist, "MAX_RECORDING_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "Train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Train/0/a.bin", bytes(10_000_000))
    with pytest.raises(DataError, match="more than 1000 bytes"):
        local(tmp_path).images[:]


# --- data sets


def test_archive_and_folder_are_the_same_data(archives: Path, tmp_path: Path) -> None:
    packed, plain = local(archives, frames=3), local(unpacked(archives, tmp_path / "plain"), frames=3)
    assert packed == plain  # by their hashes
    assert packed.images.shape == (40, 3, 2, 34, 34)
    assert (packed.timesteps, packed.input_shape, packed.classes) == (3, (2, 34, 34), 10)
    everything = packed.images[:]
    assert torch.equal(everything, plain.images[:])
    assert torch.equal(packed.images[torch.tensor([5, 0])], everything[[5, 0]])
    numbers = [int(Path(name).stem) for name in packed.images.names]  # type: ignore[attr-defined]
    assert sorted(numbers) == list(range(40))
    assert numbers != sorted(numbers)  # in random order
    assert packed.labels.tolist() == [i % 10 for i in numbers]
    for number, frames in zip(numbers, everything, strict=True):
        assert np.array_equal(frames.numpy(), oracle(recording(draw(number, 100 + number)), 3))


def test_the_hash_depends_on_frames_order_and_files(archives: Path) -> None:
    hashes = {
        local(archives, frames=n, seed=s, split=x).sha256 for n in (3, 4) for s in (0, 1) for x in ("train", "test")
    }
    assert len(hashes) == 8
    assert local(archives).sha256 == local(archives, frames=10).sha256
    assert local(archives, subset=5).images.shape == (5, 10, 2, 34, 34)


def test_only_indexed_recordings_are_read(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()

    def counting(content: bytes, frames: int, name: str) -> npt.NDArray[np.float32]:
        reads[name] += 1
        return frames_of(content, frames, name)

    monkeypatch.setattr(n_mnist, "frames_of", counting)
    data = DataSpec("n-mnist", 20, 1, held_out=5, frames=4)
    whole, held = data.parts(archives)
    assert held is not None
    assert (len(whole), len(held), sum(reads.values())) == (15, 5, 0)
    assert whole.images[:2].shape == (2, 4, 2, 34, 34)
    assert held.images[torch.tensor([4])].shape == (1, 4, 2, 34, 34)
    assert sum(reads.values()) == 3


@pytest.mark.parametrize("frames", [0, -1, 10_001])
def test_numbers_of_frames_are_checked(archives: Path, frames: int) -> None:
    with pytest.raises(DataError, match="frames from 1 to 10000"):
        local(archives, frames=frames)
    with pytest.raises(DataError, match="digits has no events"):
        load_dataset("digits", frames=3)


def test_missing_and_damaged_archives_are_named(archives: Path) -> None:
    (archives / "Train.zip").rename(archives / "train.zip")  # as some mirrors name it
    assert len(local(archives)) == 40
    content = (archives / "train.zip").read_bytes()
    (archives / "train.zip").write_bytes(content[:-30])
    with pytest.raises(DataError, match=r"cannot read .*train.zip"):
        local(archives)
    (archives / "train.zip").unlink()
    with pytest.raises(DataError, match=r"no Train.zip and no folder Train in"):
        local(archives)
    with zipfile.ZipFile(archives / "Train.zip", "w") as archive:
        archive.writestr("Test/0/1.bin", b"12345")
    with pytest.raises(DataError, match=r"no recordings Train/LABEL/NAME.bin in"):
        local(archives)


def test_damage_inside_an_archive_is_named(archives: Path) -> None:
    data = local(archives, frames=2)
    content = bytearray((archives / "Train.zip").read_bytes())
    content[600:900] = bytes(300)
    (archives / "Train.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read Train/\d/\d+.bin of .*Train.zip"):
        data.images[:]


def test_download_fills_the_folder_once(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (archives / "Test.zip").read_bytes()
    served = tmp_path / "served" / n_mnist.ARCHIVES["test"][1]
    served.parent.mkdir(parents=True)
    served.write_bytes(content)
    name, path, md5 = n_mnist.ARCHIVES["test"]
    with pytest.raises(DataError, match=f"not {md5}"):
        recordings("test", tmp_path / "cache", base_url=(tmp_path / "served").as_uri())
    assert not (tmp_path / "cache" / name).exists()
    monkeypatch.setitem(n_mnist.ARCHIVES, "test", (name, path, hashlib.md5(content).hexdigest()))
    for _ in range(2):
        found = recordings("test", tmp_path / "cache", base_url=(tmp_path / "served").as_uri())
        assert len(found.names) == 8
        served.unlink(missing_ok=True)


def test_a_network_is_trained_on_events_and_its_checkpoint_finds_them(archives: Path, tmp_path: Path) -> None:
    net = Spec(channels=2, input_shape=(2, 34, 34), timesteps=3, coding="spikes")
    out = tmp_path / "events.pt"
    data = DataSpec("n-mnist", 20, 1, frames=3)
    train(net, data, TrainingSpec(alpha=0.1, epochs=1, batch_size=10), out, data_dir=archives)
    found = load_checkpoint(out)
    assert found.data == data
    assert found.samples("train", archives) == data.load("train", archives)
    assert len(found.samples("test", archives)) == 8


def test_the_real_recordings() -> None:
    if not REAL.is_dir():
        pytest.skip("no N-MNIST files: name their folder in IKUN_N_MNIST")
    for split, count in (("train", 1000), ("test", 100)):
        data = local(REAL, split, frames=4)
        assert data.images.shape == (count, 4, 2, 34, 34)
        some = data.images[:50]
        assert 1069 <= float(some.flatten(1).sum(1).min())
        assert float(some.flatten(1).sum(1).max()) <= 7152
        assert data.labels.unique().tolist() == list(range(10))
        with zipfile.ZipFile(data.images.place) as archive:  # type: ignore[attr-defined]
            name = data.images.names[0]  # type: ignore[attr-defined]
            assert np.array_equal(some[0].numpy(), oracle(archive.read(name), 4))
