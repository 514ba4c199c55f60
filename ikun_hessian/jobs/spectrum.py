"""One spectrum analysis: settings, computation, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import OPENING, Job, measured_on
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from hessian_tools.analysis.settings import SpectrumSettings
    from hessian_tools.results.spectrum import SpectrumResult
    from hessian_tools.runtime.distributed import Group


def spectrum_settings(
    memory: float, operators: tuple[str, ...], curve: str | None, **options: Any
) -> tuple[SpectrumSettings, dict[str, Any]]:
    """What to compute and how to open a checkpoint for it, from the options of `spectrum`. memory: GiB."""
    from hessian_tools.analysis.settings import SpectrumSettings

    opening = {name: options.pop(name) for name in OPENING}
    settings = SpectrumSettings(
        **options,
        operators=tuple(dict.fromkeys(operators)) or SpectrumSettings.operators,
        samples_curve=_counts(curve),
        memory=memory,
    )
    return settings, opening


def _counts(text: str | None) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        counts = (0,)
    if any(n < 1 for n in counts) or list(counts) != sorted(set(counts)):
        raise UsageError(f"--samples-curve '{text}' is no growing list of sample counts like 1,16,64,256")
    return counts


def analyse_spectrum(
    job: Job, settings: SpectrumSettings, stem: Path, group: Group | None = None, shown: bool = True
) -> SpectrumResult:
    """The result of one checkpoint, computed from the start or from where an interrupted run stopped."""
    from hessian_tools.analysis.spectrum import spectrum
    from hessian_tools.io.json import clean
    from hessian_tools.io.versions import versions
    from hessian_tools.resume import Phases
    from ikun.smoothed_operator import smoothed

    stem.parent.mkdir(parents=True, exist_ok=True)
    key = {
        "settings": dataclasses.asdict(settings),
        **job.provenance,
        **measured_on(job.objective),
        "versions": versions(),
    }
    key["number of processes"] = group.size if group else 1
    with Bar("", shown and (group is None or group.rank == 0)) as bar:
        return spectrum(
            job.objective,
            settings,
            variants={name: job.another(**changes) for name, changes in job.variants.items()},
            smoothed=smoothed,
            relaxed=job.another(relaxed=True) if "relaxed" in settings.operators else None,
            provenance=job.provenance,
            progress=bar.update,
            phases=Phases(Path(f"{stem}.resume"), clean(key), group),
        )


def write_spectrum(result: SpectrumResult, stem: Path, figures: bool = True) -> list[str]:
    """Arrays, figures, and away with the interrupted state; returns the endings of what was written."""
    from hessian_tools.plots.spectrum import layers_figure, samples_figure, spectrum_figure
    from hessian_tools.plots.style import save_figure
    from hessian_tools.results.spectrum import save_spectrum
    from hessian_tools.resume import Phases

    files = save_spectrum(result, stem)
    if figures:
        files += save_figure(spectrum_figure(result), stem)
    if figures and result.blocks:
        files += save_figure(layers_figure(result), f"{stem}.layers")
    if figures and result.samples_curve:
        files += save_figure(samples_figure(result), f"{stem}.samples")
    Phases.remove(Path(f"{stem}.resume"))
    return [f.name.removeprefix(f"{stem.name}.") for f in files]
