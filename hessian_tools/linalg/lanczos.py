"""The Lanczos process: one kernel that feeds eigenpairs, quadrature and densities.

Products are taken in the operator's dtype; the recurrence, its dot products and the reorthogonalization (against the
whole basis, twice) are float64, without which ghosts of converged eigenvalues appear.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessian_tools.operators.base import Operator

# (products done, products expected, worst residual of the wanted pairs relative to ||A||: NaN while unknown)
ProductProgress = Callable[[int, int, float], None]
# A next vector shorter than this, relative to the operator, is round-off: the Krylov space is invariant.
_BREAKDOWN = 1e-13


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs: values [k] in the order asked for, orthonormal vectors [P, k], residuals ||Av - value v|| [k].

    Every residual is explicit, from a product with the vector itself; an eigenvalue of A lies within it.
    converged: residual <= tol * norm, with norm the largest |Ritz value|, an estimate of ||A||.
    products: all that were taken, those for the residuals included.
    bounds [k]: for converged pairs min(residual, residual^2 / gap + round-off of a product) (Kato 1949, Temple 1928),
    for others the residual. The gap is to the nearest other Ritz value, less its residual: an eigenvalue lies within
    the bound provided that the Ritz values stand for all eigenvalues nearby. Within the residual one lies in any case.
    steps: dimension of the Krylov space built from the random start before the first restart, 0 if unknown; complete:
    that space closed (or all of R^P was spanned), so with probability 1 no value of the spectrum was missed, though
    copies of one may have been. low, high: the outermost Ritz values at the end.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    norm: float
    tol: float
    products: int
    bounds: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    steps: int = 0
    complete: bool = False
    low: float = math.nan
    high: float = math.nan

    def take(self, index: Tensor | slice) -> Eigenpairs:
        return dataclasses.replace(
            self,
            values=self.values[index],
            vectors=self.vectors[:, index],
            residuals=self.residuals[index],
            converged=self.converged[index],
            bounds=self.bounds[index] if len(self.bounds) else self.bounds,
        )


def random_vector(op: Operator, generator: torch.Generator) -> Tensor:
    """A standard normal vector [P], float64, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(op.shape[0], dtype=torch.float64, generator=generator).to(op.device)


