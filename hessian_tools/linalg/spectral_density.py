"""Spectral density by stochastic Lanczos quadrature, outliers deflated.

phi(t) = (1/P) sum_i delta(t - lambda_i). Converged eigenpairs enter as atoms of weight 1/P; the rest is the average,
over random probes, of the Gauss quadrature of the probe's spectral measure on their complement (Ubaru, Chen & Saad
2017; Chen, Trogdon & Ubaru 2021). The first Lanczos step of a probe z also gives z'Az and ||Az||^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from hessian_tools.linalg.lanczos import Eigenpairs, ProductProgress, orthogonalize, quadrature, tridiagonals
from hessian_tools.linalg.trace import rademacher
from hessian_tools.operators.base import Operator

_MOST_PROBES = 64  # that an accuracy may choose


@dataclass(frozen=True)
class DensityEstimate:
    """One quadrature per probe: nodes and weights, each a list of arrays [m]; every probe's weights sum to 1.

    The first `atoms` nodes of every probe are the deflated eigenvalues, weight 1/P each. steps: the most that a probe
    took. `quadratic` [probes] holds z'Az and `squared` [probes] ||Az||^2 of each probe on the complement.
    coarse_nodes, coarse_weights: the quadratures from the first half of each probe's steps. accuracy: Wasserstein-1
    distance of either quadrature over the range of all nodes, the largest of the probes; NaN where a single step that
    was not exact tells nothing.
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
        return len(self.nodes)

    def moment(self, power: int) -> Tensor:
        """The estimates [probes] of tr(A^power) / P, one per probe."""
        return torch.stack([(w * x**power).sum() for x, w in zip(self.nodes, self.weights, strict=True)])


def wasserstein(nodes: Tensor, weights: Tensor, others: Tensor, other_weights: Tensor) -> float:
    """Wasserstein-1 distance, the integral of |F - G|, of two sets of atoms [m], [n], the weights scaled to sum 1."""
    return float(stats.wasserstein_distance(nodes, others, weights, other_weights))


def density(
    op: Operator,
    *,
    probes: int | None = None,
    steps: int | None = None,
    accuracy: float | None = None,
    generator: torch.Generator,
    deflate: Eigenpairs | None = None,
    max_vectors: int | None = None,
    progress: ProductProgress | None = None,
) -> DensityEstimate:
    """The density of A from `probes` runs of `steps` Lanczos steps, 4 and 60 unless given.

    accuracy: t, the wanted Wasserstein-1 distance to the true density over the spectrum's range. It chooses what is not
    given: the probes by max(4, 4 ln(2P / .05) / ((P + 2) t^2)), at most 64; the steps as 8, 16, 32, ..., until a
    doubling moves the probe's quadrature by t/2 or less, at most 12/t + 1/2 (both bounds: Chen, Trogdon & Ubaru 2021,
    for probes uniform on the sphere, failing with probability 5%) and at most max_vectors. See the result's `accuracy`
    for what was reached.
    deflate: pairs to take out exactly (all converged). max_vectors: how many vectors of P float64 the Lanczos bases may
    hold; probes whose bases fit together run together. progress: called after every step of every probe.
    Raises ValueError for counts below 1, an accuracy not between 0 and 1 and steps that max_vectors cannot hold,
    FloatingPointError if a product is not finite.
    """
    if accuracy is not None and not 0 < accuracy < 1:
        raise ValueError(f"the accuracy of a density must lie between 0 and 1, not {accuracy}")
    size = op.shape[0]
    atoms = torch.empty(0, dtype=torch.float64) if deflate is None else deflate.values
    basis = None if deflate is None else deflate.vectors
    threshold = 0.0 if accuracy is None or steps is not None else accuracy / 2
    count, most = _chosen(size, accuracy, max_vectors)
    count, most = count if probes is None else probes, most if steps is None else steps
    if count < 1 or most < 1:
        raise ValueError(f"a density needs at least one probe and one step, not {count} and {most}")
    most = min(most, size - len(atoms))
    if max_vectors is not None and most > max_vectors:
        raise ValueError(
            f"{most} steps need {most * size * 8 / 2**30:.3g} GiB for the Lanczos basis, {max_vectors} vectors "
            f"({max_vectors * size * 8 / 2**30:.3g} GiB) are allowed: allow more memory or fewer steps"
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
        if not threshold or m < 16 or m & (m - 1):  # 8 steps against 16, 16 against 32, ...
            return False
        a, b = torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)
        fine = whole(a, b)
        return wasserstein(*whole(a[: m // 2], b), *fine) <= threshold * float(fine[0].max() - fine[0].min())

    def draw() -> Tensor:
        z = rademacher(op, 1, generator)[:, 0]
        if basis is not None:
            z, _ = orthogonalize(z, basis)
        return z if float(z @ z) > 1e-20 * size else torch.zeros_like(z)

    group = count if max_vectors is None else max_vectors // most if most else 1
    runs: list[tuple[float, Tensor, Tensor]] = []  # ||z||^2 on the complement, alpha, beta
    for first in range(0, count, group):
        starts = [draw() for _ in range(first, min(first + group, count))]
        found = tridiagonals(op, starts, most, basis, stop)
        runs += [(float(z @ z), *coefficients) for z, coefficients in zip(starts, found, strict=True)]
    fine = [whole(a, b) for _, a, b in runs]
    coarse = [whole(a[: len(a) // 2 or 1], b) for _, a, b in runs]
    unknown = any(len(a) == 1 and float(b[0]) for _, a, b in runs)
    every = torch.cat([x for x, _ in fine + coarse])
    span = float(every.max() - every.min())
    moved = max(wasserstein(*c, *f) for c, f in zip(coarse, fine, strict=True))
    quadratic = [n * float(a[:1].sum()) for n, a, _ in runs]  # 0 where there is no step
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


def _chosen(size: int, accuracy: float | None, max_vectors: int | None) -> tuple[int, int]:
    """Probes, and steps at most, for a wanted accuracy."""
    if accuracy is None:
        return 4, 60
    probes = math.ceil(4 * math.log(2 * size / 0.05) / ((size + 2) * accuracy**2))
    steps = math.ceil(12 / accuracy + 0.5)
    return min(max(4, probes), _MOST_PROBES), steps if max_vectors is None else min(steps, max_vectors)
