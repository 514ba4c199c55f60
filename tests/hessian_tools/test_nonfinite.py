"""Tests that a NaN or an infinity is traced to the first layer that produces it."""

import pytest
import torch
from torch import nn

from hessian_tools.analysis.context import AnalysisError
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.nonfinite import first_not_finite
from hessian_tools.objective import make_objective

DATA = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2), torch.arange(6) % 3


class Root(nn.Module):
    """x + |x - x0|^power at x0: finite, without a derivative for power < 1, without a second one for power < 2."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.detach()).abs() ** self.power + x


class Overflow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e308 * 1e308


def objective(middle: nn.Module):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), middle, nn.Linear(4, 3)).double()
    return make_objective(model, nn.functional.cross_entropy, DATA)


def test_a_finite_network_has_no_such_layer():
    assert first_not_finite(objective(nn.Tanh())) is None


def test_output_names_the_first_layer_with_an_infinite_output():
    assert first_not_finite(objective(Overflow())) == "the output of layer '3' (Overflow) is not finite"


def test_gradient_names_the_last_parameter_before_the_layer():
    assert first_not_finite(objective(Root(0.5))) == "the gradient is not finite from '2.bias' backwards"


def test_curvature_names_the_last_parameter_before_the_layer():
    assert first_not_finite(objective(Root(1.5))) == "second derivatives are not finite from '2.bias' backwards"


def test_the_analysis_stops_with_the_name_of_the_layer():
    with pytest.raises(AnalysisError, match=r"second derivatives are not finite from '2.bias' backwards"):
        spectrum(objective(Root(1.5)), SpectrumSettings(top=2, smallest=1))
    with pytest.raises(AnalysisError, match=r"the output of layer '3' \(Overflow\) is not finite"):
        spectrum(objective(Overflow()), SpectrumSettings(top=2, smallest=1))


def test_a_loss_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(2, 3)).double()
    found = make_objective(model, lambda out, y: out.mean() / 0, DATA)
    assert "loss" in (first_not_finite(found) or "")


def test_hooks_are_removed():
    found = objective(Overflow())
    first_not_finite(found)
    assert not any(m._forward_hooks for m in found.model.modules())
