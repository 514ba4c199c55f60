"""Tests of participation ratios and shares of eigenvectors, against NumPy and known vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hessian_tools.analysis.operator_spectrum.eigenvectors import gradient_shares, layer_shares, participation
from hessian_tools.objective import Objective, make_objective
from hessian_tools.perturbation import filter_norms


def unit_columns(size: int, count: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.linalg.qr(rng.standard_normal((size, count)))[0])


def objective() -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    return make_objective(model, nn.functional.mse_loss, (torch.randn(2, 1, 4, 4), torch.randn(2, 3)))


def test_participation_of_known_vectors_is_the_number_of_equal_entries() -> None:
    size = 12
    alike = torch.full((size,), size**-0.5, dtype=torch.float64)
    single = torch.eye(size, dtype=torch.float64)[3]
    half = torch.zeros(size, dtype=torch.float64)
    half[:6] = torch.tensor([1.0, -1, 1, -1, 1, 1]) / 6**0.5
    found = participation(torch.stack([alike, single, half], 1))
    assert found.tolist() == pytest.approx([1, 1 / size, 0.5])
    assert participation(torch.ones(1, 1, dtype=torch.float64)).tolist() == [1]


def test_participation_and_gradient_shares_agree_with_numpy() -> None:
    vectors = unit_columns(50, 7)
    v, g = vectors.numpy(), np.random.default_rng(1).standard_normal(50)
    np.testing.assert_allclose(participation(vectors).numpy(), 1 / (50 * (v**4).sum(0)))
    shares = gradient_shares(torch.from_numpy(g), vectors)
    np.testing.assert_allclose(shares.numpy(), [(u @ g) ** 2 / (g @ g) for u in v.T])


@pytest.mark.parametrize("scale", [1e-100, 1e-12, 1e12, 1e100])
def test_gradient_shares_sum_to_one_over_a_basis_at_any_scale(scale: float) -> None:
    vectors = unit_columns(20, 20)
    g = scale * torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = gradient_shares(g, vectors)
    assert float(shares.sum()) == pytest.approx(1)
    torch.testing.assert_close(shares, gradient_shares(g / scale, vectors))
    assert gradient_shares(vectors[:, 4], vectors).tolist() == pytest.approx([float(i == 4) for i in range(20)])


def test_a_zero_gradient_has_no_share() -> None:
    assert gradient_shares(torch.zeros(6), unit_columns(6, 2)).tolist() == [0, 0]


def test_layer_shares_agree_with_numpy() -> None:
    target = objective()
    sizes = {name: p.numel() for name, p in target.parameters.items()}
    vectors = unit_columns(target.size, 3)
    rows = np.split(vectors.numpy(), np.cumsum(list(sizes.values()))[:-1])
    for k, shares in enumerate(layer_shares(target, vectors)):
        assert list(shares) == list(sizes)
        assert list(shares.values()) == pytest.approx([float((row[:, k] ** 2).sum()) for row in rows])
        assert sum(shares.values()) == pytest.approx(1)


def test_filter_norms_are_those_of_all_weights_into_a_unit() -> None:
    target = objective()
    expected = []
    for p in target.parameters.values():
        for row in p.detach().numpy():
            norm = float((row**2).sum() ** 0.5)
            expected += [norm] * row.size
    torch.testing.assert_close(filter_norms(target), torch.tensor(expected))
