"""Warnings of a spectrum: a network that learned nothing, few samples, and signs of the curvature."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.analysis.warnings import learned_nothing, warnings_of
from hessian_tools.objective import make_objective
from hessian_tools.perturbation import class_count, count_correct
from hessian_tools.results.spectrum import SpectrumResult

FIRING = {"spike1": {"dead": 0.2}, "spike2": {"dead": 0.0}}


@pytest.mark.parametrize(
    ("accuracy", "loss", "classes", "activity", "words"),
    [
        (0.95, 0.1, 10, FIRING, ""),
        (math.nan, 0.1, 10, FIRING, ""),
        (0.11, 0.1, 10, FIRING, "guessing gives 10.0%"),
        (0.19, 0.1, 10, {}, "not learned"),
        (0.9, math.nan, 10, {}, "diverged"),
        (0.5, 0.1, None, {}, ""),
        (0.9, 0.1, 2, {}, ""),  # below twice that of guessing, like every accuracy
        (0.6, 0.1, 2, {}, "not learned"),
        (0.95, 0.1, 10, {"spike1": {"dead": 1.0}}, "never fires"),
    ],
)
def test_a_network_that_learned_nothing_is_named(
    accuracy: float, loss: float, classes: int | None, activity: dict[str, Any], words: str
) -> None:
    found = learned_nothing(accuracy, loss, classes, activity)
    assert (words in found) if words else not found


def analysed(**settings: Any) -> SpectrumResult:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    target = make_objective(net, F.cross_entropy, (torch.randn(96, 6), torch.randint(0, 3, (96,))))
    return spectrum(target, SpectrumSettings(top=2, smallest=2, density=False, **settings))


def test_a_smooth_network_is_not_said_to_have_a_surrogate() -> None:
    result = analysed(operators=("hessian",))
    assert result.spectra["hessian"].smallest_eigenvalues[0].value < -1e-3  # a true saddle
    assert not any("surrogate's" in text or "spiking" in text for text in result.warnings)


@pytest.mark.parametrize(
    ("outputs", "labels", "right"),
    [
        (torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([1, 0, 0]), 2),  # logits of class 1
        (torch.tensor([2.0, -1.0, 3.0]), torch.tensor([1, 1, 1]), 2),
        (torch.tensor([[0.9], [0.1]]), torch.tensor([1, 0]), None),  # probabilities, or small logits
        (torch.tensor([[2.0], [-1.0]]), torch.tensor([2, 0]), None),
        (torch.eye(3), torch.tensor([0, 1, 0]), 2),
        (torch.eye(3), torch.tensor([0, 1, 3]), None),
        (torch.eye(3), torch.tensor([0.0, 1.0, 2.0]), None),
        (torch.eye(3), torch.eye(3), 3),  # one-hot, of any dtype
        (torch.eye(3), torch.eye(3)[[0, 2, 1]], 1),
        (torch.eye(3), torch.eye(3)[[0, 2, 1]].long(), 1),
        (torch.eye(3), torch.eye(3)[[0, 2, 1]].bool(), 1),
        (torch.eye(3), 0.9 * torch.eye(3), None),  # a regression
        (torch.eye(3), torch.eye(3) + 1e-6, None),
        (torch.eye(3), torch.ones(3, 3), None),  # several labels per sample
        (torch.eye(3), torch.zeros(3, 3), None),
        (torch.eye(3), torch.eye(3)[:, :2], None),
        (torch.ones(3, 1), torch.ones(3, 1), None),
    ],
)
def test_correct_samples_are_counted_or_unknown(outputs: torch.Tensor, labels: torch.Tensor, right: int | None) -> None:
    found = count_correct(outputs, labels)
    assert found is None if right is None else int(found) == right  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(6))
def test_residuals_hold_the_round_off_of_a_saturated_network(seed: int) -> None:
    """In float32 with large logits, the distance to the true eigenvalue is many times the residual of the products."""
    torch.manual_seed(seed)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        net[2].weight.mul_(200)
    settings = SpectrumSettings(top=3, smallest=2, density=False, operators=("hessian",), tol=1e-4)
    found = spectrum(make_objective(net, F.cross_entropy, (x, y)), settings).spectra["hessian"]
    parameters = list(net.double().parameters())
    gradient = torch.autograd.grad(F.cross_entropy(net(x.double()), y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    matrix = torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
    true = torch.linalg.eigvalsh(matrix)
    for pair in (*found.eigenvalues, *found.smallest_eigenvalues):
        assert float((true - pair.value).abs().min()) <= pair.residual
        assert pair.residual <= 1e-4 * float(true.abs().max())


def test_a_fitted_network_is_analysed_in_float32() -> None:
    """At a cross-entropy of 1e-5 the second derivative of the loss cancels in float32, but not in float64."""
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    y = x[:, :3].argmax(1)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(6000):
        optimizer.zero_grad()
        value = F.cross_entropy(net(x), y)
        value.backward()
        if value < 1e-5:
            break
        optimizer.step()
    settings = SpectrumSettings(top=1, smallest=0, density=False)
    narrow = spectrum(make_objective(net, F.cross_entropy, (x, y)), settings)
    wide = spectrum(make_objective(net, F.cross_entropy, (x, y), dtype=torch.float64), settings)
    for name in ("hessian", "ggn"):
        a, b = (r.spectra[name].eigenvalues[0] for r in (narrow, wide))
        assert abs(a.value - b.value) <= 1e-5 * b.value
        assert narrow.spectra[name].symmetry_error < 1e-5


def matrix_of(net: nn.Module, loss: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    net = copy.deepcopy(net).double()
    parameters = list(net.parameters())
    gradient = torch.autograd.grad(loss(net(x.double()), y), parameters, create_graph=True)
    rows = []
    for g in torch.cat([g.reshape(-1) for g in gradient]):
        row = torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(row, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in pairs]))
    return torch.stack(rows)


class Dead(nn.Module):
    """A layer of rectifiers that are off for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.b(torch.relu(self.a(x) - 1e6))
        return out


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 3), Dead], ids=["logistic", "dead"])
@pytest.mark.parametrize("seed", range(3))
def test_eigenvalues_of_zero_do_not_spoil_the_residuals(make: Callable[[], nn.Module], seed: int) -> None:
    """The product with an eigenvector of eigenvalue 0 is round-off alone, which must not count for the others."""
    torch.manual_seed(seed)
    net, x, y = make(), torch.randn(64, 6), torch.arange(64) % 3
    settings = SpectrumSettings(top=3, smallest=2, density=False, operators=("hessian",))
    result = spectrum(make_objective(net, F.cross_entropy, (x, y)), settings)
    true = torch.linalg.eigvalsh(matrix_of(net, F.cross_entropy, x, y))
    found = result.spectra["hessian"]
    assert abs(float(true[0])) < 1e-9  # a smallest eigenvalue of zero
    for pair in (*found.eigenvalues, *found.smallest_eigenvalues):
        assert float((true - pair.value).abs().min()) <= pair.residual <= 1e-5 * float(true[-1])
    assert not any("missed" in text for text in result.warnings)


