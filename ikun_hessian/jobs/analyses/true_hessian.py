"""Settings, computation and files of operator `true`: the Hessian of the smoothed loss itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.analyses.spectrum import LONG
from ikun_hessian.jobs.job import Job, resume_key
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from hessian_tools.analysis.true_hessian.settings import TrueHessianSettings
    from hessian_tools.operators.base import Operator
    from hessian_tools.results.true_hessian import TrueHessianResult
    from hessian_tools.runtime.distributed import Group

TRUE = "true"  # name of the operator


def true_hessian_settings(
    memory: float, operators: tuple[str, ...], draws: int | None, options: Mapping[str, Any]
) -> TrueHessianSettings:
    """Return the settings of operator `true` from the options of `spectrum`.

    Args:
        memory: Memory in GiB.
        operators: Names of the operators, `true` among them. The eigenvectors of the others are measured too.
        draws: Number of forward passes; None for the default.
        options: The other options, by parameter name.

    Raises:
        ValueError: If a setting has an invalid value.
    """
    from hessian_tools.analysis.true_hessian.settings import TrueHessianSettings

    chosen = {name: options[name] for name in ("noise", "top", "smallest", "seed")}
    others = tuple(name for name in dict.fromkeys(operators) if name != TRUE)
    draws = TrueHessianSettings.draws if draws is None else draws
    return TrueHessianSettings(**chosen, draws=draws, memory=memory, operators=others)


def analyse_true_hessian(
    job: Job, settings: TrueHessianSettings, stem: Path | None, group: Group | None = None, shown: bool = True
) -> TrueHessianResult:
    """Measure the Hessian of the smoothed loss of a checkpoint, or resume an interrupted analysis of it.

    Args:
        job: The opened checkpoint.
        settings: What to compute.
        stem: Path of the results without ending; the state of an interrupted run is STEM.resume. None: nothing can
            be resumed.
        group: Processes that share the work.
        shown: Whether to show a progress bar.
    """
    from hessian_tools.analysis.true_hessian.analysis import true_hessian
    from hessian_tools.resume import Phases

    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
    key = resume_key(job, settings, {"number of processes": group.size if group else 1})
    with Bar("", shown and (group is None or group.rank == 0)) as bar:
        return true_hessian(
            job.objective,
            settings,
            operators=_operators(job, settings),
            provenance=job.provenance,
            progress=bar.update,
            phases=Phases(Path(f"{stem}.resume") if stem else None, key, group),
        )


def _operators(job: Job, settings: TrueHessianSettings) -> dict[str, Operator]:
    """Return the other operators by name."""
    from hessian_tools.operators.curvature import OPERATORS
    from ikun.smoothed_operator import smoothed

    made: dict[str, Operator] = {}
    memory = settings.memory * 2**30 / (2 * len(settings.operators) or 1)
    for name in settings.operators:
        if name == "smoothed":
            made[name] = smoothed(job.objective, memory, scale=settings.noise, seed=settings.seed)
        elif name == "relaxed":
            made[name] = OPERATORS["hessian"](job.another(relaxed=True), memory)
        else:
            made[name] = OPERATORS[name](job.objective, memory)
    return made


def true_hessian_expectation(job: Job, settings: TrueHessianSettings) -> str:
    """Return a line that says how long the forward passes will take, or "" if it is less than a minute.

    Args:
        job: The opened checkpoint. In a group, every process must call this function.
        settings: What to compute.
    """
    from hessian_tools.analysis.true_hessian.sampling import make_sampler

    sampler = make_sampler(
        job.objective, settings.noise, group=settings.group
    )  # two passes, to load what is loaded once
    began = time.perf_counter()
    sampler.losses("", lambda k, b: [sampler.draw((), k, b)], 2, 1)
    each = (time.perf_counter() - began) / 2
    seconds = each * settings.draws
    if seconds < LONG:
        return ""
    minutes = max(1, round(seconds / 60))
    taken = f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min"
    return f"expected    about {taken} for operator true ({settings.draws:,} forward passes of {each:.2g} s)"


def write_true_hessian(result: TrueHessianResult, stem: Path, figures: bool = True) -> list[str]:
    """Write a result and its figure, remove the state of an interrupted run, and return the endings of the files."""
    from hessian_tools.io.json import save_result
    from hessian_tools.plots.style import save_figure
    from hessian_tools.plots.true_hessian import true_hessian_figure
    from hessian_tools.resume import Phases

    files = [Path(f"{stem}.json")]
    save_result(result, files[0])
    if figures:
        files += save_figure(true_hessian_figure(result), stem)
    Phases.remove(Path(f"{stem}.resume"))
    return [f.name.removeprefix(f"{stem.name}.") for f in files]
