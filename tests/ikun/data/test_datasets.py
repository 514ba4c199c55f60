"""Tests of data sets by name: splits, subsets and coding."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ikun.data import datasets as data
from ikun.data.datasets import load_dataset
from ikun.data.download import DataError
from ikun.data.encoding import encode

# --- digits, splits and subsets


def test_digits_keep_their_split() -> None:
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    for dataset, count in ((train, 1437), (test, 360)):
        assert len(dataset) == count
        assert dataset.images.shape == (count, 1, 8, 8)
        assert dataset.images.dtype == torch.float32
        assert dataset.labels.dtype == torch.int64
        assert (float(dataset.images.min()), float(dataset.images.max())) == (0.0, 1.0)
        assert np.unique(dataset.labels.numpy()).tolist() == list(range(10))
    # The split is part of every published number: these hashes must never change.
    assert train.sha256 == "9fc753d344468a4bc570197ee99d0dfb2da4162ba3c2f6011ab0a8533ce1bae4"
    assert test.sha256 == "f8ffd5068c1b8834381d9fcbb80978c03662f586be06c7a130544d56fad0c19f"


def test_digits_split_is_a_partition() -> None:
    def rows(images: npt.NDArray[np.float32]) -> list[bytes]:
        return [image.tobytes() for image in images.reshape(-1, 64)]

    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    everything = rows((load_digits().images / 16).astype(np.float32))
    train, test = (rows(load_dataset("digits", split).images.numpy()) for split in data.SPLITS)
    assert len(set(everything)) == 1797  # so that images can stand for their indices
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(everything)


@settings(max_examples=8)
@given(sizes=st.tuples(st.integers(1, 360), st.integers(1, 360)), seed=st.integers(0, 2**64))
def test_subsets_are_nested_and_repeatable(sizes: tuple[int, int], seed: int) -> None:
    small, large = (load_dataset("digits", "test", subset=size, seed=seed) for size in sorted(sizes))
    assert len(small) == min(sizes)
    assert torch.equal(large.images[: len(small)], small.images)
    assert torch.equal(large.labels[: len(small)], small.labels)
    assert load_dataset("digits", "test", subset=len(small), seed=seed) == small
    assert len({image.numpy().tobytes() for image in large.images}) == len(large)  # without replacement


def test_subset_depends_on_the_seed_and_may_be_everything() -> None:
    whole = load_dataset("digits", "test")
    shuffled = load_dataset("digits", "test", subset=360, seed=1)
    assert shuffled.labels.bincount().tolist() == whole.labels.bincount().tolist()
    assert len({whole.sha256, shuffled.sha256, load_dataset("digits", "test", subset=360, seed=2).sha256}) == 3


@pytest.mark.parametrize("subset", [-1, 0, 361])
def test_an_impossible_subset_is_refused(subset: int) -> None:
    with pytest.raises(DataError, match="from 1 to 360"):
        load_dataset("digits", "test", subset=subset)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(DataError, match="unknown data set 'mnist': choose one of digits, fashion-mnist"):
        load_dataset("mnist")
    with pytest.raises(DataError, match="unknown split 'valid'"):
        load_dataset("digits", "valid")
    with pytest.raises(DataError, match="seed"):
        load_dataset("digits", seed=-1)


def test_data_error_is_one_line() -> None:
    assert str(DataError("a\nb\r\nc")) == "a b c"


# --- coding


def test_direct_coding_changes_nothing() -> None:
    images = torch.rand(3, 1, 4, 4)
    assert encode(images, 5, "direct", None) is images


def test_poisson_spikes_have_the_rates_of_the_pixels() -> None:
    steps, pixels = 4000, torch.linspace(0, 1, 11).reshape(1, 1, 11).expand(2, 3, 11)
    spikes = encode(pixels, steps, "poisson", torch.Generator().manual_seed(0))
    assert spikes.shape == (2, steps, 3, 11)
    assert spikes.dtype == torch.float32
    assert np.unique(spikes.numpy()).tolist() == [0.0, 1.0]
    # 6 sites per rate; 5 standard deviations of a Bernoulli mean, exact at rates 0 and 1.
    error = (spikes.mean(dim=(0, 1, 2)) - pixels[0, 0]).abs()
    bound = 5 * (pixels[0, 0] * (1 - pixels[0, 0]) / (6 * steps)).sqrt()
    assert bool((error <= bound + 1e-6).all())
    # Independent between steps and between sites: correlations stay within 5/sqrt(number of pairs).
    centred = spikes[:, :, :, 5] - 0.5
    for product in (centred[:, 1:] * centred[:, :-1], centred[0] * centred[1]):
        assert abs(float(product.mean()) / 0.25) < 5 / math.sqrt(product.numel())


def test_poisson_never_fires_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.zeros(size))  # the least draw there is
    assert encode(torch.tensor([[0.0, 1e-6]]), 2, "poisson").tolist() == [[[0.0, 1.0], [0.0, 1.0]]]


def test_poisson_is_repeatable_in_every_dtype() -> None:
    images = load_dataset("digits", subset=5).images
    first, again, other, double = (
        encode(pixels, 6, "poisson", torch.Generator().manual_seed(seed))
        for pixels, seed in ((images, 3), (images, 3), (images, 4), (images.double(), 3))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert double.dtype == torch.float64
    assert torch.equal(first, double.float())
    torch.manual_seed(11)
    default = encode(images, 6, "poisson", None)
    torch.manual_seed(11)
    assert torch.equal(default, encode(images, 6, "poisson"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_poisson_is_the_same_on_a_cuda_device() -> None:
    images = load_dataset("digits", subset=5).images
    here = encode(images, 6, "poisson", torch.Generator().manual_seed(3))
    there = encode(images.cuda(), 6, "poisson", torch.Generator().manual_seed(3))
    assert there.is_cuda
    assert torch.equal(here, there.cpu())
    with pytest.raises(DataError, match="generator on cuda"):
        encode(images, 6, "poisson", torch.Generator("cuda"))


def test_bad_codings_are_refused() -> None:
    images = torch.zeros(1, 1, 2, 2)
    with pytest.raises(DataError, match="unknown coding 'rate': choose one of direct, poisson"):
        encode(images, 4, "rate", None)
    with pytest.raises(DataError, match="0 timesteps"):
        encode(images, 0, "poisson", None)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(DataError, match=r"outside \[0,1\]"):
            encode(images + bad, 4, "poisson", None)
