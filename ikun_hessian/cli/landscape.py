"""The command `landscape`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.cli.click_options import options, own_options, screen_options, threads_option
from ikun_hessian.cli.inputs import checkpoint_files
from ikun_hessian.cli.screen import dumps, echo, echo_opening, show_result
from ikun_hessian.jobs.analyses.landscape import analyse_landscape, write_landscape, write_surfaces, write_together
from ikun_hessian.jobs.device import half_of_the_memory, pick
from ikun_hessian.jobs.existing_results import existing_result
from ikun_hessian.jobs.open import open_job
from ikun_hessian.jobs.options import OPENING, RESULTS
from ikun_hessian.jobs.results import result_stem, result_stems

if TYPE_CHECKING:
    from hessian_tools.results.landscape import LandscapeResult
    from ikun_hessian.jobs.job import Job


DIRECTIONS = "top1,top2,negative,gradient,random1,random2"
PLANES = ("random1,random2", "top1,negative")


@click.command("landscape")
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--directions",
    default=DIRECTIONS,
    show_default=True,
    metavar="NAME,NAME,...",
    help="topN: eigenvector N of the surrogate Hessian; negative: that of its most negative eigenvalue; gradient; "
    "randomN: a random direction, filter-normalized.",
)
@click.option("--points", default=41, show_default=True, help="Number of points on a line; odd, to include 0.")
@click.option(
    "--range",
    "reach",
    type=float,
    help="Largest distance from the checkpoint, relative to the weight norm [default: 0.5 along random directions, "
    "0.05 along the others, which are about ten times steeper].",
)
@click.option(
    "--plane",
    "planes",
    multiple=True,
    metavar="NAME,NAME",
    help=f"Two directions that span a plane. Repeatable [default: {' and '.join(PLANES)}, if --directions has them].",
)
@click.option("--plane-points", default=21, show_default=True, help="Number of points on each axis of a plane; odd.")
@click.option("--no-planes", is_flag=True, help="Compute lines only.")
@click.option("--surface", is_flag=True, help="Also draw the planes as surfaces in three dimensions.")
@click.option(
    "--trajectory",
    is_flag=True,
    help="Treat the checkpoints as snapshots of one run, and draw their path in the plane of their first two principal "
    "components, or of one --plane.",
)
@click.option("--accuracy", is_flag=True, help="Also measure the accuracy along the lines.")
@options(*OPENING)
@own_options
@options(*RESULTS)
@threads_option
@screen_options
def landscape_command(
    checkpoints: tuple[Path, ...],
    directions: str,
    points: int,
    reach: float | None,
    planes: tuple[str, ...],
    plane_points: int,
    no_planes: bool,
    surface: bool,
    trajectory: bool,
    accuracy: bool,
    device: str,
    memory: float | None,
    seed: int,
    out: Path | None,
    tag: str | None,
    force: bool,
    resume: bool,
    as_json: bool,
    captioned: bool,
    detail: str,
    **opening: Any,
) -> None:
    """Compute the loss along lines and planes through the weights of each checkpoint.

    The losses are those of the spiking network and of the relaxed one. The figure also shows the quadratic models of
    the Hessian and the GGN. The results are written next to the checkpoint, as NAME.landscape.json, .png and .pdf.
    A folder stands for all checkpoints in it.
    For several checkpoints, landscapes.png and .pdf show all of them on one scale. With --trajectory the checkpoints
    are snapshots of one run, and the result is NAME.trajectory.json, .png and .pdf of the last snapshot.
    """
    checkpoints = checkpoint_files(checkpoints)
    from hessian_tools.analysis.landscape import LandscapeSettings
    from hessian_tools.io.json import clean, load_result
    from hessian_tools.results.landscape import LANDSCAPE_SCHEMA, LandscapeResult
    from ikun_hessian.reports.landscape import landscape_lines
    from ikun_hessian.reports.summary import brief_line, landscape_summary

    where = pick(device)
    names = tuple(dict.fromkeys(name.strip() for name in directions.split(",") if name.strip()))
    if no_planes and planes:
        raise click.UsageError("--plane and --no-planes exclude each other: leave one out")
    if trajectory:
        _refuse_unused(planes)
        _trajectory(
            checkpoints,
            directions=_pair(planes[0]) if planes else ("pc1", "pc2"),
            points=plane_points,
            seed=seed,
            out=out,
            tag=tag,
            force=force,
            resume=resume,
            as_json=as_json,
            captioned=captioned,
            detail=detail,
            memory=memory or half_of_the_memory(where),
            device=where,
            **opening,
        )
        return
    if planes or no_planes:
        pairs = tuple(map(_pair, planes))
    else:
        pairs = tuple(pair for pair in map(_pair, PLANES) if set(pair) <= set(names))
    settings = LandscapeSettings(
        directions=names,
        planes=tuple(dict.fromkeys(pairs)),
        points=points,
        plane_points=plane_points,
        range=reach,
        accuracy=accuracy,
        seed=seed,
        memory=memory or half_of_the_memory(where),
    )
    stems = result_stems(checkpoints, out, tag, "landscape")
    found: list[LandscapeResult] = []
    locks = click.get_current_context().with_resource(ExitStack())
    for path, stem in zip(checkpoints, stems, strict=True):
        if detail != "quiet":
            echo_opening(path, opening["own"])
        job = open_job(path, memory=settings.memory, device=where, **opening)
        old = existing_result(
            stem, lambda path: load_result(path, LandscapeResult, LANDSCAPE_SCHEMA), settings, job, force, resume, locks
        )
        result = old or analyse_landscape(job, settings, stem, shown=detail != "quiet")
        found.append(result)
        ends = ["json", "png", "pdf"]
        if old is None:
            write_landscape(result, stem, captioned)
        if surface:
            write_surfaces([(path.stem, result)], Path(f"{stem}.surface"), captioned)
            ends += ["surface.png", "surface.pdf"]
        if not as_json:
            files = f"{stem}.{{{','.join(ends)}}}{' (unchanged)' if old else ''}"
            full = [*landscape_lines(result), f"files       {files}"]
            show_result(detail, len(found), brief_line(result), landscape_summary(result, files), full)
    if len(found) > 1:
        together = (out or checkpoints[0].parent) / ".".join(["landscapes", *([tag] if tag else [])])
        written = write_together(list(zip(_labels(checkpoints), found, strict=True)), together, surface, captioned)
        if not as_json and detail not in ("quiet", "brief"):
            echo(f"files       {together}.{{{','.join(written)}}}")
    if as_json:
        printed = [clean(dataclasses.asdict(result)) for result in found]
        echo(dumps(printed[0] if len(printed) == 1 else printed))


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest names that differ: stems, otherwise whole paths."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path.with_suffix("")) for path in paths]


def _refuse_unused(planes: Sequence[str]) -> None:
    """Raise UsageError if options were given that --trajectory has no use for."""
    context = click.get_current_context()
    for name in ("directions", "points", "reach", "no_planes", "surface", "accuracy"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = {"reach": "range"}.get(name, name.replace("_", "-"))
            raise click.UsageError(f"--{option} has no meaning with --trajectory: leave one of them out")
    if len(planes) > 1:
        raise click.UsageError("--trajectory draws one plane: give one --plane")


def _trajectory(
    checkpoints: Sequence[Path],
    *,
    directions: tuple[str, str],
    points: int,
    seed: int,
    out: Path | None,
    tag: str | None,
    force: bool,
    resume: bool,
    as_json: bool,
    captioned: bool,
    detail: str,
    memory: float,
    device: str,
    **opening: Any,
) -> None:
    """Compute and show the path of one training run."""
    from hessian_tools.analysis.training_path import TrainingPathSettings
    from hessian_tools.io.json import clean, load_result
    from hessian_tools.results.training_path import TRAINING_PATH_SCHEMA, TrainingPath
    from ikun_hessian.jobs.analyses.training_path import analyse_training_path, saved_snapshots, write_training_path
    from ikun_hessian.reports.training_path import training_path_lines

    settings = TrainingPathSettings(directions, points, seed=seed, memory=memory)

    def open_one(path: Path) -> Job:
        if detail != "quiet":
            echo_opening(path, opening["own"])
        return open_job(path, memory=memory, device=device, **opening)

    job, snapshots = saved_snapshots(checkpoints, open_one)
    settings = dataclasses.replace(settings, snapshots=tuple((s.name, s.sha256) for s in snapshots))
    stem = result_stem(job.path, out, tag, "trajectory")
    locks = click.get_current_context().with_resource(ExitStack())
    old = existing_result(
        stem, lambda path: load_result(path, TrainingPath, TRAINING_PATH_SCHEMA), settings, job, force, resume, locks
    )
    result = old or analyse_training_path(job, snapshots, settings, stem, shown=detail != "quiet")
    if old is None:
        write_training_path(result, stem, captioned)
    if as_json:
        echo(dumps(clean(dataclasses.asdict(result))))
        return
    lines = [*training_path_lines(result), f"files       {stem}.{{json,png,pdf}}{' (unchanged)' if old else ''}"]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in zip(result.directions, result.explained, strict=True))
    brief = f"{job.path}: {len(result.snapshots)} snapshots, {shares} of their variance, loss {result.loss:.4g}"
    show_result(detail, 1, brief, "\n".join(lines), lines)


def _pair(text: str) -> tuple[str, str]:
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2:
        raise click.UsageError(f"--plane '{text}' is not a pair of directions like random1,random2")
    return names[0], names[1]
