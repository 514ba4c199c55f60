"""Objectives: means, batches, modes, parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.objective import evaluation_mode, make_objective


def mse(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def toy(seed: int = 0, samples: int = 10) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, (torch.randn(samples, 3).double(), torch.randn(samples, 2).double())


@pytest.mark.parametrize("size", [1, 3, 7, 10, 100])
def test_value_and_gradient_do_not_depend_on_batches(size: int) -> None:
    model, data = toy()
    loss = mse(model(data[0]), data[1])
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    value, gradient = make_objective(model, mse, data, batch_size=size).value_and_gradient()
    assert value == pytest.approx(loss.item(), rel=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_duplicated_samples_change_nothing() -> None:
    model, (x, y) = toy()
    once = make_objective(model, mse, (x, y)).value_and_gradient()
    twice = make_objective(model, mse, (x.repeat(2, 1), y.repeat(2, 1)), batch_size=7).value_and_gradient()
    assert once[0] == pytest.approx(twice[0], rel=1e-14)
    torch.testing.assert_close(once[1], twice[1])


def test_split_and_flatten_are_inverse_and_missing_counts_as_zero() -> None:
    model, data = toy()
    objective = make_objective(model, mse, data)
    v = torch.randn(objective.size, dtype=torch.float64)
    assert torch.equal(objective.flatten(objective.split(v)), v)
    parts: list[Tensor | None] = list(objective.split(v))
    parts[1] = None
    assert torch.equal(objective.flatten(parts)[12:16], torch.zeros(4, dtype=torch.float64))
    assert objective.weights().shape == (objective.size,)


def test_the_users_model_is_left_alone() -> None:
    model, data = toy()
    model.train()
    before = [p.clone() for p in model.parameters()]
    objective = make_objective(model, mse, data, params="0.*", dtype=torch.float32)
    objective.value_and_gradient()
    assert model.training
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float64 for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert list(objective.parameters) == ["0.weight", "0.bias"]
    assert objective.dtype == torch.float32


def test_patterns_choose_parameters() -> None:
    model, data = toy()
    assert list(make_objective(model, mse, data, params="*.bias").parameters) == ["0.bias", "2.bias"]
    assert list(make_objective(model, mse, data, params="0.bias, 2.*").parameters) == ["0.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"no parameter matches 'conv\*': the model has 0.weight, 0.bias"):
        make_objective(model, mse, data, params="conv*")


def test_only_norms_and_dropout_evaluate() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.ReLU())
    evaluation_mode(model)
    assert [m.training for m in model] == [True, False, False, True]


def test_what_spiking_libraries_call_dropout_evaluates_alone() -> None:
    class Dropout(nn.Module):  # as SpikingJelly's and snnTorch's: no class of torch
        pass

    class Masked(Dropout):
        pass

    class DropPath(nn.Sequential):
        pass

    model = nn.Sequential(Dropout(), Masked(), DropPath(nn.ReLU(), nn.BatchNorm1d(2)), nn.Linear(2, 2))
    evaluation_mode(model)
    assert [m.training for m in model] == [False, False, False, True]
    assert [m.training for m in model[2]] == [True, False]


def test_reset_runs_before_every_forward() -> None:
    class Counting(nn.Module):
        """A leaky neuron that forgets only when told to."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.state: Tensor | float = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.state = self.state + self.w * x
            return torch.as_tensor(self.state)

    def reset(model: nn.Module) -> None:
        model.state = 0.0  # type: ignore[assignment]

    x = torch.ones(4, 1, dtype=torch.float64)
    objective = make_objective(Counting(), mse, (x, 2 * x), batch_size=1, reset=reset)
    first, second = objective.value_and_gradient(), objective.value_and_gradient()
    assert first[0] == second[0] == 1.0
    assert torch.equal(first[1], second[1])


def test_bad_input() -> None:
    model, (x, y) = toy()
    with pytest.raises(ValueError, match="no samples"):
        make_objective(model, mse, (x[:0], y[:0]))
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'0\.weight' has NaN"):
        make_objective(model, mse, (x, y))


def test_rebatched_keeps_order() -> None:
    model, (x, y) = toy()
    objective = make_objective(model, mse, (x, y), batch_size=4).rebatched(3)
    assert [len(t) for _, t in objective.batches] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([b for b, _ in objective.batches]), x)
    assert sum(w for _, w in objective.weighted_batches()) == pytest.approx(1)
