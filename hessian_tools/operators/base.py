"""Symmetric linear operators and algebra on them. An algorithm sees `.shape`, `.dtype`, `.device` and `op @ v`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor


class Operator(ABC):
    """A symmetric P x P operator. `products` counts the vectors it was applied to."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device
        self.products = 0

    @abstractmethod
    def _apply(self, block: Tensor) -> Tensor:
        """[P, k] -> [P, k], in dtype."""

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with v [P] or [P, k], in this operator's dtype. Raises ValueError for another length."""
        if v.dim() not in (1, 2) or v.shape[0] != self.shape[0]:
            raise ValueError(f"the operator has size {self.shape[0]}, the vector has shape {list(v.shape)}")
        block = v.to(self.device, self.dtype).reshape(self.shape[0], -1)
        self.products += block.shape[1]
        return self._apply(block).reshape(v.shape)


class Dense(Operator):
    """A symmetric matrix [P, P]. Raises ValueError if it is not symmetric to 1e-6 of its largest entry."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a square matrix is needed, not {list(matrix.shape)}")
        if not (matrix - matrix.T).abs().max() <= 1e-6 * matrix.abs().max():
            raise ValueError("the matrix is not symmetric")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _apply(self, block: Tensor) -> Tensor:
        return self.matrix @ block


class Composed(Operator):
    """An operator given by a function of blocks [P, k]; counts products of its own."""

    def __init__(
        self, size: int, dtype: torch.dtype, device: torch.device, function: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(size, dtype, device)
        self._function = function

    def _apply(self, block: Tensor) -> Tensor:
        return self._function(block)


def _like(op: Operator, function: Callable[[Tensor], Tensor]) -> Operator:
    return Composed(op.shape[0], op.dtype, op.device, function)


def scaled(op: Operator, scale: Tensor | float) -> Operator:
    """D A D for a vector D [P], c A for a number c."""
    if not isinstance(scale, Tensor):
        return _like(op, lambda v: scale * (op @ v))
    d = scale.to(op.device, op.dtype)[:, None]
    return _like(op, lambda v: d * (op @ (d * v)))


def shifted(op: Operator, shift: float) -> Operator:
    """A + shift I."""
    return _like(op, lambda v: op @ v + shift * v)


def summed(*ops: Operator) -> Operator:
    """A + B + ..."""
    if len({op.shape for op in ops}) != 1:
        raise ValueError(f"operators of sizes {[op.shape[0] for op in ops]} cannot be added")
    return _like(ops[0], lambda v: torch.stack([op @ v for op in ops]).sum(0))


def projected(op: Operator, basis: Tensor) -> Operator:
    """(I - QQ') A (I - QQ') for orthonormal columns Q [P, k]."""
    q = basis.to(op.device, op.dtype)

    def complement(v: Tensor) -> Tensor:
        return v - q @ (q.T @ v)

    return _like(op, lambda v: complement(op @ complement(v)))


def dense(op: Operator) -> Tensor:
    """The matrix [P, P] of an operator; P products."""
    return op @ torch.eye(op.shape[0], dtype=op.dtype, device=op.device)


def to_scipy(op: Operator) -> LinearOperator:
    """For scipy.sparse.linalg (eigsh, lobpcg, ...): products in the operator's dtype, float64 outside."""

    def matmat(v: Any) -> Any:
        return (op @ torch.from_numpy(np.array(v, dtype=np.float64))).to("cpu", torch.float64).numpy()

    return LinearOperator(op.shape, matvec=lambda v: matmat(v.reshape(-1)), matmat=matmat, dtype=np.float64)


def from_scipy(a: Any) -> Operator:
    """An operator from a symmetric scipy operator, sparse or dense matrix; float64 on the CPU."""
    return Composed(
        a.shape[0],
        torch.float64,
        torch.device("cpu"),
        lambda v: torch.from_numpy(np.asarray(a @ v.numpy(), dtype=np.float64)),
    )


def symmetry_error(op: Operator, generator: torch.Generator) -> float:
    """|u'Av - v'Au| / ||Au|| for random u, v of unit variance; 0 for the zero operator."""
    u, v = torch.randn(2, op.shape[0], dtype=torch.float64, generator=generator).to(op.device)
    products = (op @ torch.stack([u, v], 1)).double()
    norm = products[:, 0].norm()
    if norm == 0:
        return 0.0
    return float((v @ products[:, 0] - u @ products[:, 1]).abs() / norm)
