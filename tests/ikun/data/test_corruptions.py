"""Tests of image corruptions against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from draws import seeded
from torch import Tensor

from ikun.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from ikun.data.datasets import load_dataset
from ikun.data.download import DataError


def images(count: int = 4, channels: int = 3, height: int = 16, width: int = 20) -> Tensor:
    return torch.rand(count, channels, height, width, generator=seeded(9))


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_corruptions_are_pure_repeatable_and_worse_with_severity(kind: str, dtype: torch.dtype) -> None:
    x = images().to(dtype)
    before, distances = x.clone(), []
    for severity in range(1, 6):
        found = corrupted(x, kind, severity, seeded())
        assert (found.shape, found.dtype) == (x.shape, dtype)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
        assert torch.equal(found, corrupted(x, kind, severity, seeded()))
        assert torch.equal(found, corrupted(x, kind, severity, seeded(1))) == (kind in ("blur", "contrast"))
        distances.append(float((found - x).norm()))
    assert torch.equal(x, before)
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_noise_is_normal_and_cut_off() -> None:
    x = torch.full((10, 3, 40, 40), 0.5)
    noise = corrupted(x, "gaussian_noise", 3, seeded()) - x
    assert float(noise.std()) == pytest.approx(0.08, rel=0.02)
    assert abs(float(noise.mean())) < 5 * 0.08 / math.sqrt(noise.numel())
    fourth = float((noise / 0.08).pow(4).mean())
    assert fourth == pytest.approx(3, abs=5 * math.sqrt(96 / noise.numel()))  # of a normal number
    black = corrupted(0 * x, "gaussian_noise", 3, seeded())
    assert float((black == 0).double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize(("shape", "pixel"), [((64, 70), 2), ((40, 32), 1), ((8, 8), 1)])
def test_blur_is_a_gaussian_mean_with_edges_repeated(severity: int, shape: tuple[int, int], pixel: int) -> None:
    """The kernel written out over padded images."""
    x = images(2, 2, *shape).double()
    sigma = SEVERITIES["blur"][severity - 1] * pixel
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), mode="edge")
    expected = np.zeros(x.shape)
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            expected += kernel[i] * kernel[j] * padded[:, :, i : i + shape[0], j : j + shape[1]]
    np.testing.assert_allclose(corrupted(x, "blur", severity, seeded()).numpy(), expected, atol=1e-12)


def test_blur_means_the_same_at_every_size() -> None:
    """Of an image four times as large, about the same image."""
    small = torch.nn.functional.interpolate(images(2, 1, 4, 4), 32, mode="bicubic").clamp(0, 1)
    large = torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear", align_corners=False)
    first = corrupted(small, "blur", 5, seeded())
    second = torch.nn.functional.avg_pool2d(corrupted(large, "blur", 5, seeded()), 4)
    assert float((first - second).norm() / (first - small).norm()) < 0.5


def test_contrast_shrinks_towards_each_channels_mean() -> None:
    x = images()
    found = corrupted(x, "contrast", 5, seeded())
    for image, other in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        mean = image.mean()
        torch.testing.assert_close(other, 0.15 * image + 0.85 * mean)


@pytest.mark.parametrize(("severity", "side"), [(1, (3, 4)), (3, (6, 8)), (5, (10, 12))])
def test_occlusion_is_a_grey_rectangle_at_random(severity: int, side: tuple[int, int]) -> None:
    x = images(400) * 0.4  # no pixel is grey before
    found = corrupted(x, "occlusion", severity, seeded())
    hidden = found == 0.5
    assert torch.equal(found[~hidden], x[~hidden])
    corners = set()
    for mask in hidden:
        assert torch.equal(mask[0], mask[1])
        rows, columns = mask[0].nonzero().unbind(1)
        top, left, height, width = rows.min(), columns.min(), *(int(v.max() - v.min()) + 1 for v in (rows, columns))
        assert (height, width) == side
        assert len(rows) == height * width
        corners.add((int(top), int(left)))
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 16 - side[0], 0, 20 - side[1])


def test_tiny_and_real_images_are_corrupted() -> None:
    assert bool((corrupted(torch.zeros(2, 1, 2, 2), "occlusion", 1, seeded()) == 0.5).flatten(1).sum(1).eq(1).all())
    x = load_dataset("digits", "test").images[:20]
    for kind in CORRUPTIONS:
        assert not torch.equal(corrupted(x, kind, 1, seeded()), x)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(DataError, match="unknown corruption 'fog': choose one of gaussian_noise, blur, contrast, occ"):
        corrupted(images(), "fog", 1, seeded())
    for severity in (0, 6, -1):
        with pytest.raises(DataError, match=f"severity {severity} of blur: give a whole number from 1 to 5"):
            corrupted(images(), "blur", severity, seeded())
    for bad in (images()[0], images() * 2, images() - 1, images() * math.nan, images()[:, None]):
        with pytest.raises(DataError, match=r"contrast needs images \[N,C,H,W\] in \[0,1\]"):
            corrupted(bad, "contrast", 1, seeded())
