"""Tests of folders of images: decoding on demand, labels and hashes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ikun.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from ikun.data import image_folder
from ikun.data.datasets import Dataset, load_dataset
from ikun.data.download import DataError
from ikun.data.encoding import encode, encoded
from ikun.data.image_folder import FolderImages, decoded
from ikun.data.lazy import taken
from ikun.data.spec import DataSpec
from ikun.networks import Network, Spec

UInt8Array = npt.NDArray[np.uint8]


def picture(seed: int, height: int = 7, width: int = 9) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 training and 4 test images of three classes; image k of a split is of colour (class, k, blue)."""
    for split, each, blue in (("train", 4, 200), ("val", 1, 100)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for k in range(each + (name == "cat")):
                path = tmp_path / split / name / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (6, 5), (label, k, blue)).save(path)
    return tmp_path


def local(folder: Path, split: str = "train", size: int | None = 4, **options: int) -> Dataset:
    return load_dataset("image-folder", split, data_dir=folder, image_size=size, **options)  # type: ignore[arg-type]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often which file has been decoded."""
    found: Counter[str] = Counter()

    def counting(path: Path, size: int) -> UInt8Array:
        found[f"{path.parent.name}/{path.name}"] += 1
        return decoded(path, size)

    monkeypatch.setattr(image_folder, "decoded", counting)
    return found


# --- one file


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 60), (64, 40), (41, 97), (8, 8), (5, 9), (1, 3)])
@pytest.mark.parametrize("size", [8, 13])
def test_resized_and_cropped_as_torch_does(tmp_path: Path, height: int, width: int, size: int) -> None:
    """Against torch's antialiased bilinear interpolation of floating pixels; Pillow rounds to whole ones twice."""
    pixels = picture(1, height, width)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    short = min(height, width)
    new = height * size // short, width * size // short
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    expected = interpolate(x, new, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    expected = expected[:, top : top + size, left : left + size]
    found = torch.from_numpy(decoded(tmp_path / "a.png", size).copy()).permute(2, 0, 1).double()
    assert found.shape == (3, size, size)
    assert float((found - expected).abs().max()) <= 1.01


def test_an_image_of_the_size_asked_for_is_left_alone(tmp_path: Path) -> None:
    Image.fromarray(picture(2, 6, 6)).save(tmp_path / "a.bmp")
    np.testing.assert_array_equal(decoded(tmp_path / "a.bmp", 6), picture(2, 6, 6))
    x = FolderImages(tmp_path, ["a.bmp"], 6)[:]
    assert torch.equal(x, torch.from_numpy(picture(2, 6, 6)).permute(2, 0, 1)[None] / 255)


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("L", "a.png", (90, 90, 90)),
        ("RGBA", "a.png", (10, 20, 30)),
        ("P", "a.png", (10, 20, 30)),
        ("RGB", "a.webp", (10, 20, 30)),
        ("RGB", "a.jpg", (10, 20, 30)),
        ("CMYK", "a.jpeg", (10, 20, 30)),
        ("1", "a.bmp", (255, 255, 255)),
    ],
)
def test_modes_and_formats_become_rgb(tmp_path: Path, mode: str, name: str, expected: tuple[int, ...]) -> None:
    flat = Image.new("L", (5, 5), 90) if mode == "L" else Image.new("RGB", (5, 5), (10, 20, 30))
    flat = Image.new("1", (5, 5), 1) if mode == "1" else flat.quantize() if mode == "P" else flat.convert(mode)
    flat.save(tmp_path / name, quality=100) if name != "a.png" else flat.save(tmp_path / name)
    found = decoded(tmp_path / name, 3)
    assert np.abs(found.astype(int) - np.array(expected)).max() <= 4  # lossy formats


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(picture(0, 50, 50)).save(good)
    content = good.read_bytes()
    text = tmp_path / "text.png"
    for bad in (b"", b"hello", content[:100], content[: len(content) // 2], content[:20] + b"\xff" * 30 + content[50:]):
        text.write_bytes(bad)
        with pytest.raises(DataError, match=r"cannot decode .*text\.png \(.*\): replace or remove") as caught:
            decoded(text, 4)
        assert "\n" not in str(caught.value)
    Image.fromarray(picture(0)).save(tmp_path / "other", format="GIF")
    with pytest.raises(DataError, match="cannot decode"):
        decoded(tmp_path / "other", 4)  # a decoder that is not one of ours is never run
    Image.fromarray(np.full((5, 5), 40_000, np.uint16)).save(text)
    with pytest.raises(DataError, match="more than 8 bits"):
        decoded(text, 4)
    monkeypatch.setattr(image_folder, "MAX_PIXELS", 2499)
    with pytest.raises(DataError, match="50 x 50 pixels are too many"):
        decoded(good, 4)


# --- the folder


def test_folders_give_classes_labels_and_pixels(folder: Path) -> None:
    for split, count, blue in (("train", 13, 200), ("test", 4, 100)):
        found = local(folder, split)
        assert (len(found), found.classes, found.input_shape, found.timesteps) == (count, 3, (3, 4, 4), None)
        x = found.images[:]
        assert (x.shape, x.dtype) == ((count, 3, 4, 4), torch.float32)
        assert tuple(found.images.shape) == x.shape
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), found.labels)
        assert torch.equal(x[:, 2], torch.full((count, 4, 4), blue) / 255)


