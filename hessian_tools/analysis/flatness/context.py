"""One flatness metric: its value, its errors, its cost, and what it may be said of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hessian_tools.analysis.context import AnalysisContext
from hessian_tools.analysis.flatness.settings import FlatnessSettings
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Composed, Operator
from hessian_tools.results.flatness import NAN, Metric


@dataclass(frozen=True)
class Work:
    """What every part of one analysis needs."""

    objective: Objective
    settings: FlatnessSettings
    run: AnalysisContext

    def measure(
        self,
        name: str,
        compute: Callable[[Operator], Metric],
        valid: str,
        meaning: str = "",
        op: Operator | None = None,
    ) -> Metric:
        """A phase that computes one metric, by products with `op` if there is one; what it refuses becomes its note."""

        def safely(op: Operator) -> dict[str, Any]:
            before = op.products
            try:
                metric = compute(op)
            except (ValueError, FloatingPointError) as error:
                metric = Metric(note=str(error))
            return vars(dataclasses.replace(metric, products=op.products - before, valid=valid, meaning=meaning))

        self.report(name)(0, 1)
        idle = Composed(1, torch.float64, torch.device("cpu"), lambda v: v)
        found = Metric(**self.run.phases.run(name, op or idle, safely))
        self.run.meter.finish(name, found.products + found.gradients + found.forwards)
        return found

    def report(self, name: str) -> Callable[[int, int], None]:
        step = self.run.meter.phase(name)
        return lambda done, most: step(done, most, NAN)
