"""Computation and files of a landscape analysis."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ikun_hessian.jobs.errors import in_options
from ikun_hessian.jobs.job import Job, measured_on
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from hessian_tools.analysis.landscape import LandscapeSettings
    from hessian_tools.objective import Objective
    from hessian_tools.results.landscape import LandscapeResult


def relaxed_objective(job: Job) -> tuple[Objective | None, dict[str, str]]:
    """Return the objective of the relaxed network, or None and the reason."""
    import torch

    try:
        objective = job.another(relaxed=True)
        with torch.no_grad():
            objective.outputs(objective.first_inputs(1))
    except ValueError as error:  # no primitive of the surrogate, or a network of another library
        return None, {"relaxed network": in_options(error)}
    return objective, {}


def analyse_landscape(job: Job, settings: LandscapeSettings, stem: Path | None, shown: bool = True) -> LandscapeResult:
    """Analyse a checkpoint, or resume an interrupted analysis of it. Without a stem, nothing can be resumed."""
    from hessian_tools.analysis.landscape import landscape as analyse
    from hessian_tools.io.json import clean
    from hessian_tools.io.versions import versions
    from hessian_tools.resume import Phases

    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
    provenance = {name: job.provenance[name] for name in ("checkpoint", "data", "network", "training")}
    key = {
        "settings": dataclasses.asdict(settings),
        **provenance,
        **measured_on(job.objective),
        "versions": versions(),
    }
    relaxed, refused = relaxed_objective(job)
    with Bar(shown=shown) as bar:
        return analyse(
            job.objective,
            settings,
            relaxed=relaxed,
            refused=refused,
            provenance=provenance,
            progress=bar.update,
            phases=Phases(Path(f"{stem}.resume") if stem else None, clean(key)),
        )


def write_landscape(result: LandscapeResult, stem: Path, captioned: bool = True) -> None:
    """Write the figure and the result, and remove the state of an interrupted run."""
    from hessian_tools.io.json import save_result
    from hessian_tools.plots.landscape import landscape_figure
    from hessian_tools.plots.style import save_figure
    from hessian_tools.resume import Phases

    save_figure(landscape_figure(result, captioned), stem)
    save_result(result, Path(f"{stem}.json"))
    Phases.remove(Path(f"{stem}.resume"))


def write_surfaces(found: Sequence[tuple[str, LandscapeResult]], stem: Path, captioned: bool = True) -> None:
    """Write the planes of one or several landscapes as surfaces in three dimensions."""
    from hessian_tools.plots.landscapes import surfaces_figure
    from hessian_tools.plots.style import save_figure

    save_figure(surfaces_figure(found, captioned), stem)


def write_together(
    found: Sequence[tuple[str, LandscapeResult]], stem: Path, surfaces: bool, captioned: bool = True
) -> list[str]:
    """Write the figures of several landscapes on one scale, and return the endings of the written files.

    Args:
        found: Labels and results.
        stem: Path of the figures without ending.
        surfaces: Whether to draw the planes as surfaces in three dimensions too.
        captioned: Whether the figures have captions.
    """
    from hessian_tools.plots.landscapes import landscapes_figure
    from hessian_tools.plots.style import save_figure

    save_figure(landscapes_figure(found, captioned), stem)
    if not surfaces:
        return ["png", "pdf"]
    write_surfaces(found, Path(f"{stem}.surface"), captioned)
    return ["png", "pdf", "surface.png", "surface.pdf"]
