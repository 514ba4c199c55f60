"""Samples that are in memory, or on disk and read when they are indexed, under one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Images(Protocol):
    """Samples [N, ...]. A tensor is one. Indexing with positions [n] or a slice returns those samples as a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice, /) -> Tensor: ...


def taken(images: Images, index: Tensor | slice) -> Images:
    """Select samples without reading those that are on disk.

    Args:
        images: Samples [N, ...].
        index: Positions [n] or a slice.

    Returns:
        The n selected samples: a tensor if `images` is one, else a `Part`.
    """
    if isinstance(images, Tensor):
        return images[index]
    return Part(images, torch.arange(len(images))[index])


@dataclass(frozen=True, eq=False)
class Part:
    """A selection of samples that are read when they are indexed.

    Attributes:
        images: Samples [N, ...].
        order: Positions [n] of the selected samples.
    """

    images: Images
    order: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        return self.images[self.order[index]]
