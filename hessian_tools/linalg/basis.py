"""Operations on a Lanczos basis that is stored in float64 or in float32.

All arithmetic is in float64. A basis in float32 takes half of the memory. A few columns at a time are converted.
Orthonormal vectors that are rounded to float32 stay orthonormal to about 6e-8 / sqrt(P), because the rounding errors of
their P entries are independent. The Lanczos recurrence then holds to 6e-8 ||A||, which is the accuracy of a product in
float32. Such a product rounds its vector to float32 in any case.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 2**15  # converted at a time: a basis of 60 vectors then takes 16 MB


def orthogonalize(v: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonalize a vector against a basis, twice.

    Args:
        v: Vector [P] or block [P, k], float64.
        basis: Orthonormal columns [P, j], float64 or float32.

    Returns:
        v minus its part in the span of the basis, and the coefficients of that part [j] or [j, k].
    """
    if basis.dtype == v.dtype:
        first = basis.T @ v
        v = (basis @ first).neg_().add_(v)
        second = basis.T @ v
        return (basis @ second).neg_().add_(v), first + second
    w = v.clone()
    total = first = torch.zeros(basis.shape[1], *v.shape[1:], dtype=v.dtype, device=v.device)
    for some, rows in zip(w.split(COLUMNS), basis.split(COLUMNS), strict=True):
        first += rows.to(v.dtype).T @ some
    second = torch.zeros_like(first)
    for some, rows in zip(w.split(COLUMNS), basis.split(COLUMNS), strict=True):
        wide = rows.to(v.dtype)
        some -= wide @ first
        second += wide.T @ some
    for some, rows in zip(w.split(COLUMNS), basis.split(COLUMNS), strict=True):
        some -= rows.to(v.dtype) @ second
    return w, total + second


def rotate(basis: Tensor, y: Tensor) -> None:
    """Replace the first k rows of basis [j, P] by y^T basis for y [j, k], with a buffer of about one row."""
    k = y.shape[1]
    for piece in basis.split(max(1024, basis.shape[1] // k), 1):
        piece[:k] = y.T @ piece.to(y.dtype)


def combined(basis: Tensor, y: Tensor) -> Tensor:
    """Return the combinations [P, k], float64, of the rows of basis [j, P] with the coefficients y [j, k].

    Of a basis in float32, orthonormal combinations are made orthonormal again, to the precision of float64.
    """
    if basis.dtype == y.dtype:
        return (y.T @ basis).T
    found = torch.empty(y.shape[1], basis.shape[1], dtype=y.dtype, device=y.device)
    for some, rows in zip(found.split(COLUMNS, 1), basis.split(COLUMNS, 1), strict=True):
        some.copy_(y.T @ rows.to(y.dtype))
    lower = torch.linalg.cholesky(found @ found.T)
    for some in found.split(COLUMNS, 1):
        some.copy_(torch.linalg.solve_triangular(lower, some, upper=False))
    return found.T
