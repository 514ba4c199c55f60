"""What every part of one spectrum analysis shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.linalg.lanczos import (
    least_basis,
)
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.progress import Meter
from hessian_tools.resume import Phases
from hessian_tools.seeding import stream

if TYPE_CHECKING:
    from hessian_tools.operators.curvature import CurvatureOperator

SYMMETRY_LIMIT = {torch.float32: 1e-4, torch.float64: 1e-10}
Op = TypeVar("Op", bound=Operator)
Factory = Callable[[Objective, float], "CurvatureOperator"]  # (objective, bytes for kept primals)


class SmoothedFactory(Protocol):
    """Make the operator `smoothed` of an objective; scale: of the weight noise, relative to each filter's RMS."""

    def __call__(self, objective: Objective, memory: float, *, scale: float, seed: int) -> CurvatureOperator: ...


class AnalysisError(RuntimeError):
    """The computation failed: an operator that is no Hessian, or numbers that are not finite."""


@dataclass(frozen=True)
class AnalysisContext:
    """What every part of one analysis needs."""

    settings: SpectrumSettings
    phases: Phases
    meter: Meter
    smoothed: SmoothedFactory | None = None  # makes operator `smoothed`

    def phase(self, name: str, op: Op, compute: Callable[[Op], dict[str, Any]]) -> dict[str, Any]:
        """A phase of the analysis, computed or taken from an interrupted run; a dict of tensors and plain values."""
        before = self.phases.products
        self.meter.phase(name)(0, 1, float("nan"))
        result = self.phases.run(name, op, compute)
        self.meter.finish(name, self.phases.products - before)
        return result

    def generator(self, phase: str, index: int) -> torch.Generator:
        """An independent stream for every phase of every operator."""
        return stream(self.settings.seed, index, *phase.encode())


def budget(memory: float, size: int, wanted: int, steps: int = 0) -> tuple[int, float]:
    """How `memory` bytes are shared: (vectors in the Lanczos basis, bytes for kept primals).

    The basis takes what the pairs and a density of `steps` steps need, and up to half of the memory and 400 vectors.
    With it at its peak are the pairs copied out of it and a few vectors of work, float64 all. Raises ValueError where
    nine tenths of the memory do not suffice for the least basis.
    """
    vector, work = 8 * size, wanted + 4
    least = max(least_basis(wanted), steps)
    comfortable = max(least_basis(wanted) + 10, steps)
    half, most = (int(share * memory / vector) - work for share in (0.5, 0.9))
    if most < least:
        needed = vector * (least + work) / 0.9 / 2**30
        raise ValueError(
            f"{wanted} eigenpairs and {steps} steps of density for {size:,} parameters need {needed:.1f} GiB of "
            f"memory, {memory / 2**30:.1f} are allowed: ask for fewer, or allow more"
        )
    room = min(max(400, comfortable), max(half, min(most, comfortable)))
    return room, memory - vector * (room + work)
