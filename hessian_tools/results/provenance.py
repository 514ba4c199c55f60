"""What every result says about the weights it was measured at."""

from __future__ import annotations

import typing
from typing import Any


class Analysed(typing.Protocol):
    """What every result says about the weights it was measured at."""

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
    """The same with the size of every parameter."""

    @property
    def parameters(self) -> dict[str, int]: ...
