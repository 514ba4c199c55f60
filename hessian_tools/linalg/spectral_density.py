"""Spectral density by stochastic Lanczos quadrature with deflation of outliers.

The density is phi(t) = (1/P) sum_i delta(t - lambda_i). Converged eigenpairs enter as atoms of weight 1/P. The rest is
estimated on their complement, as the average over random probes of the Gauss quadrature of each probe's spectral
measure (Ubaru, Chen & Saad 2017; Chen, Trogdon & Ubaru 2021). The first Lanczos step of a probe z also gives z^T A z
and ||A z||^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.linalg.basis import orthogonalize
from hessian_tools.linalg.lanczos import Eigenpairs, ProductProgress
from hessian_tools.linalg.lanczos_quadrature import quadrature, tridiagonals
from hessian_tools.linalg.trace import LEAST_ACCURACY, LEAST_PROBES, rademacher
from hessian_tools.operators.base import Operator

_MOST_PROBES = 64  # largest number of probes chosen by an accuracy
MOST_DEFAULT, DEFAULT_ACCURACY = 4, 0.01  # of `default_probes`
SETTLED = 3e-3  # relative to the range: the curve of the cumulative function moves by less than half of its line width


@dataclass(frozen=True)
class DensityEstimate:
    """One quadrature per probe. The weights of every probe sum to 1.

    Attributes:
        nodes: Nodes [m] of each probe. The first `atoms` nodes are the deflated eigenvalues.
        weights: Weights [m] of each probe. Those of the deflated eigenvalues are 1/P.
        atoms: Number of deflated eigenvalues.
        steps: Largest number of Lanczos steps of a probe.
        quadratic: z^T A z [probes] of each probe z on the complement of the deflated vectors.
        squared: ||A z||^2 [probes] of each probe z on the complement.
        coarse_nodes: Nodes of the quadratures from the first half of each probe's steps.
        coarse_weights: Weights of the quadratures from the first half of each probe's steps.
        accuracy: Wasserstein-1 distance between the full and the coarse quadrature, relative to the range of all nodes;
            the largest over the probes. NaN if a probe made only one step and that step was not exact.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    atoms: int
    steps: int
    quadratic: Tensor
    squared: Tensor
    coarse_nodes: tuple[Tensor, ...]
    coarse_weights: tuple[Tensor, ...]
    accuracy: float

    @property
    def probes(self) -> int:
        """Number of probes."""
        return len(self.nodes)

    def moment(self, power: int) -> Tensor:
        """Return the estimates [probes] of tr(A^power) / P, one per probe."""
        return torch.stack([(w * x**power).sum() for x, w in zip(self.nodes, self.weights, strict=True)])


def wasserstein(nodes: Tensor, weights: Tensor, others: Tensor, other_weights: Tensor) -> float:
    """Return the Wasserstein-1 distance, the integral of |F - G|, between two discrete distributions.

    Args:
        nodes: Atoms [m] of the first distribution.
        weights: Their weights [m], which are scaled to sum to 1.
        others: Atoms [n] of the second distribution.
        other_weights: Their weights [n], which are scaled to sum to 1.
    """
    signed = torch.cat([weights / weights.sum(), -other_weights / other_weights.sum()])
    places, order = torch.cat([nodes, others]).sort()
    return float(places.diff() @ signed[order].cumsum(0)[:-1].abs())


