"""The command `flatness`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.earlier import earlier
from ikun_hessian.opening import Job, measured_on, open_job
from ikun_hessian.options import (
    OPENING,
    Own,
    half_of_the_memory,
    json_option,
    opening_options,
    out_option,
    own_options,
    pick,
    result_stem,
    tag_option,
)
from ikun_hessian.screen import Bar, dumps

if TYPE_CHECKING:
    from hessian_tools.calibration import CalibrationResult, CalibrationSettings
    from hessian_tools.flatness import FlatnessResult, FlatnessSettings


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--operator",
    "operators",
    multiple=True,
    type=click.Choice(["smoothed"]),
    help="The noise-matched operator too, first of all; ggn and hessian always are measured.",
)
@click.option(
    "--noise",
    type=float,
    multiple=True,
    help="Scale of the weight noise of --operator smoothed and of --calibrate, over each filter's rms; may be given "
    "several times [default: 0.1; to calibrate 0.05, 0.1, 0.2, 0.4].",
)
@click.option("--radius", default=0.1, show_default=True, help="Of average sharpness, over the weights' size.")
@click.option(
    "--rho", default=0.01, show_default=True, help="Of SAM, m-sharpness and worst case, over the weights' size."
)
@click.option("--draws", default=32, show_default=True, help="Of noise, in antithetic pairs.")
@click.option("--damping", type=float, help="z of effective dimension and log det [default: 1% of lambda_max].")
@click.option("--calibrate", is_flag=True, help="Measure too which operator predicts this network's true loss.")
@opening_options
@own_options
@click.option("--seed", default=0, show_default=True)
@out_option
@tag_option
@click.option("--force", is_flag=True, help="Overwrite a result of other settings, or an interrupted analysis.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted analysis; finished checkpoints are kept.")
@json_option
def flatness(
    checkpoints: tuple[Path, ...],
    noise: tuple[float, ...],
    draws: int,
    calibrate: bool,
    device: str,
    memory: float | None,
    seed: int,
    data_dir: Path | None,
    out: Path | None,
    tag: str | None,
    force: bool,
    resume: bool,
    as_json: bool,
    own: Own,
    **options: Any,
) -> None:
    """How flat the loss is at each checkpoint, by the field's metrics, with errors, cost and validity.

    Leaves NAME.flatness.json beside the checkpoint; --calibrate leaves NAME.calibration.json, .png and .pdf too. All
    checkpoints meet the same noise; several are compared at the end.
    """
    from hessian_tools.calibration import SCHEMA as CALIBRATION
    from hessian_tools.calibration import CalibrationResult, CalibrationSettings
    from hessian_tools.flatness import SCHEMA, FlatnessResult
    from hessian_tools.flatness_report import calibration_lines, comparison_lines, flatness_lines
    from hessian_tools.results import clean, load

    where = pick(device)
    memory = memory or half_of_the_memory(where)
    settings, opening = settings_of(memory, calibrate=calibrate, noise=noise, draws=draws, seed=seed, **options)
    scales = tuple(dict.fromkeys(noise)) or CalibrationSettings.scales
    calibrating = CalibrationSettings(scales=scales, draws=draws, seed=seed, memory=memory)
    stems = [result_stem(path, out, tag, "flatness") for path in checkpoints]
    if len(set(stems)) < len(stems):
        raise click.UsageError("two checkpoints would write the same result: give them other names, or one --out each")
    found: list[FlatnessResult] = []
    for path, stem in zip(checkpoints, stems, strict=True):
        click.echo(f"opening {path}", err=True)
        job = open_job(path, own=own, **opening, memory=memory, data_dir=data_dir, device=where)
        beside = result_stem(path, out, tag, "calibration")
        old = earlier(stem, lambda path: load(path, FlatnessResult, SCHEMA), settings, job, force, resume)
        known: CalibrationResult | None = None
        refusal = ""
        if calibrate:
            known = earlier(
                beside, lambda path: load(path, CalibrationResult, CALIBRATION), calibrating, job, force, resume
            )
            if known is None:
                known, refusal = _calibrate(job, calibrating, beside)
        result = old or analyse(job, settings, stem)
        found.append(result)
        if as_json:
            if refusal:
                click.echo(f"not calibrated: {refusal}", err=True)
            continue
        if len(found) > 1:
            click.echo("-" * 80)
        click.echo("\n".join(flatness_lines(result, known or own_calibration(beside, job))))
        click.echo(f"files       {stem}.json{' (as it was)' if old else ''}")
        if calibrate:
            shown = calibration_lines(known) if known else [f"not calibrated: {refusal}"]
            click.echo("\n".join(["", *shown]))
        if known:
            click.echo(f"files       {beside}.{{json,png,pdf}}")
    if as_json:
        printed = [clean(dataclasses.asdict(result)) for result in found]
        click.echo(dumps(printed[0] if len(printed) == 1 else printed))
    elif len(found) > 1:
        click.echo("\n".join(["-" * 80, *comparison_lines(found)]))


def settings_of(
    memory: float, *, operators: tuple[str, ...], noise: tuple[float, ...], calibrate: bool = False, **options: Any
) -> tuple[FlatnessSettings, dict[str, Any]]:
    """What to measure and how to open a checkpoint for it, from the options of `flatness`. memory: GiB."""
    from hessian_tools.flatness import FlatnessSettings

    if noise and not (operators or calibrate):
        raise click.UsageError("--noise is the scale of --operator smoothed or of --calibrate: give one of them")
    opening = {name: options.pop(name) for name in OPENING}
    smoothed = (tuple(dict.fromkeys(noise)) or (0.1,)) if operators else ()
    return FlatnessSettings(**options, smoothed=smoothed, memory=memory), opening


def _key(job: Job, settings: FlatnessSettings | CalibrationSettings) -> dict[str, Any]:
    """What the numbers of an interrupted run depend on."""
    from hessian_tools.results import clean
    from hessian_tools.settings import versions

    key = {"settings": dataclasses.asdict(settings), **job.provenance, **measured_on(job.objective)}
    cleaned: dict[str, Any] = clean({**key, "versions": versions()})
    return cleaned


def analyse(job: Job, settings: FlatnessSettings, stem: Path, shown: bool = True) -> FlatnessResult:
    """The result of one checkpoint, computed from the start or from where an interrupted run stopped, and written."""
    from hessian_tools.flatness import flatness as analyse
    from hessian_tools.phases import Phases
    from hessian_tools.results import save

    stem.parent.mkdir(parents=True, exist_ok=True)
    state = Path(f"{stem}.resume")
    with Bar(shown=shown) as bar:
        result = analyse(
            job.objective,
            settings,
            provenance=job.provenance,
            progress=bar.update,
            phases=Phases(state, _key(job, settings)),
        )
    save(result, Path(f"{stem}.json"))
    Phases.remove(state)
    return result


def _calibrate(job: Job, settings: CalibrationSettings, stem: Path) -> tuple[CalibrationResult | None, str]:
    """The calibration of one checkpoint, written with its figure; or none and why."""
    from hessian_tools.calibration_figure import calibration_figure
    from hessian_tools.figures import save_figure
    from hessian_tools.phases import Phases, ResumeError
    from hessian_tools.results import save
    from ikun_hessian.calibrate import calibration_of

    stem.parent.mkdir(parents=True, exist_ok=True)
    state = Path(f"{stem}.resume")
    try:
        with Bar("calibration") as bar:
            result = calibration_of(job, settings, Phases(state, _key(job, settings)), bar.update)
    except ResumeError:
        raise
    except ValueError as error:  # a network that nothing can be measured of; the loss at other weights still can
        Phases.remove(state)
        return None, str(error)
    save_figure(calibration_figure(result), stem)
    save(result, Path(f"{stem}.json"))
    Phases.remove(state)
    return result, ""


def own_calibration(stem: Path, job: Job) -> CalibrationResult | None:
    """The calibration of this very checkpoint, analysed with this surrogate, if there is one."""
    from hessian_tools.calibration import SCHEMA, CalibrationResult
    from hessian_tools.results import ResultError, load

    try:
        found = load(Path(f"{stem}.json"), CalibrationResult, SCHEMA)
    except ResultError:
        return None
    same = found.checkpoint.get("sha256") == job.provenance["checkpoint"]["sha256"]
    same &= found.network == job.provenance["network"] and list(found.weight_norms) == list(job.objective.parameters)
    return found if same else None
