"""Corrupted images in five severities, after Hendrycks & Dietterich 2019 (arXiv:1903.12261).

The severities of Gaussian noise, blur and contrast are those of CIFAR-10-C. The blur is scaled up for images that are
larger than CIFAR's. Occlusion is not part of CIFAR-10-C: it is a grey square, as in Zeiler & Fergus 2014
(arXiv:1311.2901, section 4.2).
"""

from __future__ import annotations

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ikun.data.download import DataError

SEVERITIES = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation in pixels; for sides over 32 pixels, in 1/32 of the side
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # remaining fraction of the contrast
    "occlusion": (0.2, 0.3, 0.4, 0.5, 0.6),  # side of the square, as a fraction of the image's side
}
CORRUPTIONS = tuple(SEVERITIES)


def corrupted(images: Tensor, kind: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupt images.

    Args:
        images: Images [N, C, H, W] with values in [0, 1].
        kind: One of CORRUPTIONS. "gaussian_noise" adds independent noise to every pixel. "blur" applies a Gaussian
            filter to each channel. "contrast" shrinks the distance of each pixel from the mean of its channel.
            "occlusion" puts a grey square (0.5) at a random place, the same in all channels.
        severity: From 1 (least) to 5.
        generator: A generator on the CPU, for the noise and for the place of the square.

    Returns:
        The corrupted images, with the same shape, dtype and range.

    Raises:
        DataError: If the kind or severity is unknown, or the images have another rank or range.
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
