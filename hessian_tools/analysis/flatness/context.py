"""Compute one flatness metric as a phase of the analysis, with its cost."""

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
    """State that all parts of one flatness analysis share.

    Attributes:
        objective: The loss, its data and its weights.
        settings: Settings of the analysis.
        run: Progress and stored phases.
    """

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
        """Compute one metric in a phase of its own.

        A ValueError or FloatingPointError of `compute` becomes the note of the metric.

        Args:
            name: Name of the metric.
            compute: Function of the operator that returns the metric.
            valid: Which loss the metric describes.
            meaning: Formula, with the radius or noise scale.
            op: Operator for `compute`, if it needs one.

        Returns:
            The metric, with the products that it took.
        """

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
        """Return a progress callback (steps done, steps in total) for a phase."""
        step = self.run.meter.phase(name)
        return lambda done, most: step(done, most, NAN)
