"""The command `train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ikun_hessian.options import data_dir_option, device_option, pick, shared
from ikun_hessian.screen import Bar, FailedError


@click.command()
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
@shared(data_dir_option, device_option)
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
    with Bar("train") as bar:
        checkpoint = run(
            network,
            dataclasses.replace(probe, held_out=held_out),
            spec,
            out,
            data_dir=data_dir,
            device=pick(device),
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
        raise FailedError("training diverged; the checkpoint holds the last finite epoch")
