"""Tests of a spectrum whose GGN is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.analysis.operator_spectrum.exact_ggn import is_cheaper
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn
from hessian_tools.operators.gram import gram_numbers
from ikun.losses import LOSSES
from ikun.networks import Network, Spec


def objective_of(samples: int = 6, dtype: torch.dtype = torch.float64) -> Objective:
    torch.manual_seed(0)
    net = Network(Spec(input_shape=(1, 8, 8), channels=3, classes=3, timesteps=3, threshold=0.6)).double().eval()
    for p in net.parameters():
        if p.dim() > 1:
            p.data.mul_(2).add_(0.03)
    x, y = torch.rand(samples, 1, 8, 8).double(), torch.arange(samples) % 3
    return make_objective(net, LOSSES["ce"], (x, y), dtype=dtype)


def test_everything_is_that_of_the_dense_matrix() -> None:
    objective = objective_of()
    exact = torch.linalg.eigvalsh(dense(ggn(objective))).flip(0)
    r = spectrum(objective, SpectrumSettings(operators=("ggn",), exact=True, top=4, damping=0.01))
    s = r.spectra["ggn"]
    assert [e.value for e in s.eigenvalues] == pytest.approx(exact[:4].tolist(), rel=1e-10)
    assert all(e.converged and e.residual < 1e-10 for e in s.eigenvalues)
    assert s.trace is not None
    assert s.trace.estimate == pytest.approx(float(exact.sum()), rel=1e-10)
    assert (s.trace.stderr, s.trace.probes) == (0, 0)
    assert s.frobenius_norm == pytest.approx(float(exact.norm()), rel=1e-10)
    assert s.effective_dimension is not None
    assert s.effective_dimension.estimate == pytest.approx(float((exact / (exact + 0.01)).sum()), rel=1e-8)
    assert s.log_determinant is not None
    assert s.log_determinant.estimate == pytest.approx(float((exact + 0.01).log().sum()), rel=1e-8)
    assert s.density is not None
    (nodes,), (weights,) = s.density.nodes, s.density.weights
    assert sum(weights) == pytest.approx(1)
    for power in (1, 2, 3):
        moment = sum(w * n**power for n, w in zip(nodes, weights, strict=True))
        assert moment == pytest.approx(float((exact**power).mean()), rel=1e-10)


def test_it_agrees_with_lanczos_and_probes() -> None:
    objective = objective_of(20, torch.float32)
    one, two = (
        spectrum(objective, SpectrumSettings(operators=("hessian", "ggn"), exact=exact, top=3, density=False))
        for exact in (True, False)
    )
    for a, b in zip(one.spectra["ggn"].eigenvalues, two.spectra["ggn"].eigenvalues, strict=True):
        assert abs(a.value - b.value) <= a.residual + b.residual
        assert a.data_stderr == pytest.approx(b.data_stderr, rel=1e-2, nan_ok=True)
    assert one.spectra["hessian"].eigenvalues == two.spectra["hessian"].eigenvalues
    s, t = (r.spectra["ggn"].trace for r in (one, two))
    assert s is not None
    assert t is not None
    assert t.ci95[0] <= s.estimate <= t.ci95[1] or math.isnan(t.ci95[0])


@pytest.mark.parametrize("settings", [{"operators": ("hessian",)}, {"operators": ("ggn",), "method": "power"}])
def test_it_is_for_the_ggn(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="exact is for operator ggn with method lanczos"):
        SpectrumSettings(exact=True, **settings)  # type: ignore[arg-type]


class Tokens(nn.Module):
    """An embedding of tokens, a linear layer at every position, and outputs of their mean."""

    def __init__(self, words: int, width: int, classes: int) -> None:
        super().__init__()
        self.words, self.each, self.out = nn.Embedding(words, width), nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.each(self.words(x))).mean(1))
        return y


@pytest.mark.parametrize(
    ("words", "width", "classes", "samples", "positions", "least"),
    [
        (5000, 8, 10, 100, 4, 1000 * 40_000),  # rows of J of the embedding
        (2, 192, 10, 100, 80, 1000 * 192**2),  # rows of J are fewer operations than factors
        (2, 512, 100, 15, 20, (15 * 100 * 20) ** 2),  # products of factors at all pairs of positions
    ],
)
def test_all_eigenvalues_are_not_chosen_where_they_take_too_much_memory(
    words: int, width: int, classes: int, samples: int, positions: int, least: int
) -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, words, (samples, positions)), torch.arange(samples) % classes
    objective = make_objective(Tokens(words, width, classes), F.cross_entropy, (x, y))
    assert least < gram_numbers(objective) < 3 * least
    assert not is_cheaper(objective, 12 * least / 2**30)
    assert is_cheaper(objective, 50 * least / 2**30)
