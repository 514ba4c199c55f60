"""Losses over time, readouts of plain networks, and padded sequences, against a double backward written out here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws import seeded
from torch import Tensor, nn

from hessian_tools.checks import ObjectiveError
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import fisher, ggn, hessian
from hessian_tools.perturbation import accuracy, outputs_at
from ikun.adapters import AdapterError, adapt
from ikun.losses import tet, time_first

N, T, K = 6, 4, 3
X = torch.rand(N, T, 5, generator=seeded(), dtype=torch.float64)
Y = torch.randint(0, K, (N,), generator=seeded())
LENGTHS = torch.tensor([4, 1, 3, 2, 4, 2])
MASK = torch.arange(T) < LENGTHS[:, None]


class Recurrent(nn.Module):
    """A plain network over time, [N, T, 5] -> [T, N, K] or [N, T, K]."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.back, self.out = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, K)
        self.first = first
        self.double()

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        h = x.new_zeros(len(x), 4) if state is None else state
        steps = []
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t]) + self.back(h))
            steps.append(self.out(h))
        return torch.stack(steps, 0 if self.first else 1)


class Masked(Recurrent):
    """Gets the mask by its name."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask[..., None])


def oracle(net: nn.Module, value: Callable[[Callable[..., Tensor]], Tensor]) -> Tensor:
    """The Hessian of value(forward), row by row, with the net's own forward as a function of its parameters."""
    parameters = dict(net.named_parameters())
    shapes = [p.shape for p in parameters.values()]

    def loss(w: Tensor) -> Tensor:
        parts = w.split([s.numel() for s in shapes])
        state = {n: p.reshape(s) for n, p, s in zip(parameters, parts, shapes, strict=True)}
        return value(lambda *args: torch.func.functional_call(net, state, args))

    w = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
    return torch.stack([torch.autograd.grad(g[i], w, retain_graph=True)[0] for i in range(len(w))])


def objective(net: nn.Module, loss: Any, x: Any = X, y: Tensor = Y, batch: int = 4, **options: Any) -> Objective:
    adapted = adapt(net, x, **options)
    return make_objective(adapted.model, loss, (x, y), reset=adapted.reset, batch_size=batch, dtype=torch.float64)


def same(found: Objective, expected: Tensor) -> None:
    gap = float((dense(hessian(found)) - expected).abs().max() / expected.abs().max())
    assert gap < 1e-10, gap
    assert expected.abs().max() > 1e-4


# ---------------------------------------------------------------- losses over time
def tet_by_hand(y: Tensor, weight: float) -> Tensor:
    """Of outputs [T, N, K]."""
    each = torch.stack([-torch.log_softmax(step, 1)[torch.arange(N), Y].mean() for step in y])
    return (1 - weight) * each.mean() + weight * ((y - 1) ** 2).sum() / y.numel()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("weight", [0.05, 0.5])
def test_the_loss_of_temporal_efficient_training(first: bool, weight: float) -> None:
    net = Recurrent(first)
    found = objective(net, tet(weight), readout="none", time_first=None if first else False)
    expected = oracle(net, lambda f: tet_by_hand(f(X) if first else f(X).transpose(0, 1), weight))
    same(found, expected)
    rates = net(X).mean(0 if first else 1)
    assert accuracy(found, next(outputs_at(found, found.weights().add, [0.0]))) == float(
        (rates.argmax(1) == Y).double().mean()
    )


def test_tet_refuses_a_weight_outside_its_range() -> None:
    with pytest.raises(ValueError, match="from 0 to 1, but it is 2"):
        tet(2.0)
    with pytest.raises(ValueError, match=r"\[N, T, K\] are needed, not \[6, 3\]"):
        tet()(torch.zeros(6, 3), Y)


SNNTORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "ce_rate_loss": lambda y: torch.stack([F.cross_entropy(step, Y) for step in y]).mean(),
    "ce_count_loss": lambda y: F.cross_entropy(y.sum(0), Y),
    "ce_max_membrane_loss": lambda y: F.cross_entropy(y.max(0).values, Y),
    "mse_count_loss": lambda y: (y.sum(0) - len(y) * F.one_hot(Y, K)).square().mean() / len(y),
    "mse_membrane_loss": lambda y: torch.stack([(step - F.one_hot(Y, K)).square().mean() for step in y]).mean(),
}


@pytest.mark.parametrize("name", SNNTORCH)
def test_the_losses_of_snntorch(name: str) -> None:
    functional = pytest.importorskip("snntorch.functional")
    net = Recurrent()
    found = objective(net, time_first(getattr(functional, name)()), readout="none")
    same(found, oracle(net, lambda f: SNNTORCH[name](f(X))))
    v = torch.randn(found.size, dtype=torch.float64, generator=seeded(1))
    curved = ggn(found) @ v
    assert torch.isfinite(curved).all()
    assert float(v @ curved) > 0
    mean = sum(
        float(v @ objective(net, found.loss, X[i : i + 1], Y[i : i + 1], readout="none").value_and_gradient()[1]) ** 2
        for i in range(N)
    )
    assert float(v @ (fisher(found) @ v)) == pytest.approx(mean / N, rel=1e-9)


def test_a_regression_over_time() -> None:
    net, y = Recurrent(), torch.rand(N, T, K, generator=seeded(2), dtype=torch.float64)
    found = objective(net, F.mse_loss, y=y, readout="none")
    same(found, oracle(net, lambda f: ((f(X).transpose(0, 1) - y) ** 2).sum() / y.numel()))


