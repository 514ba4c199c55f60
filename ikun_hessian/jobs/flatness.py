"""One flatness analysis: settings and computation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import OPENING, Job, measured_on
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from hessian_tools.analysis.calibration import CalibrationSettings
    from hessian_tools.analysis.flatness.settings import FlatnessSettings
    from hessian_tools.results.flatness import FlatnessResult


def flatness_settings(
    memory: float, *, operators: tuple[str, ...], noise: tuple[float, ...], calibrate: bool = False, **options: Any
) -> tuple[FlatnessSettings, dict[str, Any]]:
    """What to measure and how to open a checkpoint for it, from the options of `flatness`. memory: GiB."""
    from hessian_tools.analysis.flatness.settings import FlatnessSettings

    if noise and not (operators or calibrate):
        raise UsageError("--noise is the scale of --operator smoothed or of --calibrate: give one of them")
    opening = {name: options.pop(name) for name in OPENING}
    smoothed = (tuple(dict.fromkeys(noise)) or (0.1,)) if operators else ()
    return FlatnessSettings(**options, smoothed=smoothed, memory=memory), opening


def resume_key(job: Job, settings: FlatnessSettings | CalibrationSettings) -> dict[str, Any]:
    """What the numbers of an interrupted run depend on."""
    from hessian_tools.io.json import clean
    from hessian_tools.io.versions import versions

    key = {"settings": dataclasses.asdict(settings), **job.provenance, **measured_on(job.objective)}
    cleaned: dict[str, Any] = clean({**key, "versions": versions()})
    return cleaned


def analyse_flatness(job: Job, settings: FlatnessSettings, stem: Path, shown: bool = True) -> FlatnessResult:
    """The result of one checkpoint, computed from the start or from where an interrupted run stopped, and written."""
    from hessian_tools.analysis.flatness.flatness import flatness
    from hessian_tools.io.json import save_result
    from hessian_tools.resume import Phases
    from ikun.smoothed_operator import smoothed

    stem.parent.mkdir(parents=True, exist_ok=True)
    state = Path(f"{stem}.resume")
    with Bar(shown=shown) as bar:
        result = flatness(
            job.objective,
            settings,
            smoothed=smoothed,
            provenance=job.provenance,
            progress=bar.update,
            phases=Phases(state, resume_key(job, settings)),
        )
    save_result(result, Path(f"{stem}.json"))
    Phases.remove(state)
    return result
