"""Fields that all results share: where the weights come from and how they were analysed."""

from __future__ import annotations

import typing
from typing import Any


class Analysed(typing.Protocol):
    """A result of any analysis: its provenance and the conditions under which it was measured."""

    @property
    def checkpoint(self) -> dict[str, Any]: ...
    @property
    def data(self) -> dict[str, Any]: ...
    @property
    def network(self) -> dict[str, Any]: ...
    @property
    def training(self) -> dict[str, Any]: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def seed(self) -> int: ...


class AnalysedParts(Analysed, typing.Protocol):
    """A result that also stores the number of elements of each parameter tensor."""

    @property
    def parameters(self) -> dict[str, int]: ...
