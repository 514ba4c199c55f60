"""Input coding: from images to what the network receives at every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ikun.data.download import DataError as DataError
from ikun.data.lazy import Images

CODINGS = ("direct", "poisson", "spikes")


def encode(images: Tensor, timesteps: int, coding: str, generator: torch.Generator | None = None) -> Tensor:
    """Code samples for a spiking network that runs `timesteps` steps.

    direct: images [N,...] unchanged; the network repeats them itself. spikes: spike trains [N,T,C,H,W] unchanged.
    poisson: independent Bernoulli spikes, 0 or 1 in the images' dtype, [N,T,...], each with the pixel value as its
    probability. Drawn from `generator` (default: torch's own) on the CPU, so that one seed gives the same spikes on
    every device.
    Raises DataError for an unknown coding, timesteps < 1 or other than the T of spike trains, images where spike trains
    are wanted and the reverse, a generator off the CPU, or pixels outside [0,1].
    """
    if coding not in CODINGS:
        raise DataError(f"unknown coding {coding!r}: choose one of {', '.join(CODINGS)}")
    if timesteps < 1:
        raise DataError(f"{timesteps} timesteps: give a whole number >= 1")
    if coding == "spikes" and images.dim() != 5:
        raise DataError("these data are images, not spike trains: give --coding direct or poisson")
    if coding != "spikes" and images.dim() == 5:
        raise DataError("these data are spike trains already: give --coding spikes")
    if coding == "spikes" and images.shape[1] != timesteps:
        steps = images.shape[1]
        raise DataError(f"these data have {steps} steps of time, the network {timesteps}: give --timesteps {steps}")
    if coding in ("direct", "spikes"):
        return images
    if generator is not None and generator.device.type != "cpu":
        raise DataError(f"poisson coding with a generator on {generator.device}: give one on the cpu")
    # Always float32 draws: another dtype would consume the generator differently.
    probability = images.detach().to("cpu", torch.float32)
    if not bool(((probability >= 0) & (probability <= 1)).all()):
        raise DataError("poisson coding of pixels outside [0,1]: scale the images first")
    draws = torch.rand(
        (len(images), timesteps, *images.shape[1:]), generator=generator, dtype=torch.float32, device="cpu"
    )
    dtype = images.dtype if images.is_floating_point() else torch.float32
    return (draws < probability[:, None]).to(images.device, dtype)


def encoded(images: Images, timesteps: int, coding: str, seed: int) -> Images:
    """All samples as network inputs, coded once and for all by `seed`; those on disk stay there.

    Poisson spikes of samples in memory come from one stream, those of a sample on disk from (seed, its position).
    Raises DataError as encode does.
    """
    if isinstance(images, Tensor):
        return encode(images, timesteps, coding, torch.Generator().manual_seed(seed))
    return _PoissonSpikes(images, timesteps, seed) if coding == "poisson" else images


@dataclass(frozen=True, eq=False)
class _PoissonSpikes:
    """Spikes [N,T,...] of images on disk."""

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
        word = np.random.SeedSequence((self.seed, row)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word) >> 1)
