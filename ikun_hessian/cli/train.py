"""The command `train`."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.cli.options import Command, data_dir_option, device_option, shared
from ikun_hessian.cli.screen import FailedError
from ikun_hessian.jobs.device import pick
from ikun_hessian.jobs.existing_results import hold
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from ikun.data.spec import DataSpec
    from ikun.networks import Spec
    from ikun.training.spec import TrainingSpec


class Listed(click.Option):
    """An option whose values are listed in a module, and in its help as well: the module is too heavy for --help."""

    def __init__(self, *arguments: Any, choices: str, **fields: Any) -> None:
        super().__init__(*arguments, **fields)
        self.choices = choices  # module:collection of names


def _listed(name: str, choices: str, default: str | None, help: str) -> Command:
    return click.option(name, cls=Listed, choices=choices, default=default, show_default=True, help=help)


@click.command("train")
@click.option(
    "--data",
    "data_name",
    cls=Listed,
    choices="ikun.data.datasets:DATASETS",
    default="digits",
    show_default=True,
    help="digits, fashion-mnist, cifar10, image-folder, spike-times.",
)
@click.option("--image-size", type=int, help="Pixels a side that the images of image-folder are cut to.")
@_listed("--model", "ikun.networks:MODELS", "csnn", "csnn, mlp, resnet, rsnn. csnn is the paper's, rsnn recurrent.")
@click.option("--depth", default=2, show_default=True, help="Convolutions of the csnn; blocks of the resnet.")
@_listed(
    "--norm", "ikun.networks:NORMS", "bn", "none, bn, tdbn. bn: BatchNorm; tdbn: one that starts at the threshold."
)
@click.option("--dropout", default=0.0, show_default=True, help="Share of hidden neurons dropped in training.")
@_listed(
    "--init",
    "ikun.initializers.names:INITIALIZERS",
    "ikun",
    "ikun, ikun_v1, ikun_v2, xavier, kaiming, lecun, normal, orthogonal, delta_orthogonal, lsuv, fluctuation, firing, "
    "gradient_stable, tdbn.",
)
@click.option("--alpha", default=1.0, show_default=True, help="alpha of the ikun rule and of tdbn.")
@click.option("--gain", default=1.0, show_default=True, help="Factor on the variance of the initializer's weights.")
@_listed("--law", "ikun.initializers.names:LAWS", "empirical", "empirical, analytic. Law of h of ikun and firing.")
@click.option(
    "--surrogate",
    cls=Listed,
    choices="ikun.surrogates:FAMILIES",
    default="atan:2",
    show_default=True,
    metavar="NAME[:P]",
    help="atan, sigmoid, tanh, triangle, linear, fast_sigmoid, superspike, softsign, piecewise_exp, erf, gaussian, "
    "rect. P: its parameter.",
)
@_listed("--neuron", "ikun.neurons:NEURONS", "if", "if, lif, plif.")
@click.option("--tau", default=2.0, show_default=True, help="Time constant of lif (start of plif), in steps.")
@_listed("--reset", "ikun.neurons:RESETS", "hard", "hard, soft.")
@click.option("--detach-reset", is_flag=True, help="No derivative through the reset.")
@click.option("--timesteps", type=int, help="T [default: 4; that of the data if they are spike trains].")
@_listed(
    "--coding",
    "ikun.data.encoding:CODINGS",
    None,
    "direct, poisson, spikes. [default: direct; spikes if the data are spike trains]",
)
@click.option("--channels", default=16, show_default=True, help="Width C of csnn and resnet.")
@click.option("--hidden", default="128,128", show_default=True, help="Layer sizes of mlp and rsnn.")
@_listed("--loss", "ikun.losses:LOSSES", "mse", "mse, ce. mse: on rates.")
@_listed("--optimizer", "ikun.training.spec:OPTIMIZERS", "adam", "adam, sgd.")
@click.option("--momentum", default=0.9, show_default=True, help="Of sgd.")
@click.option("--lr", default=1e-3, show_default=True)
@_listed("--schedule", "ikun.training.spec:SCHEDULES", "cosine", "cosine, step, none.")
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
@click.option(
    "--save-at-loss",
    type=float,
    multiple=True,
    metavar="X",
    help="A checkpoint NAME.lossX.pt of the first epoch with a training loss (as logged: the mean over its batches, "
    "dropout on) of X or less; may be repeated.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Overwrite an existing checkpoint or interrupted run.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("ckpt.pt"), show_default=True)
@shared(data_dir_option, device_option)
def train_command(resume: bool, force: bool, out: Path, data_dir: Path | None, device: str, **options: Any) -> None:
    """Train a network from an initializer and write a checkpoint.

    The log, one JSON line an epoch, lies beside it. An interrupted run goes on with --resume and the same options.
    """
    from ikun.training.log import run_paths
    from ikun.training.loop import train as run
    from ikun.training.loop import training_lock

    network, data, spec = specifications(data_dir=data_dir, **options)
    hold(click.get_current_context().with_resource(ExitStack()), training_lock(out), out, "choose another --out")
    state = run_paths(out)["resume"]
    if state.exists() and not (force or resume):
        raise click.UsageError(f"an interrupted run lies at {state}: --resume it, or --force a new one")
    if out.exists() and not (force or (resume and state.exists())):
        raise click.UsageError(f"{out} exists: choose another --out, or --force to overwrite it")
    with Bar("train") as bar:
        checkpoint = run(
            network,
            data,
            spec,
            out,
            data_dir=data_dir,
            device=pick(device),
            resume=resume,
            progress=lambda done, total, note: bar.update(note, done, total),
            report=lambda failure: bar.say(failure + ("; lower --alpha" if spec.init == "ikun" else "")),
        )
    if kept := checkpoint.kept:
        run_all = checkpoint.training["epochs_run"]
        of = "" if kept["epoch"] == run_all else f", kept of {run_all}"
        click.echo(
            f"epoch {kept['epoch']}{of}: train loss {kept['loss']:.4g}, accuracy {kept['accuracy']:.1%}; "
            f"test loss {kept['test_loss']:.4g}, accuracy {kept['test_accuracy']:.1%}"
        )
    for failure in checkpoint.training["failures"]:
        click.echo(f"! {failure}")
    click.echo(f"{out}  (log {run_paths(out)['log'].name})")
    click.echo(f"next: ikun-hessian spectrum {out}")
    if any(f.startswith("NaN") for f in checkpoint.training["failures"]):
        raise FailedError("training diverged; the checkpoint holds the last finite epoch")


def specifications(
    *,
    data_name: str,
    data_dir: Path | None,
    subset: int | None,
    image_size: int | None,
    hidden: str,
    held_out: int,
    timesteps: int | None,
    coding: str | None,
    **options: Any,
) -> tuple[Spec, DataSpec, TrainingSpec]:
    """(network, data, training) as the options of `train` say, by their names there; the data are looked at for it.

    Raises ValueError or click.UsageError for what does not fit.
    """
    from ikun.data.spec import DataSpec
    from ikun.networks import Spec
    from ikun.training.spec import TrainingSpec

    fields = {f.name for f in dataclasses.fields(TrainingSpec)}
    spec = TrainingSpec(**{k: v for k, v in options.items() if k in fields})
    probe = DataSpec(data_name, subset, spec.seed, image_size=image_size)
    found = probe.load(data_dir=data_dir)
    if spec.patience and not held_out:
        held_out = max(1, len(found) // 10)
    if held_out and not 0 < held_out < len(found):
        raise click.UsageError(f"--held-out {held_out} leaves nothing of {len(found)} images to train on")
    try:
        sizes = tuple(int(part) for part in hidden.split(","))
    except ValueError:
        raise click.UsageError(f"--hidden '{hidden}' is no list of sizes like 128,128") from None
    if timesteps is None:
        timesteps = found.timesteps or 4
    network = Spec(
        input_shape=found.input_shape,
        classes=found.classes,
        hidden=sizes,
        timesteps=timesteps,
        coding=coding or ("direct" if found.timesteps is None else "spikes"),
        **{k: v for k, v in options.items() if k not in fields},
    )
    return network, dataclasses.replace(probe, held_out=held_out), spec
