"""Curvature relative to the weights, which rescaling the layers of a ReLU network leaves alone.

Both are of a curvature operator, so of the surrogate and not of the true spiking loss.
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

TOL, PRODUCTS = 0.05, 60  # of deflation: the estimate is unbiased whatever is deflated
ROUND_OFF = 1e-5  # of a positive semidefinite form, relative


def fisher_rao(op: Operator, weights: Tensor) -> float:
    """The Fisher-Rao norm ||w||_fr = sqrt(w'Fw), weights w [P]; one product (Liang et al. 2019).

    op is the Fisher matrix meant: operators.fisher, labels from the data (their empirical Fisher-Rao norm), or
    operators.ggn, which for cross-entropy is the Fisher matrix with labels from the model. Some publish the square.
    Raises ValueError for weights that are not finite and for an operator that is not positive semidefinite along them.
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
    """The names of the parameters that relative_flatness can measure: those with two dimensions or more."""
    return [name for name, p in objective.parameters.items() if p.dim() > 1]


def relative_flatness(
    op: Operator, objective: Objective, layer: str, *, probes: int = 16, deflate: int = 8, seed: int = 0
) -> TraceEstimate:
    """kappa_Tr = sum_{s,t} <w_s, w_t> tr H_{s,t} of one layer, with a 95% interval (Petzka et al. 2021, definition 3).

    layer: name of its weights [d, ...]; w_s [m] are their rows, a convolution's filters, H_{s,t} [m, m] the block of
    op (over all of the objective's parameters) for rows s and t. Biases are left out.

    It is the trace of Z -> R'H(R Z), Z [r, m], for any R [d, r] with RR' = WW': of E (RZ)'H(RZ) over random signs Z,
    estimated by one product with op a probe. The `deflate` eigenvectors of largest |eigenvalue| come first, exactly, at
    the cost of some 30 products (PRODUCTS + deflate at most).
    Raises ValueError for a layer that is no matrix, another objective's operator, weights that are not finite, fewer
    probes than an interval takes, and a negative deflate.
    """
    if layer not in matrices(objective):
        raise ValueError(f"'{layer}' is no weight matrix: choose from {', '.join(matrices(objective)) or 'none'}")
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
    """Z -> R'H(R Z) on vectors [r m], H one layer's block of op: the vector op meets is zero elsewhere."""
    sizes = {name: p.numel() for name, p in objective.parameters.items()}
    names = list(sizes)
    start = sum(sizes[name] for name in names[: names.index(layer)])
    own = slice(start, start + sizes[layer])
    w = objective.parameters[layer].detach().flatten(1).double()
    if not torch.isfinite(w).all():
        raise ValueError(f"parameter '{layer}' has NaN or infinite entries")
    d, m = w.shape
    # the smaller of two roots: W itself, or the triangle of W' = QR, for which W = R'Q'
    root = (w if m <= d else torch.linalg.qr(w.T, "r").R.T).to(op.device, op.dtype)
    r = root.shape[1]

    def product(block: Tensor) -> Tensor:
        whole = block.new_zeros(op.shape[0], block.shape[1])
        whole[own] = torch.einsum("sr,rmk->smk", root, block.reshape(r, m, -1)).reshape(d * m, -1)
        image = (op @ whole)[own].reshape(d, m, -1)
        return torch.einsum("sr,smk->rmk", root, image).reshape(r * m, -1)

    return Composed(r * m, op.dtype, op.device, product)
