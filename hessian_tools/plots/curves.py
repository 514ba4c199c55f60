"""Compute axes and curves as plain arrays: value axes, symlog axes, broadened densities and cumulative functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hessian_tools.results.operator_spectrum import Density
from hessian_tools.results.spectrum import SpectrumResult

Array = npt.NDArray[np.float64]
BROADENING = 1.0  # the constant c in sigma = c * (range of the nodes) / steps
LOG_DECADES = 6  # largest range of positive values on a logarithmic axis
SYMLOG_DECADES = 3  # largest range of sizes on the logarithmic part of a symlog axis


@dataclass(frozen=True)
class SymlogAxis:
    """Symmetric logarithmic axis of a variable x, drawn at u = asinh(x / linthresh).

    Attributes:
        linthresh: The axis is linear within +-linthresh and logarithmic outside.
        low: Lower limit in x.
        high: Upper limit in x.
        sigma: Standard deviation in u of the Gaussians that broaden a density on this axis.
    """

    linthresh: float
    low: float
    high: float
    sigma: float

    def forward(self, x: Array) -> Array:
        """Convert x to u."""
        return np.arcsinh(x / self.linthresh)

    def inverse(self, u: Array) -> Array:
        """Convert u to x."""
        x: Array = self.linthresh * np.sinh(u)
        return x

    def slope(self, x: Array) -> Array:
        """Return the derivative du / dx at x."""
        slope: Array = 1 / np.hypot(x, self.linthresh)
        return slope


@dataclass(frozen=True)
class ValueAxis:
    """Axis of the values of a curve.

    Attributes:
        kind: "log", "symlog" or "linear".
        low: Lower limit.
        high: Upper limit.
        linthresh: A symlog axis is linear within +-linthresh. NaN for other kinds.
    """

    kind: str
    low: float
    high: float
    linthresh: float = math.nan


def value_axis(values: Array, errors: Array) -> ValueAxis:
    """Choose an axis that shows all values with their error bars.

    The axis is logarithmic if all values are positive, lie within `LOG_DECADES` decades and have errors below 90% of
    the value. Otherwise it is symlog, or linear if the smallest magnitude exceeds a tenth of the largest.

    Args:
        values: Values [n]. Values that are not finite are ignored.
        errors: Half lengths of the error bars [n]. Errors that are not finite count as 0.

    Returns:
        The axis, with a margin at both ends.

    Raises:
        ValueError: If no value is finite.
    """
    y, e = _known(values, errors)
    sizes = np.abs(y[y != 0])
    largest, smallest = float(sizes.max(initial=0.0)), float(sizes.min(initial=math.inf))
    low, high = float((y - e).min()), float((y + e).max())
    if (e < 0.9 * y).all() and smallest >= largest * 10.0**-LOG_DECADES:
        room = log_margin(low, high)
        return ValueAxis("log", low / room, high * room)
    linthresh = max(smallest, largest * 10.0 ** -(LOG_DECADES if y.min() > 0 else SYMLOG_DECADES))
    if linthresh > largest / 10:
        return linear_axis(values, errors)
    return ValueAxis("symlog", *symlog_limits(linthresh, low, high), linthresh)


def log_margin(low: float, high: float) -> float:
    """Return the factor between the outermost values `low` and `high` and the limits of a logarithmic axis."""
    factor: float = (high / low) ** 0.05
    return max(1.2, factor, math.sqrt(3 * low / high))


def symlog_limits(linthresh: float, low: float, high: float) -> tuple[float, float]:
    """Return the limits of a symlog axis that shows `low` to `high` with a margin of 5% at both ends."""
    ends = np.arcsinh(np.array([low, high]) / linthresh)
    ends += 0.05 * (ends[1] - ends[0]) * np.array([-1, 1])
    low, high = (float(x) for x in linthresh * np.sinh(ends))
    return low, high


def linear_axis(values: Array, errors: Array) -> ValueAxis:
    """Choose a linear axis that shows all values with their error bars.

    Args:
        values: Values [n]. Values that are not finite are ignored.
        errors: Half lengths of the error bars [n]. Errors that are not finite count as 0.

    Returns:
        The axis, with a margin at both ends.

    Raises:
        ValueError: If no value is finite.
    """
    y, e = _known(values, errors)
    low, high = float((y - e).min()), float((y + e).max())
    size = max(-low, high)
    room = 0.06 * (high - low) if high - low > 1e-6 * size else 0.5 * size or 1.0
    return ValueAxis("linear", low - room, high + room)


def _known(values: Array, errors: Array) -> tuple[Array, Array]:
    """Return the finite values and their errors."""
    known = np.isfinite(values)
    if not known.any():
        raise ValueError("no finite value to draw")
    return values[known], np.nan_to_num(errors, nan=0.0, posinf=0.0)[known]


def symlog_axis(result: SpectrumResult) -> SymlogAxis:
    """Choose one eigenvalue axis for the densities of all operators of a result.

    The axis is linear over the tenth of the quadrature nodes of the bulk that are closest to 0.
    """
    densities = list(densities_of(result).values())
    atoms = [finite(nodes[: d.atoms]) for d in densities for nodes in d.nodes]
    bulk = [x for d in densities for x, _ in _bulk(d)]
    reach = [x + side * 3 * _spacing(x) for x in bulk for side in (-1, 1)]
    drawn = np.concatenate([np.zeros(1), *atoms, *bulk, *reach])
    sizes = np.abs(np.concatenate([np.zeros(1), *bulk]))
    largest = max((float(np.abs(x).max(initial=0.0)) for x in (*atoms, *bulk)), default=0.0) or 1.0
    inner = float(np.quantile(sizes[sizes > 0], 0.1)) if sizes.any() else largest
    linthresh = float(np.clip(inner, 1e-8 * largest, 0.1 * largest))
    ranges = [
        float(np.ptp(np.arcsinh(x / linthresh))) / max(d.steps, 1) for d in densities for x, _ in _bulk(d) if len(x)
    ]
    sigma = float(np.clip(BROADENING * max(ranges, default=0.0), 0.05, 0.5))
    low, high = np.arcsinh(np.array([drawn.min(), drawn.max()]) / linthresh)
    margin = max(0.03 * (high - low), 3 * sigma)
    ends = linthresh * np.sinh(np.array([low - margin, high + margin]))
    return SymlogAxis(linthresh, float(ends[0]), float(ends[1]), sigma)


def density_curves(density: Density, axis: SymlogAxis, positive: bool = False) -> tuple[Array, Array]:
    """Compute the broadened density of the bulk for each probe.

    Every quadrature node becomes a Gaussian with standard deviation `axis.sigma` in u, or, if the nodes are further
    apart than that, a Gaussian in lambda as wide as their spacing. Deflated eigenvalues are not included.

    Args:
        density: Quadrature nodes and weights of an operator.
        axis: The eigenvalue axis.
        positive: Whether the operator has no negative eigenvalues. The density then ends at 0, and what the broadening
            moved below 0 is reflected.

    Returns:
        A grid of eigenvalues [n], and the density per unit of lambda of each probe [probes, n]. Both are empty if
        there is no bulk.
    """
    bulk = _bulk(density)
    u = np.concatenate([axis.forward(x) for x, _ in bulk])
    if not len(u):
        return np.empty(0), np.empty((len(bulk), 0))
    reach = max((float(_spacing(x).max(initial=0.0)) for x, _ in bulk), default=0.0)
    ends = np.array([axis.inverse(u.min()) - 6 * reach, axis.inverse(u.max()) + 6 * reach])
    low, high = axis.forward(ends)
    count = math.ceil((high - low + 12 * axis.sigma) / axis.sigma * 4) + 1
    grid = axis.inverse(np.linspace(low - 6 * axis.sigma, high + 6 * axis.sigma, count))
    if positive:  # what the broadening would move below 0 is reflected
        grid = np.append(0.0, grid[grid > 0])
        sides = [(_broadened(x, w, grid, axis), _broadened(-x[::-1], w[::-1], grid, axis)) for x, w in bulk]
        return grid, np.stack([right + left for right, left in sides])
    return grid, np.stack([_broadened(x, w, grid, axis) for x, w in bulk])


def _broadened(nodes: Array, weights: Array, grid: Array, axis: SymlogAxis) -> Array:
    """Return the density of one probe: a Gaussian per node, in u or, for widely spaced nodes, in lambda."""
    spacing = _spacing(nodes)
    coarse = spacing > axis.sigma / axis.slope(nodes)
    in_u = weights[~coarse] @ _gaussian(axis.forward(grid), axis.forward(nodes[~coarse]), axis.sigma)
    in_lambda = weights[coarse] @ _gaussian(grid, nodes[coarse], spacing[coarse])
    total: Array = in_u * axis.slope(grid) + in_lambda
    return total


def one_eigenvalue(densities: Sequence[Density], grid: Array, axis: SymlogAxis) -> Array:
    """Compute the height of the density of a single eigenvalue.

    The eigenvalue is broadened as widely as any node of the densities at the same place.

    Args:
        densities: Densities of the operators drawn together.
        grid: Eigenvalues [n].
        axis: The eigenvalue axis.

    Returns:
        P times the density at its maximum [n], for an eigenvalue at each point of the grid.
    """
    widest = axis.sigma / axis.slope(grid)
    for nodes, _ in (pair for d in densities for pair in _bulk(d)):
        spacing = _spacing(nodes)
        coarse = spacing > axis.sigma / axis.slope(nodes)
        widest = np.maximum(widest, spacing[coarse].max(initial=0.0))
    density: Array = 1 / (widest * math.sqrt(2 * math.pi))
    return density


def _gaussian(x: Array, centres: Array, sigma: Array | float) -> Array:
    """Return normal densities [centres, x]."""
    s = np.broadcast_to(sigma, centres.shape)[:, None]
    values: Array = np.exp(-0.5 * ((x - centres[:, None]) / s) ** 2) / (s * math.sqrt(2 * math.pi))
    return values


def _spacing(nodes: Array) -> Array:
    """Return the resolution at each node: the wider gap to its neighbours, at most the median gap."""
    if len(nodes) < 2:
        return np.zeros(len(nodes))
    gaps = np.diff(nodes)
    wider = np.maximum(np.append(gaps[:1], gaps), np.append(gaps, gaps[-1:]))
    return np.minimum(wider, np.median(gaps))


def cumulative(density: Density) -> tuple[Array, Array]:
    """Compute the fraction of eigenvalues that are at most x.

    Args:
        density: Quadrature nodes and weights of an operator.

    Returns:
        All nodes in ascending order [n], and for each probe the fraction at each node [probes, n], which stays
        constant up to the next node.
    """
    x = np.unique(np.concatenate([finite(n) for n in density.nodes]))
    steps = []
    for nodes, weights in _quadratures(density):
        total = np.append(0.0, np.cumsum(weights))
        steps.append(total[np.searchsorted(nodes, x, side="right")])
    return x, np.stack(steps)


def densities_of(result: SpectrumResult) -> dict[str, Density]:
    """Return the densities that were computed, by operator."""
    return {name: s.density for name, s in result.spectra.items() if s.density is not None and s.density.nodes}


def _quadratures(density: Density, skip: int = 0) -> list[tuple[Array, Array]]:
    """Return the sorted nodes and the weights of each probe, without its first `skip` nodes."""
    pairs = []
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        x, w = np.array(nodes[skip:], dtype=float), np.array(weights[skip:], dtype=float)
        x, w = x[np.isfinite(x)], w[np.isfinite(x)]
        pairs.append((x[np.argsort(x)], w[np.argsort(x)]))
    return pairs


def _bulk(density: Density) -> list[tuple[Array, Array]]:
    """Return the nodes and weights of each probe without the deflated eigenvalues."""
    return _quadratures(density, density.atoms)


def is_positive(name: str, density: Density) -> bool:
    """Return whether an operator is positive semidefinite: a GGN or Fisher matrix without a negative node."""
    nodes = finite(x for probe in density.nodes for x in probe)
    return name in ("ggn", "fisher") and bool(len(nodes)) and nodes.min() >= -1e-4 * np.abs(nodes).max()


def finite(values: Iterable[float]) -> Array:
    """Return the finite values as an array."""
    return np.array([x for x in values if math.isfinite(x)], dtype=float)
