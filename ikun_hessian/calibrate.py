"""The calibration of a checkpoint: which operators predict the curvature of its true spiking loss."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from ikun_hessian.opening import Job

if TYPE_CHECKING:
    from hessian_tools.calibration import CalibrationResult, CalibrationSettings, Progress
    from hessian_tools.phases import Phases

WIDTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)  # of the common Gaussian surrogate, in thresholds


def calibration_of(
    job: Job, settings: CalibrationSettings, phases: Phases | None = None, progress: Progress | None = None
) -> CalibrationResult:
    """Calibrate every operator on an opened checkpoint; tie rule reversed and a common surrogate of WIDTHS with it."""
    from hessian_tools import calibration
    from hessian_tools.forward import accuracy, outputs_at
    from hessian_tools.results import clean
    from hessian_tools.settings import versions

    began = time.perf_counter()
    objective, threshold = job.objective, job.threshold
    variants = {name: job.another(**changes) for name, changes in job.variants.items() if "ties" in changes}
    family = {}
    if threshold is not None:
        family = {f"gaussian:{w:g}": job.another(surrogate=f"gaussian:{w * threshold:g}") for w in WIDTHS}
    found = calibration.calibrate(
        objective, settings, variants=variants, family=family, phases=phases, progress=progress
    )
    weights = objective.weights()
    (outputs,) = outputs_at(objective, lambda _: weights, [0])
    return calibration.CalibrationResult(
        schema=calibration.SCHEMA,
        checkpoint=job.provenance["checkpoint"],
        data={**job.provenance["data"], "samples": objective.samples},
        network=job.provenance["network"],
        training=job.provenance["training"],
        settings=clean(dataclasses.asdict(settings)),
        num_parameters=objective.size,
        weight_norms={name: float(p.detach().double().norm()) for name, p in objective.parameters.items()},
        loss=objective.value_and_gradient()[0],
        accuracy=accuracy(objective, outputs),
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        seed=settings.seed,
        seconds=time.perf_counter() - began + (phases.seconds if phases else 0.0),
        versions=versions(),
        calibration=found,
    )