def test_any_first_part_is_mixed_and_subsets_are_nested(folder: Path) -> None:
    """Files come sorted by class; the order is random, always the same for a seed."""
    whole = local(folder)
    assert whole.labels.tolist() != sorted(whole.labels.tolist())
    assert local(folder) == whole
    assert local(folder, seed=1) != whole
    assert local(folder, subset=13) == whole
    small = local(folder, subset=5)
    assert torch.equal(small.images[:], whole.images[:5])
    assert torch.equal(small.labels, whole.labels[:5])
    with pytest.raises(DataError, match=r"a subset of 14 of image-folder train \(13 samples\)"):
        local(folder, subset=14)


def test_nothing_is_decoded_before_it_is_asked_for(folder: Path, reads: Counter[str]) -> None:
    whole = local(folder)
    part = taken(taken(whole.images, slice(2, 9)), torch.tensor([5, 1]))
    assert tuple(part.shape) == (2, 3, 4, 4)
    assert not reads
    x = part[:]
    assert sum(reads.values()) == 2
    assert torch.equal(x, whole.images[torch.tensor([7, 3])])
    assert torch.equal(part[torch.tensor([1])], x[1:])
    assert part[:0].shape == (0, 3, 4, 4)


def test_training_and_held_out_samples_stay_on_disk(folder: Path, reads: Counter[str]) -> None:
    spec = DataSpec("image-folder", subset=10, seed=3, held_out=4, image_size=4)
    train, held = spec.parts(folder)
    assert held is not None
    assert (len(train.images), len(held.images)) == (6, 4)
    assert not reads
    whole = local(folder, subset=10, seed=3)
    assert torch.equal(torch.cat([train.images[:], held.images[:]]), whole.images[:])
    assert spec.load("test", folder) == local(folder, "test")


def test_hash_is_of_names_sizes_labels_and_image_size(folder: Path) -> None:
    found = local(folder, subset=3)
    assert isinstance(found.images, FolderImages)
    text = b"image-folder 4\n"
    for name, label in zip(found.images.names, found.labels.tolist(), strict=True):
        text += f"{name}\0{(folder / name).stat().st_size} {label}\n".encode()
    assert found.sha256 == hashlib.sha256(text).hexdigest()
    hashes = {local(folder).sha256, local(folder, size=5).sha256, local(folder, seed=1).sha256}
    (folder / "train/ant/0.png").write_bytes((folder / "train/ant/0.png").read_bytes() + b"\0")
    hashes.add(local(folder).sha256)
    (folder / "train/ant/0.png").rename(folder / "train/ant/9.png")
    hashes.add(local(folder).sha256)
    assert len(hashes) == 5


def test_other_files_are_passed_over(folder: Path) -> None:
    before = local(folder)
    (folder / "train/ant/.hidden.png").write_bytes(b"")
    (folder / "train/ant/notes.txt").write_text("")
    (folder / "train/ant/folder.png").mkdir()
    (folder / "train/.cache").mkdir()
    (folder / "train/list.csv").write_text("")
    assert local(folder) == before
    (folder / "train/ant/0.png").rename(folder / "train/ant/0.PNG")
    assert len(local(folder)) == 13
    (folder / "val").rename(folder / "test")
    assert len(local(folder, "test")) == 4


