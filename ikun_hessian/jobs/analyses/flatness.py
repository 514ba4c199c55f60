"""Settings and computation of a flatness analysis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Job, resume_key
from ikun_hessian.jobs.options import OPENING_PARAMETERS
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from hessian_tools.analysis.flatness.settings import FlatnessSettings
    from hessian_tools.results.flatness import FlatnessResult


def flatness_settings(
    memory: float, *, operators: tuple[str, ...], noise: tuple[float, ...], calibrate: bool = False, **options: Any
) -> tuple[FlatnessSettings, dict[str, Any]]:
    """Split the options of `flatness` into settings of the analysis and arguments of `open_job`.

    Args:
        memory: Memory in GiB.
        operators: ("smoothed",) to measure the noise-matched operator too.
        noise: Scales of the weight noise; empty for the default.
        calibrate: Whether the checkpoint will be calibrated too, with the same noise.
        options: The other options, by parameter name.

    Returns:
        The settings, and the arguments of `open_job` that the results depend on.

    Raises:
        UsageError: If `noise` is given without a use.
        ValueError: If a setting has an invalid value.
    """
    from hessian_tools.analysis.flatness.settings import FlatnessSettings

    if noise and not (operators or calibrate):
        raise UsageError("--noise needs --operator smoothed or --calibrate, whose scale it is")
    opening = {name: options.pop(name) for name in OPENING_PARAMETERS}
    smoothed = (tuple(dict.fromkeys(noise)) or (0.1,)) if operators else ()
    return FlatnessSettings(**options, smoothed=smoothed, memory=memory), opening


def analyse_flatness(job: Job, settings: FlatnessSettings, stem: Path | None, shown: bool = True) -> FlatnessResult:
    """Analyse a checkpoint, or resume an interrupted analysis of it, and write the result to STEM.json.

    Without a stem, nothing is written and nothing can be resumed.
    """
    from hessian_tools.analysis.flatness.flatness import flatness
    from hessian_tools.io.json import save_result
    from hessian_tools.resume import Phases
    from ikun.smoothed_operator import smoothed

    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
    state = Path(f"{stem}.resume") if stem else None
    with Bar(shown=shown) as bar:
        result = flatness(
            job.objective,
            settings,
            smoothed=smoothed,
            provenance=job.provenance,
            progress=bar.update,
            phases=Phases(state, resume_key(job, settings)),
        )
    if state is not None:
        save_result(result, Path(f"{stem}.json"))
        Phases.remove(state)
    return result
