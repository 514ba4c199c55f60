"""Samples in memory, or on disk and read when they are asked for: what training and analysis need of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Images(Protocol):
    """Samples [N, ...]: a tensor is one. Indexed by positions [n] or a slice, it gives those samples as a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice, /) -> Tensor: ...


def taken(images: Images, index: Tensor | slice) -> Images:
    """The samples at these positions; none that is on disk is read for it."""
    if isinstance(images, Tensor):
        return images[index]
    return Part(images, torch.arange(len(images))[index])


@dataclass(frozen=True, eq=False)
class Part:
    """The samples of `images` at the positions `order` [n]."""

    images: Images
    order: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        return self.images[self.order[index]]
