"""The command `info`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ikun_hessian.cli.options import data_dir_option, json_option
from ikun_hessian.cli.screen import dumps

if TYPE_CHECKING:
    from ikun.checkpoint import Checkpoint
    from ikun.layer_statistics import LayerStatistics


@click.command("info")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@json_option
@data_dir_option
def info_command(checkpoint: Path, as_json: bool, data_dir: Path | None) -> None:
    """What a checkpoint is, and what every layer does: at initialization and as trained.

    The realised weight variance stands beside the one of IKUN's rule; the gains are measured, from layer to layer.
    """
    from ikun.checkpoint import load_checkpoint
    from ikun.layer_statistics import batch_norm_by_batch, observe
    from ikun.losses import LOSSES
    from ikun.surrogates import Surrogate
    from ikun.training.loop import initialized
    from ikun.training.spec import TrainingSpec

    found = load_checkpoint(checkpoint)
    data = found.samples(data_dir=data_dir)
    _refuse_too_long(checkpoint, found, len(data))
    x, y = found.inputs(data.images)[:512], data.labels[:512]
    known = {f.name for f in dataclasses.fields(TrainingSpec)}
    try:
        spec = TrainingSpec(**{k: v for k, v in found.training.items() if k in known})
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    fresh = initialized(found.network, data, spec)
    with batch_norm_by_batch(fresh.network.eval()):  # no dropout
        before = observe(fresh.network, x, y, LOSSES[found.loss])
    after = observe(found.build(), x, y, LOSSES[found.loss])
    if as_json:
        states = {"initialization": before, "trained": after}
        table = {
            k: [{**dataclasses.asdict(s), "rule_variance": s.rule_variance(spec.alpha)} for s in v]
            for k, v in states.items()
        }
        told = {"network": dataclasses.asdict(found.network), "training": found.training, "layers": table}
        click.echo(dumps({**told, "initializer_passes": fresh.forward_passes}))
        return
    n, t = found.network, {**dataclasses.asdict(spec), "epochs_run": "?", "samples": "?", **found.training}
    click.echo(str(checkpoint))
    click.echo(
        f"{n.model}, {n.neuron} neurons, {n.reset} reset, surrogate {n.surrogate}, T = {n.timesteps}, norm {n.norm},"
    )
    click.echo(f"loss {found.loss}, {sum(p.numel() for p in found.build().parameters()):,} parameters")
    gain = f", gain {t['gain']:g}" if t["gain"] != 1 else ""
    click.echo(
        f"{t['init']} initializer (alpha {t['alpha']:g}{gain}), {fresh.forward_passes} forward passes over a batch"
    )
    click.echo(
        f"{t['optimizer']} lr {t['lr']:g}, {t['epochs_run']} epochs on {found.data.name}, {t['samples']} samples, "
        f"seed {t['seed']}"
    )
    if t.get("best_epoch", t["epochs_run"]) != t["epochs_run"]:
        click.echo(f"weights of epoch {t['best_epoch']}, the best or the last finite one")
    surrogate = Surrogate.parse(n.surrogate)
    if {"accuracy", "test_accuracy"} <= set(found.kept):
        click.echo(f"train accuracy {found.kept['accuracy']:.1%}, test accuracy {found.kept['test_accuracy']:.1%}")
    for failure in found.training.get("failures", ()):
        click.echo(f"! {failure}")

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
        "near 1. dead: neurons that never fire on 512 samples.\n"
        f"f'(x) = {surrogate.family.formula} at x = h - threshold, a = {surrogate.parameter:g}."
    )


def _refuse_too_long(path: Path, found: Checkpoint, count: int) -> None:
    """Click's error where the passes over 512 samples would take more than half of the memory: T may be 10,000."""
    import math

    import torch

    from hessian_tools.chain.segments import bytes_per_sample
    from hessian_tools.objective import make_objective
    from ikun.losses import LOSSES
    from ikun_hessian.jobs.device import half_of_the_memory

    n = found.network
    one = torch.zeros(1, *((n.timesteps,) if n.coding == "poisson" else ()), *n.input_shape)
    each = bytes_per_sample(make_objective(found.build(), LOSSES[found.loss], (one, torch.zeros(1, dtype=torch.long))))
    coded = 4 * count * n.timesteps * math.prod(n.input_shape) if n.coding == "poisson" else 0
    needed, most = (3 * 512 * (each or 0) + coded) / 2**30, half_of_the_memory("cpu")
    if needed > most:
        raise click.UsageError(
            f"{path}: T = {n.timesteps}: its passes would take some {needed:.0f} GiB, more than half of this machine's "
            "memory: spectrum runs such networks in segments of time, info does not"
        )
