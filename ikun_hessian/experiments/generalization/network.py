"""Train one network of the study of generalization and measure it at two moments."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ikun_hessian.experiments.generalization.measures import NAMES, measured_sharpness
from ikun_hessian.experiments.generalization.result import (
    END,
    ENDING,
    MATCHED,
    SCHEMA,
    Moment,
    NetworkResult,
    load_network,
)
from ikun_hessian.experiments.generalization.settings import GeneralizationSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ikun.data.datasets import Dataset
    from ikun.data.spec import DataSpec
    from ikun.networks import Network, Spec
    from ikun.training.spec import TrainingSpec


@dataclass(frozen=True)
class NetworkUnit:
    """One network of the study: the work of one unit.

    Attributes:
        name: Name of the network.
        runs: Folder of the results.
        environment: Name of its environment.
        axes: Its value on every axis of the grid, as text.
        network: The architecture.
        data: The training samples, the same for all networks.
        training: The training.
        settings: Settings of the measures.
        data_dir: Folder of the data set; None for the download cache.
        device: "cpu" or "cuda".
        study: Process ID of the study.
    """

    name: str
    runs: Path
    environment: str
    axes: dict[str, str]
    network: Spec
    data: DataSpec
    training: TrainingSpec
    settings: GeneralizationSettings
    data_dir: Path | None
    device: str
    study: int

    @property
    def path(self) -> Path:
        """The file of the result."""
        return self.runs / f"{self.name}{ENDING}"

    @property
    def failure(self) -> Path:
        """The file that says why the last attempt failed."""
        return self.runs / f"{self.name}.failed.json"

    def done(self) -> bool:
        """Return whether there is a complete result."""
        from hessian_tools.io.json import ResultError

        try:
            return load_network(self.path).name == self.name
        except ResultError:
            return False

    def progress(self) -> float:
        """Return 1 if there is a result, else 0: a network takes seconds."""
        return float(self.path.exists())

    def run(self) -> None:
        """Train and measure the network, and write its result."""
        from hessian_tools.io.json import save_result

        save_result(trained_and_measured(self), self.path)


def trained_and_measured(unit: NetworkUnit) -> NetworkResult:
    """Train a network, and measure it at the first epoch at the threshold of the training loss, and at the end.

    The result depends only on the settings and the seed, on one machine to the last bit.
    """
    import torch

    from hessian_tools.io.versions import versions
    from ikun.training.loop import evaluate, learning_rate, make_optimizer, start, train_epoch

    train, test = _samples(unit.data, unit.data_dir)
    spec = unit.training
    net = start(unit.network, train, spec, unit.device)
    first = _weights(net)
    optimizer = make_optimizer(net, spec)
    moments: dict[str, Moment] = {}
    diverged, epoch, measuring, began = False, 0, 0.0, time.perf_counter()
    for epoch in range(1, spec.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, epoch - 1)
        for _ in train_epoch(net, optimizer, train, spec, epoch - 1):
            pass
        loss, accuracy = evaluate(net, train, spec.loss, spec.seed)
        diverged = not (math.isfinite(loss) and bool(torch.isfinite(_weights(net)).all()))
        if diverged:
            moments = {}
            break
        reached = [MATCHED] if loss <= unit.settings.threshold and MATCHED not in moments else []
        if reached or epoch == spec.epochs:
            started = time.perf_counter()
            moment = _moment(unit, net, first, epoch, (loss, accuracy), train, test, true=bool(reached))
            moments |= dict.fromkeys([*reached, *([END] if epoch == spec.epochs else [])], moment)
            measuring += time.perf_counter() - started
    return NetworkResult(
        schema=SCHEMA,
        name=unit.name,
        environment=unit.environment,
        axes=unit.axes,
        seed=spec.seed,
        diverged=diverged,
        epochs=epoch,
        test_samples=len(test),
        num_parameters=len(first),
        moments=moments,
        seconds={"training": time.perf_counter() - began - measuring, "measuring": measuring},
        settings=unit.settings.measured(),
        data_sha256={"train": train.sha256, "test": test.sha256},
        versions=versions(),
    )


def _moment(
    unit: NetworkUnit,
    net: Network,
    first: Tensor,
    epoch: int,
    trained: tuple[float, float],
    train: Dataset,
    test: Dataset,
    *,
    true: bool,
) -> Moment:
    """Measure a network at an epoch, on a copy."""
    from hessian_tools.objective import make_objective
    from ikun.data.encoding import encode
    from ikun.losses import LOSSES
    from ikun.training.loop import evaluate, generator

    spec, n = unit.training, unit.settings.samples
    net = copy.deepcopy(net).eval()
    for p in net.parameters():
        p.grad = None
    x = encode(train.images[:n], net.spec.timesteps, net.spec.coding, generator(spec.seed, 1)).to(unit.device)
    objective = make_objective(net, LOSSES[spec.loss], (x, train.labels[:n]))
    found = measured_sharpness(objective, unit.settings, true=true)
    weights = _weights(net)
    found |= {
        "training loss": trained[0],
        "learning rate": spec.lr,
        "weight norm": float(weights.norm()),
        "distance from initialization": float((weights - first).norm()),
        "random number": _random(unit),
    }
    test_loss, test_accuracy = evaluate(net, test, spec.loss, spec.seed)
    return Moment(
        epoch=epoch,
        train_loss=trained[0],
        train_accuracy=trained[1],
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        measures={name: _rounded(found.get(name, math.nan)) for name in NAMES},
    )


def _random(unit: NetworkUnit) -> float:
    """Return a number that depends on the name of the network only."""
    import hashlib

    return int.from_bytes(hashlib.sha256(unit.name.encode()).digest()[:6], "big") / 2**48


def _weights(net: Network) -> Tensor:
    """Return all weights [P] in float64."""
    import torch

    return torch.cat([p.detach().double().reshape(-1) for p in net.parameters()]).cpu()


def _rounded(value: float) -> float:
    """Round to 8 digits, so that a thousand results fit into a small archive."""
    return float(f"{value:.8g}")


@lru_cache(maxsize=2)
def _samples(data: DataSpec, data_dir: Path | None) -> tuple[Dataset, Dataset]:
    """Return the training samples and all test samples; each process reads them once."""
    return data.load("train", data_dir), data.load("test", data_dir)
