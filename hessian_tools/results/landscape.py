"""The result of a landscape analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LANDSCAPE_SCHEMA = "ikun-hessian/landscape/1"
# Default ranges in units of ||w||. Filter-normalized random directions as in Li et al. 2018, half as far; eigenvectors
# and gradient are some ten times as steep, and as far away the loss is that of chance.
RANDOM_RANGE, SHARP_RANGE = 0.5, 0.05
NAN = float("nan")


@dataclass(frozen=True)
class Line:
    """Losses at w + t v, v of norm 1, for the distances t; those of the relaxed network empty where there is none.

    hessian: v'Hv and ggn: v'Gv of the surrogate; slope: g'v. Eigenvectors and gradient point uphill (slope >= 0).
    residual: ||Hv - (v'Hv) v|| of an eigenvector, and whether that is as small as it should be; NaN and True for other
    directions. Accuracies are empty unless asked for.
    """

    name: str
    hessian: float
    ggn: float
    slope: float
    residual: float
    converged: bool
    distances: tuple[float, ...]
    loss: tuple[float, ...]
    relaxed_loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    relaxed_accuracy: tuple[float, ...]

    @property
    def step(self) -> int:
        """Grid points from 0 to the one at which second differences are reported: a fifth of the range."""
        return max(1, round(len(self.distances) // 2 / 5))

    def around(self, losses: Sequence[float]) -> tuple[float, float, float, float]:
        """(step e, losses at -e, 0 and e), in terms of which L'' = (L(e) - 2 L(0) + L(-e)) / e^2."""
        middle = len(self.distances) // 2
        low, high = middle - self.step, middle + self.step
        return self.distances[high], losses[low], losses[middle], losses[high]

    def second_difference(self, losses: Sequence[float]) -> float:
        """(L(e) - 2 L(0) + L(-e)) / e^2 of one of the losses; NaN where there is none."""
        if not losses:
            return NAN
        e, below, here, above = self.around(losses)
        return (above - 2 * here + below) / e**2


@dataclass(frozen=True)
class Plane:
    """Losses at w + s u + t v, u and v of norm 1 with this cosine between them.

    loss[i][j]: at s = distances[j] along the first direction and t = distances[i] along the second; relaxed_loss: empty
    where there is no relaxed network.
    """

    directions: tuple[str, str]
    cosine: float
    distances: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    relaxed_loss: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LandscapeResult:
    """Everything that `landscape` measured, and what it was measured on.

    weight_norm: ||w||. loss, relaxed_loss: at w, NaN where there is no relaxed network. refused: what was asked for
    and could not be had, and why. products: with the Hessian and the GGN; evaluations: of a loss on all samples.
    """

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    settings: dict[str, Any]
    num_parameters: int
    parameters: dict[str, int]
    weight_norm: float
    loss: float
    relaxed_loss: float
    accuracy: float
    gradient_norm: float
    dtype: str
    device: str
    seed: int
    symmetry_error: float
    lines: tuple[Line, ...]
    planes: tuple[Plane, ...]
    refused: dict[str, str]
    products: int
    evaluations: int
    seconds: float
    versions: dict[str, str]
