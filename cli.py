"""The command line: joins ikun and hessian_tools, and does no mathematics of its own.

Heavy imports happen inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from hessian_tools.distributed import Group
    from hessian_tools.objective import Objective
    from hessian_tools.results import SpectrumResult
    from hessian_tools.settings import Settings
    from ikun.checkpoint import Checkpoint
    from ikun.data import Dataset

Command = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ikun-hessian")
def cli() -> None:
    """How flat is the minimum my spiking network found?

    Train a spiking network from a chosen initializer, open its checkpoint, and see the Hessian spectrum with its
    errors: `ikun-hessian train`, then `ikun-hessian spectrum ckpt.pt`.
    """


def _shared(*options: Command) -> Command:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
_data_dir = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder with the data set's files [default: the cache]."
)


@cli.command()
@click.option("--data", "data_name", default="digits", show_default=True, help="digits or fashion-mnist.")
@click.option("--model", default="csnn", show_default=True, help="csnn (the paper's) or mlp.")
@click.option("--norm", default="bn", show_default=True, help="none or bn (BatchNorm).")
@click.option(
    "--init",
    default="ikun",
    show_default=True,
    help="ikun, ikun_v1, ikun_v2, xavier, kaiming, lecun, normal or orthogonal.",
)
@click.option("--alpha", default=1.0, show_default=True, help="alpha of the ikun rule.")
@click.option("--law", default="empirical", show_default=True, help="ikun's law of h: empirical or analytic.")
@click.option(
    "--surrogate", default="atan:2", show_default=True, metavar="NAME[:P]", help="Surrogate and its parameter."
)
@click.option("--neuron", default="if", show_default=True, help="if, lif or plif.")
@click.option("--tau", default=2.0, show_default=True, help="Time constant of lif (start of plif), in steps.")
@click.option("--reset", default="hard", show_default=True, help="hard or soft.")
@click.option("--detach-reset", is_flag=True, help="No derivative through the reset.")
@click.option("--timesteps", default=4, show_default=True, help="T.")
@click.option("--coding", default="direct", show_default=True, help="direct or poisson.")
@click.option("--channels", default=16, show_default=True, help="Width C of the csnn.")
@click.option("--hidden", default="128,128", show_default=True, help="Layer sizes of the mlp.")
@click.option("--loss", default="mse", show_default=True, help="mse (on rates) or ce.")
@click.option("--optimizer", default="adam", show_default=True, help="adam or sgd.")
@click.option("--momentum", default=0.9, show_default=True, help="Of sgd.")
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--schedule", default="cosine", show_default=True, help="cosine, step or none.")
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option("--epochs", default=20, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--patience", default=0, show_default=True, help="Early stopping: epochs without a better held-out loss.")
@click.option(
    "--held-out", default=0, show_default=True, help="Images held out for early stopping [with --patience: 10%]."
)
@click.option("--subset", type=int, help="Train on so many images [default: all].")
@click.option("--seed", default=42, show_default=True)
@click.option("--snapshots", default=0, show_default=True, help="So many checkpoints on the way.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Overwrite an existing checkpoint or interrupted run.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("ckpt.pt"), show_default=True)
@_shared(_data_dir, _device)
def train(
    data_name: str,
    hidden: str,
    held_out: int,
    subset: int | None,
    seed: int,
    resume: bool,
    force: bool,
    out: Path,
    data_dir: Path | None,
    device: str,
    patience: int,
    **options: Any,
) -> None:
    """Train a network from an initializer and write a checkpoint.

    The log, one JSON line an epoch, lies beside it. An interrupted run goes on with --resume and the same options.
    """
    from ikun.checkpoint import DataSpec
    from ikun.networks import Spec
    from ikun.training import TrainingSpec, run_paths
    from ikun.training import train as run

    if out.exists() and not force:
        raise click.UsageError(f"{out} exists: choose another --out, or --force to overwrite it")
    if run_paths(out)["resume"].exists() and not (force or resume):
        raise click.UsageError(
            f"an interrupted run lies at {run_paths(out)['resume']}: --resume it, or --force a new one"
        )
    fields = {f.name for f in dataclasses.fields(TrainingSpec)}
    spec = TrainingSpec(**{k: v for k, v in options.items() if k in fields}, seed=seed, patience=patience)
    probe = DataSpec(data_name, subset, seed)
    images = probe.load(data_dir=data_dir)
    if patience and not held_out:
        held_out = max(1, len(images) // 10)
    if held_out and not 0 < held_out < len(images):
        raise click.UsageError(f"--held-out {held_out} leaves nothing of {len(images)} images to train on")
    try:
        sizes = tuple(int(part) for part in hidden.split(","))
    except ValueError:
        raise click.UsageError(f"--hidden '{hidden}' is no list of sizes like 128,128") from None
    network = Spec(
        input_shape=(images.images.shape[1], images.images.shape[2], images.images.shape[3]),
        classes=images.classes,
        hidden=sizes,
        **{k: v for k, v in options.items() if k not in fields},
    )
    with _Bar("train") as bar:
        checkpoint = run(
            network,
            dataclasses.replace(probe, held_out=held_out),
            spec,
            out,
            data_dir=data_dir,
            device=_pick(device),
            resume=resume,
            progress=lambda done, total, note: bar.update(note, done, total),
        )
    last = checkpoint.history[-1] if checkpoint.history else {}
    if last:
        click.echo(
            f"epoch {last['epoch']}: train loss {last['loss']:.4g}, accuracy {last['accuracy']:.1%}; "
            f"test loss {last['test_loss']:.4g}, accuracy {last['test_accuracy']:.1%}"
        )
    for failure in checkpoint.training["failures"]:
        click.echo(f"! {failure}")
    click.echo(f"{out}  (log {run_paths(out)['log'].name})")
    click.echo(f"next: ikun-hessian spectrum {out}")
    if any(f.startswith("NaN") for f in checkpoint.training["failures"]):
        raise _FailedError("training diverged; the checkpoint holds the last finite epoch")


@cli.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", default=10, show_default=True, help="Largest eigenvalues.")
@click.option("--smallest", default=5, show_default=True, help="Smallest (most negative) eigenvalues.")
@click.option(
    "--magnitude", default=0, show_default=True, help="So many of largest size instead of --top and --smallest."
)
@click.option("--method", type=click.Choice(["lanczos", "power"]), default="lanczos", show_default=True)
@click.option("--backend", type=click.Choice(["own", "pyhessian"]), default="own", show_default=True)
@click.option(
    "--operator",
    "operators",
    multiple=True,
    help="hessian, ggn, fisher or relaxed; may be given several times [default: hessian and ggn].",
)
@click.option("--density/--no-density", default=True, show_default=True)
@click.option("--steps", type=int, help="Lanczos steps a density probe [default: 60, or by --accuracy].")
@click.option("--probes", type=int, help="Density probes [default: 4, or by --accuracy].")
@click.option("--accuracy", type=float, help="Wasserstein accuracy of the density, over the range: chooses both.")
@click.option("--damping", type=float, help="z of effective dimension and log det [default: 1% of lambda_max].")
@click.option("--samples", default="all", show_default=True, help="So many samples, or all.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--batch-size", type=int, help="Samples a forward pass [default: what fits into a quarter of --memory].")
@click.option("--tol", default=1e-4, show_default=True, help="Residual over norm at which a pair has converged.")
@click.option("--params", default="*", show_default=True, help="Pattern of parameter names, for instance 'fc*'.")
@click.option("--per-layer", is_flag=True, help="Every layer's diagonal block of the first operator too.")
@click.option("--save-vectors", "vectors", is_flag=True, help="Eigenvectors too, in the .npz.")
@click.option(
    "--samples-curve", "curve", metavar="N,N,...", help="Eigenvalues and trace on so many samples too, each resampled."
)
@click.option("--resamples", default=5, show_default=True, help="Subsets of each size for --samples-curve.")
@click.option(
    "--trajectory", is_flag=True, help="The checkpoints are snapshots of one run: draw them against the epoch."
)
@click.option("--surrogate", help="Analyse with this surrogate instead of the one trained with.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--memory", type=float, help="GiB for kept primals and eigenvectors [default: half of the memory].")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for results [default: beside it]."
)
@click.option("--tag", help="Part of the results' name, to keep results of several settings.")
@click.option("--force", is_flag=True, help="Overwrite a result of other settings, or an interrupted analysis.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted analysis; finished checkpoints are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON on standard output and nothing else.")
@_shared(_data_dir, _device)
def spectrum(
    checkpoints: tuple[Path, ...],
    samples: str,
    split: str,
    batch_size: int | None,
    params: str,
    surrogate: str | None,
    dtype: str,
    out: Path | None,
    tag: str | None,
    force: bool,
    resume: bool,
    as_json: bool,
    data_dir: Path | None,
    device: str,
    operators: tuple[str, ...],
    curve: str | None,
    memory: float | None,
    trajectory: bool,
    **options: Any,
) -> None:
    """Eigenvalues, density and trace of the Hessian at each checkpoint, with errors.

    Data, loss and subset come from the checkpoint. Leaves NAME.spectrum.json, .npz, .png and .pdf beside it. Started by
    torchrun, the processes share the work.
    """
    from hessian_tools import distributed
    from hessian_tools.figures import save_figure, trajectory_figure
    from hessian_tools.report import spectrum_lines
    from hessian_tools.results import to_json, write_table
    from hessian_tools.settings import Settings
    from hessian_tools.trajectory import one_run, trajectory_rows
    from ikun.checkpoint import load_checkpoint

    where = _pick(device)
    settings = Settings(
        **options,
        operators=tuple(dict.fromkeys(operators)) or Settings.operators,
        samples_curve=_counts(curve),
        memory=memory or _half_of_the_memory(where),
    )
    if (batch_size is not None and batch_size < 1) or not settings.memory > 0:
        raise click.UsageError("--batch-size and --memory must be positive")
    if trajectory and len(checkpoints) < 2:
        raise click.UsageError("--trajectory needs several snapshots of one run")
    if trajectory:  # before hours of work
        opened = [load_checkpoint(path) for path in checkpoints]
        named = zip(checkpoints, opened, strict=True)
        one_run([(path.name, c.training, dataclasses.asdict(c.network)) for path, c in named])
    stems = [_stem(path, out, tag) for path in checkpoints]
    if len(set(stems)) < len(stems):
        raise click.UsageError("two checkpoints would write the same result: give them other names, or one --out each")
    group = distributed.initialize(where)
    first = group is None or group.rank == 0
    found: list[SpectrumResult] = []
    for path, stem in zip(checkpoints, stems, strict=True):
        if first:
            click.echo(f"opening {path}", err=True)
        job = _open(path, split, samples, batch_size, params, surrogate, dtype, where, data_dir, settings, group)
        old = _earlier(stem, settings, job, force, resume) if first else None
        old = old if group is None else group.broadcast(old)
        done = old is not None
        result = old or _analyse(job, settings, stem, group)
        found.append(result)
        if not first:
            continue
        files = [] if done else _write(result, stem)
        if not as_json:
            if len(found) > 1:
                click.echo("-" * 80)
            click.echo("\n".join(spectrum_lines(result)))
            click.echo(f"files       {stem}.{{{','.join(files) or 'json,...'}}}{' (as they were)' if done else ''}")
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


def _counts(text: str | None) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        counts = (0,)
    if any(n < 1 for n in counts) or list(counts) != sorted(set(counts)):
        raise click.UsageError(f"--samples-curve '{text}' is no growing list of sample counts like 1,16,64,256")
    return counts


def _half_of_the_memory(device: str) -> float:
    """GiB."""
    import torch

    if device == "cuda":
        total = torch.cuda.mem_get_info()[1]
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return round(total / 2**31 / int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _earlier(stem: Path, settings: Settings, job: _Job, force: bool, resume: bool) -> SpectrumResult | None:
    """A finished result that --resume keeps; refuses to overwrite what it must not, and with --force clears the way."""
    from hessian_tools.phases import Phases

    state = Path(f"{stem}.resume")
    if force:
        Phases.remove(state)
        return None
    old = _existing(Path(f"{stem}.json"), settings, job)
    if state.exists() and not resume:
        raise click.UsageError(f"an interrupted analysis lies at {state}: --resume it, or --force a new one")
    return old if resume and not state.exists() else None


def _analyse(job: _Job, settings: Settings, stem: Path, group: Group | None) -> SpectrumResult:
    """The result of one checkpoint, computed from the start or from where an interrupted run stopped."""
    from hessian_tools.phases import Phases
    from hessian_tools.results import clean
    from hessian_tools.settings import versions
    from hessian_tools.spectrum import spectrum as analyse

    stem.parent.mkdir(parents=True, exist_ok=True)
    key = {"settings": dataclasses.asdict(settings), **job.provenance, **_measured_on(job), "versions": versions()}
    key["number of processes"] = group.size if group else 1
    with _Bar("", group is None or group.rank == 0) as bar:
        return analyse(
            job.objective,
            settings,
            variants=job.variants,
            relaxed=job.relaxed,
            provenance=job.provenance,
            progress=bar.update,
            phases=Phases(Path(f"{stem}.resume"), clean(key), group),
        )


def _write(result: SpectrumResult, stem: Path) -> list[str]:
    """Arrays, figures, and away with the interrupted state; returns the endings of what was written."""
    from hessian_tools.figures import layers_figure, samples_figure, save_figure, spectrum_figure
    from hessian_tools.phases import Phases
    from hessian_tools.results import save_spectrum

    files = [*save_spectrum(result, stem), *save_figure(spectrum_figure(result), stem)]
    if result.blocks:
        files += save_figure(layers_figure(result), f"{stem}.layers")
    if result.samples_curve:
        files += save_figure(samples_figure(result), f"{stem}.samples")
    Phases.remove(Path(f"{stem}.resume"))
    return [f.name.removeprefix(f"{stem.name}.") for f in files]


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output and nothing else.")
@_shared(_data_dir)
def info(checkpoint: Path, as_json: bool, data_dir: Path | None) -> None:
    """What a checkpoint is, and what every layer does: at initialization and as trained.

    The realised weight variance stands beside the one of IKUN's rule; the gains are measured, from layer to layer.
    """
    from ikun.checkpoint import load_checkpoint
    from ikun.networks import LOSSES
    from ikun.statistics import LayerStatistics, batch_norm_by_batch, observe
    from ikun.training import TrainingSpec, start

    found = load_checkpoint(checkpoint)
    data = found.data.load(data_dir=data_dir)
    x, y = found.inputs(data.images)[:512], data.labels[:512]
    known = {f.name for f in dataclasses.fields(TrainingSpec)}
    spec = TrainingSpec(**{k: v for k, v in found.training.items() if k in known})
    fresh = start(found.network, data, spec)
    with batch_norm_by_batch(fresh):
        before = observe(fresh, x, y, LOSSES[found.loss])
    after = observe(found.build(), x, y, LOSSES[found.loss])
    if as_json:
        states = {"initialization": before, "trained": after}
        table = {
            k: [{**dataclasses.asdict(s), "rule_variance": s.rule_variance(spec.alpha)} for s in v]
            for k, v in states.items()
        }
        click.echo(_dumps({"network": dataclasses.asdict(found.network), "training": found.training, "layers": table}))
        return
    n, t = found.network, found.training
    click.echo(str(checkpoint))
    click.echo(
        f"{n.model}, {n.neuron} neurons, {n.reset} reset, surrogate {n.surrogate}, T = {n.timesteps}, norm {n.norm},"
    )
    click.echo(f"loss {found.loss}, {sum(p.numel() for p in found.build().parameters()):,} parameters")
    click.echo(
        f"{t['init']} (alpha {t['alpha']:g}), {t['optimizer']} lr {t['lr']:g}, {t['epochs_run']} epochs on "
        f"{found.data.name}, {t['samples']} samples, seed {t['seed']}"
    )
    if found.history:
        last = found.history[-1]
        click.echo(f"train accuracy {last['accuracy']:.1%}, test accuracy {last['test_accuracy']:.1%}")

    def show(title: str, rows: Sequence[LayerStatistics]) -> None:
        click.echo(f"\n{title}")
        click.echo("layer    Var W   rule's  E[f'^2]  firing  dead  Var current  forward  backward")
        for s in rows:
            click.echo(
                f"{s.name:<6}{s.weight_variance:>8.2g} {s.rule_variance(spec.alpha):>8.2g} {s.derivative_square:>8.3g} "
                f"{s.firing_rate:>7.3f} {s.dead:>5.0%} {s.current_variance:>12.3g} {s.forward_gain:>8.3g} "
                f"{s.backward_gain:>9.3g}"
            )

    show("at initialization (BatchNorm, if any, by the batch)", before)
    show("as trained (BatchNorm, if any, by its running statistics)", after)
    click.echo(
        f"\nrule's: alpha / (fan_in E[x^2] E[f'^2]), alpha = {spec.alpha:g}, this layer's own moments.\n"
        "forward: Var current over the layer before's. backward: mean square of the loss\n"
        "gradient at the layer before over this one's. An initializer wants to keep both\n"
        "near 1. dead: neurons that never fire on 512 samples."
    )


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Folder for the figure [here]."
)
@click.option("--tag", help="Part of the figure's name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output and nothing else.")
def compare(paths: tuple[Path, ...], out: Path, tag: str | None, as_json: bool) -> None:
    """Several saved spectra side by side: a table and the eigenvalue-against-rank figure.

    PATH is NAME.spectrum.json, a checkpoint that has one beside it, or a folder of them. Refuses to compare what was
    not measured alike, and says which condition differs.
    """
    from hessian_tools.compare import comparable, labelled
    from hessian_tools.figures import rank_figure, save_figure
    from hessian_tools.report import compare_lines
    from hessian_tools.results import ResultError, load_spectrum, to_json

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.spectrum.json"))
            if not inside:
                raise ResultError(f"{path}: no *.spectrum.json in this folder: run `ikun-hessian spectrum` first")
            files += inside
        else:
            files.append(path.with_suffix(".spectrum.json") if path.suffix == ".pt" else path)
    results = labelled([load_spectrum(f) for f in files])
    comparable(results)
    stem = out / ".".join(["compare", *([tag] if tag else []), "eigenvalues"])
    written = save_figure(rank_figure(results), stem)
    if as_json:
        click.echo(_dumps({label: to_json(r) for label, r in results}))
        return
    click.echo("\n".join(compare_lines(results)))
    click.echo(f"files       {stem}.{{{','.join(f.suffix[1:] for f in written)}}}")


@dataclasses.dataclass(frozen=True)
class _Job:
    path: Path
    objective: Any
    variants: dict[str, Any]
    relaxed: Any
    provenance: dict[str, Any]


def _open(
    path: Path,
    split: str,
    samples: str,
    batch_size: int | None,
    params: str,
    surrogate: str | None,
    dtype: str,
    device: str,
    data_dir: Path | None,
    settings: Settings,
    group: Group | None,
) -> _Job:
    """A checkpoint and its data as objectives."""
    import torch

    from hessian_tools.objective import make_objective
    from ikun.checkpoint import load_checkpoint, sha256
    from ikun.networks import LOSSES
    from ikun.statistics import observe
    from ikun.surrogates import Surrogate

    checkpoint = load_checkpoint(path)
    trained = Surrogate.parse(checkpoint.network.surrogate)
    analysed = Surrogate.parse(surrogate) if surrogate else trained
    data, x, digest = _samples(checkpoint, split, samples, data_dir)
    y = data.labels[: len(x)]

    def objective(steeper: float = 1.0, **changes: Any) -> Objective:
        network = checkpoint.build(surrogate=str(analysed.steeper(steeper)), **changes)
        made = make_objective(
            network,
            LOSSES[checkpoint.loss],
            (x, y),
            batch_size=batch_size,
            params=params,
            dtype=getattr(torch, dtype),
            device=device,
        )
        return dataclasses.replace(made, group=group)

    if batch_size is None:
        batch_size = _batch_size(objective(), settings.memory * 2**30 / 4, group)
        batch_size = batch_size if group is None else group.broadcast(batch_size)
    first = objective()
    reversed_ties = "last" if checkpoint.network.ties == "first" else "first"
    variants = {"slope x 1/2": objective(0.5), "slope x 2": objective(2.0)}
    if checkpoint.network.model == "csnn":
        variants["ties reversed"] = objective(ties=reversed_ties)
    statistics = observe(checkpoint.build(), x[:512], y[:512], LOSSES[checkpoint.loss])
    provenance = {
        "checkpoint": {"path": str(path), "sha256": sha256(path)},
        "data": {"name": data.name, "split": split, "sha256": digest, "loss": checkpoint.loss},
        "network": {
            **dataclasses.asdict(checkpoint.network),
            "surrogate": str(analysed),
            "trained_surrogate": str(trained),
        },
        "training": checkpoint.training,
        "activity": {
            s.neuron: {"firing_rate": s.firing_rate, "dead": s.dead, "derivative_square": s.derivative_square}
            for s in statistics
        },
    }
    relaxed = objective(relaxed=True) if "relaxed" in settings.operators else None
    return _Job(path, first, variants, relaxed, json.loads(json.dumps(provenance)))


def _batch_size(objective: Objective, memory: float, group: Group | None) -> int:
    """What fits into `memory` bytes, but on the CPU no more than is fast: batches run side by side, and arrays beyond
    some 30 MB come from fresh pages every time. At least 64 samples if they fit, shorter batches being all overhead."""
    import torch

    from hessian_tools.operators import batch_size_within

    processes = group.size if group else 1
    workers = torch.get_num_threads() if objective.device.type == "cpu" else 1
    most = batch_size_within(objective, memory / workers)
    if objective.device.type == "cpu":
        share = -(-objective.samples // (workers * processes))
        most = min(most, max(64, min(share, batch_size_within(objective, 2**27))))
    return min(most, -(-objective.samples // processes))  # a batch for every process


def _samples(
    checkpoint: Checkpoint, split: str, samples: str, data_dir: Path | None
) -> tuple[Dataset, torch.Tensor, str]:
    """(data set, network inputs, a hash of the very samples)."""
    data = checkpoint.data.load(split, data_dir)
    if samples != "all" and not (samples.isdecimal() and 1 <= int(samples) <= len(data)):
        raise click.UsageError(f"--samples {samples}: give a number from 1 to {len(data)}, or all")
    count = len(data) if samples == "all" else int(samples)
    x = checkpoint.inputs(data.images)[:count]
    return data, x, hashlib.sha256(f"{data.sha256} {count}".encode()).hexdigest()


def _stem(path: Path, out: Path | None, tag: str | None) -> Path:
    name = ".".join([path.stem, *([tag] if tag else []), "spectrum"])
    return (out or path.parent) / name


def _measured_on(job: _Job) -> dict[str, Any]:
    o = job.objective
    return {
        "dtype": str(o.dtype),
        "device": str(o.device),
        "batches": [len(y) for _, y in o.batches],
        "parameters": _sizes(o),
    }


def _sizes(objective: Objective) -> dict[str, int]:
    return {name: p.numel() for name, p in objective.parameters.items()}


def _existing(existing: Path, settings: Settings, job: _Job) -> SpectrumResult | None:
    """The result there already, if it was made in the same way; refuses if it was not: it may have cost an hour."""
    from hessian_tools.results import ResultError, load_spectrum

    if not existing.exists():
        return None
    try:
        old = load_spectrum(existing)
    except ResultError:
        raise click.UsageError(f"{existing} exists and is no result of this version: --tag NAME or --force") from None
    asked = json.loads(json.dumps(dataclasses.asdict(settings)))
    new = {
        "settings": {name: value for name, value in asked.items() if name != "memory"},  # which changes no number
        "checkpoint": {"sha256": job.provenance["checkpoint"]["sha256"]},
        "data": job.provenance["data"],
        "network": job.provenance["network"],
    }
    differing = [
        f"{part} {key}"
        for part, values in new.items()
        for key, value in values.items()
        if getattr(old, part).get(key) != value
    ]
    if old.dtype != str(job.objective.dtype).removeprefix("torch."):
        differing.append("dtype")
    if old.parameters != _sizes(job.objective):
        differing.append("set of parameters")
    if differing:
        raise click.UsageError(
            f"{existing} was made with another {differing[0]}: keep both with --tag NAME, or overwrite it with --force"
        )
    return old


class _Bar:
    """One progress bar on standard error, none when that is no terminal."""

    def __init__(self, name: str = "", shown: bool = True) -> None:
        self.name = f"{name}: " if name else ""
        self.shown = shown

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        hidden = None if self.shown else True  # None: where standard error is no terminal
        self.bar = tqdm(total=1, disable=hidden, leave=False, dynamic_ncols=True, desc=self.name)
        self.bar.bar_format = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        return self

    def update(self, phase: str, done: int, total: int, worst: float = float("nan")) -> None:
        self.bar.total = max(total, done, 1)
        self.bar.set_description_str(f"{self.name}{phase} ", refresh=False)
        self.bar.set_postfix_str(f"residual {worst:.0e}" if worst == worst else "", refresh=False)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class _FailedError(Exception):
    """The computation failed through no fault of the command line: exit code 1."""


def _pick(device: str) -> str:
    """The device asked for; on CUDA, full precision and deterministic algorithms."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: this PyTorch finds no CUDA device: use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return device


