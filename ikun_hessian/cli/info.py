"""The command `info`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ikun_hessian.cli.click_options import options, own_options
from ikun_hessian.cli.inputs import one_checkpoint
from ikun_hessian.cli.screen import dumps, echo
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.options import DATA_DIR, JSON

if TYPE_CHECKING:
    from ikun.checkpoint import Checkpoint
    from ikun.layer_statistics import LayerStatistics


@click.command("info")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@options(JSON, DATA_DIR)
@own_options
def info_command(checkpoint: Path, as_json: bool, data_dir: Path | None, own: Own) -> None:
    """Describe a checkpoint, and every layer of its network, at initialization and after training.

    The variance of the weights is shown next to the one of IKUN's rule. The gains from layer to layer are measured. Of
    a network of your own, the neurons are shown as they are.
    """
    checkpoint = one_checkpoint(checkpoint)
    if own.meant(checkpoint):
        _show_own(checkpoint, own, as_json)
        return
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
    with batch_norm_by_batch(fresh.network.eval()):  # evaluation mode: no dropout
        before = observe(fresh.network, x, y, LOSSES[found.loss])
    after = observe(found.build(), x, y, LOSSES[found.loss])
    if as_json:
        states = {"initialization": before, "trained": after}
        table = {
            k: [{**dataclasses.asdict(s), "rule_variance": s.rule_variance(spec.alpha)} for s in v]
            for k, v in states.items()
        }
        told = {"network": dataclasses.asdict(found.network), "training": found.training, "layers": table}
        echo(dumps({**told, "initializer_passes": fresh.forward_passes}))
        return
    n, t = found.network, {**dataclasses.asdict(spec), "epochs_run": "?", "samples": "?", **found.training}
    echo(str(checkpoint))
    echo(f"{n.model}, {n.neuron} neurons, {n.reset} reset, surrogate {n.surrogate}, T = {n.timesteps}, norm {n.norm},")
    echo(f"loss {found.loss}, {sum(p.numel() for p in found.build().parameters()):,} parameters")
    gain = f", gain {t['gain']:g}" if t["gain"] != 1 else ""
    echo(f"{t['init']} initializer (alpha {t['alpha']:g}{gain}), {fresh.forward_passes} forward passes over a batch")
    echo(
        f"{t['optimizer']} lr {t['lr']:g}, {t['epochs_run']} epochs on {found.data.name}, {t['samples']} samples, "
        f"seed {t['seed']}"
    )
    if t.get("best_epoch", t["epochs_run"]) != t["epochs_run"]:
        echo(f"weights of epoch {t['best_epoch']}, the best or the last finite one")
    surrogate = Surrogate.parse(n.surrogate)
    if {"accuracy", "test_accuracy"} <= set(found.kept):
        echo(f"train accuracy {found.kept['accuracy']:.1%}, test accuracy {found.kept['test_accuracy']:.1%}")
    for failure in found.training.get("failures", ()):
        echo(f"! {failure}")

    def show(title: str, rows: Sequence[LayerStatistics]) -> None:
        echo(f"\n{title}")
        echo("layer    Var W   rule's  E[f'^2]  firing  dead  Var current  forward  backward")
        for s in rows:
            echo(
                f"{s.name:<6}{s.weight_variance:>8.2g} {s.rule_variance(spec.alpha):>8.2g} {s.derivative_square:>8.3g} "
                f"{s.firing_rate:>7.3f} {s.dead:>5.0%} {s.current_variance:>12.3g} {s.forward_gain:>8.3g} "
                f"{s.backward_gain:>9.3g}"
            )

    show("at initialization (BatchNorm, if any, by the batch)", before)
    show("as trained (BatchNorm, if any, by its running statistics)", after)
    echo(
        f"\nrule's: alpha / (fan_in E[x^2] E[f'^2]), alpha = {spec.alpha:g}, from this layer's moments.\n"
        "forward: Var current, relative to that of the previous layer. backward: mean\n"
        "square of the loss gradient at the previous layer, relative to that at this one.\n"
        "Initializers aim to keep both near 1. dead: share of neurons that never fire on\n"
        "512 samples.\n"
        f"f'(x) = {surrogate.family.formula} at x = h - threshold, a = {surrogate.parameter:g}."
    )


def _show_own(path: Path, own: Own, as_json: bool) -> None:
    """Describe the neurons of a network of the user's own on its first 512 samples."""
    from hessian_tools import nested
    from ikun.adapters.layer_activity import layer_activity
    from ikun_hessian.jobs.device import half_of_the_memory
    from ikun_hessian.jobs.user.network import located, open_own

    found = open_own(path, own, samples="all", surrogate=None, memory=half_of_the_memory("cpu"))
    adapted = found.adapted()
    with located():
        rows = layer_activity(adapted, nested.selected(found.x, slice(512)), found.y[:512], found.loss)
    if not rows:
        raise click.UsageError(f"{path}: the network has no spiking neurons of a library that is known")
    if as_json:
        layers = [{k: v for k, v in dataclasses.asdict(s).items() if v == v} for s in rows]
        echo(dumps({"network": found.network, "data": found.data, "layers": layers, "nodes": adapted.nodes}))
        return
    n = found.network
    echo(f"{path}: {n['model']}, {n['library']}, {n['neuron']} neurons, surrogate {n['surrogate']}")
    width = max(8, *(len(s.name) for s in rows)) + 1
    echo(f"\n{'neurons':<{width}}firing  dead  E[f'^2]  Var current  forward  backward")
    for s in rows:
        echo(
            f"{s.name:<{width}}{s.firing_rate:>6.3f} {s.dead:>5.0%} {_cell(s.derivative_square, 8)} "
            f"{_cell(s.current_variance, 12)} {_cell(s.forward_gain, 8)} {_cell(s.backward_gain, 9)}"
        )
    for name, reason in adapted.nodes.items():
        if reason:
            echo(f"! {name}: E[f'^2] is not known: {reason}")
    echo(
        f"\nOn {min(len(found.y), 512)} samples, in the order of the calls. forward: Var current, relative to that of\n"
        "the neurons before. backward: mean square of the loss gradient there, relative to that at these."
    )


def _cell(value: float, width: int) -> str:
    return f"{value:>{width}.3g}" if value == value else "-".rjust(width)


def _refuse_too_long(path: Path, found: Checkpoint, count: int) -> None:
    """Raise UsageError if the passes over 512 samples would take more than half of the memory (T may be 10,000)."""
    import math

    import torch

    from hessian_tools.objective import make_objective
    from hessian_tools.operators.curvature import product_bytes
    from ikun.losses import LOSSES
    from ikun_hessian.jobs.device import half_of_the_memory

    n = found.network
    one = torch.zeros(1, *((n.timesteps,) if n.coding == "poisson" else ()), *n.input_shape)
    batch = one, torch.zeros(1, dtype=torch.long)
    each = sum(product_bytes(make_objective(found.build(), LOSSES[found.loss], batch, check=False)))
    coded = 4 * count * n.timesteps * math.prod(n.input_shape) if n.coding == "poisson" else 0
    needed, most = (3 * 512 * each + coded) / 2**30, half_of_the_memory("cpu")
    if needed > most:
        raise click.UsageError(
            f"{path}: T = {n.timesteps} needs about {needed:.0f} GiB, more than half of the memory of this machine. "
            "spectrum computes such networks in smaller batches; info cannot."
        )
