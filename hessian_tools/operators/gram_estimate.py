"""The spectrum of the Gauss-Newton matrix of many samples, from a few random rows of its factor for each.

With B_i = R_i^T R_i the second derivative of the loss of sample i by its C outputs, G is the mean of J_i^T B_i J_i. If
row c of R_i is drawn with probability p_c and divided by sqrt(m p_c), the m rows of every sample give a matrix whose
mean is G, and whose Gram matrix has N m rows in place of N C (the Monte Carlo approximation of Dangel et al. 2022,
"ViViT", arXiv 2106.02624). Here p_c is the share of row c in the squared norm of R_i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor

from hessian_tools.evaluation import differentiable
from hessian_tools.objective import Objective
from hessian_tools.operators.gram import assembled

PARTS = 8  # of the draws, of which each is left out once


@dataclass(frozen=True, eq=False)
class GramEstimate:
    """An estimate of the eigenvalues of the Gauss-Newton matrix G that are not zero.

    Attributes:
        values: Eigenvalues of the estimated matrix [N m], float64, in descending order. The matrix has the mean G, but
            its largest eigenvalue is on average larger than that of G, and many small ones are missing.
        trace: Trace of G, without bias.
        trace_stderr: Its standard error over the draws of rows. NaN with one row per sample.
        below: A lower estimate of the largest eigenvalue: the quadratic form of G, from a part of the draws, along the
            first eigenvector of the others, which is on average not larger than that of G. NaN with one row per sample.
        below_stderr: Its standard error over the draws, as if they were independent.
        columns: m, the rows per sample.
    """

    values: Tensor
    trace: float
    trace_stderr: float
    below: float
    below_stderr: float
    columns: int


@differentiable
def gram_estimate(
    objective: Objective,
    columns: int = 4,
    *,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GramEstimate:
    """Estimate the spectrum of the Gauss-Newton matrix from a few rows of its factor per sample.

    The error for other samples is not in the standard errors.

    Args:
        objective: The loss, its data and its weights. No sample may depend on another.
        columns: m, the number of rows per sample, at least 1. It takes m backward passes per batch.
        generator: Draws the rows, on the CPU; None: torch's own.
        progress: Callback with the backward passes done and their total.

    Raises:
        GramError: As by `gram_matrix`, with N m rows.
        ValueError: If `columns` is less than 1.
    """
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")

    def drawn(root: Tensor) -> Tensor:
        shares = root.square().sum(2).cpu()
        shares = torch.where(shares.sum(1, keepdim=True) > 0, shares, 1)  # no row of this sample matters
        shares = shares / shares.sum(1, keepdim=True)
        rows = torch.multinomial(shares, columns, replacement=True, generator=generator)
        scale = (columns * shares.gather(1, rows)).sqrt()
        return root.gather(1, rows[..., None].expand(-1, -1, root.shape[2]).to(root.device)) / scale[..., None].to(root)

    matrix, _ = assembled(objective, drawn, progress)
    values = torch.linalg.eigvalsh(matrix).flip(0).clamp_min(0)
    traces = matrix.diagonal().view(-1, columns).sum(0) * columns
    forms = matrix.new_full((1,), torch.nan)
    if columns > 1:
        parts = torch.arange(columns).tensor_split(min(columns, PARTS))
        forms = torch.stack([_form(matrix, part, columns) for part in parts])
    errors = [float(t.std() / len(t) ** 0.5) if len(t) > 1 else float("nan") for t in (traces, forms)]
    return GramEstimate(values, float(traces.mean()), errors[0], float(forms.mean()), errors[1], columns)


def _form(matrix: Tensor, part: Tensor, columns: int) -> Tensor:
    """Return the quadratic form of a part of the draws along the first eigenvector v of the others.

    With A their rows, v = A^T u / |A^T u| for the first eigenvector u of A A^T. With n draws in the part and B their
    rows, the form is m / n |B v|^2.
    """
    mine = torch.isin(torch.arange(len(matrix)) % columns, part)
    others = matrix[~mine][:, ~mine].numpy()
    (largest,), u = eigh(others, subset_by_index=[len(others) - 1, len(others) - 1])
    if largest <= 0:
        return matrix.new_zeros(())
    image: Tensor = matrix[mine][:, ~mine] @ torch.from_numpy(u)
    return columns / len(part) * image.square().sum() / float(largest)
