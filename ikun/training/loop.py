"""Train a network from an initializer to a checkpoint, reproducibly, with a log and a state to resume from.

All random numbers depend only on the seed and the epoch. A run that is killed and resumed therefore ends with the same
weights as an uninterrupted one, to the last bit on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.io.files import alone
from ikun.checkpoint import Checkpoint, CheckpointError, save_atomically, save_checkpoint
from ikun.data.datasets import Dataset
from ikun.data.encoding import encode
from ikun.data.spec import DataSpec
from ikun.initializers import catalog as initializers
from ikun.layer_statistics import LayerStatistics, batch_norm_by_batch, observe
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.training.health import failures, overdriven
from ikun.training.log import append, layer_lines, loss_path, run_paths, snapshot_path, write_description, write_log
from ikun.training.resume import NO_STATE, read_resume
from ikun.training.spec import TrainingSpec
from ikun.training.update import relaxed_twin, require_relaxed, update

TrainingProgress = Callable[[int, int, str], None]  # (batches done, total batches, note)


def generator(*key: int) -> torch.Generator:
    """Return a random generator whose stream is independent of that of every other key, for instance (seed, epoch).

    Trailing zeros do not count: (1, 0) and (1,) are the same key.
    """
    return torch.Generator().manual_seed(_seed(*key))


def _seed(*key: int) -> int:
    """Hash a key to a seed."""
    words = np.random.SeedSequence(key).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def learning_rate(spec: TrainingSpec, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 0.

    It depends only on the epoch, so a resumed run needs no state of a scheduler.
    """
    if spec.schedule == "cosine":
        return spec.lr * 0.5 * (1 + math.cos(math.pi * epoch / spec.epochs))
    if spec.schedule == "step":
        return spec.lr * 0.1 ** (3 * epoch // spec.epochs)
    return spec.lr


@dataclass(frozen=True)
class Initialization:
    """A freshly initialized network and the cost of its initializer.

    Attributes:
        network: The network.
        seconds: Time that the initializer took.
        forward_passes: Number of forward passes that the initializer ran.
    """

    network: Network
    seconds: float
    forward_passes: int


def start(network: Spec, data: Dataset, spec: TrainingSpec, device: torch.device | str = "cpu") -> Network:
    """Return the network that training starts from.

    Args:
        network: Architecture of the network.
        data: The training samples. Initializers that measure activity use the first 256.
        spec: Settings of the training, which name the initializer and the seed.
        device: Device of the network.

    Raises:
        ValueError: If the initializer has no solution.
    """
    return initialized(network, data, spec, device).network


def initialized(network: Spec, data: Dataset, spec: TrainingSpec, device: torch.device | str = "cpu") -> Initialization:
    """Return the network that training starts from, with the cost of its initializer (arguments as in `start`)."""
    torch.manual_seed(spec.seed)  # torch's layer constructors draw weights, which the initializer then replaces
    net = Network(network)
    x = encode(data.images[:256], network.timesteps, network.coding, generator(spec.seed, 1))
    began = time.perf_counter()
    done = initializers.initialize(
        net, spec.init, generator=generator(spec.seed, 0), x=x, alpha=spec.alpha, law=spec.law, gain=spec.gain
    )
    seconds = time.perf_counter() - began
    return Initialization(net.to(device), seconds, done.forward_passes)


def training_lock(out: Path) -> AbstractContextManager[None]:
    """Return a context that keeps other processes from training to the same path `out` (see `alone`)."""
    stem, suffix = re.escape(out.stem), re.escape(out.suffix)
    return alone(out, rf"{stem}(\.(epoch|loss)[^.]*(\.[^.]*)?)?{suffix}(\.resume)?|{stem}\.train\.jsonl?")


def train(
    network: Spec,
    data: DataSpec,
    spec: TrainingSpec,
    out: Path,
    *,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    progress: TrainingProgress | None = None,
    report: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Train a network and write its checkpoint.

    Next to the checkpoint it writes the log (OUT.train.jsonl), the description of the run (OUT.train.json, at the start
    and at the end) and the checkpoints that `spec` asks for during training. The state to resume from (OUT.resume) is
    written before the first epoch and after every epoch, and removed at the end.

    A run stops when its weights become NaN. The checkpoint then holds the weights of the last finite epoch, and
    training["failures"] names the failure.

    Args:
        network: Architecture of the network.
        data: The samples to train on and to hold out.
        spec: Settings of the training.
        out: Path of the checkpoint.
        data_dir: Folder of the data set's files; None for the default folder.
        device: Device to train on.
        resume: Continue the interrupted run of `out`.
        progress: Called after every batch with the number of batches done, the total number and a note.
        report: Called before the first epoch with every sign of failure at initialization.

    Returns:
        The checkpoint that was written.

    Raises:
        CheckpointError: If there is no interrupted run to resume, or it has other settings.
        DataError: If the data cannot be loaded.
        ValueError: If `spec.patience` is set without held-out samples, the initializer has no solution, or the relaxed
            network is needed and the surrogate has none.
    """
    if spec.patience and not data.held_out:
        raise ValueError("patience needs held-out samples, whose loss it watches: set held_out, or set patience to 0")
    if spec.needs_relaxed:
        require_relaxed(network.surrogate)
    paths = run_paths(out)
    train_set, held_out = data.parts(data_dir)
    test_set = data.load("test", data_dir)
    settings = _settings(network, data, spec, train_set)
    begun = initialized(network, train_set, spec, device)
    reference, net = begun.network, copy.deepcopy(begun.network)
    optimizer = make_optimizer(net, spec)
    state: dict[str, Any] = {"epoch": 0, "history": [], "best": None, "stopped": False}
    if resume:
        state = read_resume(paths["resume"], settings)
        try:
            net.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises many types of errors for states that do not fit
            raise CheckpointError(f"{paths['resume']}: {NO_STATE}") from error
    state = {"saved_at_loss": {}, "seconds": 0.0, **state, "settings": settings}
    state.setdefault("start", _described(begun, spec, train_set))
    if report is not None and state["epoch"] == 0:
        for failure in _all_failures(state):
            report(failure)
    if not resume:
        _keep(state, net, optimizer, paths["resume"])
    if state["epoch"] == 0:
        for path in [*(loss_path(out, x) for x in spec.save_at_loss), *(snapshot_path(out, e) for e in _epochs(spec))]:
            path.unlink(missing_ok=True)  # left by an earlier run of the same name
    write_log(paths["log"], state["history"])
    write_description(paths["run"], _description(state, finished=False))
    steps = len(_cuts(len(train_set), spec.batch_size))
    while state["epoch"] < spec.epochs and not state["stopped"]:
        epoch, began = state["epoch"], time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, epoch)
        before = {k: v.detach().clone() for k, v in net.state_dict().items()}
        line: dict[str, Any] = {"epoch": epoch + 1, "lr": learning_rate(spec, epoch)}
        for i, done in enumerate(train_epoch(net, optimizer, train_set, spec, epoch), 1):
            line.update(done)
            if progress is not None:
                progress(epoch * steps + i, spec.epochs * steps, f"epoch {epoch + 1}, loss {done['loss']:.4f}")
        line.update(_evaluations(net, spec, test_set, held_out))
        observed = _observe(net.eval(), spec, train_set)
        line["layers"] = layer_lines(net, reference, observed)
        line["failures"] = failures(line, observed, net)
        if diverged := any(f.startswith("NaN") for f in line["failures"]):
            net.load_state_dict(before)
            state["stopped"] = True
        state["history"] = [*state["history"], line]
        state["epoch"] = epoch + 1
        _early_stop(state, line, net, spec)
        append(paths["log"], line)
        for path in [] if diverged else _moments(out, state, line, spec):
            save_checkpoint(_checkpoint(network, data, spec, net, state, epoch + 1), path)
        state["seconds"] += time.perf_counter() - began
        _keep(state, net, optimizer, paths["resume"])
    if state["best"] is not None:
        net.load_state_dict(state["best"]["network"])
    checkpoint = _checkpoint(network, data, spec, net, state, _best_epoch(state))
    save_checkpoint(checkpoint, out)
    write_description(paths["run"], _description(state, finished=True))
    paths["resume"].unlink(missing_ok=True)
    return checkpoint


def _keep(state: dict[str, Any], net: Network, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write the state that a resumed run starts from."""
    save_atomically({**state, "network": net.state_dict(), "optimizer": optimizer.state_dict()}, path)


def _moments(out: Path, state: dict[str, Any], line: dict[str, Any], spec: TrainingSpec) -> list[Path]:
    """Return the paths of the checkpoints to write after an epoch, and note the losses that it reached first."""
    new = {f"{x:g}": x for x in spec.save_at_loss if line["loss"] <= x and f"{x:g}" not in state["saved_at_loss"]}
    state["saved_at_loss"] |= dict.fromkeys(new, line["epoch"])
    snapshots = {line["epoch"]} & _epochs(spec)
    return [*(snapshot_path(out, e) for e in snapshots), *(loss_path(out, x) for x in new.values())]


def _epochs(spec: TrainingSpec) -> set[int]:
    """Return the epochs after which snapshots are written."""
    return {round(spec.epochs * k / spec.snapshots) for k in range(1, spec.snapshots + 1)} - {0}


def _settings(network: Spec, data: DataSpec, spec: TrainingSpec, train_set: Dataset) -> dict[str, Any]:
    """Return the settings of a run, which a resumed run must share, as plain values."""
    return {
        "network": json.loads(json.dumps(dataclasses.asdict(network))),
        "data": {**dataclasses.asdict(data), "sha256": train_set.sha256, "samples": len(train_set)},
        "training": dataclasses.asdict(spec),
    }


def _description(state: dict[str, Any], *, finished: bool) -> dict[str, Any]:
    """Return the contents of the description of a run."""
    return {
        **state["settings"],
        "finished": finished,
        "epochs_run": state["epoch"],
        "best_epoch": _best_epoch(state),
        "failures": _all_failures(state),
        "saved_at_loss": state["saved_at_loss"],
        "seconds": state["seconds"],
        "start": state["start"],
    }


def _described(begun: Initialization, spec: TrainingSpec, data: Dataset) -> dict[str, Any]:
    """Return the cost of the initializer and the statistics of every layer before training.

    BatchNorm uses the statistics of the batch, because its running statistics are not yet estimated.
    """
    with batch_norm_by_batch(begun.network.eval()):
        layers = [dataclasses.asdict(s) for s in _observe(begun.network, spec, data)]
    return {"seconds": begun.seconds, "forward_passes": begun.forward_passes, "layers": layers}


def make_optimizer(net: Network, spec: TrainingSpec) -> torch.optim.Optimizer:
    """Return the optimizer of a specification, over all parameters."""
    if spec.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    return torch.optim.Adam(net.parameters(), spec.lr, weight_decay=spec.weight_decay)


def _cuts(count: int, size: int) -> list[tuple[int, int]]:
    """Return the (start, end) of every batch. A last batch of one sample is dropped, because BatchNorm needs two."""
    cuts = [(i, min(i + size, count)) for i in range(0, count, size)]
    return cuts[:-1] if len(cuts) > 1 and cuts[-1][1] - cuts[-1][0] == 1 else cuts


def train_epoch(
    net: Network, optimizer: torch.optim.Optimizer, data: Dataset, spec: TrainingSpec, epoch: int
) -> Iterator[dict[str, float]]:
    """Train for one epoch. Yields the means of loss, accuracy and gradient norm so far after every batch."""
    forward = relaxed_twin(net).train() if spec.sam_forward == "relaxed" else net.train()
    torch.manual_seed(_seed(spec.seed, epoch, 5))  # for dropout
    device = next(net.parameters()).device
    order = torch.randperm(len(data), generator=generator(spec.seed, epoch, 2))
    spikes = generator(spec.seed, epoch, 3)
    loss_sum, right, norm_sum, seen = 0.0, 0, 0.0, 0
    for steps, (begin, end) in enumerate(_cuts(len(data), spec.batch_size), 1):
        index = order[begin:end]
        x = encode(data.images[index], net.spec.timesteps, net.spec.coding, spikes).to(device)
        y = data.labels[index].to(device)
        out, loss, norm = update(
            forward,
            LOSSES[spec.loss],
            optimizer,
            x,
            y,
            radius=spec.sam,
            adaptive=spec.asam,
            seed=_seed(spec.seed, epoch, 6, steps),
        )
        norm_sum += norm
        loss_sum += loss.item() * len(y)
        right += int((out.argmax(1) == y).sum())
        seen += len(y)
        yield {"loss": loss_sum / seen, "accuracy": right / seen, "gradient_norm": norm_sum / steps}


@torch.no_grad()
def evaluate(net: Network, data: Dataset, loss: str, seed: int = 0, batch_size: int = 512) -> tuple[float, float]:
    """Evaluate a network.

    Args:
        net: The network. It is switched to evaluation mode.
        data: The samples.
        loss: Name of the loss.
        seed: Seed of the spikes of Poisson coding.
        batch_size: Number of samples per batch.

    Returns:
        The mean loss and the accuracy.
    """
    net.eval()
    device = next(net.parameters()).device
    spikes = generator(seed, 4)
    total, right = 0.0, 0
    for begin in range(0, len(data), batch_size):
        y = data.labels[begin : begin + batch_size].to(device)
        x = encode(data.images[begin : begin + batch_size], net.spec.timesteps, net.spec.coding, spikes).to(device)
        out = net(x)
        total += float(LOSSES[loss](out, y)) * len(y)
        right += int((out.argmax(1) == y).sum())
    return total / len(data), right / len(data)


def _evaluations(net: Network, spec: TrainingSpec, test: Dataset, held_out: Dataset | None) -> dict[str, float]:
    """Evaluate on the test samples and on the held-out samples."""
    test_loss, test_accuracy = evaluate(net, test, spec.loss, spec.seed)
    found = {"test_loss": test_loss, "test_accuracy": test_accuracy}
    if held_out is not None:
        found["held_out_loss"], found["held_out_accuracy"] = evaluate(net, held_out, spec.loss, spec.seed)
    if spec.relaxed_accuracy:
        twin = relaxed_twin(net)
        found["relaxed_test_loss"], found["relaxed_test_accuracy"] = evaluate(twin, test, spec.loss, spec.seed)
    return found


def _observe(net: Network, spec: TrainingSpec, data: Dataset) -> tuple[LayerStatistics, ...]:
    """Measure the statistics of every layer on the first 256 training samples."""
    device = next(net.parameters()).device
    x = encode(data.images[:256], net.spec.timesteps, net.spec.coding, generator(spec.seed, 1)).to(device)
    return observe(net, x, data.labels[:256].to(device), LOSSES[spec.loss])


def _early_stop(state: dict[str, Any], line: dict[str, Any], net: Network, spec: TrainingSpec) -> None:
    """Keep the weights of the best held-out loss, and stop after `patience` epochs without a better one."""
    if not spec.patience or state["stopped"]:
        return
    best = state["best"]
    if best is None or line["held_out_loss"] < best["loss"]:
        weights = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
        state["best"] = {"epoch": line["epoch"], "loss": line["held_out_loss"], "network": weights}
    elif line["epoch"] - best["epoch"] >= spec.patience:
        state["stopped"] = True


def _checkpoint(
    network: Spec, data: DataSpec, spec: TrainingSpec, net: Network, state: dict[str, Any], epoch: int
) -> Checkpoint:
    """Return the checkpoint of a run whose weights are those of the given epoch."""
    settings = state["settings"]
    training = {
        **settings["training"],
        "data_sha256": settings["data"]["sha256"],
        "samples": settings["data"]["samples"],
        "epochs_run": state["epoch"],
        "best_epoch": epoch,
        "failures": _all_failures(state),
        "saved_at_loss": dict(state["saved_at_loss"]),
    }
    weights: dict[str, Tensor] = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
    return Checkpoint(network, data, spec.loss, weights, training, state["history"])


def _best_epoch(state: dict[str, Any]) -> int:
    """Return the epoch of the weights that are kept: the best or the last finite one. 0 is the initialization."""
    if state["best"] is not None:
        return int(state["best"]["epoch"])
    return int(state["epoch"]) - any(f.startswith("NaN") for line in state["history"][-1:] for f in line["failures"])


def _all_failures(state: dict[str, Any]) -> list[str]:
    """Return the failures at initialization and in all epochs, sorted and without repetitions."""
    begun = overdriven(state["start"]["layers"], state["settings"]["network"]["threshold"])
    return sorted({*begun, *(f for line in state["history"] for f in line["failures"])})
