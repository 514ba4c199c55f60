"""Curvature relative to the weights: metrics that do not change when the layers of a ReLU network are rescaled.

They use a curvature operator, so they describe the surrogate and not the true spiking loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessian_tools.linalg.lanczos import eigenpairs, least_basis
from hessian_tools.linalg.trace import TraceEstimate, trace
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Composed, Operator
from hessian_tools.seeding import stream

TOL, PRODUCTS = 0.05, 60  # of the deflation; the estimate is unbiased whatever is deflated
ROUND_OFF = 1e-5  # relative round-off of a positive semidefinite form


def fisher_rao(op: Operator, weights: Tensor) -> float:
    """Compute the Fisher-Rao norm sqrt(w'Fw) (Liang et al. 2019). It takes one product.

    Some publications give its square.

    Args:
        op: Fisher matrix F. `operators.curvature.fisher` uses labels from the data (the empirical Fisher-Rao norm of
            the paper). `operators.curvature.ggn` is, for cross-entropy, the Fisher matrix with labels from the model.
        weights: Weights w [P].

    Returns:
        The norm.

    Raises:
        ValueError: If the weights are not finite, or if w'Fw is negative.
    """
    w = weights.to(op.device, torch.float64)
    if not torch.isfinite(w).all():
        raise ValueError("the weights have NaN or infinite entries")
    image = (op @ w).double()
    form = float(w @ image)
    if form < -ROUND_OFF * float(w.norm() * image.norm()):
        raise ValueError(f"w'Aw = {form:.6g} is negative: a Fisher-Rao norm needs a Fisher matrix or the GGN")
    return math.sqrt(max(0.0, form))


def matrices(objective: Objective) -> list[str]:
    """Return the names of the parameters that `relative_flatness` can measure: those with two or more dimensions."""
    return [name for name, p in objective.parameters.items() if p.dim() > 1]


def relative_flatness(
    op: Operator, objective: Objective, layer: str, *, probes: int = 16, deflate: int = 8, seed: int = 0
) -> TraceEstimate:
    """Estimate the relative flatness of one layer, `kappa_Tr = sum over s, t of <w_s, w_t> tr H_st`.

    Source: Petzka et al. 2021, definition 3. Here w_s [m] are the rows of the weights (filters of a convolution), and
    H_st [m, m] is the block of the operator for rows s and t. Biases are not included.

    The sum is the trace of the map Z -> R'H(R Z), with Z [r, m], for any R [d, r] with RR' = WW'. It is estimated as
    the mean of (RZ)'H(RZ) over random signs Z, with one product per probe. The `deflate` eigenvectors with the largest
    |eigenvalue| are summed exactly. They take about 30 products, and at most PRODUCTS + deflate.

    Args:
        op: Curvature operator over all parameters of the objective.
        objective: Objective with the weights.
        layer: Name of the weights of the layer [d, ...].
        probes: Number of probes.
        deflate: Number of eigenvectors to deflate.
        seed: Random seed.

    Returns:
        The estimate with a 95% confidence interval.

    Raises:
        ValueError: If the parameter is not a matrix, the operator has another size, the weights are not finite, there
            are too few probes for an interval, or `deflate` is negative.
    """
    if layer not in matrices(objective):
        raise ValueError(f"'{layer}' is not a weight matrix: choose from {', '.join(matrices(objective)) or 'none'}")
    if op.shape[0] != objective.size:
        raise ValueError(f"the operator has size {op.shape[0]}, the objective {objective.size} parameters")
    if deflate < 0:
        raise ValueError(f"deflate must be at least 0, not {deflate}")
    inner, index = _weighted(op, objective, layer), list(objective.parameters).index(layer)
    pairs = None
    if count := min(deflate, inner.shape[0]):
        most = max(least_basis(count), PRODUCTS)
        pairs = eigenpairs(
            inner, 0, magnitude=count, generator=stream(seed, index, 0), tol=TOL, max_products=most, max_basis=most
        )
    return trace(inner, probes=probes, generator=stream(seed, index, 1), deflate=pairs)


def _weighted(op: Operator, objective: Objective, layer: str) -> Operator:
    """Return the operator Z -> R'H(R Z) on vectors [r m], where H is the block of `op` for one layer."""
    sizes = {name: p.numel() for name, p in objective.parameters.items()}
    names = list(sizes)
    start = sum(sizes[name] for name in names[: names.index(layer)])
    own = slice(start, start + sizes[layer])
    w = objective.parameters[layer].detach().flatten(1).double()
    if not torch.isfinite(w).all():
        raise ValueError(f"parameter '{layer}' has NaN or infinite entries")
    d, m = w.shape
    # The smaller of two roots of WW': W itself, or R' of W' = QR (then W = R'Q').
    root = (w if m <= d else torch.linalg.qr(w.T, "r").R.T).to(op.device, op.dtype)
    r = root.shape[1]

    def product(block: Tensor) -> Tensor:
        whole = block.new_zeros(op.shape[0], block.shape[1])
        whole[own] = torch.einsum("sr,rmk->smk", root, block.reshape(r, m, -1)).reshape(d * m, -1)
        image = (op @ whole)[own].reshape(d, m, -1)
        return torch.einsum("sr,smk->rmk", root, image).reshape(r * m, -1)

    return Composed(r * m, op.dtype, op.device, product)
