"""Calibration of a checkpoint: which operators predict the curvature of the true spiking loss."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ikun_hessian.jobs.errors import in_options
from ikun_hessian.jobs.job import Job, resume_key
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from hessian_tools.analysis.calibration import CalibrationProgress, CalibrationSettings
    from hessian_tools.results.calibration import CalibrationResult
    from hessian_tools.resume import Phases


WIDTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)  # widths of the Gaussian surrogates, relative to the threshold


def calibration_of(
    job: Job, settings: CalibrationSettings, phases: Phases | None = None, progress: CalibrationProgress | None = None
) -> CalibrationResult:
    """Calibrate every operator on an opened checkpoint.

    This includes the Hessian with the reversed tie rule, and those with Gaussian surrogates of all WIDTHS.

    Args:
        job: The opened checkpoint.
        settings: Scales and number of noise samples.
        phases: Where to store finished phases, to resume an interrupted run.
        progress: Called with the progress.
    """
    from hessian_tools.analysis.calibration import calibrate
    from hessian_tools.io.json import clean
    from hessian_tools.io.versions import versions
    from hessian_tools.perturbation import accuracy, outputs_at
    from hessian_tools.results import calibration
    from ikun.smoothed_operator import smoothed

    began = time.perf_counter()
    objective, threshold = job.objective, job.threshold
    variants = {name: job.another(**changes) for name, changes in job.variants.items() if "ties" in changes}
    family = {}
    if threshold is not None:
        family = {f"gaussian:{w:g}": job.another(surrogate=f"gaussian:{w * threshold:g}") for w in WIDTHS}
    found = calibrate(
        objective, settings, variants=variants, family=family, smoothed=smoothed, phases=phases, progress=progress
    )
    weights = objective.weights()
    (outputs,) = outputs_at(objective, lambda _: weights, [0])
    return calibration.CalibrationResult(
        schema=calibration.CALIBRATION_SCHEMA,
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


def analyse_calibration(
    job: Job, settings: CalibrationSettings, stem: Path, captioned: bool = True
) -> tuple[CalibrationResult | None, str]:
    """Calibrate a checkpoint, and write the result and its figure. Return the result, or None and the reason."""
    from hessian_tools.io.json import save_result
    from hessian_tools.plots.calibration import calibration_figure
    from hessian_tools.plots.style import save_figure
    from hessian_tools.resume import Phases, ResumeError

    stem.parent.mkdir(parents=True, exist_ok=True)
    state = Path(f"{stem}.resume")
    try:
        with Bar("calibration") as bar:
            result = calibration_of(job, settings, Phases(state, resume_key(job, settings)), bar.update)
    except ResumeError:
        raise
    except ValueError as error:  # this network cannot be calibrated, but its flatness can be measured
        Phases.remove(state)
        return None, in_options(error)
    save_figure(calibration_figure(result, captioned), stem)
    save_result(result, Path(f"{stem}.json"))
    Phases.remove(state)
    return result, ""


def own_calibration(stem: Path, job: Job) -> CalibrationResult | None:
    """Return the stored calibration of this checkpoint with this surrogate, or None."""
    from hessian_tools.io.json import ResultError, load_result
    from hessian_tools.results.calibration import CALIBRATION_SCHEMA, CalibrationResult

    try:
        found = load_result(Path(f"{stem}.json"), CalibrationResult, CALIBRATION_SCHEMA)
    except ResultError:
        return None
    same = found.checkpoint.get("sha256") == job.provenance["checkpoint"]["sha256"]
    same &= found.network == job.provenance["network"] and list(found.weight_norms) == list(job.objective.parameters)
    return found if same else None