def density(
    op: Operator,
    *,
    probes: int | None = None,
    steps: int | None = None,
    accuracy: float | None = None,
    settled: float = 0.0,
    generator: torch.Generator,
    deflate: Eigenpairs | None = None,
    max_vectors: int | None = None,
    basis_dtype: torch.dtype = torch.float64,
    progress: ProductProgress | None = None,
) -> DensityEstimate:
    """Estimate the spectral density of an operator.

    Args:
        op: The operator A.
        probes: Number of random probes. The default is 4, or chosen by `accuracy`.
        steps: Number of Lanczos steps per probe. The default is 60, or chosen by `accuracy`.
        accuracy: Wanted Wasserstein-1 distance t to the true density, relative to the range of the spectrum. It chooses
            what is not given. The number of probes is max(4, 4 ln(2P / 0.05) / ((P + 2) t^2)), at most 64. The number
            of steps is doubled (8, 16, 32, ...) until a doubling moves the quadrature of the probe by at most t/2; it
            is at most 12/t + 1/2 and at most `max_vectors`. Both bounds are from Chen, Trogdon & Ubaru 2021, for probes
            uniform on the sphere and a failure probability of 5%. The accuracy that was reached is in the result.
        settled: The given or default steps are doubled, too (8, 16, 32, ...), until a doubling moves the quadrature by
            at most this distance. 0: all of them are made.
        generator: Random generator of the probes.
        deflate: Converged eigenpairs to take out exactly.
        max_vectors: Largest number of vectors [P] in the Lanczos bases. Probes whose bases fit together run together.
        basis_dtype: torch.float64, or torch.float32 for half of the memory of the bases (see
            `hessian_tools.linalg.basis`).
        progress: Called after every step of every probe with (products done, products expected, NaN).

    Returns:
        The estimate.

    Raises:
        ValueError: If `probes` or `steps` is below 1, `accuracy` is not between LEAST_ACCURACY and 1, or `max_vectors`
            cannot hold the steps.
        FloatingPointError: If a product is not finite.
    """
    if accuracy is not None and not LEAST_ACCURACY <= accuracy < 1:
        raise ValueError(f"the accuracy of a density must be from {LEAST_ACCURACY:g} to 1, but it is {accuracy}")
    size = op.shape[0]
    atoms = torch.empty(0, dtype=torch.float64) if deflate is None else deflate.values
    basis = None if deflate is None else deflate.vectors
    threshold = settled if accuracy is None or steps is not None else accuracy / 2
    count, most = _chosen(size, accuracy, max_vectors)
    count, most = count if probes is None else probes, most if steps is None else steps
    if count < 1 or most < 1:
        raise ValueError(f"a density needs at least one probe and one step, but they are {count} and {most}")
    most = min(most, size - len(atoms))
    if max_vectors is not None and most > max_vectors:
        vector = size * basis_dtype.itemsize / 2**30
        raise ValueError(
            f"{most} steps need {most * vector:.3g} GiB for the Lanczos basis, but only {max_vectors} vectors "
            f"({max_vectors * vector:.3g} GiB) are allowed: allow more memory or fewer steps"
        )
    done = 0

    def whole(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        theta, omega = quadrature(alpha, beta) if len(alpha) else (alpha, beta)
        rest = (size - len(atoms)) / size
        return torch.cat([atoms, theta]), torch.cat([torch.full_like(atoms, 1 / size), rest * omega])

    def stop(alpha: list[float], beta: list[float]) -> bool:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, count * most, math.nan)
        m = len(alpha)
        if not threshold or m < 16 or m & (m - 1):  # compare 8 steps with 16, 16 with 32, ...
            return False
        a, b = torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)
        fine = whole(a, b)
        return wasserstein(*whole(a[: m // 2], b), *fine) <= threshold * float(fine[0].max() - fine[0].min())

    squares: list[float] = []  # ||z||^2 of every probe on the complement

    def drawn(number: int) -> Iterator[Tensor]:  # one at a time, so that a probe is freed when it is part of a basis
        for _ in range(number):
            z = rademacher(op, 1, generator)[:, 0]
            if basis is not None:
                z, _ = orthogonalize(z, basis)
            squares.append(float(z @ z) if float(z @ z) > 1e-20 * size else 0.0)
            yield z if squares[-1] else torch.zeros_like(z)

    group = count if max_vectors is None else max_vectors // most if most else 1
    found: list[tuple[Tensor, Tensor]] = []  # alpha, beta
    for first in range(0, count, group):
        found += tridiagonals(op, drawn(min(group, count - first)), most, basis, stop, basis_dtype)
    runs = [(square, *coefficients) for square, coefficients in zip(squares, found, strict=True)]
    fine = [whole(a, b) for _, a, b in runs]
    coarse = [whole(a[: len(a) // 2 or 1], b) for _, a, b in runs]
    unknown = any(len(a) == 1 and float(b[0]) for _, a, b in runs)
    every = torch.cat([x for x, _ in fine + coarse])
    span = float(every.max() - every.min())
    moved = max(wasserstein(*c, *f) for c, f in zip(coarse, fine, strict=True))
    quadratic = [n * float(a[:1].sum()) for n, a, _ in runs]  # 0 if no step was made
    squared = [n * float(a[:1].square().sum() + b[:1].square().sum()) for n, a, b in runs]
    return DensityEstimate(
        nodes=tuple(x for x, _ in fine),
        weights=tuple(w for _, w in fine),
        atoms=len(atoms),
        steps=max(len(a) for _, a, _ in runs),
        quadratic=torch.tensor(quadratic, dtype=torch.float64),
        squared=torch.tensor(squared, dtype=torch.float64),
        coarse_nodes=tuple(x for x, _ in coarse),
        coarse_weights=tuple(w for _, w in coarse),
        accuracy=0.0 if span == 0 else math.nan if unknown else moved / span,
    )


def default_probes(size: int) -> int:
    """Return the number of probes if neither it nor an accuracy is given: 4, or fewer if those are enough, at least 2.

    They are enough if the mean over them is, with probability 95%, within a Wasserstein-1 distance of 0.01 of the
    density, relative to the range of the spectrum (Chen, Trogdon & Ubaru 2021). That is so for 3 probes from P =
    225,000 on, and for 2 from 350,000 on.

    Args:
        size: Size P of the operator.
    """
    return min(MOST_DEFAULT, max(LEAST_PROBES, _enough_probes(size, DEFAULT_ACCURACY)))


def _enough_probes(size: int, accuracy: float) -> int:
    """Return how many probes are within a Wasserstein-1 distance of the density with probability 95%."""
    return math.ceil(4 * math.log(2 * size / 0.05) / ((size + 2) * accuracy**2))


def _chosen(size: int, accuracy: float | None, max_vectors: int | None) -> tuple[int, int]:
    """Return the number of probes and the largest number of steps for a wanted accuracy."""
    if accuracy is None:
        return 4, 60
    probes = _enough_probes(size, accuracy)
    steps = math.ceil(12 / accuracy + 0.5)
    return min(max(4, probes), _MOST_PROBES), steps if max_vectors is None else min(steps, max_vectors)
