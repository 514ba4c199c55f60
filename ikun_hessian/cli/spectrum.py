"""The command `spectrum`."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.cli.click_options import options, own_options, screen_options, threads_option
from ikun_hessian.cli.inputs import checkpoint_files
from ikun_hessian.cli.screen import echo, echo_opening, show_result
from ikun_hessian.jobs.analyses.spectrum import analyse_spectrum, expectation, spectrum_settings, write_spectrum
from ikun_hessian.jobs.analyses.true_hessian import (
    TRUE,
    analyse_true_hessian,
    true_hessian_expectation,
    true_hessian_settings,
    write_true_hessian,
)
from ikun_hessian.jobs.device import half_of_the_memory, pick
from ikun_hessian.jobs.existing_results import existing_result
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.open import open_job
from ikun_hessian.jobs.options import RESULTS, SPECTRUM
from ikun_hessian.jobs.results import result_stems

if TYPE_CHECKING:
    from hessian_tools.analysis.true_hessian.settings import TrueHessianSettings
    from hessian_tools.results.spectrum import SpectrumResult


@click.command("spectrum")
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@options(*SPECTRUM)
@own_options
@options(*RESULTS)
@threads_option
@screen_options
def spectrum_command(
    checkpoints: tuple[Path, ...],
    out: Path | None,
    tag: str | None,
    force: bool,
    resume: bool,
    as_json: bool,
    device: str,
    data_dir: Path | None,
    memory: float | None,
    trajectory: bool,
    own: Own,
    captioned: bool,
    detail: str,
    **options: Any,
) -> None:
    """Compute eigenvalues, density and trace of the Hessian at each checkpoint, with errors.

    The checkpoint says which data and which loss are used. The results are written next to it, as NAME.spectrum.json,
    .npz, .png and .pdf; those of operator true as NAME.true.json, .png and .pdf. A folder stands for all checkpoints in
    it. If the command is started by torchrun, the processes share the work.
    """
    checkpoints = checkpoint_files(checkpoints)
    if trajectory and len(checkpoints) < 2:
        raise click.UsageError("--trajectory needs several snapshots of one run")
    from hessian_tools.io.files import write_table
    from hessian_tools.io.json import clean
    from hessian_tools.plots.spectrum import trajectory_figure
    from hessian_tools.plots.style import save_figure
    from hessian_tools.results.spectrum import load_spectrum, to_json
    from hessian_tools.results.trajectory import one_run, trajectory_rows
    from hessian_tools.results.true_hessian import load_true_hessian
    from hessian_tools.runtime import distributed
    from ikun.checkpoint import load_checkpoint
    from ikun_hessian.reports.spectrum import spectrum_lines
    from ikun_hessian.reports.summary import brief_line, spectrum_summary
    from ikun_hessian.reports.true_hessian import true_hessian_brief, true_hessian_lines, true_hessian_summary

    where = pick(device)
    memory = memory or half_of_the_memory(where)
    truth: TrueHessianSettings | None = None
    if TRUE in options["operators"]:
        truth = true_hessian_settings(memory, options["operators"], options.pop("draws"), options)
        options["operators"] = truth.operators
        if options["time"] is not None and not truth.operators:
            raise click.UsageError("--time is for other operators than true: use --draws")
        if options["per_layer"] and not truth.operators:
            raise click.UsageError("--per-layer needs another operator than true: add --operator ggn")
        if trajectory and not truth.operators:
            raise click.UsageError("--trajectory needs another operator than true: add --operator ggn")
    settings, opening = spectrum_settings(memory, **options)
    if trajectory and not any(own.meant(path) for path in checkpoints):  # check this before hours of work
        opened = [load_checkpoint(path) for path in checkpoints]
        named = zip(checkpoints, opened, strict=True)
        one_run([(path.name, c.training, dataclasses.asdict(c.network)) for path, c in named])
    stems = result_stems(checkpoints, out, tag, "spectrum")
    truth_stems = result_stems(checkpoints, out, tag, "true")
    group = distributed.initialize_group(where)
    first = group is None or group.rank == 0
    found: list[SpectrumResult] = []
    printed: list[dict[str, Any]] = []
    shown = 0
    locks = click.get_current_context().with_resource(ExitStack())
    for path, stem, truth_stem in zip(checkpoints, stems, truth_stems, strict=True):
        if first and detail != "quiet":
            echo_opening(path, own)
        job = open_job(
            path,
            own=own,
            **opening,
            memory=settings.memory,
            data_dir=data_dir,
            device=where,
            group=group,
            forward_only=truth is not None and not truth.operators,
        )
        if truth is None or truth.operators:
            old = existing_result(stem, load_spectrum, settings, job, force, resume, locks) if first else None
            old = old if group is None else group.broadcast(old)
            if old is None and detail != "quiet" and (line := expectation(job, settings)) and first:
                echo(line, err=True)
            result = old or analyse_spectrum(job, settings, stem, group, shown=detail != "quiet")
            found.append(result)
            if first:
                printed.append(to_json(result))
                files = [] if old else write_spectrum(result, stem, captioned=captioned)
                names = _names(stem, files)
                shown += 1
                if not as_json:
                    full = [*spectrum_lines(result), f"files       {names}"]
                    show_result(detail, shown, brief_line(result), spectrum_summary(result, names), full)
        if truth is not None:
            known = existing_result(truth_stem, load_true_hessian, truth, job, force, resume, locks) if first else None
            known = known if group is None else group.broadcast(known)
            if known is None and detail != "quiet" and (line := true_hessian_expectation(job, truth)) and first:
                echo(line, err=True)
            measured = known or analyse_true_hessian(job, truth, truth_stem, group, shown=detail != "quiet")
            if first:
                printed.append(clean(dataclasses.asdict(measured)))
                names = _names(truth_stem, [] if known else write_true_hessian(measured, truth_stem))
                shown += 1
                if not as_json:
                    full = [*true_hessian_lines(measured), f"files       {names}"]
                    brief, summary = true_hessian_brief(measured), true_hessian_summary(measured, names)
                    show_result(detail, shown, brief, summary, full)
    if trajectory and first:
        stem = (out or checkpoints[0].parent) / ".".join([*([tag] if tag else []), "trajectory"])
        save_figure(trajectory_figure(found, captioned), stem)
        write_table(trajectory_rows(found), Path(f"{stem}.csv"))
        if not as_json and detail != "quiet":
            echo(f"trajectory  {stem}.{{png,pdf,csv}}")
    if as_json and first:
        echo(json.dumps(printed[0] if len(printed) == 1 else printed))
    if group is not None:
        group.close()


def _names(stem: Path, files: list[str]) -> str:
    """Return the names of the written files; without any, those of a result that was kept."""
    return f"{stem}.{{{','.join(files) or 'json,...'}}}{'' if files else ' (unchanged)'}"
