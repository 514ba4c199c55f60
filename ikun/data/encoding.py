"""Input coding: turn images into the input that the network receives at every time step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ikun.data.download import DataError as DataError
from ikun.data.lazy import Images

CODINGS = ("direct", "poisson", "spikes")


def encode(images: Tensor, timesteps: int, coding: str, generator: torch.Generator | None = None) -> Tensor:
    """Encode samples for a spiking network.

    Args:
        images: Images [N, C, H, W], or spike trains [N, T, C, H, W] if `coding` is "spikes".
        timesteps: Number of time steps T that the network runs.
        coding: "direct" returns the images unchanged, and the network repeats them at every step. "poisson" draws
            independent Bernoulli spikes with the pixel value as their probability. "spikes" returns the spike trains
            unchanged.
        generator: A generator on the CPU for "poisson" (default: torch's own). Spikes are drawn on the CPU, so that
            one seed gives the same spikes on every device.

    Returns:
        The network's input: [N, C, H, W] for "direct", else [N, T, C, H, W], in the dtype of the images.

    Raises:
        DataError: If the coding is unknown, `timesteps` is less than 1 or differs from the length of the spike trains,
            the data are images where spike trains are needed (or the reverse), the generator is not on the CPU, or
            pixels are outside [0, 1].
    """
    if coding not in CODINGS:
        raise DataError(f"unknown coding {coding!r}: choose one of {', '.join(CODINGS)}")
    if timesteps < 1:
        raise DataError(f"{timesteps} timesteps: give a whole number >= 1")
    if coding == "spikes" and images.dim() != 5:
        raise DataError("these data are images, not spike trains: set {coding} to direct or poisson", coding=...)
    if coding != "spikes" and images.dim() == 5:
        raise DataError("these data are spike trains already: give {coding}", coding="spikes")
    if coding == "spikes" and images.shape[1] != timesteps:
        steps = images.shape[1]
        raise DataError(
            "these data have {} time steps, the network {}: give {timesteps}", steps, timesteps, timesteps=steps
        )
    if coding in ("direct", "spikes"):
        return images
    if generator is not None and generator.device.type != "cpu":
        raise DataError(f"poisson coding with a generator on {generator.device}: give one on the cpu")
    # The draws are always float32: another dtype would consume the generator differently.
    probability = images.detach().to("cpu", torch.float32)
    if not bool(((probability >= 0) & (probability <= 1)).all()):
        raise DataError("poisson coding of pixels outside [0,1]: scale the images first")
    draws = torch.rand(
        (len(images), timesteps, *images.shape[1:]), generator=generator, dtype=torch.float32, device="cpu"
    )
    dtype = images.dtype if images.is_floating_point() else torch.float32
    return (draws < probability[:, None]).to(images.device, dtype)


def encoded(images: Images, timesteps: int, coding: str, seed: int) -> Images:
    """Encode all samples reproducibly, without reading those that are on disk.

    Poisson spikes of samples in memory are drawn from one stream with the seed `seed`. Those of a sample on disk are
    drawn from a stream of its own, seeded by `seed` and the sample's position.

    Args:
        images: Images [N, C, H, W] in memory or on disk, or spike trains [N, T, C, H, W].
        timesteps: Number of time steps T that the network runs.
        coding: One of CODINGS, as in `encode`.
        seed: Seed of the Poisson spikes.

    Returns:
        The network's inputs, as in `encode`. Samples on disk are encoded when they are read.

    Raises:
        DataError: As `encode` does.
    """
    if isinstance(images, Tensor):
        return encode(images, timesteps, coding, torch.Generator().manual_seed(seed))
    return _PoissonSpikes(images, timesteps, seed) if coding == "poisson" else images


@dataclass(frozen=True, eq=False)
class _PoissonSpikes:
    """Poisson spikes [N, T, ...] of images on disk."""

    images: Images
    timesteps: int
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), self.timesteps, *self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        rows = torch.arange(len(self))[index]
        return torch.stack(
            [
                encode(image[None], self.timesteps, "poisson", self._generator(row))[0]
                for row, image in zip(rows.tolist(), self.images[rows], strict=True)
            ]
        )

    def _generator(self, row: int) -> torch.Generator:
        """Return the generator of one sample."""
        word = np.random.SeedSequence((self.seed, row)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word) >> 1)
