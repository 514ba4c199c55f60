"""Objectives whose curvature is known or cheap to compute: quadratic losses, and small networks on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from draws import normal, seeded
from torch import Tensor, nn

from hessian_tools.objective import Objective, make_objective
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

Loss = Callable[[Tensor, Tensor], Tensor]
Model = TypeVar("Model", bound=nn.Module)


# --- losses that are functions of the weights


class WeightsAsOutputs(nn.Module):
    """A model whose output for every sample is its weights."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), *self.w.shape)


def objective_on(
    w: Tensor, loss: Loss, y: Tensor | None = None, model: Callable[[Tensor], nn.Module] = WeightsAsOutputs
) -> Objective:
    """A loss of the weights themselves, repeated for every target; without targets, one sample with target 1."""
    y = torch.ones(1, dtype=w.dtype) if y is None else y
    return make_objective(model(w), loss, (torch.zeros(len(y), 1, dtype=w.dtype), y), check=False)


def quadratic(a: Tensor, w: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Objective:
    """The loss of sample i is scale * y_i w'Aw / 2."""

    def loss(o: Tensor, y: Tensor) -> Tensor:
        flat = o.flatten(1)
        return scale * (y * (flat @ a.to(o.dtype) * flat).sum(1)).mean() / 2

    return objective_on(w, loss, y)


def positive_definite(shape: int | tuple[int, ...] = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A positive definite A [P, P] and P weights of this shape."""
    shape = (shape,) if isinstance(shape, int) else shape
    generator, size = seeded(seed), torch.Size(shape).numel()
    b = torch.randn(size, 2 * size, dtype=torch.float64, generator=generator)
    return b @ b.T / size, torch.randn(shape, dtype=torch.float64, generator=generator)


# --- networks


class Plainly(nn.Module):
    """A network of ikun whose neurons and pooling run step by step in plain torch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x, plain=True)
        return out


def plainly(objective: Objective) -> Objective:
    """The same objective in plain torch: the oracle, which shares no code with the passes of neurons."""
    return replace(objective, model=Plainly(objective.model), programs={})


def spiking_network(seed: int, gain: float = 2.0, **spec: Any) -> Network:
    """A network with initial weights from this seed, multiplied by `gain` so that it fires."""
    torch.manual_seed(seed)
    net = Network(Spec(**{"model": "mlp", "classes": 3, **spec}))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(gain)
    return net


def spiking_objective(
    seed: int = 5,
    *,
    samples: int = 12,
    gain: float = 2.0,
    loss: str = "mse",
    batch_size: int | None = 5,
    dtype: torch.dtype = torch.float64,
    inputs_seed: int | None = None,
    labels: str = "random",
    **spec: Any,
) -> Objective:
    """`spiking_network` on uniform inputs.

    The inputs follow the weights in the same stream, unless they have a seed of their own. labels: "random", "cyclic"
    (0, 1, 2, 0, ...) or "predicted" (every sample is classified correctly).
    """
    net = spiking_network(seed, gain, **spec)
    generator = None if inputs_seed is None else seeded(inputs_seed)
    x = torch.rand(samples, *net.spec.input_shape, generator=generator)
    if labels == "predicted":
        with torch.no_grad():
            y = net(x).argmax(1)
    else:
        y = torch.randint(0, 3, (samples,)) if labels == "random" else torch.arange(samples) % 3
    return make_objective(net, LOSSES[loss], (x, y), batch_size=batch_size, dtype=dtype)


def filled(model: Model, gain: float = 1.0, seed: int = 10) -> Model:
    """The model with normal weights of variance gain^2 / fan-in."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(gain * normal(*p.shape, seed=seed + i) / p[0].numel() ** 0.5)
    return model


def filled_objective(
    seed: int,
    gain: float,
    *,
    samples: int,
    inputs_seed: int,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float64,
    **spec: Any,
) -> Objective:
    """A spiking MLP with normal weights, its cross-entropy on positive inputs and cyclic labels."""
    net = filled(Network(Spec(**{"model": "mlp", "norm": "none", **spec})), gain, seed)
    x = normal(samples, *net.spec.input_shape, seed=inputs_seed).abs()
    y = torch.arange(samples) % net.spec.classes
    return make_objective(net, LOSSES["ce"], (x, y), dtype=dtype, batch_size=batch_size)


def firing_objective(
    loss: str = "mse", params: str = "*", dtype: torch.dtype = torch.float64, **fields: Any
) -> Objective:
    """A small network with random weights and norms, on five samples of 5 x 6 pixels."""
    torch.manual_seed(1)
    shape, small = (1, 5, 6), {"channels": 2, "hidden": (6, 5), "classes": 3, "timesteps": 3, "threshold": 0.6}
    spec = Spec(**{"input_shape": shape, "v_reset": -0.1, "tau": 1.6, **small, **fields})
    net = Network(spec)
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):  # large enough for spikes in every layer
            m.weight.data.mul_(2).add_(0.1)
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
            m.running_var.uniform_(0.1, 0.3)  # type: ignore[union-attr, operator]
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, 0, 0.5)
    x = torch.rand(5, *spec.input_shape)
    if spec.coding == "poisson":
        x = torch.bernoulli(x[:, None].expand(5, spec.timesteps, *spec.input_shape))
    return make_objective(net.to(dtype), LOSSES[loss], (x.to(dtype), torch.arange(5) % spec.classes), params=params)


def trained_smooth() -> Objective:
    """A smooth network of 11,178 parameters, trained for a few steps to separate its largest eigenvalue."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 21), nn.Tanh(), nn.Linear(21, 7))
    x, y = torch.randn(96, 64), torch.randint(0, 7, (96,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return make_objective(model, nn.functional.cross_entropy, (x, y), batch_size=40)
