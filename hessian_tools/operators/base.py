"""Symmetric linear operators and algebra on them.

Algorithms use only `.shape`, `.dtype`, `.device` and `op @ v`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor


class Operator(ABC):
    """A symmetric P x P linear operator.

    Attributes:
        shape: (P, P).
        dtype: The dtype of the products.
        device: The device of the products.
        products: Number of vectors that the operator was applied to.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device
        self.products = 0

    @abstractmethod
    def _apply(self, block: Tensor) -> Tensor:
        """Return the product [P, k] with a block [P, k] in the operator's dtype."""

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product with v [P] or [P, k], in the operator's dtype.

        Raises:
            ValueError: If the first dimension of `v` is not P.
        """
        if v.dim() not in (1, 2) or v.shape[0] != self.shape[0]:
            raise ValueError(f"the operator has size {self.shape[0]}, the vector has shape {list(v.shape)}")
        block = v.to(self.device, self.dtype).reshape(self.shape[0], -1)
        self.products += block.shape[1]
        return self._apply(block).reshape(v.shape)


class Dense(Operator):
    """The operator of a symmetric matrix [P, P].

    Raises:
        ValueError: If the matrix is not square, or not symmetric to within 1e-6 of its largest entry.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"the matrix must be square, but its shape is {list(matrix.shape)}")
        if not (matrix - matrix.T).abs().max() <= 1e-6 * matrix.abs().max():
            raise ValueError("the matrix is not symmetric (to 1e-6 of its largest entry)")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _apply(self, block: Tensor) -> Tensor:
        return self.matrix @ block


class Composed(Operator):
    """An operator given by a function of blocks [P, k]. It has its own count of products."""

    def __init__(
        self, size: int, dtype: torch.dtype, device: torch.device, function: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(size, dtype, device)
        self._function = function

    def _apply(self, block: Tensor) -> Tensor:
        return self._function(block)


def _like(op: Operator, function: Callable[[Tensor], Tensor]) -> Operator:
    """Return an operator with the size, dtype and device of `op`."""
    return Composed(op.shape[0], op.dtype, op.device, function)


def scaled(op: Operator, scale: Tensor | float) -> Operator:
    """Return D A D for a vector D [P] (the diagonal), or c A for a number c."""
    if not isinstance(scale, Tensor):
        return _like(op, lambda v: scale * (op @ v))
    d = scale.to(op.device, op.dtype)[:, None]
    return _like(op, lambda v: d * (op @ (d * v)))


def shifted(op: Operator, shift: float) -> Operator:
    """Return A + shift I."""
    return _like(op, lambda v: op @ v + shift * v)


def summed(*ops: Operator) -> Operator:
    """Return A + B + ... Raises ValueError if the sizes differ."""
    if len({op.shape for op in ops}) != 1:
        raise ValueError(f"operators of sizes {[op.shape[0] for op in ops]} cannot be added: the sizes must be equal")
    return _like(ops[0], lambda v: torch.stack([op @ v for op in ops]).sum(0))


def projected(op: Operator, basis: Tensor) -> Operator:
    """Return (I - Q Q^T) A (I - Q Q^T) for orthonormal columns Q [P, k]."""
    q = basis.to(op.device, op.dtype)

    def complement(v: Tensor) -> Tensor:
        return v - q @ (q.T @ v)

    return _like(op, lambda v: complement(op @ complement(v)))


def dense(op: Operator) -> Tensor:
    """Return the matrix [P, P] of an operator. This takes P products."""
    return op @ torch.eye(op.shape[0], dtype=op.dtype, device=op.device)


def to_scipy(op: Operator) -> LinearOperator:
    """Wrap an operator for scipy.sparse.linalg (eigsh, lobpcg, ...).

    The products are computed in the operator's dtype and returned in float64.
    """

    def matmat(v: Any) -> Any:
        return (op @ torch.from_numpy(np.array(v, dtype=np.float64))).to("cpu", torch.float64).numpy()

    return LinearOperator(op.shape, matvec=lambda v: matmat(v.reshape(-1)), matmat=matmat, dtype=np.float64)


def from_scipy(a: Any) -> Operator:
    """Wrap a symmetric scipy LinearOperator, sparse matrix or dense matrix. Products are float64 on the CPU."""
    return Composed(
        a.shape[0],
        torch.float64,
        torch.device("cpu"),
        lambda v: torch.from_numpy(np.asarray(a @ v.numpy(), dtype=np.float64)),
    )


def symmetry_error(op: Operator, generator: torch.Generator) -> float:
    """Return |u^T A v - v^T A u| / ||A u|| for random standard normal u and v. It is 0 for the zero operator."""
    u, v = torch.randn(2, op.shape[0], dtype=torch.float64, generator=generator).to(op.device)
    products = (op @ torch.stack([u, v], 1)).double()
    norm = products[:, 0].norm()
    if norm == 0:
        return 0.0
    return float((v @ products[:, 0] - u @ products[:, 1]).abs() / norm)
