"""Training from an initializer to a checkpoint: deterministic, logged, resumable.

Everything random comes from (seed, epoch), so a run that is killed and resumed ends with the same weights, bit for
bit on the CPU, as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ikun import initializers
from ikun.checkpoint import Checkpoint, CheckpointError, DataSpec, read_plain, save_atomically, save_checkpoint
from ikun.data import Dataset, encode
from ikun.networks import LOSSES, Network, Spec
from ikun.statistics import LayerStatistics, observe

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("cosine", "step", "none")

# What counts as a failure. A layer is dead (saturated) when this share of its neurons never (always) fires on the
# fixed batch; a gradient explodes or vanishes by its norm, or by the ratio of mean squares of first and last layer.
DEAD_SHARE = 0.99
EXPLODING_NORM, VANISHING_NORM = 1e4, 1e-10
EXPLODING_RATIO, VANISHING_RATIO = 1e8, 1e-8


@dataclass(frozen=True)
class TrainingSpec:
    """How to train. momentum: of sgd. patience: stop after so many epochs without a better held-out loss and keep the
    best (0: never). step schedule: lr x 0.1 after each third of the epochs. snapshots: so many checkpoints on the way.
    """

    init: str = "ikun"
    alpha: float = 1.0
    law: str = "empirical"
    loss: str = "mse"
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "cosine"
    weight_decay: float = 0.0
    momentum: float = 0.9
    epochs: int = 20
    batch_size: int = 128
    seed: int = 42
    patience: int = 0
    snapshots: int = 0

    def __post_init__(self) -> None:
        choices = (("init", initializers.NAMES), ("law", initializers.LAWS), ("loss", tuple(LOSSES)))
        for name, allowed in (*choices, ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not '{getattr(self, name)}'")
        if not (self.lr > 0 and math.isfinite(self.lr) and self.alpha > 0 and self.weight_decay >= 0):
            raise ValueError("lr and alpha must be positive, weight_decay not negative")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")
        if self.epochs < 0 or self.batch_size < 1 or min(self.seed, self.patience, self.snapshots) < 0:
            raise ValueError("epochs, seed, patience and snapshots must not be negative, batch_size at least 1")


Progress = Callable[[int, int, str], None]  # (batches done, batches in all, note)


def generator(*key: int) -> torch.Generator:
    """An independent stream for every key, for instance (seed, epoch); (1, 0) and (1,) are one key."""
    words = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def learning_rate(spec: TrainingSpec, epoch: int) -> float:
    """Of epoch 0, 1, ...: a function of the epoch alone, so there is no scheduler state to resume."""
    if spec.schedule == "cosine":
        return spec.lr * 0.5 * (1 + math.cos(math.pi * epoch / spec.epochs))
    if spec.schedule == "step":
        return spec.lr * 0.1 ** (3 * epoch // spec.epochs)
    return spec.lr


def start(network: Spec, data: Dataset, spec: TrainingSpec, device: torch.device | str = "cpu") -> Network:
    """A freshly initialized network; ikun measures its law of h on the first 256 training samples."""
    torch.manual_seed(spec.seed)  # torch's own layer constructors draw, though every weight is drawn again
    net = Network(network)
    x = encode(data.images[:256], network.timesteps, network.coding, generator(spec.seed, 1))
    initializers.initialize(net, spec.init, generator=generator(spec.seed, 0), x=x, alpha=spec.alpha, law=spec.law)
    return net.to(device)


def train(
    network: Spec,
    data: DataSpec,
    spec: TrainingSpec,
    out: Path,
    *,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Train and write `out`, the log beside it (OUT.train.jsonl), snapshots and, until the end, OUT.resume.

    A run whose weights become NaN stops; the checkpoint then holds the last finite epoch and says so under
    training['failures']. Raises CheckpointError if there is nothing to resume or it was made with other settings,
    DataError for data that cannot be had, ValueError for patience without held-out samples or an initializer that has
    no solution.
    """
    if spec.patience and not data.held_out:
        raise ValueError("patience needs held-out samples: without them there is no loss to stop by")
    paths = run_paths(out)
    train_set, held_out = data.parts(data_dir)
    test_set = data.load("test", data_dir)
    settings = _settings(network, data, spec, train_set)
    reference = start(network, train_set, spec, device)
    net = start(network, train_set, spec, device)
    optimizer = _optimizer(net, spec)
    state: dict[str, Any] = {"epoch": 0, "history": [], "best": None, "stopped": False}
    if resume:
        state = _read_resume(paths["resume"], settings)
        net.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    state["settings"] = settings
    _rewrite_log(paths["log"], state["history"])
    steps = len(_cuts(len(train_set), spec.batch_size))
    while state["epoch"] < spec.epochs and not state["stopped"]:
        epoch = state["epoch"]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, epoch)
        before = {k: v.detach().clone() for k, v in net.state_dict().items()}
        line: dict[str, Any] = {"epoch": epoch + 1, "lr": learning_rate(spec, epoch)}
        for i, done in enumerate(_epoch(net, optimizer, train_set, spec, epoch), 1):
            line.update(done)
            if progress is not None:
                progress(epoch * steps + i, spec.epochs * steps, f"epoch {epoch + 1}, loss {done['loss']:.4f}")
        line.update(_evaluations(net, spec, test_set, held_out))
        observed = _observe(net, spec, train_set)
        line["layers"] = _layers(net, reference, observed)
        line["failures"] = failures(line, observed, net)
        if any(f.startswith("NaN") for f in line["failures"]):
            net.load_state_dict(before)
            state["stopped"] = True
        state["history"] = [*state["history"], line]
        state["epoch"] = epoch + 1
        _early_stop(state, line, net, spec)
        _append(paths["log"], line)
        if spec.snapshots and (epoch + 1) in _snapshot_epochs(spec):
            save_checkpoint(_checkpoint(network, data, spec, net, state, settings), snapshot_path(out, epoch + 1))
        save_atomically({**state, "network": net.state_dict(), "optimizer": optimizer.state_dict()}, paths["resume"])
    if state["best"] is not None:
        net.load_state_dict(state["best"]["network"])
    checkpoint = _checkpoint(network, data, spec, net, state, settings)
    save_checkpoint(checkpoint, out)
    paths["resume"].unlink(missing_ok=True)
    return checkpoint


