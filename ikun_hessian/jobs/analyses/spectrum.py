"""Settings, computation and files of a spectrum analysis."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Job, resume_key
from ikun_hessian.jobs.options import OPENING_PARAMETERS
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from hessian_tools.analysis.settings import SpectrumSettings
    from hessian_tools.results.spectrum import SpectrumResult
    from hessian_tools.runtime.distributed import Group

LONG = 60.0  # seconds from which an analysis says beforehand what it will take


def spectrum_settings(
    memory: float,
    operators: tuple[str, ...],
    curve: str | None,
    time: str | None = None,
    draws: int | None = None,
    **options: Any,
) -> tuple[SpectrumSettings, dict[str, Any]]:
    """Split the options of `spectrum` into settings of the analysis and arguments of `open_job`.

    Args:
        memory: Memory in GiB.
        operators: Names of the operators; empty for the default.
        curve: Growing sample counts, for example "1,16,64"; None for no curve.
        time: Time that an analysis may take, for example "90s", "5m" or "1.5h"; None for no limit.
        draws: Number of weight perturbations; None for the default.
        options: The other options, by parameter name.

    Returns:
        The settings, and the arguments of `open_job` that the results depend on.

    Raises:
        UsageError: If `curve` is not such a list, or `time` not such a time.
        ValueError: If a setting has an invalid value.
    """
    from hessian_tools.analysis.settings import SpectrumSettings

    opening = {name: options.pop(name) for name in OPENING_PARAMETERS}
    settings = SpectrumSettings(
        **options,
        operators=tuple(dict.fromkeys(operators)) or SpectrumSettings.operators,
        samples_curve=_counts(curve),
        memory=memory,
        time=None if time is None else _seconds(time),
        draws=SpectrumSettings.draws if draws is None else draws,
    )
    return settings, opening


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "min": 60, "h": 3600}
    number = text.strip().rstrip("smhin ")
    unit = text.strip()[len(number) :].strip()
    try:
        found = float(number) * units[unit or "s"]
    except (ValueError, KeyError):
        found = math.nan
    if not 0 < found < math.inf:
        raise UsageError(f"--time '{text}' is not a time like 90s, 5m or 1.5h")
    return found


def _counts(text: str | None) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        counts = (0,)
    if any(n < 1 for n in counts) or list(counts) != sorted(set(counts)):
        raise UsageError(f"--samples-curve '{text}' is not a growing list of sample counts like 1,16,64,256")
    return counts


def analyse_spectrum(
    job: Job, settings: SpectrumSettings, stem: Path | None, group: Group | None = None, shown: bool = True
) -> SpectrumResult:
    """Analyse a checkpoint, or resume an interrupted analysis of it.

    Args:
        job: The opened checkpoint.
        settings: What to compute.
        stem: Path of the results without ending; the state of an interrupted run is STEM.resume. None: nothing can
            be resumed.
        group: Processes that share the work.
        shown: Whether to show a progress bar.
    """
    from hessian_tools.analysis.spectrum import spectrum
    from hessian_tools.resume import Phases
    from ikun.smoothed_operator import smoothed

    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
    key = resume_key(job, settings, {"number of processes": group.size if group else 1})
    with Bar("", shown and (group is None or group.rank == 0)) as bar:
        return spectrum(
            job.objective,
            settings,
            variants={name: job.another(**changes) for name, changes in job.variants.items()},
            smoothed=smoothed,
            relaxed=job.another(relaxed=True) if "relaxed" in settings.operators else None,
            over_time=job.another(over_time=True) if settings.per_step else None,
            provenance=job.provenance,
            progress=bar.update,
            phases=Phases(Path(f"{stem}.resume") if stem else None, key, group),
        )


def expectation(job: Job, settings: SpectrumSettings) -> str:
    """Return a line that says how long an analysis will take, or "" if it is less than a minute.

    Args:
        job: The opened checkpoint. In a group, every process must call this function.
        settings: What to compute.
    """
    from hessian_tools.analysis.planning.estimate import estimate_time
    from hessian_tools.analysis.spectrum import planned_products

    found = estimate_time(job.objective, settings, planned_products(settings, job.variants, job.objective.size))
    if found.seconds < LONG:
        return ""
    minutes = max(1, round(found.seconds / 60))
    taken = f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min"
    return (
        f"expected    about {taken} in all, {found.memory / 2**30:.1f} GiB of memory ({found.products:,} products of "
        f"{found.product_seconds:.2g} s)"
    )


def write_spectrum(result: SpectrumResult, stem: Path, figures: bool = True, captioned: bool = True) -> list[str]:
    """Write arrays and figures, remove the state of an interrupted run, and return the endings of the written files."""
    from hessian_tools.io.files import write_table
    from hessian_tools.plots.spectrum import layers_figure, samples_figure, spectrum_figure
    from hessian_tools.plots.style import save_figure
    from hessian_tools.results.spectrum import save_spectrum
    from hessian_tools.results.spectrum_rows import layer_rows, step_rows
    from hessian_tools.resume import Phases

    files = save_spectrum(result, stem)
    for name, rows in (("layers", layer_rows(result)), ("steps", step_rows(result))):
        if rows:
            files.append(Path(f"{stem}.{name}.csv"))
            write_table(rows, files[-1])
    if figures:
        files += save_figure(spectrum_figure(result, captioned), stem)
    if figures and result.blocks:
        files += save_figure(layers_figure(result, captioned), f"{stem}.layers")
    if figures and result.samples_curve:
        files += save_figure(samples_figure(result, captioned), f"{stem}.samples")
    Phases.remove(Path(f"{stem}.resume"))
    return [f.name.removeprefix(f"{stem.name}.") for f in files]
