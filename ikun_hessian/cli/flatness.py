"""The command `flatness`."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.cli.click_options import options, own_options, screen_options, threads_option
from ikun_hessian.cli.inputs import checkpoint_files
from ikun_hessian.cli.screen import dumps, echo, echo_opening, show_result
from ikun_hessian.jobs.analyses.calibration import analyse_calibration, own_calibration
from ikun_hessian.jobs.analyses.flatness import analyse_flatness, flatness_settings
from ikun_hessian.jobs.device import half_of_the_memory, pick
from ikun_hessian.jobs.existing_results import existing_result
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.open import open_job
from ikun_hessian.jobs.options import FLATNESS, RESULTS
from ikun_hessian.jobs.results import result_stem, result_stems

if TYPE_CHECKING:
    from hessian_tools.results.calibration import CalibrationResult
    from hessian_tools.results.flatness import FlatnessResult


@click.command("flatness")
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@options(*FLATNESS)
@own_options
@options(*RESULTS)
@threads_option
@screen_options
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
    captioned: bool,
    detail: str,
    **options: Any,
) -> None:
    """Compute standard flatness metrics at each checkpoint, with errors, cost and validity.

    The results are written next to the checkpoint, as NAME.flatness.json and, with --calibrate, NAME.calibration.json,
    .png and .pdf. All checkpoints are measured with the same noise, and compared at the end.
    A folder stands for all checkpoints in it.
    """
    checkpoints = checkpoint_files(checkpoints)
    from hessian_tools.analysis.calibration import CalibrationSettings
    from hessian_tools.io.json import clean, load_result
    from hessian_tools.results.calibration import CALIBRATION_SCHEMA as CALIBRATION
    from hessian_tools.results.calibration import CalibrationResult
    from hessian_tools.results.flatness import FLATNESS_SCHEMA, FlatnessResult
    from ikun_hessian.reports.flatness import (
        calibration_lines,
        flatness_comparison_lines,
        flatness_lines,
        told_apart_lines,
    )
    from ikun_hessian.reports.summary import brief_line, flatness_summary

    where = pick(device)
    memory = memory or half_of_the_memory(where)
    settings, opening = flatness_settings(memory, calibrate=calibrate, noise=noise, draws=draws, seed=seed, **options)
    scales = tuple(dict.fromkeys(noise)) or CalibrationSettings.scales
    calibrating = CalibrationSettings(scales=scales, draws=draws, seed=seed, memory=memory)
    stems = result_stems(checkpoints, out, tag, "flatness")
    found: list[FlatnessResult] = []
    locks = click.get_current_context().with_resource(ExitStack())
    for path, stem in zip(checkpoints, stems, strict=True):
        if detail != "quiet":
            echo_opening(path, own)
        job = open_job(path, own=own, **opening, memory=memory, data_dir=data_dir, device=where)
        calibration_stem = result_stem(path, out, tag, "calibration")
        old = existing_result(
            stem, lambda path: load_result(path, FlatnessResult, FLATNESS_SCHEMA), settings, job, force, resume, locks
        )
        known: CalibrationResult | None = None
        refusal = ""
        if calibrate:
            known = existing_result(
                calibration_stem,
                lambda path: load_result(path, CalibrationResult, CALIBRATION),
                calibrating,
                job,
                force,
                resume,
                locks,
            )
            if known is None:
                known, refusal = analyse_calibration(job, calibrating, calibration_stem, captioned)
        result = old or analyse_flatness(job, settings, stem, shown=detail != "quiet")
        found.append(result)
        if as_json:
            if refusal:
                echo(f"not calibrated: {refusal}", err=True)
            continue
        unchanged = " (unchanged)" if old else ""
        files = f"{stem}.json" + (f", {calibration_stem}.{{json,png,pdf}}" if known else "") + unchanged
        full = [*flatness_lines(result, known or own_calibration(calibration_stem, job))]
        full += [f"files       {stem}.json{unchanged}"]
        if calibrate:
            full += ["", *(calibration_lines(known) if known else [f"not calibrated: {refusal}"])]
        if known:
            full += [f"files       {calibration_stem}.{{json,png,pdf}}"]
        summary = flatness_summary(result, files, calibration=known, refusal=refusal)
        show_result(detail, len(found), brief_line(result), summary, full)
    if as_json:
        printed = [clean(dataclasses.asdict(result)) for result in found]
        echo(dumps(printed[0] if len(printed) == 1 else printed))
    elif len(found) > 1 and detail in ("summary", "full"):
        lines = told_apart_lines(found) if detail == "summary" else flatness_comparison_lines(found)
        echo("\n".join(["-" * 80, *lines]))