@pytest.mark.parametrize("operator", ["hessian", "ggn", "fisher"])
def test_outputs_of_one_axis_are_analysed_in_float32(operator: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(48, 6), (torch.arange(48) % 2).float()
    flat = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    settings = SpectrumSettings(top=1, smallest=0, density=False, operators=(operator,), tol=1e-4)
    values = []
    for net, targets in ((flat, y), (flat[:3], y[:, None])):
        target = make_objective(net, F.binary_cross_entropy_with_logits, (x, targets))
        values.append(spectrum(target, settings).spectra[operator].eigenvalues[0])
    assert abs(values[0].value - values[1].value) <= 1e-5 * values[1].value
    assert values[0].residual <= 1e-4 * values[0].value


def test_classes_are_known_from_labels() -> None:
    result = analysed(operators=("hessian",))
    assert result.data["classes"] == 3
    assert "not learned its task" in result.warnings[0]
    for labels, count in (
        (torch.tensor([0, 4, 1]), 5),
        (torch.eye(4)[[0, 1]], 4),
        (torch.eye(4, dtype=torch.long)[[0, 1]], 4),
        (torch.tensor([0.0, 1.0]), None),
        (torch.tensor([-1, 2]), None),
        (torch.rand(3, 2), None),
        (torch.zeros(3, 2, 2, dtype=torch.long), None),
        (torch.zeros(3, dtype=torch.complex64), None),
    ):
        assert class_count(labels) == count


def test_fewer_probes_than_usual_are_said() -> None:
    torch.manual_seed(0)
    target = make_objective(nn.Linear(4, 3), F.cross_entropy, (torch.randn(32, 4), torch.randint(0, 3, (32,))))
    asked = spectrum(target, SpectrumSettings(top=2, smallest=2, probes=2, steps=4, operators=("ggn",)))
    chosen = dataclasses.replace(asked, settings={**asked.settings, "probes": None})
    assert not any("probes instead of 4" in text for text in warnings_of(asked))
    assert any("2 probes instead of 4" in text for text in warnings_of(chosen))