def run_paths(out: Path) -> dict[str, Path]:
    """The files of a run beside its checkpoint."""
    return {"log": out.with_suffix(".train.jsonl"), "resume": out.with_name(out.name + ".resume")}


def snapshot_path(out: Path, epoch: int) -> Path:
    return out.with_name(f"{out.stem}.epoch{epoch:04d}{out.suffix}")


def _snapshot_epochs(spec: TrainingSpec) -> set[int]:
    return {round(spec.epochs * k / spec.snapshots) for k in range(1, spec.snapshots + 1)} - {0}


def _settings(network: Spec, data: DataSpec, spec: TrainingSpec, train_set: Dataset) -> dict[str, Any]:
    """What a resumed run must agree with, as plain values."""
    return {
        "network": json.loads(json.dumps(dataclasses.asdict(network))),
        "data": {**dataclasses.asdict(data), "sha256": train_set.sha256, "samples": len(train_set)},
        "training": dataclasses.asdict(spec),
    }


def _read_resume(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no interrupted run to resume: start without --resume")
    state = read_plain(path)
    known = state.get("settings")
    if not isinstance(known, dict) or {"network", "optimizer", "epoch", "history", "best", "stopped"} - set(state):
        raise CheckpointError(f"{path}: not the state of an interrupted run: remove it and start again")
    for part, values in settings.items():
        for key, value in values.items():
            if known.get(part, {}).get(key) != value:
                raise CheckpointError(
                    f"{path}: the interrupted run had {key} {known.get(part, {}).get(key)!r}, not {value!r}: "
                    "resume with its own options, or start again with --force"
                )
    return state


def _optimizer(net: Network, spec: TrainingSpec) -> torch.optim.Optimizer:
    if spec.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    return torch.optim.Adam(net.parameters(), spec.lr, weight_decay=spec.weight_decay)


def _cuts(count: int, size: int) -> list[tuple[int, int]]:
    """Batch boundaries; a last batch of one sample is dropped, BatchNorm has no variance there."""
    cuts = [(i, min(i + size, count)) for i in range(0, count, size)]
    return cuts[:-1] if len(cuts) > 1 and cuts[-1][1] - cuts[-1][0] == 1 else cuts


def _epoch(
    net: Network, optimizer: torch.optim.Optimizer, data: Dataset, spec: TrainingSpec, epoch: int
) -> Iterator[dict[str, float]]:
    """One pass over shuffled data; yields the running means of loss, accuracy and gradient norm after every batch."""
    net.train()
    device = next(net.parameters()).device
    order = torch.randperm(len(data), generator=generator(spec.seed, epoch, 2))
    spikes = generator(spec.seed, epoch, 3)
    loss_sum, right, norm_sum, seen = 0.0, 0, 0.0, 0
    for steps, (begin, end) in enumerate(_cuts(len(data), spec.batch_size), 1):
        index = order[begin:end]
        x = encode(data.images[index], net.spec.timesteps, net.spec.coding, spikes).to(device)
        y = data.labels[index].to(device)
        out = net(x, once=True)
        loss = LOSSES[spec.loss](out, y)
        optimizer.zero_grad()
        loss.backward()
        norm_sum += float(torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm())
        optimizer.step()
        loss_sum += loss.item() * len(y)
        right += int((out.argmax(1) == y).sum())
        seen += len(y)
        yield {"loss": loss_sum / seen, "accuracy": right / seen, "gradient_norm": norm_sum / steps}


@torch.no_grad()
def evaluate(net: Network, data: Dataset, loss: str, seed: int = 0, batch_size: int = 512) -> tuple[float, float]:
    """(mean loss, accuracy) in evaluation mode."""
    net.eval()
    device = next(net.parameters()).device
    spikes = generator(seed, 4)
    total, right = 0.0, 0
    for begin in range(0, len(data), batch_size):
        y = data.labels[begin : begin + batch_size].to(device)
        x = encode(data.images[begin : begin + batch_size], net.spec.timesteps, net.spec.coding, spikes).to(device)
        out = net(x, once=True)
        total += float(LOSSES[loss](out, y)) * len(y)
        right += int((out.argmax(1) == y).sum())
    return total / len(data), right / len(data)


def _evaluations(net: Network, spec: TrainingSpec, test: Dataset, held_out: Dataset | None) -> dict[str, float]:
    test_loss, test_accuracy = evaluate(net, test, spec.loss, spec.seed)
    found = {"test_loss": test_loss, "test_accuracy": test_accuracy}
    if held_out is not None:
        found["held_out_loss"], found["held_out_accuracy"] = evaluate(net, held_out, spec.loss, spec.seed)
    return found


def _observe(net: Network, spec: TrainingSpec, data: Dataset) -> tuple[LayerStatistics, ...]:
    """Layer statistics in evaluation mode on the first 256 training samples."""
    net.eval()
    device = next(net.parameters()).device
    x = encode(data.images[:256], net.spec.timesteps, net.spec.coding, generator(spec.seed, 1)).to(device)
    return observe(net, x, data.labels[:256].to(device), LOSSES[spec.loss])


def _layers(
    net: Network, reference: Network, observed: tuple[LayerStatistics, ...]
) -> dict[str, dict[str, float | None]]:
    """Per layer, for the log: firing rate, E[f'^2], and ||W - W0|| / ||W0||."""
    first = {name: weights.weight.detach() for name, weights, *_ in reference.stages()}
    now = {name: weights.weight.detach() for name, weights, *_ in net.stages()}
    return {
        s.name: {
            "firing_rate": s.firing_rate,
            "derivative_square": s.derivative_square,
            "distance": float((now[s.name] - first[s.name]).norm() / first[s.name].norm()),
        }
        for s in observed
    }


def failures(line: dict[str, Any], observed: tuple[LayerStatistics, ...], net: Network) -> list[str]:
    """The failures that an epoch shows, by name; [] for a healthy one."""
    found = []
    for name, p in net.named_parameters():
        if not bool(torch.isfinite(p).all()):
            found.append(f"NaN: {name.removeprefix('layers.')} is not finite")
    if not math.isfinite(line["loss"]) and not found:
        found.append("NaN: the loss is not finite")
    if found:
        return found
    for s in observed:
        if s.dead >= DEAD_SHARE:
            found.append(f"dead layer: {s.dead:.0%} of {s.neuron} ({s.name}) never fires")
        if s.saturated >= DEAD_SHARE:
            found.append(f"saturated layer: {s.saturated:.0%} of {s.neuron} ({s.name}) always fires")
    first, last = observed[0].gradient_square, observed[-1].gradient_square
    ratio = first / last if last > 0 else math.nan
    if line["gradient_norm"] > EXPLODING_NORM or ratio > EXPLODING_RATIO:
        found.append(f"exploding gradient: norm {line['gradient_norm']:.1e}, first to last layer {ratio:.1e}")
    if line["gradient_norm"] < VANISHING_NORM or ratio < VANISHING_RATIO:
        found.append(f"vanishing gradient: norm {line['gradient_norm']:.1e}, first to last layer {ratio:.1e}")
    return found


def _early_stop(state: dict[str, Any], line: dict[str, Any], net: Network, spec: TrainingSpec) -> None:
    """Keep the weights of the best held-out loss; stop when `patience` epochs brought none better."""
    if not spec.patience or state["stopped"]:
        return
    best = state["best"]
    if best is None or line["held_out_loss"] < best["loss"]:
        weights = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
        state["best"] = {"epoch": line["epoch"], "loss": line["held_out_loss"], "network": weights}
    elif line["epoch"] - best["epoch"] >= spec.patience:
        state["stopped"] = True


def _checkpoint(
    network: Spec, data: DataSpec, spec: TrainingSpec, net: Network, state: dict[str, Any], settings: dict[str, Any]
) -> Checkpoint:
    best = state["best"]["epoch"] if state["best"] is not None else state["epoch"]
    names = sorted({f for line in state["history"] for f in line["failures"]})
    training = {
        **settings["training"],
        "data_sha256": settings["data"]["sha256"],
        "samples": settings["data"]["samples"],
    }
    training |= {"epochs_run": state["epoch"], "best_epoch": best, "failures": names}
    weights: dict[str, Tensor] = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
    return Checkpoint(network, data, spec.loss, weights, training, state["history"])


def _rewrite_log(path: Path, history: list[dict[str, Any]]) -> None:
    """The log holds exactly the epochs that the state holds, also after a kill between the two writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(_json(line) for line in history), encoding="utf-8")


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_json(line))


def _json(line: dict[str, Any]) -> str:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(line)) + "\n"
