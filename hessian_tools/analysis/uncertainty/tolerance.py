"""The tolerance of eigenpairs: no product is made for digits that the error over the data hides.

An eigenpair may stop when its residual is `FRACTION` of the standard error of its eigenvalue over the data. Some
eigenvalue lies within the residual of the value, and the error of a separated value is of second order in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessian_tools.analysis.uncertainty.sampling_error import standard_error
from hessian_tools.linalg.lanczos import LOOSE
from hessian_tools.operators.curvature import CurvatureOperator

FRACTION = 0.1  # of the standard error over the data
IMAGES = 2**27  # bytes of the products with all vectors, up to which those of the groups are added up


def tolerance(error: float, norm: float, tightest: float) -> float:
    """Return the residual that suffices for an eigenvalue, relative to the norm of the operator.

    Args:
        error: Standard error of the eigenvalue over the data; NaN if it is not known.
        norm: Norm of the operator.
        tightest: Smallest tolerance.

    Returns:
        `FRACTION` of the error, but from `tightest` to `LOOSE`.
    """
    if not (norm > 0 and error == error):
        return tightest
    return max(tightest, min(LOOSE, FRACTION * error / norm))


class GroupForms:
    """Quadratic forms of groups of samples, which a search and the errors over the data share.

    Args:
        op: The operator.
        groups: The same operator with one batch per group.
        parts: The samples of each group.

    Attributes:
        vectors: The vectors of the search; None before.
    """

    def __init__(self, op: CurvatureOperator, groups: CurvatureOperator, parts: Sequence[Tensor]) -> None:
        self._op, self._groups, self._parts = op, groups, parts
        self.vectors: Tensor | None = None
        self._known: tuple[list[Tensor], Tensor] | None = None

    def __call__(self, *blocks: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what `batch_forms` of the groups does. Those of the search are not computed again."""
        found: list[Tensor] = []
        counts = torch.empty(0)
        for block in blocks:
            if self._known is not None and self.vectors is not None and torch.equal(block, self.vectors):
                (forms,), counts = self._known
                self._groups.products += block.shape[1]
            else:
                (forms,), counts = self._computed(block, None)
            found.append(forms)
        return found, counts

    def enough(self, tightest: float, vectors: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tolerances of Ritz pairs and the products with the vectors (see `linalg.lanczos.Enough`)."""
        alone = self._groups.objective.group is None
        total = torch.zeros_like(vectors) if alone and 8 * vectors.numel() <= IMAGES else None
        self.vectors, self._known = vectors, self._computed(vectors, total)
        (forms,), counts = self._known
        norm = float(values.abs().max())
        errors = standard_error(forms.diagonal(dim1=1, dim2=2), counts).tolist()
        tols = torch.tensor([tolerance(error, norm, tightest) for error in errors], dtype=torch.float64)
        return tols, total if total is not None and bool(total.any()) else None

    def _computed(self, block: Tensor, total: Tensor | None) -> tuple[list[Tensor], Tensor]:
        before = self._op.products
        found = self._op.sample_forms(self._parts, block)
        self._groups.products += self._op.products - before
        self._op.products = before
        return found or self._groups.batch_forms(block, total=total)
