"""The Lanczos process: one kernel that feeds eigenpairs, quadrature and densities.

Products are taken in the operator's dtype; the recurrence, its dot products and the reorthogonalization (against the
whole basis, twice) are float64, without which ghosts of converged eigenvalues appear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.operators import Operator

Progress = Callable[[int, int], None]  # (products done, products at most)

# A next vector shorter than this, relative to the operator, is round-off: the Krylov space is invariant.
_BREAKDOWN = 1e-13


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs: values [k] in the order asked for, orthonormal vectors [P, k], residuals ||Av - value v|| [k].

    Every residual is explicit, from a product with the vector itself; an eigenvalue of A lies within it.
    converged: residual <= tol * norm, with norm the largest |Ritz value|, an estimate of ||A||.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    norm: float
    tol: float
    products: int

    def take(self, index: Tensor | slice) -> Eigenpairs:
        return Eigenpairs(
            self.values[index],
            self.vectors[:, index],
            self.residuals[index],
            self.converged[index],
            self.norm,
            self.tol,
            self.products,
        )


def random_vector(op: Operator, generator: torch.Generator) -> Tensor:
    """A standard normal vector [P], float64, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(op.shape[0], dtype=torch.float64, generator=generator).to(op.device)


def orthogonalize(v: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """v minus its part in the span of orthonormal columns [P, j], twice; returns it and the coefficients [j]."""
    first = basis.T @ v
    v = v - basis @ first
    second = basis.T @ v
    return v - basis @ second, first + second


def certified(op: Operator, vectors: Tensor, tol: float, norm: float | None = None) -> Eigenpairs:
    """Eigenpairs with explicit residuals from orthonormal vectors [P, k]; values are Rayleigh quotients."""
    before = op.products
    images = (op @ vectors).double()
    values = (vectors * images).sum(0)
    residuals = (images - vectors * values).norm(dim=0)
    norm = max(float(values.abs().max()) if len(values) else 0.0, norm or 0.0)
    return Eigenpairs(
        values.cpu(), vectors, residuals.cpu(), (residuals <= tol * norm).cpu(), norm, tol, op.products - before
    )


def tridiagonal(op: Operator, start: Tensor, steps: int, deflate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lanczos coefficients (alpha [m], beta [m - 1]) of A from `start` [P], m <= steps; on the CPU, float64.

    With `deflate`, orthonormal columns Q [P, k], the process runs on (I - QQ') A (I - QQ'). m < steps where the
    Krylov space is invariant.
    """
    size = op.shape[0]
    fixed = 0 if deflate is None else deflate.shape[1]
    steps = min(steps, size - fixed)
    basis = torch.empty(size, fixed + steps, dtype=torch.float64, device=op.device)
    if deflate is not None:
        basis[:, :fixed] = deflate
    v, _ = orthogonalize(start.double(), basis[:, :fixed])
    v = v / v.norm()
    alpha, beta, scale = [], [], 0.0
    for j in range(steps):
        basis[:, fixed + j] = v
        w, coefficients = orthogonalize((op @ v).double(), basis[:, : fixed + j + 1])
        a, b = float(coefficients[-1]), float(w.norm())
        alpha.append(a)
        scale = max(scale, abs(a), b)
        if b <= _BREAKDOWN * scale or j == steps - 1:
            break
        beta.append(b)
        v = w / b
    return torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)


def quadrature(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights [m] of the spectral measure of the start vector (Golub & Welsch 1969).

    sum of weight * node^k equals v'A^k v for k <= 2m - 1, for the unit start vector v.
    """
    nodes, vectors = torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
    return nodes, vectors[0].square()


def eigenpairs(
    op: Operator,
    largest: int = 10,
    smallest: int = 0,
    *,
    generator: torch.Generator,
    tol: float = 1e-4,
    max_products: int = 1000,
    max_basis: int | None = None,
    start: Tensor | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    """The `largest` eigenvalues, descending, followed by the `smallest` ones, ascending, by thick-restart Lanczos.

    Stops when every wanted pair has residual <= tol * ||A||, or after max_products (then some pairs are reported as
    not converged). The basis holds at most max_basis vectors of P float64; when it is full it restarts from the best
    Ritz vectors (Wu & Simon 2000). start [P], if given, replaces the random start vector.
    Raises ValueError for counts that do not fit the operator, FloatingPointError if a product is not finite.
    """
    size = op.shape[0]
    wanted = largest + smallest
    if largest < 0 or smallest < 0 or not 1 <= wanted <= size:
        raise ValueError(f"cannot find {largest} largest and {smallest} smallest of {size} eigenvalues")
    keep = min(wanted + min(wanted, 10), size)
    room = min(size, max(max_basis or 400, keep + 10))
    basis = torch.empty(size, room, dtype=torch.float64, device=op.device)
    t = torch.zeros(room, room, dtype=torch.float64)
    v = random_vector(op, generator) if start is None else start.to(op.device, torch.float64)
    v = v / v.norm()
    before, scale, j = op.products, 0.0, 0
    while True:
        basis[:, j] = v
        w = (op @ v).double()
        if not torch.isfinite(w).all():
            raise FloatingPointError("a product with the operator is not finite")
        w, coefficients = orthogonalize(w, basis[:, : j + 1])
        t[j, : j + 1] = t[: j + 1, j] = coefficients.cpu()
        beta = float(w.norm())
        scale = max(scale, float(coefficients.abs().max()), beta)
        j += 1
        done = op.products - before
        if progress is not None:
            progress(done, max_products)
        invariant = beta <= _BREAKDOWN * scale
        last = j == size or done >= max_products
        if j >= wanted and (last or invariant or j == room or j % 4 == 0):
            ritz, y = torch.linalg.eigh(t[:j, :j])
            index = _ends(j, largest, smallest)
            bound = 0.3 * tol * float(ritz.abs().max())  # below tol: the explicit residual has round-off besides
            # an invariant space says nothing of copies of its eigenvalues outside it, so it does not end the search
            if last or (not invariant and bool((beta * y[-1, index].abs() <= bound).all())):
                return certified(op, basis[:, :j] @ y[:, index].to(op.device), tol, float(ritz.abs().max()))
            if j == room:
                kept = _ends(j, *_shares(keep, largest, smallest))
                basis[:, : len(kept)] = basis[:, :j] @ y[:, kept].to(op.device)
                t.zero_()
                j = len(kept)
                t[:j, :j] = torch.diag(ritz[kept])
        if invariant:
            w, _ = orthogonalize(random_vector(op, generator), basis[:, :j])
            beta = float(w.norm())
        v = w / beta


def _ends(count: int, largest: int, smallest: int) -> Tensor:
    """Indices into `count` ascending values: the largest, descending, then the smallest, ascending; none twice."""
    top = list(range(count - 1, count - 1 - min(largest, count), -1))
    bottom = [i for i in range(min(smallest, count)) if i not in top]
    return torch.tensor(top + bottom, dtype=torch.long)


def _shares(keep: int, largest: int, smallest: int) -> tuple[int, int]:
    """How many Ritz vectors survive a restart at either end: at least one of each."""
    top = max(1, round(keep * largest / (largest + smallest))) if largest else 1
    return top, max(1, keep - top)