def orthogonalize(v: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """v minus its part in the span of orthonormal columns [P, j], twice; returns it and the coefficients [j]."""
    first = basis.T @ v
    v = (basis @ first).neg_().add_(v)
    second = basis.T @ v
    return (basis @ second).neg_().add_(v), first + second


def certified(
    op: Operator,
    vectors: Tensor,
    tol: float,
    norm: float | None = None,
    others: tuple[Tensor, Tensor] | None = None,
    report: Callable[[], None] | None = None,
) -> Eigenpairs:
    """Eigenpairs with explicit residuals from orthonormal vectors [P, k], float64; values are Rayleigh quotients.

    One product a vector, one after the other; `report` is called after each. others: the remaining Ritz values [m] of
    the space the vectors come from and bounds on their residuals [m]; without them the gaps are unknown and the
    residuals are the bounds.
    """
    before = op.products
    values, residuals = torch.empty(2, vectors.shape[1], dtype=torch.float64)
    for i, v in enumerate(vectors.unbind(1)):
        image = (op @ v).double()
        values[i] = value = float(v @ image)
        residuals[i] = float((image - value * v).norm())
        if report is not None:
            report()
    norm = max(float(values.abs().max()) if len(values) else 0.0, norm or 0.0)
    converged = residuals <= tol * norm
    bounds, ritz = residuals, values
    if others is not None:
        sharp = temple_bounds(values, residuals, *others) + torch.finfo(op.dtype).eps * norm
        bounds = torch.where(converged, residuals.minimum(sharp), residuals)
        ritz = torch.cat([values, others[0]])
    pairs = Eigenpairs(values, vectors, residuals, converged, norm, tol, op.products - before, bounds)
    return dataclasses.replace(pairs, low=float(ritz.min()), high=float(ritz.max())) if len(ritz) else pairs


def temple_bounds(values: Tensor, residuals: Tensor, others: Tensor, radii: Tensor) -> Tensor:
    """min(residual, residual^2 / gap) of every pair [k] (Kato 1949, Temple 1928).

    gap: from the value to the nearest of the other pairs' values and of `others` [m], each brought nearer by its own
    residual, `radii` [m]. Without a positive gap, or with no other value known, it is the residual.
    """
    gaps = (values[:, None] - torch.cat([values, others])).abs() - torch.cat([residuals, radii])
    gap = gaps.fill_diagonal_(math.inf).min(1).values
    return torch.where((gap > 0) & gap.isfinite(), residuals.minimum(residuals.square() / gap), residuals)


def tridiagonal(op: Operator, start: Tensor, steps: int, deflate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lanczos coefficients (alpha [m], beta [m - 1]) of A from `start` [P]; see `tridiagonals`."""
    alpha, beta = tridiagonals(op, [start], steps, deflate)[0]
    return alpha, beta[:-1]


def tridiagonals(
    op: Operator,
    starts: Sequence[Tensor],
    steps: int,
    deflate: Tensor | None = None,
    stop: Callable[[list[float], list[float]], bool] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Lanczos coefficients (alpha [m], beta [m]), m <= steps, of A from each start [P]; on the CPU, float64.

    The last beta leads to the step not taken; it is 0 where the Krylov space is invariant, which may be at m < steps
    (m = 0 for a start of zeros). With `deflate`, orthonormal columns Q [P, k], it is the process of
    (I - QQ') A (I - QQ'). stop(alpha, beta) is asked after every step of every run, and ends that run. The runs are
    independent, but take their products as one block a step: an operator that keeps no primal recomputes it only once.
    Holds steps * len(starts) vectors of P float64. Raises FloatingPointError if a product is not finite.
    """
    size, device = op.shape[0], op.device
    fixed = torch.empty(size, 0, dtype=torch.float64, device=device) if deflate is None else deflate
    steps = min(steps, size - fixed.shape[1])
    vectors = [orthogonalize(start.to(device, torch.float64), fixed)[0] for start in starts]
    active = [i for i, v in enumerate(vectors) if v.norm() > 0]
    vectors = [v / v.norm() for v in vectors]
    bases = [torch.empty(steps, size, dtype=torch.float64, device=device) for _ in vectors]  # one vector a row
    alphas: list[list[float]] = [[] for _ in vectors]
    betas: list[list[float]] = [[] for _ in vectors]
    for j in range(steps):
        if not active:
            break
        images = (op @ torch.stack([vectors[i] for i in active]).T).T
        going = []
        for i, image in zip(active, images, strict=True):
            bases[i][j] = vectors[i]
            w, coefficients = orthogonalize(image.contiguous().double(), bases[i][: j + 1].T)
            w, _ = orthogonalize(w, fixed)
            b = float(w.norm())
            if not math.isfinite(b):
                raise FloatingPointError("a product with the operator is not finite")
            alphas[i].append(float(coefficients[-1]))
            betas[i].append(b if b > _BREAKDOWN * max(b, *map(abs, alphas[i]), *betas[i]) else 0.0)
            stopped = stop is not None and stop(alphas[i], betas[i])
            if betas[i][-1] and not stopped:
                vectors[i] = w / b
                going.append(i)
        active = going
    return [
        (torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
        for a, b in zip(alphas, betas, strict=True)
    ]


def quadrature(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights [m] of the spectral measure of the start vector (Golub & Welsch 1969).

    From alpha [m] and the first m - 1 of beta. sum of weight * node^k equals v'A^k v for k <= 2m - 1, for the unit
    start vector v.
    """
    side = beta[: len(alpha) - 1]
    nodes, vectors = torch.linalg.eigh(torch.diag(alpha) + torch.diag(side, 1) + torch.diag(side, -1))
    return nodes, vectors[0].square()


def eigenpairs(
    op: Operator,
    largest: int = 10,
    smallest: int = 0,
    *,
    magnitude: int = 0,
    generator: torch.Generator,
    tol: float = 1e-4,
    max_products: int = 1000,
    max_basis: int | None = None,
    start: Tensor | None = None,
    progress: ProductProgress | None = None,
) -> Eigenpairs:
    """The `largest` eigenvalues, descending, then the `smallest`, ascending, by thick-restart Lanczos.

    magnitude: instead of these, so many of largest |value|, by decreasing |value| (pass largest=0).
    Stops when every wanted pair has residual <= tol * ||A||, or after max_products (then some pairs are reported as
    not converged); the residuals take one more product a pair. A full basis restarts from the best Ritz vectors (Wu &
    Simon 2000). It holds at most max_basis vectors (400 or 2 wanted unless given); the peak is max_basis + wanted + 6
    vectors of P float64, besides what a product takes. start [P], if given, replaces the random start vector.
    Copies of a multiple eigenvalue appear when the Krylov space that holds the first one closes, or by round-off: at a
    loose tol some may be missing. A search of the complement from another start finds those.
    Raises ValueError for counts that do not fit the operator and a max_basis too small for them, FloatingPointError if
    a product is not finite.
    """
    size = op.shape[0]
    if magnitude and (largest or smallest):
        raise ValueError(
            f"eigenvalues by magnitude ({magnitude}) exclude the {largest} largest and {smallest} smallest: pass 0 "
            "for either"
        )
    wanted = largest + smallest + magnitude
    if min(largest, smallest, magnitude) < 0 or not 1 <= wanted <= size:
        kind = f"{magnitude} by magnitude" if magnitude else f"{largest} largest and {smallest} smallest"
        raise ValueError(f"cannot find {kind} of {size} eigenvalues")
    room = max(400, 2 * wanted) if max_basis is None else max_basis
    least = min(size, least_basis(wanted))
    if room < least:
        gib = 8 * size / 2**30
        raise ValueError(
            f"{wanted} eigenpairs need a basis of {least} vectors of {size} float64 ({least * gib:.3g} GiB), "
            f"{room} ({room * gib:.3g} GiB) are allowed: ask for fewer pairs or allow more memory"
        )
    room = min(size, room)
    basis = torch.empty(room, size, dtype=torch.float64, device=op.device)  # one vector a row
    t = torch.zeros(room, room, dtype=torch.float64)
    v = random_vector(op, generator) if start is None else start.to(op.device, torch.float64)
    basis[0] = v / v.norm()
    del v
    before, scale, j, steps, complete = op.products, 0.0, 0, 0, False
    checks: list[tuple[int, float]] = []  # (products, worst relative residual)
    closed, opened, deadline = torch.empty(0), 0, 0  # wanted values and products when the space was last invariant

    def report() -> None:
        if progress is not None:
            done = op.products - before
            expected = expected_products(checks, 0.3 * tol, done, max_products)
            progress(done, max(done, expected + wanted), checks[-1][1] if checks else math.nan)

    while True:
        w = (op @ basis[j]).double()
        if not torch.isfinite(w).all():
            raise FloatingPointError("a product with the operator is not finite")
        w, coefficients = orthogonalize(w, basis[: j + 1].T)
        t[j, : j + 1] = t[: j + 1, j] = coefficients.cpu()
        beta = float(w.norm())
        scale = max(scale, float(coefficients.abs().max()), beta)
        j += 1
        done = op.products - before
        invariant = beta <= _BREAKDOWN * scale
        last = j == size or done >= max_products
        if not steps and (invariant or j == room):
            steps, complete = j, invariant and start is None
        settled = False
        if invariant or (j >= wanted and (last or j == room or j % 4 == 0)):
            ritz, y = torch.linalg.eigh(t[:j, :j])
            estimates = beta * y[-1].abs()
            index = _wanted(ritz, largest, smallest, magnitude)
            if invariant:
                # it says nothing of copies of its eigenvalues outside it; these are sought from a random vector in the
                # complement, and when its space closes without bettering the wanted values, there are no better ones
                found = ritz[index]
                settled = found.shape == closed.shape and bool((found - closed).abs().max() <= 10 * _BREAKDOWN * scale)
                # that space has no more distinct eigenvalues than the last, so it closes as soon, round-off permitting
                closed, opened, deadline = found, done, 2 * done - opened
            else:
                checks.append((done, float(estimates[index].max() / ritz.abs().max())))
                # below tol: the explicit residual has round-off besides
                settled = done > deadline and checks[-1][1] <= 0.3 * tol
        report()
        if settled or (last and j >= wanted):
            vectors = (y[:, index].T.to(op.device) @ basis[:j]).T
            del basis
            rest = torch.ones(j, dtype=torch.bool).index_fill(0, index, False)
            pairs = certified(op, vectors, tol, float(ritz.abs().max()), (ritz[rest], estimates[rest]), report)
            return dataclasses.replace(
                pairs,
                products=op.products - before,
                steps=0 if start is not None else steps or j,
                complete=complete or j == size,
            )
        if j == room:
            kept = _survivors(ritz, largest, smallest, magnitude, room)
            _rotate(basis[:j], y[:, kept].to(op.device))
            t.zero_()
            j = len(kept)
            t[:j, :j] = torch.diag(ritz[kept])
        if invariant:
            w, _ = orthogonalize(random_vector(op, generator), basis[:j].T)
            beta = float(w.norm())
        torch.div(w, beta, out=basis[j])


def least_basis(wanted: int) -> int:
    """The least max_basis with which `eigenpairs` looks for so many pairs."""
    return wanted + max(5, wanted // 5)


def _wanted(ritz: Tensor, largest: int, smallest: int, magnitude: int) -> Tensor:
    """Indices into ascending values, none twice: by magnitude, or the largest, descending, and the smallest."""
    count, sizes = len(ritz), ritz.abs().tolist()
    if magnitude:
        return torch.tensor(sorted(range(count), key=sizes.__getitem__, reverse=True)[:magnitude])
    top = list(range(count - 1, count - 1 - min(largest, count), -1))
    bottom = [i for i in range(min(smallest, count)) if i not in top]
    return torch.tensor(top + bottom, dtype=torch.long)


def _survivors(ritz: Tensor, largest: int, smallest: int, magnitude: int, room: int) -> Tensor:
    """Indices of the Ritz vectors that a restart keeps: the wanted, some more of their kind, and one at either end."""
    wanted = largest + smallest + magnitude
    keep = wanted + min(wanted, 10, (room - wanted - 2) // 2)
    top = round(keep * largest / wanted)
    index = _wanted(ritz, top, keep - top, keep if magnitude else 0)
    kept: Tensor = torch.cat([index, torch.tensor([0, len(ritz) - 1])]).unique()
    return kept


def _rotate(basis: Tensor, y: Tensor) -> None:
    """The first k rows of basis [j, P] become y' basis, y [j, k], in place but for a buffer of about one row."""
    k = y.shape[1]
    for piece in basis.split(max(1024, basis.shape[1] // k), 1):
        piece[:k] = y.T @ piece


def expected_products(checks: Sequence[tuple[int, float]], target: float, done: int, most: int) -> int:
    """Products until the worst residual comes down to `target`, its logarithm linear over the last five of `checks`.

    checks: (products, worst residual). `most` with fewer than three checks or without progress; never below done + 1.
    """
    recent = checks[-5:]
    if len(recent) < 3:
        return most
    line = statistics.linear_regression(
        [products for products, _ in recent], [math.log(max(worst, 1e-300)) for _, worst in recent]
    )
    if not line.slope < 0:
        return most
    return min(most, max(done + 1, math.ceil((math.log(target) - line.intercept) / line.slope)))


def random_start_bound(steps: int, size: int, failure: float = 0.05) -> float:
    """Relative error e of the largest Ritz value from a random start: with probability 1 - failure it lies no more than
    e (lambda_max - lambda_min) below lambda_max, after `steps` Lanczos steps (products) on a matrix of that size.

    From failure = 1.648 sqrt(size) exp(-sqrt(e) (2 steps - 1)), Kuczynski & Wozniakowski 1992; at most 1, and 0 for
    steps >= size. It holds for the lower end as well; for both at once the failures add up. Raises ValueError for a
    failure outside (0, 1) and for counts that are none.
    """
    if not 0 < failure < 1 or size < 1 or steps < 0:
        raise ValueError(
            f"the failure probability lies between 0 and 1, size is positive, steps not negative: not {failure}, "
            f"{size} and {steps}"
        )
    if steps >= size:
        return 0.0
    if steps == 0:
        return 1.0
    return min(1.0, (math.log(1.648 * math.sqrt(size) / failure) / (2 * steps - 1)) ** 2)


def excess(pairs: Eigenpairs, size: int, failure: float = 0.05) -> float:
    """With probability 1 - failure over the random start, no eigenvalue of the operator of that size lies farther than
    this above pairs.high or below pairs.low: 0 for a complete search, infinite where the steps are too few to say.

    Each end fails with failure / 2; with e the relative error of either, the range of the spectrum is at most that of
    the Ritz values over 1 - 2e. Restarts only widen the latter, as they keep both outermost Ritz vectors.
    """
    e = 0.0 if pairs.complete else random_start_bound(pairs.steps, size, failure / 2)
    return e / (1 - 2 * e) * (pairs.high - pairs.low) if e < 0.5 else math.inf
