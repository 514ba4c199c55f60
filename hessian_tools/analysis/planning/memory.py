"""How an analysis divides its memory between the Lanczos basis, eigenvectors and primals."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hessian_tools.engine.product import kept_bytes
from hessian_tools.linalg.lanczos import BASIS, least_basis
from hessian_tools.objective import Objective

TEMPORARY = 1.75  # what a product takes while it is computed, relative to what it keeps; measured
PROCESS = 0.75 * 2**30  # bytes of PyTorch, Python and copies of the network, but at most an eighth of the memory


@dataclass(frozen=True)
class Budget:
    """A division of memory.

    Attributes:
        vectors: Number of vectors in the Lanczos basis.
        kept: Bytes for stored primals.
        basis_dtype: The dtype of the basis.
    """

    vectors: int
    kept: float
    basis_dtype: torch.dtype = torch.float64


def budget(
    memory: float, size: int, wanted: int, steps: int = 0, dtype: torch.dtype = torch.float64, in_use: float = 0.0
) -> Budget:
    """Divide the available memory between the Lanczos basis and stored primals.

    The basis gets what the eigenpairs and a density with `steps` steps need, and beyond that up to half of the memory
    and at most 400 vectors. Its peak includes the eigenpairs copied out of it and a few work vectors, all in float64.
    The basis itself is in float64 if all 400 vectors fit, and otherwise in the dtype of the operator: products in
    float32 are as inaccurate as a basis in float32.

    Args:
        memory: Memory in bytes.
        size: Number P of parameters.
        wanted: Number of eigenpairs.
        steps: Lanczos steps of a density.
        dtype: The dtype of the operator.
        in_use: Bytes that batches take while they are processed, and other things. At most a quarter of the memory
            counts.

    Returns:
        The division.

    Raises:
        ValueError: If nine tenths of the memory do not suffice for the smallest possible basis.
    """
    work = 8 * size * (wanted + 4)
    least = max(least_basis(wanted), steps)
    comfortable = max(least_basis(wanted) + 10, steps)
    long = max(BASIS, comfortable)
    left = memory - min(in_use, memory / 4)
    narrow = dtype == torch.float32 and left / 2 < 8 * size * long + work
    vector = (4 if narrow else 8) * size
    half, most = (int((share * left - work) / vector) for share in (0.5, 0.9))
    if most < least:
        needed = (vector * least + work) / 0.9 / 2**30 * memory / left
        raise ValueError(
            f"{wanted} eigenpairs and {steps} density steps for {size:,} parameters need {needed:.1f} GiB of memory, "
            f"but memory is {memory / 2**30:.1f} GiB. Raise memory, or ask for fewer eigenpairs or steps."
        )
    room = min(long, max(half, min(most, comfortable)))
    return Budget(room, left - vector * room - work, torch.float32 if narrow else torch.float64)


def budget_of(objective: Objective, memory: float, wanted: int, steps: int = 0) -> Budget:
    """Divide the memory for an objective (see `budget`), less what its batches and the process itself take.

    Args:
        objective: The objective.
        memory: Memory in GiB.
        wanted: Number of eigenpairs.
        steps: Lanczos steps of a density.

    Raises:
        ValueError: If the memory does not suffice.
    """
    size, dtype = objective.size, objective.dtype
    found = budget(memory * 2**30, size, wanted, steps, dtype)
    if found.vectors >= BASIS and found.basis_dtype == torch.float64:  # there is memory enough
        return found
    busy = in_use(objective) + min(PROCESS, memory * 2**30 / 8)
    return budget(memory * 2**30, size, wanted, steps, dtype, busy)


def in_use(objective: Objective) -> float:
    """Return about how many bytes the products of all batches that are processed at a time take; 0 if unknown."""
    if (found := kept_bytes(objective)) is None:
        return 0.0
    once, each = found
    workers = torch.get_num_threads() if objective.device.type == "cpu" else 1
    return TEMPORARY * min(workers, len(objective.share)) * (once + each * max(objective.sizes))
