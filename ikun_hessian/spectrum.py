"""The command `spectrum`."""

from __future__ import annotations

import dataclasses
import json
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
from ikun_hessian.screen import Bar

if TYPE_CHECKING:
    from hessian_tools.distributed import Group
    from hessian_tools.results import SpectrumResult
    from hessian_tools.settings import Settings


@click.command()
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
def spectrum(
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
    from hessian_tools import distributed
    from hessian_tools.figures import save_figure, trajectory_figure
    from hessian_tools.report import spectrum_lines
    from hessian_tools.results import load_spectrum, to_json, write_table
    from hessian_tools.trajectory import one_run, trajectory_rows
    from ikun.checkpoint import load_checkpoint

    where = pick(device)
    settings, opening = settings_of(memory or half_of_the_memory(where), **options)
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
    group = distributed.initialize(where)
    first = group is None or group.rank == 0
    found: list[SpectrumResult] = []
    for path, stem in zip(checkpoints, stems, strict=True):
        if first:
            click.echo(f"opening {path}", err=True)
        job = open_job(path, own=own, **opening, memory=settings.memory, data_dir=data_dir, device=where, group=group)
        old = earlier(stem, load_spectrum, settings, job, force, resume) if first else None
        old = old if group is None else group.broadcast(old)
        result = old or analyse(job, settings, stem, group)
        found.append(result)
        if not first:
            continue
        files = [] if old else write(result, stem)
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


def settings_of(
    memory: float, operators: tuple[str, ...], curve: str | None, **options: Any
) -> tuple[Settings, dict[str, Any]]:
    """What to compute and how to open a checkpoint for it, from the options of `spectrum`. memory: GiB."""
    from hessian_tools.settings import Settings

    opening = {name: options.pop(name) for name in OPENING}
    settings = Settings(
        **options,
        operators=tuple(dict.fromkeys(operators)) or Settings.operators,
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
        raise click.UsageError(f"--samples-curve '{text}' is no growing list of sample counts like 1,16,64,256")
    return counts


def analyse(job: Job, settings: Settings, stem: Path, group: Group | None = None, shown: bool = True) -> SpectrumResult:
    """The result of one checkpoint, computed from the start or from where an interrupted run stopped."""
    from hessian_tools.phases import Phases
    from hessian_tools.results import clean
    from hessian_tools.settings import versions
    from hessian_tools.spectrum import spectrum as analyse

    stem.parent.mkdir(parents=True, exist_ok=True)
    key = {
        "settings": dataclasses.asdict(settings),
        **job.provenance,
        **measured_on(job.objective),
        "versions": versions(),
    }
    key["number of processes"] = group.size if group else 1
    with Bar("", shown and (group is None or group.rank == 0)) as bar:
        return analyse(
            job.objective,
            settings,
            variants={name: job.another(**changes) for name, changes in job.variants.items()},
            relaxed=job.another(relaxed=True) if "relaxed" in settings.operators else None,
            provenance=job.provenance,
            progress=bar.update,
            phases=Phases(Path(f"{stem}.resume"), clean(key), group),
        )


def write(result: SpectrumResult, stem: Path, figures: bool = True) -> list[str]:
    """Arrays, figures, and away with the interrupted state; returns the endings of what was written."""
    from hessian_tools.figures import layers_figure, samples_figure, save_figure, spectrum_figure
    from hessian_tools.phases import Phases
    from hessian_tools.results import save_spectrum

    files = save_spectrum(result, stem)
    if figures:
        files += save_figure(spectrum_figure(result), stem)
    if figures and result.blocks:
        files += save_figure(layers_figure(result), f"{stem}.layers")
    if figures and result.samples_curve:
        files += save_figure(samples_figure(result), f"{stem}.samples")
    Phases.remove(Path(f"{stem}.resume"))
    return [f.name.removeprefix(f"{stem.name}.") for f in files]
