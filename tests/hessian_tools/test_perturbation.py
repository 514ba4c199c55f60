"""Tests of outputs and losses at perturbed weights, against a model with these weights written into it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from draws import normal
from objectives import spiking_network
from scipy import stats
from torch import Tensor, nn

from hessian_tools.objective import Objective, make_objective
from hessian_tools.perturbation import accuracy, mean_loss, noise, noise_scales, outputs_at, sample_losses, targets
from ikun.losses import LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")


class Critic(nn.Module):
    """A model that calls one of its heads `value`."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.value(x))


class Accumulating(nn.Module):
    """A model with a state that must be reset."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.total: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + self.fc(x)
        return torch.sigmoid(self.total)


def clear(model: nn.Module) -> None:
    model.total = 0.0  # type: ignore[assignment]


def firing(loss: str = "mse", dtype: torch.dtype = torch.float64, params: str = "*", **fields: Any) -> Objective:
    small = {"model": "csnn", "input_shape": (1, 4, 5), "channels": 2, "hidden": (6,), "timesteps": 3}
    net = spiking_network(1, 1.0, **{**small, **fields})
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.data.mul_(2).add_(0.1)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.1, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, 0.2, 0.6)
    data = torch.rand(7, 1, 4, 5).to(dtype), torch.arange(7) % 3
    return make_objective(net.to(dtype), LOSSES[loss], data, batch_size=3, params=params)


def on_seven_samples(module: nn.Module, **fields: Any) -> Objective:
    return make_objective(module.double(), LOSSES["mse"], (normal(7, 6), torch.arange(7) % 3), batch_size=3, **fields)


OBJECTIVES = {
    "csnn": firing,
    "plif": lambda: firing(neuron="plif", reset="soft"),
    "float32": lambda: firing(dtype=torch.float32),
    "some parameters": lambda: firing(params="norm*,fc1.weight"),
    "mlp": lambda: firing(model="mlp", norm="none"),
    "critic": lambda: on_seven_samples(Critic()),
    "state": lambda: on_seven_samples(Accumulating(), reset=clear),
    "tied": lambda: on_seven_samples(tied()),
}


def tied() -> nn.Module:
    one, two = nn.Linear(6, 6), nn.Linear(6, 6)
    two.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), two)


def by_hand(objective: Objective, weights: Tensor) -> Tensor:
    """The outputs at a flat vector of weights: parameters written into a copy, forward() called sample by sample."""
    model, start = copy.deepcopy(objective.model), 0
    for name, p in model.named_parameters():
        if name in objective.parameters:
            p.data = weights[start : start + p.numel()].reshape(p.shape).clone()
            start += p.numel()
    assert start == len(weights)
    rows = []
    for x, _ in objective.batches:
        for sample in x:
            if objective.reset is not None:
                objective.reset(model)
            rows.append(model.forward(sample[None]).detach())
    return torch.cat(rows)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_outputs_at(name: str, threads: int) -> None:
    objective = OBJECTIVES[name]()
    before = {key: value.clone() for key, value in objective.model.state_dict().items()}
    steps = [objective.weights() + 0.5 * normal(objective.size, seed=i).to(objective.dtype) for i in range(7)]
    torch.set_num_threads(threads)
    found = list(outputs_at(objective, lambda i: steps[i], range(7)))
    exact = [by_hand(objective, w) for w in steps]
    assert len({tuple(out.flatten().tolist()) for out in exact}) > 3  # the order matters
    for out, wanted in zip(found, exact, strict=True):
        assert not out.requires_grad
        torch.testing.assert_close(out, wanted, rtol=1e-5 if objective.dtype == torch.float32 else 1e-12, atol=1e-12)
    for key, value in objective.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.requires_grad and p.grad is None for p in objective.parameters.values())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_losses_are_those_of_the_objective(loss: str) -> None:
    objective = firing(loss)
    (outputs,) = outputs_at(objective, lambda _: objective.weights(), [0])
    assert mean_loss(objective, outputs) == pytest.approx(objective.value_and_gradient()[0], rel=1e-13)
    each = sample_losses(objective, outputs)
    o, y = outputs.numpy(), targets(objective).numpy()
    log_sum = np.log(np.exp(o).sum(1))
    exact = ((o - np.eye(3)[y]) ** 2).mean(1) if loss == "mse" else log_sum - o[np.arange(7), y]
    np.testing.assert_allclose(each.numpy(), exact, rtol=1e-13)
    assert mean_loss(objective, outputs) == pytest.approx(exact.mean(), rel=1e-13)
    assert accuracy(objective, outputs) == (o.argmax(1) == y).mean()


def test_losses_are_float64_and_targets_may_be_numbers() -> None:
    x, y = normal(6, 2).float(), normal(6, 1, seed=1).float()
    objective = make_objective(nn.Linear(2, 1), lambda o, t: (o - t).square().mean(), (x, y), batch_size=4)
    outputs = (1 + 1e-6 * normal(6, 1, seed=2)).float()
    exact = (outputs.double().numpy() - y.double().numpy()) ** 2
    assert mean_loss(objective, outputs) == pytest.approx(exact.mean(), rel=1e-14)
    assert sample_losses(objective, outputs).dtype == torch.float64
    np.testing.assert_allclose(sample_losses(objective, outputs).numpy(), exact[:, 0], rtol=1e-14)
    assert np.isnan(accuracy(objective, outputs))


def test_noise_comes_in_antithetic_pairs_and_depends_on_seed_and_size_alone() -> None:
    one, other = firing(), firing(dtype=torch.float32, loss="ce")
    other.parameters["fc1.weight"].data.mul_(3)
    assert one.size == other.size
    first = [noise(one, 4, i) for i in range(6)]
    for i in (0, 2, 4):
        assert torch.equal(first[i], -first[i + 1])
        assert torch.equal(noise(other, 4, i), first[i].float())
        assert not torch.equal(noise(one, 5, i), first[i])
    assert not torch.equal(first[0], first[2])
    many = torch.cat([noise(one, 0, i) for i in range(0, 200, 2)])
    assert stats.kstest(many.numpy(), "norm").pvalue > 0.01
    other = firing(params="fc*")
    assert len(noise(other, 4, 0)) == other.size < one.size


def test_noise_scales_are_the_rms_of_filters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4)).double()
    net = nn.ModuleDict(
        {"body": model, "neuron": nn.ParameterDict({"logit": nn.Parameter(torch.tensor(-0.7).double())})}
    )
    objective = make_objective(net, LOSSES["mse"], (normal(1, 2, 3, 3), torch.zeros(1, dtype=torch.int64)), check=False)
    exact = []
    for p in net.parameters():
        a = p.detach().numpy()
        if a.ndim > 1:
            rms = np.sqrt((a.reshape(len(a), -1) ** 2).mean(1))
            exact.append(np.repeat(rms, a[0].size))
        else:
            exact.append(np.abs(a).reshape(-1))
    np.testing.assert_allclose(noise_scales(objective).numpy(), np.concatenate(exact), rtol=1e-13)


def test_a_loss_that_asks_for_values() -> None:
    def loss(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        errors = (o - y).square()
        return errors.mean() if errors.max().item() < 1 else errors.sqrt().mean()

    x, y = normal(6, 2), normal(6, 1, seed=1)
    objective = make_objective(nn.Linear(2, 1).double(), loss, (x, y), check=False)
    outputs = y + torch.tensor([[0.5], [2.0], [-0.1], [3.0], [-4.0], [0.0]])
    assert sample_losses(objective, outputs).tolist() == pytest.approx([0.25, 2.0, 0.01, 3.0, 4.0, 0.0])
