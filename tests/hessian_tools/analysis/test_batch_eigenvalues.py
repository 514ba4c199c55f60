"""Tests of the largest eigenvalue over mini-batches, by dense matrices."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hessian_tools.analysis.batch_eigenvalues import BatchSettings, batch_eigenvalues
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn, hessian
from hessian_tools.seeding import stream
from ikun.losses import cross_entropy


@pytest.fixture(scope="module")
def objective() -> Objective:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return make_objective(net, cross_entropy, (torch.rand(26, 4).double(), torch.randint(0, 3, (26,))), batch_size=9)


@pytest.mark.parametrize("operator", ["ggn", "hessian"])
def test_eigenvalues_are_those_of_the_matrices(objective: Objective, operator: str) -> None:
    found = batch_eigenvalues(objective, BatchSettings(operator, batch_size=8, tol=1e-6, seed=3))
    parts = torch.randperm(26, generator=stream(3, 1))[:24].split(8)
    make = {"ggn": ggn, "hessian": hessian}[operator]
    exact = [float(torch.linalg.eigvalsh(dense(make(objective.regrouped([part]))))[-1]) for part in parts]
    assert found.values == pytest.approx(exact, rel=1e-8)
    assert found.whole == pytest.approx(float(torch.linalg.eigvalsh(dense(make(objective.regrouped(parts))))[-1]))
    assert found.whole <= found.mean
    assert all(found.converged)
    assert found.deviation == pytest.approx(float(torch.tensor(exact).std()))
    assert "3 batches of 8 samples" in repr(found)


def test_the_seed_decides_the_batches(objective: Objective) -> None:
    first, again, other = (
        batch_eigenvalues(objective, BatchSettings(batch_size=6, batches=2, seed=s)) for s in (0, 0, 1)
    )
    assert len(first.values) == 2
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(again, seconds=0)
    assert first.values != other.values


def test_mistakes(objective: Objective) -> None:
    with pytest.raises(ValueError, match="batch_size is 27, but there are only 26 samples"):
        batch_eigenvalues(objective, BatchSettings(batch_size=27))
    for options, message in (
        ({"operator": "relaxed"}, "must be"),
        ({"batches": 0}, "at least 1"),
        ({"tol": 1.0}, "tol"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchSettings(**options)