def _dumps(value: Any) -> str:
    """JSON with null for what is not finite."""
    from hessian_tools.results import clean

    return json.dumps(clean(value))


def _message(error: BaseException) -> str:
    return " ".join(str(error).split())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 the computation failed, 2 the user's mistake, 130 interrupted."""
    try:
        cli.main(arguments, prog_name="ikun-hessian", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        rank, size = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))
        one = f"rank {rank} of {size}: " if size > 1 else ""
        died = " (torchrun ends all processes when one has died)" if size > 1 else ""
        click.echo(f"{one}interrupted{died}: --resume goes on", err=True)
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        click.echo(f"error: {_message(Exception(error.format_message()))}", err=True)
        return 2
    except ValueError as error:  # CheckpointError, DataError, ResultError and settings that do not fit are ValueErrors
        click.echo(f"error: {_message(error)}", err=True)
        return 2
    except (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        click.echo(f"error: {error.filename}: {error.strerror}: choose another place with --out", err=True)
        return 2
    except OSError as error:
        click.echo(f"error: {error.filename or 'writing failed'}: {error.strerror or error}", err=True)
        return 1
    except _FailedError as error:
        click.echo(f"error: {_message(error)}", err=True)
        return 1
    except (RuntimeError, MemoryError) as error:  # AnalysisError and torch's own, out of memory among them
        message = _message(error) or type(error).__name__
        hint = ": lower --batch-size or --memory" if "memory" in message.lower() else ""
        click.echo(f"error: {message}{hint}", err=True)
        return 1
    return 0


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated run ends as an interrupted one
    sys.exit(run())


if __name__ == "__main__":
    main()