def test_malformed_folders_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def refused(message: str, split: str = "train", where: Path | None = folder, size: int | None = 4) -> None:
        with pytest.raises(DataError, match=message) as caught:
            load_dataset("image-folder", split, data_dir=where, image_size=size)
        assert "\n" not in str(caught.value)

    refused("give it as data_dir=", where=None)
    for size in (None, 0, 4097):
        refused(f"images of size {size}: give a number of pixels from 1 to 4096 as image_size=", size=size)
    empty = tmp_path_factory.mktemp("empty")
    refused("no folder train in .*data_dir=", where=empty)
    (empty / "train").mkdir()
    refused("no class folders in .*train", where=empty)
    refused("no folder train", where=folder / "train")
    (folder / "train" / "dog").mkdir()
    refused(r"no images \(\.png, .*\) in .*dog: add some or remove")
    (folder / "train" / "dog").rmdir()
    (folder / "val" / "dog").mkdir()
    refused("dog is a class that .*train does not have", "test")
    (folder / "val" / "dog").rmdir()
    os.rename(folder / "val", folder / "test")
    (folder / "test" / "ant" / "0.png").unlink()
    refused("no images .*ant", "test")
    with pytest.raises(DataError, match="image_size=4: digits has images of a fixed size"):
        load_dataset("digits", image_size=4)


def test_a_corrupt_file_is_named_when_it_is_met(folder: Path) -> None:
    (folder / "train/bee/2.png").write_bytes(b"no image")
    found = local(folder)
    at = list(found.images.names).index("train/bee/2.png")  # type: ignore[attr-defined]
    others = torch.tensor([i for i in range(13) if i != at])
    assert found.images[others].shape == (12, 3, 4, 4)
    with pytest.raises(DataError, match=r"cannot decode .*train/bee/2\.png"):
        found.images[:]


# --- coding


def test_poisson_spikes_of_a_sample_depend_on_its_position_alone(folder: Path, reads: Counter[str]) -> None:
    for name in Path(folder / "train").rglob("*.png"):
        Image.fromarray(picture(int(name.stem), 6, 6)).save(name)
    images = local(folder).images
    spikes = encoded(images, 400, "poisson", seed=5)
    assert tuple(spikes.shape) == (13, 400, 3, 4, 4)
    assert not reads
    some = spikes[torch.tensor([7, 2])]
    assert sum(reads.values()) == 2
    assert torch.equal(spikes[2:8], torch.cat([spikes[2:3], spikes[3:8]]))
    assert torch.equal(some, torch.stack([spikes[7:8][0], spikes[2:3][0]]))
    assert not torch.equal(some, encoded(images, 400, "poisson", seed=6)[torch.tensor([7, 2])])
    assert set(some.unique().tolist()) == {0, 1}
    p = images[torch.tensor([7, 2])]
    assert bool(((some.mean(1) - p).abs() <= 5 * (p * (1 - p) / 400).sqrt() + 1e-6).all())
    same_pixels = encoded(FolderImages(folder, ["train/ant/0.png"] * 2, 4), 100, "poisson", 5)[:]
    assert not torch.equal(same_pixels[0], same_pixels[1])  # independent
    assert encoded(images, 4, "direct", 0) is images


def test_samples_in_memory_are_encoded_at_once() -> None:
    x = torch.rand(5, 1, 4, 4)
    assert encoded(x, 3, "direct", 1) is x
    expected = encode(x, 3, "poisson", torch.Generator().manual_seed(1))
    found = encoded(x, 3, "poisson", 1)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)
    checkpoint = Checkpoint(Spec("mlp", (1, 4, 4), coding="poisson", timesteps=3), DataSpec(seed=1), "mse", {}, {}, [])
    assert torch.equal(checkpoint.inputs(x)[:], expected)


@pytest.mark.parametrize("size", ["8", 8.0, True])
def test_checkpoints_store_the_image_size(tmp_path: Path, size: object) -> None:
    network = Network(Spec("mlp", (3, 8, 8), 3, hidden=()))
    data = DataSpec("image-folder", image_size=8)
    save_checkpoint(Checkpoint(network.spec, data, "mse", network.state_dict(), {}, []), tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt").data == data
    values = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**values, "data": {**values["data"], "image_size": size}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"b\.pt.*subset, image_size and frames must be whole numbers"):
        load_checkpoint(tmp_path / "b.pt")
    older = {k: v for k, v in values["data"].items() if k != "image_size"}
    torch.save({**values, "data": {**older, "name": "digits"}}, tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt").data == DataSpec()


@pytest.mark.parametrize("shape", [(1, 300_000), (300_000, 1)])
def test_a_thin_image_is_refused_before_it_is_enlarged(shape: tuple[int, int], tmp_path: Path) -> None:
    """Its shorter side resized to 64 pixels, it would have 1.2 billion of them."""
    Image.new("L", shape).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match=r"cannot decode .*thin\.png \(.*pixels are too thin"):
        decoded(tmp_path / "thin.png", 64)
    Image.new("L", (300, 1) if shape[0] > 1 else (1, 300)).save(tmp_path / "thin.png")
    assert decoded(tmp_path / "thin.png", 64).shape == (64, 64, 3)