def test_a_loss_written_for_time_first_must_say_so() -> None:
    """Unmarked, it is not a mean over samples, or fails on the shape."""

    def last(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs[-1].square().mean() + 0 * labels.sum()

    with pytest.raises(ObjectiveError, match="not a mean over samples"):
        objective(Recurrent(), last, readout="none")
    same(
        objective(Recurrent(), time_first(last), readout="none"),
        oracle(Recurrent(), lambda f: f(X)[-1].square().mean()),
    )
    with pytest.raises(ValueError, match="outputs over time"):
        time_first(last)(torch.zeros(6, 3), Y)


# ---------------------------------------------------------------- plain networks that return time
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: sum(y[t] for t in range(T)) / T,  # type: ignore[dict-item,return-value]
    "sum": lambda y: sum(y[t] for t in range(T)),  # type: ignore[dict-item,return-value]
    "last": lambda y: y[T - 1],
    "max": lambda y: y.max(0).values,
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("readout", READ)
def test_plain_networks_that_return_time(readout: str, first: bool) -> None:
    net = Recurrent(first)
    found = objective(net, F.cross_entropy, readout=readout, time_first=None if first else False)
    same(found, oracle(net, lambda f: F.cross_entropy(READ[readout](f(X) if first else f(X).transpose(0, 1)), Y)))


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (
            Recurrent(),
            {},
            r"samples gave .*: samples must be the first axis; if the first axis is time, give readout",
        ),
        (Recurrent(False), {"readout": "sum"}, "if the second axis is time, give time_first=False"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(20, K)).double(),
            {"readout": "none"},
            "readout='none' needs outputs over",
        ),
        (Recurrent(), {"readout": "median"}, "readout='median' is not one of mean, sum, last, max, none"),
    ],
)
def test_what_cannot_be_read_out(net: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message) as error:
        adapt(net, X, **options)
    assert "\n" not in str(error.value)


def test_outputs_of_samples_with_another_axis_stay() -> None:
    """Nothing says that the second axis is time."""
    adapted = adapt(Recurrent(False), X)
    assert adapted.plan.time_axis is None
    assert adapted.model(X).shape == (N, T, K)


# ---------------------------------------------------------------- padded sequences
def padded(readout: str, f: Callable[..., Tensor]) -> Tensor:
    """Every sequence by itself, without its padding."""
    rows = []
    for i in range(N):
        y = f(X[i : i + 1, : int(LENGTHS[i])])[:, 0]
        rows.append({"mean": y.mean(0), "sum": y.sum(0), "last": y[-1], "max": y.max(0).values}[readout])
    return F.cross_entropy(torch.stack(rows), Y)


INPUTS = [
    ({"x": X, "lengths": LENGTHS}, "lengths"),
    ({"x": X, "mask": MASK}, "mask"),
    ({"mask": MASK.double(), "x": X}, "mask"),
    ((X, MASK.long()), "1"),
    ((LENGTHS.to(torch.uint8), X), "0"),
]


@pytest.mark.parametrize(("x", "valid"), INPUTS)
@pytest.mark.parametrize("readout", READ)
def test_only_valid_steps_are_read_out(x: Any, valid: str, readout: str) -> None:
    net = Recurrent()
    found = objective(net, F.cross_entropy, x, readout=readout, valid=valid)
    same(found, oracle(net, lambda f: padded(readout, f)))


def test_a_network_gets_the_mask_by_its_name_only() -> None:
    net = Masked()
    found = objective(net, F.cross_entropy, {"x": X, "mask": MASK.double()}, valid="mask")
    same(found, oracle(Recurrent(), lambda f: padded("mean", f)))


def test_a_mask_that_begins_with_padding() -> None:
    mask = MASK.flip(1)
    found = objective(Recurrent(), F.cross_entropy, (X, mask), valid="1", readout="last")
    same(found, oracle(Recurrent(), lambda f: F.cross_entropy(f(X)[-1], Y)))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (X, {"valid": "1"}, "valid= needs inputs that are a dict or a tuple"),
        ((X, MASK), {"valid": "2"}, "valid='2' is not a tensor of the inputs, which are 0 to 1"),
        ({"x": X, "m": MASK}, {"valid": "mask"}, "valid='mask' is not a tensor of the inputs, which are x, m"),
        ((X, MASK * (LENGTHS > 1)[:, None]), {"valid": "1"}, "valid=: sample 1 has no valid step"),
        ((X, LENGTHS + 1), {"valid": "1"}, r"valid=: sample 0 is longer than the inputs \[6, 4, 5\]"),
        ((X, MASK[:, :3]), {"valid": "1"}, r"valid= has shape \[3, 3\]: lengths \[N\] or a mask \[N, 4\]"),
        ((X, MASK[..., None]), {"valid": "1"}, r"valid= has shape \[6, 4, 1\]: lengths \[N\] or a mask"),
        ((X, MASK), {"valid": "1", "readout": "none"}, "valid= selects the steps of a readout"),
    ],
)
def test_masks_that_cannot_be_used(x: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message) as error:
        adapt(Recurrent(), x, **options)
    assert "\n" not in str(error.value)


def test_a_loss_over_padded_steps_has_its_mask_in_the_targets() -> None:
    """The documented way with `readout="none"`: padded steps have the label -1, and each sample is a mean by itself."""
    labels = torch.randint(0, K, (N, T), generator=seeded(3)).masked_fill(~MASK, -1)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(outputs.transpose(1, 2), labels, ignore_index=-1, reduction="none")
        return (each.sum(1) / (labels >= 0).sum(1)).mean()

    found = objective(Recurrent(), loss, y=labels, readout="none")

    def value(f: Callable[..., Tensor]) -> Tensor:
        each = [F.cross_entropy(f(X[i : i + 1, :n])[:, 0], labels[i, :n]) for i, n in enumerate(LENGTHS.tolist())]
        return torch.stack(each).mean()

    same(found, oracle(Recurrent(), value))
