"""Spectral density by stochastic Lanczos quadrature, outliers deflated.

phi(t) = (1/P) sum_i delta(t - lambda_i). Converged eigenpairs enter as atoms of weight 1/P; the rest is the average,
over random probes, of the Gauss quadrature of the probe's spectral measure on their complement (Ubaru, Chen & Saad
2017; Chen, Trogdon & Ubaru 2021). The first Lanczos step of a probe z also gives z'Az and ||Az||^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.lanczos import Eigenpairs, Progress, orthogonalize, quadrature, tridiagonal
from hessian_tools.operators import Operator


@dataclass(frozen=True)
class Density:
    """One quadrature per probe: nodes and weights, each a list of arrays [m]; every probe's weights sum to 1.

    The first `atoms` nodes of every probe are the deflated eigenvalues, weight 1/P each. `quadratic` [probes] holds
    z'Az and `squared` [probes] ||Az||^2 of each probe on the complement.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    atoms: int
    steps: int
    quadratic: Tensor
    squared: Tensor

    @property
    def probes(self) -> int:
        return len(self.nodes)

    def moment(self, power: int) -> Tensor:
        """The estimates [probes] of tr(A^power) / P, one per probe."""
        return torch.stack([(w * x**power).sum() for x, w in zip(self.nodes, self.weights, strict=True)])


def rademacher(op: Operator, count: int, generator: torch.Generator) -> Tensor:
    """Probes [P, count] of independent signs, float64, drawn on the CPU."""
    draws = torch.randint(0, 2, (count, op.shape[0]), generator=generator, dtype=torch.int8)
    return (2.0 * draws.double() - 1).T.to(op.device)


def density(
    op: Operator,
    *,
    probes: int = 4,
    steps: int = 60,
    generator: torch.Generator,
    deflate: Eigenpairs | None = None,
    progress: Progress | None = None,
) -> Density:
    """The density of A from `probes` runs of `steps` Lanczos steps. deflate: pairs to take out exactly (all
    converged). Raises ValueError for counts below 1."""
    if probes < 1 or steps < 1:
        raise ValueError(f"a density needs at least one probe and one step, not {probes} and {steps}")
    size = op.shape[0]
    atoms = torch.empty(0, dtype=torch.float64) if deflate is None else deflate.values
    basis = None if deflate is None else deflate.vectors
    nodes, weights, quadratic, squared = [], [], [], []
    rest = (size - len(atoms)) / size
    for i, z in enumerate(rademacher(op, probes, generator).unbind(1)):
        if basis is not None:
            z, _ = orthogonalize(z, basis)
        length = float(z @ z)
        if rest == 0 or length <= 1e-20 * size:
            theta, omega = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
            quadratic.append(0.0)
            squared.append(0.0)
        else:
            alpha, beta = tridiagonal(op, z, steps, basis)
            theta, omega = quadrature(alpha, beta)
            quadratic.append(length * float(alpha[0]))
            squared.append(length * float(alpha[0] ** 2 + (beta[0] ** 2 if len(beta) else 0.0)))
        nodes.append(torch.cat([atoms, theta]))
        weights.append(torch.cat([torch.full_like(atoms, 1 / size), rest * omega]))
        if progress is not None:
            progress((i + 1) * steps, probes * steps)
    return Density(
        tuple(nodes),
        tuple(weights),
        len(atoms),
        steps,
        torch.tensor(quadratic, dtype=torch.float64),
        torch.tensor(squared, dtype=torch.float64),
    )
