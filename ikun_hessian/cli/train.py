"""The command `train`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.cli.click_options import options, threads_option
from ikun_hessian.cli.screen import FailedError, echo, echo_red
from ikun_hessian.jobs.device import pick
from ikun_hessian.jobs.existing_results import hold
from ikun_hessian.jobs.options import TRAIN
from ikun_hessian.jobs.progress_bar import Bar
from ikun_hessian.jobs.training import specifications

if TYPE_CHECKING:
    from ikun.training.spec import TrainingSpec


@click.command("train")
@options(*TRAIN)
@threads_option
def train_command(resume: bool, force: bool, out: Path, data_dir: Path | None, device: str, **options: Any) -> None:
    """Train a network from an initializer and write a checkpoint.

    The log is written to NAME.train.jsonl next to the checkpoint, with one JSON line per epoch. To continue an
    interrupted run, repeat the command with --resume.
    """
    from hessian_tools.analysis.warnings import learned_nothing
    from ikun.training.log import run_paths
    from ikun.training.loop import train as run
    from ikun.training.loop import training_lock

    network, data, spec = specifications(data_dir=data_dir, **options)
    hold(click.get_current_context().with_resource(ExitStack()), training_lock(out), out, "choose another --out")
    state = run_paths(out)["resume"]
    if state.exists() and not (force or resume):
        raise click.UsageError(f"{state}: an interrupted run. Use --resume to continue it, or --force to start again.")
    if out.exists() and not (force or (resume and state.exists())):
        raise click.UsageError(f"{out} exists: choose another --out, or use --force to overwrite it")
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
        echo(
            f"epoch {kept['epoch']}{of}: train loss {kept['loss']:.4g}, accuracy {kept['accuracy']:.1%}; "
            f"test loss {kept['test_loss']:.4g}, accuracy {kept['test_accuracy']:.1%}"
        )
        if said := learned_nothing(kept["accuracy"], kept["loss"], network.classes, {}):
            echo_red(f"! {said} {_hint(spec)}")
    for failure in checkpoint.training["failures"]:
        echo(f"! {failure}")
    if spec.init == "ikun" and options["alpha"] is None:
        echo(f"ikun initializer with alpha = {spec.alpha:g}; --alpha 1 is the literal reading of the paper")
    echo(f"{out}  (log {run_paths(out)['log'].name})")
    echo(f"next: ikun-hessian spectrum {out}")
    if any(f.startswith("NaN") for f in checkpoint.training["failures"]):
        raise FailedError("training diverged; the checkpoint holds the weights of the last finite epoch")


def _hint(spec: TrainingSpec) -> str:
    """Say what to change if a network has not learned."""
    smaller = f"a smaller --alpha (now {spec.alpha:g}), " if spec.init == "ikun" else ""
    return f"Try {smaller}more --epochs, another --lr (now {spec.lr:g}), or --init kaiming."
