"""The command `spectrum`."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.cli.options import json_option, opening_options, out_option, own_options, tag_option
from ikun_hessian.jobs.device import half_of_the_memory, pick
from ikun_hessian.jobs.existing_results import existing_result
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.open import open_job
from ikun_hessian.jobs.results import result_stem
from ikun_hessian.jobs.spectrum import analyse_spectrum, spectrum_settings, write_spectrum

if TYPE_CHECKING:
    from hessian_tools.results.spectrum import SpectrumResult


@click.command("spectrum")
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", default=10, show_default=True, help="Largest eigenvalues.")
@click.option("--smallest", default=5, show_default=True, help="Smallest (most negative) eigenvalues.")
@click.option("--scaled", default=1, show_default=True, help="Largest eigenvalues in units of filter norm.")
@click.option(
    "--magnitude", default=0, show_default=True, help="So many of largest size instead of --top and --smallest."
)
@click.option("--method", type=click.Choice(["lanczos", "power"]), default="lanczos", show_default=True)
@click.option("--backend", type=click.Choice(["own", "pyhessian"]), default="own", show_default=True)
@click.option(
    "--operator",
    "operators",
    multiple=True,
    help="hessian, ggn, fisher, relaxed or smoothed; may be given several times [default: hessian and ggn].",
)
@click.option("--density/--no-density", default=True, show_default=True)
@click.option("--steps", type=int, help="Lanczos steps a density probe [default: 60, or by --accuracy].")
@click.option("--probes", type=int, help="Density probes [default: 4, or by --accuracy].")
@click.option("--accuracy", type=float, help="Wasserstein accuracy of the density, over the range: chooses both.")
@click.option("--damping", type=float, help="z of effective dimension and log det [default: 1% of lambda_max].")
@click.option(
    "--noise", default=0.1, show_default=True, help="Weight noise of operator smoothed, over each filter's rms."
)
@click.option("--tol", default=1e-4, show_default=True, help="Residual over norm at which a pair has converged.")
@click.option("--per-layer", is_flag=True, help="Every layer's diagonal block of the first operator too.")
@click.option("--save-vectors", "vectors", is_flag=True, help="Eigenvectors too, in the .npz.")
@click.option(
    "--samples-curve", "curve", metavar="N,N,...", help="Eigenvalues and trace on so many samples too, each resampled."
)
@click.option("--resamples", default=5, show_default=True, help="Subsets of each size for --samples-curve.")
@click.option(
    "--trajectory", is_flag=True, help="The checkpoints are snapshots of one run: draw them against the epoch."
)
@opening_options
@own_options
@click.option("--seed", default=0, show_default=True)
@out_option
@tag_option
@click.option("--force", is_flag=True, help="Overwrite a result of other settings, or an interrupted analysis.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted analysis; finished checkpoints are kept.")
@json_option
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
    **options: Any,
) -> None:
    """Eigenvalues, density and trace of the Hessian at each checkpoint, with errors.

    Data, loss and subset come from the checkpoint. Leaves NAME.spectrum.json, .npz, .png and .pdf beside it. Started by
    torchrun, the processes share the work.
    """
    from hessian_tools.io.files import write_table
    from hessian_tools.plots.spectrum import trajectory_figure
    from hessian_tools.plots.style import save_figure
    from hessian_tools.results.spectrum import load_spectrum, to_json
    from hessian_tools.results.trajectory import one_run, trajectory_rows
    from hessian_tools.runtime import distributed
    from ikun.checkpoint import load_checkpoint
    from ikun_hessian.reports.spectrum import spectrum_lines

    where = pick(device)
    settings, opening = spectrum_settings(memory or half_of_the_memory(where), **options)
    if trajectory and len(checkpoints) < 2:
        raise click.UsageError("--trajectory needs several snapshots of one run")
    if trajectory and any(own.meant(path) for path in checkpoints):
        raise click.UsageError("--trajectory needs the epochs that checkpoints of ikun-hessian hold: leave it out")
    if trajectory:  # before hours of work
        opened = [load_checkpoint(path) for path in checkpoints]
        named = zip(checkpoints, opened, strict=True)
        one_run([(path.name, c.training, dataclasses.asdict(c.network)) for path, c in named])
    stems = [result_stem(path, out, tag, "spectrum") for path in checkpoints]
    if len(set(stems)) < len(stems):
        raise click.UsageError("two checkpoints would write the same result: give them other names, or one --out each")
    group = distributed.initialize_group(where)
    first = group is None or group.rank == 0
    found: list[SpectrumResult] = []
    locks = click.get_current_context().with_resource(ExitStack())
    for path, stem in zip(checkpoints, stems, strict=True):
        if first:
            click.echo(f"opening {path}", err=True)
        job = open_job(path, own=own, **opening, memory=settings.memory, data_dir=data_dir, device=where, group=group)
        old = existing_result(stem, load_spectrum, settings, job, force, resume, locks) if first else None
        old = old if group is None else group.broadcast(old)
        result = old or analyse_spectrum(job, settings, stem, group)
        found.append(result)
        if not first:
            continue
        files = [] if old else write_spectrum(result, stem)
        if not as_json:
            if len(found) > 1:
                click.echo("-" * 80)
            click.echo("\n".join(spectrum_lines(result)))
            click.echo(f"files       {stem}.{{{','.join(files) or 'json,...'}}}{'' if files else ' (as they were)'}")
    if trajectory and first:
        stem = (out or checkpoints[0].parent) / ".".join([*([tag] if tag else []), "trajectory"])
        save_figure(trajectory_figure(found), stem)
        write_table(trajectory_rows(found), Path(f"{stem}.csv"))
        if not as_json:
            click.echo(f"trajectory  {stem}.{{png,pdf,csv}}")
    if as_json and first:
        printed = [to_json(result) for result in found]
        click.echo(json.dumps(printed[0] if len(printed) == 1 else printed))
    if group is not None:
        group.close()
