"""Networks that behave after some calls in another way than in the checks, and sparse gradients."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools import SpectrumSettings, dense, hessian, make_objective, spectrum
from hessian_tools.analysis.context import AnalysisError
from hessian_tools.io.errors import ObjectiveError
from hessian_tools.perturbation import outputs_at

X, Y = torch.randn(24, 5, generator=torch.Generator().manual_seed(3)), torch.arange(24) % 3
SETTINGS = SpectrumSettings(top=1, density=False)


class Changing(nn.Module):
    """A network that changes after a number of calls."""

    def __init__(self, calls: int, change: Callable[[Changing, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)
        self.left, self.change = calls, change

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return self.change(self, out) if self.left < 0 else out


def scaled(model: Changing, out: Tensor) -> Tensor:
    model.a.weight.data.mul_(1.5)  # which no counter of versions notices
    return out


def lost(model: Changing, out: Tensor) -> Tensor:
    return out * torch.nan


def _refused_or_right(calls: int, change: Callable[[Changing, Tensor], Tensor], refusal: str) -> None:
    """A traced network is not called again, so that a change which comes later has no effect on the numbers."""

    def measured(count: int) -> tuple[float, ...]:
        found = spectrum(make_objective(Changing(count, change), F.cross_entropy, (X, Y)), SETTINGS)
        main = found.main[1]
        assert main.trace is not None
        return found.loss, found.accuracy, found.gradient_norm, main.eigenvalues[0].value, main.trace.estimate

    said = ""
    try:
        values = measured(calls)
    except (ObjectiveError, AnalysisError) as error:
        said = str(error)
    assert re.search(refusal, said) if said else values == measured(10**9)


@pytest.mark.parametrize("calls", range(2, 26, 3))
def test_weights_that_change_after_some_calls_are_refused_or_have_no_effect(calls: int) -> None:
    _refused_or_right(calls, scaled, r"changes the network's parameters|different outputs|depends on")


@pytest.mark.parametrize("calls", range(4, 44, 4))
def test_outputs_that_turn_nan_are_not_said_to_be_coupled(calls: int) -> None:
    _refused_or_right(calls, lost, r"finite|two forward passes")


def test_outputs_at_other_weights_refuse_weights_that_change() -> None:
    objective = make_objective(Changing(0, scaled), F.cross_entropy, (X, Y), check=False)
    with pytest.raises(ObjectiveError, match=r"changes the network's parameters"):
        list(outputs_at(objective, lambda _: objective.weights(), [0]))


def test_outputs_that_are_nan_in_large_batches_are_not_said_to_be_coupled() -> None:
    class Large(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (torch.nan if len(x) > 3 else 1)

    with pytest.raises(ObjectiveError, match="finite in one batch and NaN or infinite in another one"):
        make_objective(Large(5, 3), F.cross_entropy, (X, Y))


def test_embeddings_with_sparse_gradients_have_the_hessian_of_dense_ones() -> None:
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.out = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(torch.tanh(self.words(x).mean(1)))
            return out

    x = torch.randint(0, 9, (24, 5), generator=torch.Generator().manual_seed(0))
    model = Words(sparse=True)
    found, expected = (dense(hessian(make_objective(m, F.cross_entropy, (x, Y)))) for m in (model, Words(sparse=False)))
    assert torch.equal(found, expected)
    assert model.words.sparse
