"""Tests of the Gram matrix of the Gauss-Newton matrix: against the dense matrix, for many kinds of layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine_networks import NETWORKS, objective_of
from sampled import sampled
from torch import Tensor, nn

from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators import gram
from hessian_tools.operators.curvature import _autograd_ggn
from hessian_tools.operators.gram import GramError, gram_eigenvectors, gram_matrix
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

NONE = {  # networks without one, and why
    "repeat_inplace_out": "samples depend on one another",
    "repeat_linear_T_first_reshape": "does not run on one sample",
}
LEFT_OUT = {"complex_w"}  # torch cannot differentiate it for one sample


def dense_ggn(objective: Objective) -> Tensor:
    """The Gauss-Newton matrix by autograd, column by column."""
    total = torch.zeros(objective.size, objective.size, dtype=objective.dtype)
    for i, weight in objective.batch_weights().items():
        product = _autograd_ggn(objective, objective.batches[i])
        total += weight * torch.stack([product(unit) for unit in torch.eye(objective.size, dtype=objective.dtype)], 1)
    return total


def check(objective: Objective, tol: float = 1e-10) -> None:
    matrix = dense_ggn(objective)
    found = gram_matrix(objective)
    exact = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)
    top, count = max(float(exact.abs().max()), 1e-200), min(len(exact), len(found.values))
    assert float((exact[:count] - found.values[:count]).abs().max()) <= tol * top
    assert float(exact[count:].abs().max() if len(exact) > count else 0) <= tol * top
    assert float(found.values[count:].max() if len(found.values) > count else 0) <= tol * top
    if top > 1e-200:
        vectors = gram_eigenvectors(objective, found, 2)
        kept = found.values[:2] > 1e-6 * top
        error = matrix.double() @ vectors - vectors * found.values[:2]
        assert float(error[:, kept].norm()) <= 1e4 * tol * top
        assert torch.allclose((vectors.T @ vectors).diagonal()[kept], torch.ones(int(kept.sum())).double(), rtol=1e-4)


@pytest.mark.parametrize("name", sampled([n for n in NETWORKS if NETWORKS[n].loss == "ce"], 4))
def test_eigenvalues_are_those_of_the_dense_matrix(name: str) -> None:
    objective = objective_of(NETWORKS[name])
    if objective.size > 4000 or name in LEFT_OUT:
        pytest.skip("too many parameters for a dense matrix")
    if name in NONE:
        with pytest.raises(GramError, match=NONE[name]):
            gram_matrix(objective)
        return
    check(objective, NETWORKS[name].tol)


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize(
    "fields",
    [
        {"model": "csnn"},
        {"model": "mlp", "hidden": (7,)},
        {"model": "resnet", "norm": "tdbn"},
        {"model": "csnn", "neuron": "plif"},  # its decay is learned: rows for each sample
        {
            "model": "rsnn",
            "hidden": (5,),
            "input_shape": (1, 1, 4),
            "coding": "poisson",
            "norm": "none",
            "timesteps": 4,
        },
    ],
)
def test_spiking_networks(fields: dict[str, object], loss: str) -> None:
    small = {"input_shape": (1, 8, 8), "channels": 3, "classes": 3, "timesteps": 3, "threshold": 0.6}
    torch.manual_seed(0)
    net = Network(Spec(**{**small, **fields})).double().eval()  # type: ignore[arg-type]
    for p in net.parameters():
        if p.dim() > 1:
            p.data.mul_(2).add_(0.03)
    shape = (4, 1, 1, 4) if fields["model"] == "rsnn" else (1, 8, 8)
    x, y = (torch.rand(7, *shape) < 0.6).double(), torch.arange(7) % 3
    check(make_objective(net, LOSSES[loss], [(x[:5], y[:5]), (x[5:], y[5:])]))


class Steps(nn.Module):
    """The same layers at every time step, with the samples in any place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.one, self.two = place, nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 6]
        t = torch.arange(1, 4).to(x).view(3, 1, 1) * x  # [T, N, 6]
        if self.place == "loop":
            return torch.stack([self.two(torch.tanh(self.one(part))) for part in t]).mean(0)
        if self.place == "first":
            return self.two(torch.tanh(self.one(t.transpose(0, 1)))).mean(1)
        if self.place == "joined":
            return self.two(torch.tanh(self.one(t.flatten(0, 1)))).view(3, len(x), 3).mean(0)
        if self.place == "joined, samples first":
            return self.two(torch.tanh(self.one(t.transpose(0, 1).flatten(0, 1)))).view(len(x), 3, 3).mean(1)
        return self.two(torch.tanh(self.one(t))).mean(0)


@pytest.mark.parametrize("samples", [1, 3, 7])
@pytest.mark.parametrize("place", ["second", "first", "joined", "joined, samples first", "loop"])
@pytest.mark.parametrize("pays", [True, False])
def test_samples_and_steps_are_told_apart(
    place: str, samples: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "_factors_pay", lambda *a: pays)
    torch.manual_seed(1)
    x, y = torch.randn(samples, 6).double(), torch.arange(samples) % 3
    check(make_objective(Steps(place).double(), F.cross_entropy, (x, y)))


def test_a_layer_that_is_used_by_itself_and_in_a_formula_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)) * self.one.weight.sum())

    torch.manual_seed(2)
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    check(make_objective(Both().double(), F.cross_entropy, (x, y)))


def test_outputs_that_are_changed_in_place() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    check(make_objective(net, F.cross_entropy, (x, y)))


def test_what_has_no_gram_matrix() -> None:
    torch.manual_seed(4)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    objective = make_objective(nn.Linear(4, 3).double(), lambda o, y: (torch.sin(3 * o) - y).square().mean(), (x, y))
    with pytest.raises(GramError, match="not convex"):
        gram_matrix(objective)
    many = make_objective(nn.Linear(4, 3000).double(), F.cross_entropy, (x, torch.arange(6)))
    with pytest.raises(GramError, match="18000 rows; at most 8192"):
        gram_matrix(many)
