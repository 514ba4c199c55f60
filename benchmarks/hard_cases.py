"""The networks of hard_networks.py: small networks of many architectures on five data sets, trained in seconds.

Every architecture has two or three networks. They are divided into a development half, which may be looked at while the
operator is changed, and a test half, which is measured once at the end. Of every architecture, the networks are sorted
by the SHA-256 of their names; the first, third, ... belong to the test half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hessian_tools.objective import Objective, make_objective
from hessian_tools.seeding import stream
from ikun.data.datasets import Dataset, load_dataset
from ikun.data.encoding import encode
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.training.loop import start
from ikun.training.spec import TrainingSpec

SIDE, FRAMES, TRAINED = 8, 8, 512  # side of images, steps of N-MNIST, number of training samples
MLP: dict[str, Any] = {"model": "mlp", "hidden": (32, 32), "norm": "none"}
SMALL: dict[str, Any] = {"model": "mlp", "hidden": (24, 24), "norm": "none"}
RESNET: dict[str, Any] = {"model": "resnet", "channels": 6, "samples": 128}
CSNN: dict[str, Any] = {"model": "csnn", "channels": 6, "norm": "bn", "samples": 128}
# architecture -> (fields of `Spec` and of `Case`, data sets)
ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": (MLP, ("digits", "fashion", "wine")),
    "deep": ({**MLP, "hidden": (24,) * 5}, ("digits", "fashion", "cancer")),
    "leak": ({**MLP, "neuron": "lif", "tau": 8.0, "timesteps": 8}, ("digits", "fashion", "cancer")),
    "residual": ({**RESNET, "norm": "none"}, ("digits", "fashion")),
    "residual-bn": ({**RESNET, "norm": "bn"}, ("digits", "fashion")),
    "residual-tdbn": ({**RESNET, "norm": "tdbn", "neuron": "lif"}, ("digits", "fashion")),
    "recurrent": ({**MLP, "model": "rsnn", "hidden": (32,), "timesteps": 8}, ("digits", "n-mnist", "wine")),
    "poisson": ({**MLP, "coding": "poisson", "timesteps": 8}, ("digits", "fashion")),
    "events": (SMALL, ("n-mnist",)),
    "events-lif": ({**SMALL, "neuron": "lif"}, ("n-mnist",)),
    "initial": ({**MLP, "epochs": 0}, ("digits", "fashion", "wine")),
    "early": ({**MLP, "epochs": 2}, ("digits", "fashion")),
    "steep": ({**MLP, "surrogate": "superspike:25"}, ("digits", "cancer")),
    "dropout": ({**MLP, "dropout": 0.3}, ("digits", "cancer")),
    "csnn-bn": (CSNN, ("digits", "fashion")),
    "mlp-bn": ({**MLP, "norm": "bn"}, ("digits", "wine")),
    "one-step": ({**MLP, "timesteps": 1}, ("digits", "cancer")),
    "soft-reset": ({**MLP, "reset": "soft", "neuron": "lif"}, ("digits", "wine")),
    "plif": ({**MLP, "neuron": "plif"}, ("fashion", "cancer")),
    "cross-entropy": ({**MLP, "loss": "ce"}, ("digits", "fashion")),
    "long": ({**MLP, "timesteps": 16}, ("fashion", "wine")),
}
FIELDS = ("epochs", "loss", "samples")  # of `Case`; the others are those of `Spec`


@dataclass(frozen=True)
class Case:
    """A network to train.

    Attributes:
        architecture: One of ARCHITECTURES.
        data: "digits", "fashion", "n-mnist", "wine" or "cancer".
        seed: Seed of the initialization and of the training.
        network: Fields of its `Spec`.
        epochs: Number of epochs over TRAINED samples.
        loss: Name of the loss.
        samples: Number of training samples on which curvature is measured.
    """

    architecture: str
    data: str
    seed: int
    network: dict[str, Any] = field(repr=False)
    epochs: int = 60
    loss: str = "mse"
    samples: int = 256

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.data}-{self.seed}"


def cases() -> list[Case]:
    """Return all networks. The networks of an architecture differ in data and seed, or at least in the seed."""
    found = []
    for architecture, (options, data) in ARCHITECTURES.items():
        own = {name: value for name, value in options.items() if name in FIELDS}
        network = {name: value for name, value in options.items() if name not in FIELDS}
        names = data if len(data) > 1 else data * 2
        found += [Case(architecture, name, seed, network, **own) for seed, name in enumerate(names)]
    return found


def halves() -> Mapping[str, str]:
    """Return "development" or "test" for the name of every network."""
    found = {}
    for architecture in ARCHITECTURES:
        names = [case.name for case in cases() if case.architecture == architecture]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        found.update({name: ("test", "development")[i % 2] for i, name in enumerate(names)})
    return found


@cache
def samples_of(name: str, folders: tuple[Path | None, Path | None]) -> tuple[Tensor, Tensor, int]:
    """Return inputs [N, C, H, W] or [N, T, C, H, W], labels [N] and the number of classes.

    Images are reduced to SIDE x SIDE pixels. The features of wine and cancer are scaled to [0, 1].

    Args:
        name: Data set.
        folders: Folders of Fashion-MNIST and N-MNIST, or None for the default folder.
    """
    if name in ("wine", "cancer"):
        from sklearn.datasets import load_breast_cancer, load_wine

        x, y = (load_wine if name == "wine" else load_breast_cancer)(return_X_y=True)
        x = (x - x.min(0)) / (x.max(0) - x.min(0))
        order = torch.randperm(len(x), generator=stream(0))[:TRAINED]
        return torch.tensor(x, dtype=torch.float32)[order, None, None], torch.tensor(y)[order], int(y.max()) + 1
    if name == "digits":
        data = load_dataset("digits", subset=TRAINED)
    elif name == "fashion":
        data = load_dataset("fashion-mnist", subset=TRAINED, data_dir=folders[0], download=False)
    else:
        data = load_dataset("n-mnist", subset=TRAINED, data_dir=folders[1], frames=FRAMES, download=False)
    images = data.images[:]
    small = F.adaptive_avg_pool2d(images.flatten(0, -4), SIDE).view(*images.shape[:-2], SIDE, SIDE)
    return small, data.labels, data.classes


def trained(case: Case, folders: tuple[Path | None, Path | None] = (None, None)) -> Objective:
    """Train the network of a case with Adam and cosine decay, and return its loss on the first training samples."""
    x, y, classes = samples_of(case.data, folders)
    coding = {"coding": "spikes", "timesteps": FRAMES} if x.dim() == 5 else {}
    network = Spec(**{**case.network, **coding}, input_shape=tuple(x.shape[-3:]), classes=classes)
    data = Dataset(case.data, "train", x, y, classes, "")
    net = start(network, data, TrainingSpec(init="ikun", alpha=0.1, seed=case.seed))
    x = encode(x, network.timesteps, network.coding, stream(case.seed, 1))
    loss, order = LOSSES[case.loss], stream(case.seed, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, case.epochs))
    torch.manual_seed(case.seed)  # for dropout
    net.train()
    for _ in range(case.epochs):
        for batch in torch.randperm(len(x), generator=order).split(64):
            optimizer.zero_grad()
            loss(net(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    chosen = slice(0, case.samples)
    return make_objective(net.eval(), loss, (x[chosen], y[chosen]))


def relabelled(objective: Objective, surrogate: str) -> Objective:
    """Return the objective of the same weights with another surrogate."""
    model: Network = objective.model  # type: ignore[assignment]
    other = Network(Spec(**{**vars(model.spec), "surrogate": surrogate}))
    other.load_state_dict(model.state_dict())
    return make_objective(other.eval(), objective.loss, list(objective.batches))
