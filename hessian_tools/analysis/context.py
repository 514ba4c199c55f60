"""Settings, progress and stored phases that all parts of an analysis share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.progress import Meter
from hessian_tools.resume import Phases
from hessian_tools.seeding import stream

if TYPE_CHECKING:
    from hessian_tools.operators.curvature import CurvatureOperator

SYMMETRY_LIMIT = {torch.float32: 1e-4, torch.float64: 1e-10}
Op = TypeVar("Op", bound=Operator)
Factory = Callable[[Objective, float], "CurvatureOperator"]  # (objective, bytes for stored primals)


class SmoothedFactory(Protocol):
    """Function that makes the operator `smoothed` of an objective."""

    def __call__(self, objective: Objective, memory: float, *, scale: float, seed: int) -> CurvatureOperator:
        """Make the operator.

        Args:
            objective: The loss, its data and its weights.
            memory: Bytes for stored primals.
            scale: Scale of the weight noise, relative to each filter's root mean square.
            seed: Seed of the noise.
        """


class AnalysisError(RuntimeError):
    """The computation failed: an operator is not symmetric, or a number is not finite."""


def require_symmetry(name: str, error: float, dtype: torch.dtype) -> None:
    """Raise AnalysisError if the symmetry error of an operator is more than round-off.

    Args:
        name: Name of the operator.
        error: Its symmetry error (see `hessian_tools.operators.base.symmetry_error`).
        dtype: Data type of its products.
    """
    if not error <= SYMMETRY_LIMIT.get(dtype, 1e-4):
        raise AnalysisError(
            f"the {name} operator is not symmetric (|u'Hv - v'Hu| / ||Hu|| = {error:.1e}), so it cannot be a Hessian. "
            "Likely causes: state carried over between forward passes, a random layer, or a surrogate without a "
            "second derivative."
        )


@dataclass(frozen=True)
class AnalysisContext:
    """State that all parts of one analysis share.

    Attributes:
        settings: Settings of the analysis.
        phases: Storage of finished phases and products.
        meter: Progress display.
        smoothed: Function that makes the operator `smoothed`, if there is one.
    """

    settings: SpectrumSettings
    phases: Phases
    meter: Meter
    smoothed: SmoothedFactory | None = None

    def phase(self, name: str, op: Op, compute: Callable[[Op], dict[str, Any]]) -> dict[str, Any]:
        """Run one phase, or load its result from an interrupted run.

        Args:
            name: Name of the phase.
            op: Operator that the phase uses.
            compute: Function of the operator that returns a dict of tensors and plain values.

        Returns:
            The result of `compute`.
        """
        before = self.phases.products
        self.meter.phase(name)(0, 1, float("nan"))
        result = self.phases.run(name, op, compute)
        self.meter.finish(name, self.phases.products - before)
        return result

    def generator(self, phase: str, index: int) -> torch.Generator:
        """Return an independent random stream for each phase and each operator (by its index)."""
        return stream(self.settings.seed, index, *phase.encode())
