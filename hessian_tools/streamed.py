"""Batches that are read when they are used, for samples that do not fit into memory together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, overload

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Inputs(Protocol):
    """Inputs of N samples that are read when asked for: inputs[index] for index [n] is a tensor [n, ...].

    It must give the same for the same index, and may be asked by several threads at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Streamed(Sequence[Batch]):
    """Batches of the samples `parts` (indices, one tensor a batch); inputs are read anew every time.

    targets [N, ...] are in memory, on the device of `like`; floating inputs come in its dtype.
    """

    inputs: Inputs
    targets: Tensor
    parts: tuple[Tensor, ...]
    like: Tensor

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, i: int) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> Streamed: ...
    def __getitem__(self, i: int | slice) -> Batch | Streamed:
        if isinstance(i, slice):
            return replace(self, parts=self.parts[i])
        return to(self.inputs[self.parts[i]], self.like), self.targets[self.parts[i]]

    def regrouped(self, parts: Sequence[Tensor]) -> Streamed:
        """The same samples, numbered from 0 in their order here, in other batches: one of each set of numbers [n]."""
        samples = torch.cat(self.parts)
        return replace(self, parts=tuple(samples[part.cpu()] for part in parts))


def to(t: Tensor, like: Tensor) -> Tensor:
    """t on the device of `like`, and in its dtype if it is floating."""
    return t.to(device=like.device, dtype=like.dtype if t.is_floating_point() else t.dtype)
