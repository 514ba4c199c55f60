"""Results of a landscape analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hessian_tools.results.text import brief, headline

LANDSCAPE_SCHEMA = "ikun-hessian/landscape/1"
# Default ranges in units of ||w||. Random directions are filter-normalized as in Li et al. 2018 and go half as far as
# theirs. Eigenvectors and the gradient are about ten times as steep: at RANDOM_RANGE the loss is at chance level.
RANDOM_RANGE, SHARP_RANGE = 0.5, 0.05
NAN = float("nan")


@dataclass(frozen=True)
class Line:
    """Losses along one direction: at w + t v, for a unit vector v.

    Eigenvectors and the gradient point uphill (slope >= 0).

    Attributes:
        name: Name of the direction.
        hessian: v'Hv, with the surrogate Hessian H.
        ggn: v'Gv, with the generalized Gauss-Newton matrix G of the surrogate.
        slope: g'v, with the surrogate gradient g.
        residual: ||Hv - (v'Hv) v|| for an eigenvector; NaN for other directions.
        converged: Whether the residual meets the tolerance; True for directions that are not eigenvectors.
        distances: Distances t.
        loss: True loss at each distance.
        relaxed_loss: Loss of the relaxed network at each distance; empty if there is no relaxed network.
        accuracy: Accuracy at each distance; empty unless requested.
        relaxed_accuracy: Accuracy of the relaxed network at each distance; empty unless requested.
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

    __repr__ = brief

    @property
    def step(self) -> int:
        """Grid points from 0 to the point at which second differences are reported: a fifth of the range."""
        return max(1, round(len(self.distances) // 2 / 5))

    def around(self, losses: Sequence[float]) -> tuple[float, float, float, float]:
        """Return the step and the losses that a second difference needs.

        Args:
            losses: Losses at `distances`.

        Returns:
            The step e and the losses at -e, 0 and e. Then L'' = (L(e) - 2 L(0) + L(-e)) / e^2.
        """
        middle = len(self.distances) // 2
        low, high = middle - self.step, middle + self.step
        return self.distances[high], losses[low], losses[middle], losses[high]

    def second_difference(self, losses: Sequence[float]) -> float:
        """Return (L(e) - 2 L(0) + L(-e)) / e^2 for the given losses; NaN if they are empty."""
        if not losses:
            return NAN
        e, below, here, above = self.around(losses)
        return (above - 2 * here + below) / e**2


@dataclass(frozen=True)
class Plane:
    """Losses in a plane: at w + s u + t v, for unit vectors u and v.

    Attributes:
        directions: Names of u and v.
        cosine: Cosine of the angle between u and v.
        distances: Grid of the distances, the same for s and t.
        loss: True loss. `loss[i][j]` is the loss at s = distances[j] and t = distances[i].
        relaxed_loss: Loss of the relaxed network in the same form; empty if there is no relaxed network.
    """

    directions: tuple[str, str]
    cosine: float
    distances: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    relaxed_loss: tuple[tuple[float, ...], ...]

    __repr__ = brief


@dataclass(frozen=True)
class LandscapeResult:
    """Losses of a landscape analysis and the conditions under which they were measured.

    Attributes:
        schema: Name and version of the file format.
        checkpoint: Source of the weights, such as path and SHA-256.
        data: Data set, split, number of samples and loss.
        network: Network and its surrogate.
        training: Settings and outcome of the training.
        settings: Settings of the analysis.
        num_parameters: Number P of parameters.
        parameters: Number of elements of each parameter tensor, by name.
        weight_norm: Norm ||w|| of the weights, the unit of all ranges.
        loss: True loss at w.
        relaxed_loss: Loss of the relaxed network at w; NaN if there is no relaxed network.
        accuracy: Accuracy at w; NaN if the targets are not class labels.
        gradient_norm: Norm of the surrogate gradient at w.
        dtype: Data type of the operator products.
        device: Device of the computation.
        seed: Random seed.
        symmetry_error: Relative asymmetry of the Hessian; NaN if no eigenvector was needed.
        lines: Losses along each direction.
        planes: Losses in each plane.
        refused: Reason for each requested direction or plane that could not be computed, and for a missing relaxed
            network.
        products: Number of products with the Hessian and the GGN.
        evaluations: Number of evaluations of a loss on all samples.
        seconds: Run time in seconds.
        versions: Versions of the libraries used.
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

    def __repr__(self) -> str:
        lines = [f"  lines: {', '.join(line.name for line in self.lines)}"] if self.lines else []
        lines += [f"  planes: {'; '.join(','.join(p.directions) for p in self.planes)}"] if self.planes else []
        lines += [f"  not computed: {', '.join(self.refused)}"] if self.refused else []
        return "\n".join([headline(self), *lines])
