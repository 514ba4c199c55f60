"""Images made worse on purpose, in five severities, after Hendrycks & Dietterich 2019 (arXiv:1903.12261).

The numbers are those of their CIFAR-10-C; the blur grows with images larger than CIFAR's. Occlusion is not theirs: a
grey square, as in Zeiler & Fergus 2014 (arXiv:1311.2901, section 4.2).
"""

from __future__ import annotations

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ikun.data.download import DataError

SEVERITIES = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation, in pixels or, beyond 32 a side, 32nds of the side
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of it
    "occlusion": (0.2, 0.3, 0.4, 0.5, 0.6),  # side of the square, in parts of the image's sides
}
CORRUPTIONS = tuple(SEVERITIES)


def corrupted(images: Tensor, kind: str, severity: int, generator: torch.Generator) -> Tensor:
    """Images [N,C,H,W] in [0,1], corrupted, of the same shape, dtype and range; severity 1 (least) to 5.

    gaussian_noise: of every pixel, drawn from `generator` on the CPU. blur: Gaussian, of each channel. contrast: the
    distance from each channel's mean shrinks. occlusion: a grey (0.5) square at a random place, all channels alike.
    Raises DataError for an unknown kind or severity and for images of another rank or range.
    """
    if kind not in SEVERITIES:
        raise DataError(f"unknown corruption {kind!r}: choose one of {', '.join(CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise DataError(f"severity {severity} of {kind}: give a whole number from 1 to 5")
    if images.dim() != 4 or not bool(((images >= 0) & (images <= 1)).all()):
        raise DataError(f"{kind} needs images [N,C,H,W] in [0,1], not {list(images.shape)}: scale them first")
    amount = SEVERITIES[kind][severity - 1]
    count, _, height, width = images.shape
    if kind == "gaussian_noise":
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float32)
        return (images + amount * noise.to(images)).clamp(0, 1)
    if kind == "blur":
        sigma = amount * max(1.0, min(height, width) / 32)
        blurred = gaussian_filter(images.cpu().numpy(), (0, 0, sigma, sigma), mode="nearest")
        return torch.from_numpy(blurred).to(images).clamp(0, 1)
    if kind == "contrast":
        mean = images.mean((2, 3), keepdim=True)
        return (mean + amount * (images - mean)).clamp(0, 1)
    inside = []
    for side in (height, width):
        covered = max(1, round(amount * side))
        first = torch.randint(side - covered + 1, (count, 1), generator=generator)
        place = torch.arange(side)
        inside.append((place >= first) & (place < first + covered))
    square = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(images.device)
    return torch.where(square, 0.5, images)
