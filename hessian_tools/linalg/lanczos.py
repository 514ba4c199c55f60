"""Eigenpairs of a symmetric operator by thick-restart Lanczos.

Products are computed in the operator's dtype. The recurrence, its dot products and the reorthogonalization (twice
against the whole basis) are in float64. Without that, spurious copies of converged eigenvalues appear. The basis is
stored in float64 or, to save memory, in float32.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessian_tools.linalg.basis import combined, orthogonalize, rotate
from hessian_tools.linalg.error_bounds import random_start_bound, temple_bounds
from hessian_tools.operators.base import Operator

# (Ritz vectors [P, k], values [k]) -> tolerances [k] relative to ||A||, and products [P, k] with the vectors if known
Enough = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
# (products done, products expected, worst residual of the wanted pairs relative to ||A||, NaN while unknown)
ProductProgress = Callable[[int, int, float], None]
# If the next vector is shorter than this, relative to the operator, it is round-off and the Krylov space is invariant.
BREAKDOWN = 1e-13
CLOSE = 0.9  # of a tolerance from `enough`, at which the search stops
LOOSE = 1e-2  # largest tolerance of a pair that `enough` may ask for
BASIS, BASIS_BYTES = 400, 4 * 2**30  # default limits of a Lanczos basis: vectors, and bytes of float64


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs of an operator A.

    Every residual is computed explicitly from a product with the vector, so an eigenvalue of A lies within the residual
    of every value.

    Attributes:
        values: Ritz values [k], in the requested order.
        vectors: Orthonormal vectors [P, k].
        residuals: Norms ||A v - value v|| [k].
        converged: Whether residual <= tol * norm [k].
        norm: The largest |Ritz value|, an estimate of ||A||.
        tol: Relative tolerance, the largest one if they differ (see `eigenpairs`).
        products: Number of operator products, including those for the residuals.
        bounds: Error bounds [k]: min(residual, residual^2 / gap + round-off of a product) for converged pairs (Kato
            1949, Temple 1928), and the residual for the others. The gap ends where another eigenvalue can be, also one
            that was not found; with probability 95% over the random start, an eigenvalue lies within the bound (see
            `hessian_tools.linalg.error_bounds.temple_bounds`).
        steps: Dimension of the Krylov space built from the random start before the first restart. 0 if unknown.
        complete: Whether that space became invariant or all of R^P was spanned. Then, with probability 1, no eigenvalue
            was missed, although copies of a multiple eigenvalue can be missing.
        low: The smallest Ritz value at the end.
        high: The largest Ritz value at the end.
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
        """Return the pairs selected by `index`, in its order."""
        return dataclasses.replace(
            self,
            values=self.values[index],
            vectors=self.vectors[:, index],
            residuals=self.residuals[index],
            converged=self.converged[index],
            bounds=self.bounds[index] if len(self.bounds) else self.bounds,
        )


def random_vector(op: Operator, generator: torch.Generator) -> Tensor:
    """Draw a standard normal vector [P], float64. It is drawn on the CPU, so a seed gives the same on any device."""
    return torch.randn(op.shape[0], dtype=torch.float64, generator=generator).to(op.device)


def certified(
    op: Operator,
    vectors: Tensor,
    tol: float | Tensor,
    norm: float | None = None,
    others: tuple[Tensor, Tensor] | None = None,
    report: Callable[[], None] | None = None,
    steps: int = 0,
    unit: float | None = None,
    images: Tensor | None = None,
) -> Eigenpairs:
    """Compute Rayleigh quotients and explicit residuals of orthonormal vectors, one product per vector.

    Args:
        op: The operator.
        vectors: Orthonormal vectors [P, k], float64.
        tol: Relative tolerance for `converged`, of all pairs or of each [k].
        norm: A lower bound on the estimate of ||A||, such as the largest |Ritz value| of the space.
        others: The remaining Ritz values [m] of the space that contains the vectors, and bounds on their residuals [m].
            Without them the gaps are unknown, and the error bounds are the residuals.
        report: Called after every product.
        steps: Dimension of the Krylov space built from a random start, the size of the operator if no eigenvalue was
            missed. 0 if unknown; then the error bounds are the residuals.
        unit: Power of two that products are divided by (see `power_of_two`), if `norm` and `others` are in this unit.
        images: Products [P, k] with the vectors, float64, if they are known.

    Returns:
        The pairs, in the order of the vectors.
    """
    before = op.products
    if unit is None and norm:
        unit = power_of_two(torch.tensor(norm))
        norm /= unit
    values, residuals = torch.empty(2, vectors.shape[1], dtype=torch.float64)
    for i, v in enumerate(vectors.unbind(1)):
        image = (op @ v).double() if images is None else images[:, i]
        unit = power_of_two(image) if unit is None else unit
        image = image if unit == 1 else image / unit
        values[i] = value = float(v @ image)
        residuals[i] = float((image - value * v).norm())
        if report is not None:
            report()
    unit = unit or 1.0
    norm = max(float(values.abs().max()) if len(values) else 0.0, norm or 0.0)
    converged = residuals <= tol * norm
    bounds, ritz = residuals, values
    if others is not None:
        ritz = torch.cat([values, others[0]])
        if steps:
            closed = 10 * BREAKDOWN * norm  # an invariant space does not tell eigenvalues apart that are closer
            sharp = temple_bounds(values, residuals, others[0], others[1] + closed, steps, op.shape[0])
            sharp = sharp + torch.finfo(op.dtype).eps * norm
            bounds = torch.where(converged, residuals.minimum(sharp), residuals)
    low, high = (float(ritz.min()) * unit, float(ritz.max()) * unit) if len(ritz) else (math.nan, math.nan)
    if unit != 1:
        values, residuals, bounds = unit * values, unit * residuals, unit * bounds
    products = op.products - before
    loosest = float(torch.as_tensor(tol).max())
    return Eigenpairs(values, vectors, residuals, converged, norm * unit, loosest, products, bounds, low=low, high=high)


def power_of_two(image: Tensor) -> float:
    """Return a power of two near the size of a product whose squares could overflow or underflow, and 1 for any other.

    Divided by it, an operator gives the same numbers up to an exact factor.

    Args:
        image: A finite product [P], float64.
    """
    largest = float(image.abs().max()) if image.numel() else 0.0
    exponent = math.frexp(largest)[1]
    return 1.0 if largest == 0 or abs(exponent) < 300 or not math.isfinite(largest) else 2.0 ** min(exponent, 1000)


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
    basis_dtype: torch.dtype = torch.float64,
    start: Tensor | None = None,
    enough: Enough | None = None,
    progress: ProductProgress | None = None,
) -> Eigenpairs:
    """Compute extreme eigenpairs by thick-restart Lanczos (Wu & Simon 2000).

    The search stops when every wanted pair has a residual of at most tol * ||A||, or after `max_products` products,
    when some pairs are reported as not converged. The explicit residuals take one more product per pair.

    A full basis restarts from the best Ritz vectors. The peak memory is max_basis vectors of P numbers of `basis_dtype`
    and wanted + 6 vectors of P float64, plus the memory of a product.

    Copies of a multiple eigenvalue are found only by round-off, or when the Krylov space that contains the first copy
    becomes invariant. At a loose tolerance some can be missing; a search of the complement from another start finds
    them.

    Args:
        op: The operator.
        largest: Number of largest eigenvalues, returned first in descending order.
        smallest: Number of smallest eigenvalues, returned next in ascending order.
        magnitude: Number of eigenvalues largest in magnitude, returned by decreasing |value|. Requires largest=0 and
            smallest=0.
        generator: Random generator of the start vector and of restarts in the complement.
        tol: Relative tolerance of the residuals.
        max_products: Largest number of operator products before the residuals.
        max_basis: Largest number of basis vectors. The default is 400, or as many as fit in 4 GiB if that is less, but
            at least twice the number of wanted pairs and what they need.
        basis_dtype: torch.float64, or torch.float32 for half of the memory (see `hessian_tools.linalg.basis`). With
            float32 the search can only reach residuals of about 1e-7 ||A||, as with products in float32. Vectors,
            values and residuals are computed in float64 from products with the vectors, so that they hold in any case.
        start: Start vector [P] instead of a random one.
        enough: Function of the wanted Ritz vectors [P, k] and values [k] that returns the tolerance [k] of each pair,
            relative to the norm of the operator, and the products with the vectors [P, k], float64, or None. It is
            called once, when all residuals are at most `LOOSE`. The search continues until every pair has its
            tolerance, which is taken to be from `tol` to `LOOSE`. If they have it already, the given products replace
            those for the explicit residuals.
        progress: Called after every product with (products done, products expected, worst relative residual).

    Returns:
        The eigenpairs.

    Raises:
        ValueError: If the counts do not fit the operator, or if `max_basis` is too small for them.
        FloatingPointError: If a product is not finite.
    """
    size = op.shape[0]
    if magnitude and (largest or smallest):
        raise ValueError(
            f"eigenvalues by magnitude ({magnitude}) exclude the {largest} largest and {smallest} smallest: pass 0 "
            "for both"
        )
    wanted = largest + smallest + magnitude
    if min(largest, smallest, magnitude) < 0 or not 1 <= wanted <= size:
        kind = f"{magnitude} by magnitude" if magnitude else f"{largest} largest and {smallest} smallest"
        raise ValueError(f"cannot find {kind} of {size} eigenvalues")
    least = min(size, least_basis(wanted))
    room = max_basis
    if room is None:
        room = max(2 * wanted, least, min(BASIS, BASIS_BYTES // (basis_dtype.itemsize * size)))
    if room < least:
        gib = basis_dtype.itemsize * size / 2**30
        raise ValueError(
            f"{wanted} eigenpairs need a basis of {least} vectors of {size} {str(basis_dtype).removeprefix('torch.')} "
            f"({least * gib:.3g} GiB), but only {room} ({room * gib:.3g} GiB) are allowed: ask for fewer pairs or "
            "allow more memory"
        )
    room = min(size, room)
    basis = torch.empty(room, size, dtype=basis_dtype, device=op.device)  # one vector per row
    t = torch.zeros(room, room, dtype=torch.float64)
    v = random_vector(op, generator) if start is None else start.to(op.device, torch.float64)
    basis[0] = v / v.norm()
    del v
    before, scale, unit, j, steps, complete = op.products, 0.0, 1.0, 0, 0, False
    checks: list[tuple[int, float]] = []  # (products, worst relative residual)
    # Stop below tol, because the explicit residual also contains round-off.
    tols, images = torch.full((wanted,), tol, dtype=torch.float64), None
    stops = 0.3 * tols
    # Wanted values and products when the space was last invariant, and the products up to which the search continues.
    closed, opened, deadline = torch.empty(0), 0, 0

    def report() -> None:
        if progress is not None:
            done = op.products - before
            expected = expected_products(checks, 0.3 * tol, done, max_products)
            progress(done, max(done, expected + wanted), checks[-1][1] if checks else math.nan)

    while True:
        w = (op @ basis[j]).double()
        if not torch.isfinite(w).all():
            raise FloatingPointError("a product with the operator is not finite")
        if not scale:
            unit = power_of_two(w)
        w, coefficients = orthogonalize(w if unit == 1 else w / unit, basis[: j + 1].T)
        t[j, : j + 1] = t[: j + 1, j] = coefficients.cpu()
        beta = float(w.norm())
        scale = max(scale, float(coefficients.abs().max()), beta)
        j += 1
        done = op.products - before
        invariant = beta <= BREAKDOWN * scale
        last = j == size or done >= max_products
        if not steps and (invariant or j == room):
            steps, complete = j, invariant and start is None
        settled = False
        if invariant or (j >= wanted and (last or j == room or j % 4 == 0)):
            ritz, y = torch.linalg.eigh(t[:j, :j])
            estimates = beta * y[-1].abs()
            index = _wanted(ritz, largest, smallest, magnitude)
            if invariant:
                # Copies of eigenvalues can exist outside this space. Continue from a random vector in the complement.
                # If that space becomes invariant without better wanted values, there are none.
                found = ritz[index]
                settled = found.shape == closed.shape and bool((found - closed).abs().max() <= 10 * BREAKDOWN * scale)
                # It has at most as many distinct eigenvalues, so apart from round-off it needs no more products.
                closed, opened, deadline = found, done, 2 * done - opened
            else:
                found = estimates[index] / ritz.abs().max()
                checks.append((done, float(found.max())))
                if enough is not None and done > deadline and not last and checks[-1][1] <= CLOSE * LOOSE:
                    vectors = combined(basis[:j], y[:, index].to(op.device))
                    allowed, images = enough(vectors, unit * ritz[index])
                    tols = allowed.nan_to_num(tol).clamp(tol, max(tol, LOOSE))
                    stops, enough = torch.maximum(stops, CLOSE * tols), None
                    images = images if bool((found <= stops).all()) else None
                    del vectors
                settled = done > deadline and bool((found <= stops).all())
        report()
        if settled or (last and j >= wanted):
            vectors = combined(basis[:j], y[:, index].to(op.device))
            del basis
            rest = torch.ones(j, dtype=torch.bool).index_fill(0, index, False)
            complete = complete or j == size
            steps = 0 if start is not None else steps or j
            seen = size if complete else steps
            rounding = 0.0 if basis_dtype == torch.float64 else torch.finfo(basis_dtype).eps * scale
            others = ritz[rest], estimates[rest] + rounding
            pairs = certified(op, vectors, tols, float(ritz.abs().max()), others, report, seen, unit, images)
            return dataclasses.replace(pairs, products=op.products - before, steps=steps, complete=complete)
        if j == room:
            kept = _survivors(ritz, largest, smallest, magnitude, room)
            rotate(basis[:j], y[:, kept].to(op.device))
            t.zero_()
            j = len(kept)
            t[:j, :j] = torch.diag(ritz[kept])
        if invariant:
            w, _ = orthogonalize(random_vector(op, generator), basis[:j].T)
            beta = float(w.norm())
        torch.div(w, beta, out=basis[j])


def least_basis(wanted: int) -> int:
    """Return the smallest `max_basis` that `eigenpairs` accepts for `wanted` pairs."""
    return wanted + max(5, wanted // 5)


def _wanted(ritz: Tensor, largest: int, smallest: int, magnitude: int) -> Tensor:
    """Return indices into ascending values: those of largest magnitude, or the largest and then the smallest."""
    count, sizes = len(ritz), ritz.abs().tolist()
    if magnitude:
        return torch.tensor(sorted(range(count), key=sizes.__getitem__, reverse=True)[:magnitude])
    top = list(range(count - 1, count - 1 - min(largest, count), -1))
    bottom = [i for i in range(min(smallest, count)) if i not in top]
    return torch.tensor(top + bottom, dtype=torch.long)


def _survivors(ritz: Tensor, largest: int, smallest: int, magnitude: int, room: int) -> Tensor:
    """Return the indices of the Ritz vectors kept at a restart: the wanted, some next to them, and both ends."""
    wanted = largest + smallest + magnitude
    keep = wanted + min(wanted, 10, (room - wanted - 2) // 2)
    top = round(keep * largest / wanted)
    index = _wanted(ritz, top, keep - top, keep if magnitude else 0)
    kept: Tensor = torch.cat([index, torch.tensor([0, len(ritz) - 1])]).unique()
    return kept


def expected_products(checks: Sequence[tuple[int, float]], target: float, done: int, most: int) -> int:
    """Extrapolate the number of products until the worst residual reaches a target.

    The logarithm of the residual is fitted by a line through the last five checks.

    Args:
        checks: Pairs (products, worst residual).
        target: The residual to reach.
        done: Number of products so far.
        most: Upper bound.

    Returns:
        The number of products, at least done + 1 and at most `most`. It is `most` for fewer than three checks and if
        the residual does not decrease.
    """
    recent = checks[-5:]
    if len(recent) < 3:
        return most
    line = statistics.linear_regression(
        [products for products, _ in recent], [math.log(max(worst, 1e-300)) for _, worst in recent]
    )
    if not line.slope < 0:
        return most
    return min(most, max(done + 1, math.ceil((math.log(max(target, 1e-300)) - line.intercept) / line.slope)))


def excess(pairs: Eigenpairs, size: int, failure: float = 0.05) -> float:
    """Bound how far an eigenvalue can lie outside the range of the Ritz values.

    With probability 1 - failure over the random start, no eigenvalue is more than this above `pairs.high` or below
    `pairs.low`. Each end fails with probability failure / 2. If e is the relative error of each end
    (`random_start_bound`), the range of the spectrum is at most that of the Ritz values divided by 1 - 2e. Restarts
    keep both outermost Ritz vectors, so they can only widen the range of the Ritz values.

    Args:
        pairs: Eigenpairs found by `eigenpairs`.
        size: Size P of the operator.
        failure: Failure probability.

    Returns:
        The bound. It is 0 for a complete search, and infinite if there were too few steps for a bound.
    """
    e = 0.0 if pairs.complete else random_start_bound(pairs.steps, size, failure / 2)
    return e / (1 - 2 * e) * (pairs.high - pairs.low) if e < 0.5 else math.inf
