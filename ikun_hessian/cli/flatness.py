"""The command `flatness`."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.cli.options import json_option, opening_options, out_option, own_options, tag_option
from ikun_hessian.cli.screen import dumps
from ikun_hessian.jobs.calibration import analyse_calibration, own_calibration
from ikun_hessian.jobs.device import half_of_the_memory, pick
from ikun_hessian.jobs.existing_results import existing_result
from ikun_hessian.jobs.flatness import analyse_flatness, flatness_settings
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.open import open_job
from ikun_hessian.jobs.results import result_stem

if TYPE_CHECKING:
    from hessian_tools.results.calibration import CalibrationResult
    from hessian_tools.results.flatness import FlatnessResult


@click.command("flatness")
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
def flatness_command(
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
    from hessian_tools.analysis.calibration import CalibrationSettings
    from hessian_tools.io.json import clean, load_result
    from hessian_tools.results.calibration import CALIBRATION_SCHEMA as CALIBRATION
    from hessian_tools.results.calibration import CalibrationResult
    from hessian_tools.results.flatness import FLATNESS_SCHEMA, FlatnessResult
    from ikun_hessian.reports.flatness import calibration_lines, flatness_comparison_lines, flatness_lines

    where = pick(device)
    memory = memory or half_of_the_memory(where)
    settings, opening = flatness_settings(memory, calibrate=calibrate, noise=noise, draws=draws, seed=seed, **options)
    scales = tuple(dict.fromkeys(noise)) or CalibrationSettings.scales
    calibrating = CalibrationSettings(scales=scales, draws=draws, seed=seed, memory=memory)
    stems = [result_stem(path, out, tag, "flatness") for path in checkpoints]
    if len(set(stems)) < len(stems):
        raise click.UsageError("two checkpoints would write the same result: give them other names, or one --out each")
    found: list[FlatnessResult] = []
    locks = click.get_current_context().with_resource(ExitStack())
    for path, stem in zip(checkpoints, stems, strict=True):
        click.echo(f"opening {path}", err=True)
        job = open_job(path, own=own, **opening, memory=memory, data_dir=data_dir, device=where)
        beside = result_stem(path, out, tag, "calibration")
        old = existing_result(
            stem, lambda path: load_result(path, FlatnessResult, FLATNESS_SCHEMA), settings, job, force, resume, locks
        )
        known: CalibrationResult | None = None
        refusal = ""
        if calibrate:
            known = existing_result(
                beside,
                lambda path: load_result(path, CalibrationResult, CALIBRATION),
                calibrating,
                job,
                force,
                resume,
                locks,
            )
            if known is None:
                known, refusal = analyse_calibration(job, calibrating, beside)
        result = old or analyse_flatness(job, settings, stem)
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
        click.echo("\n".join(["-" * 80, *flatness_comparison_lines(found)]))
