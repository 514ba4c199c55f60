"""Copies of models, evaluation mode, and operations whose own second derivative is missing or wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from hessian_tools.evaluation import copy_model, evaluation_mode, loss_in_double
from hessian_tools.io.errors import ObjectiveError
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(2, 4), nn.Linear(4, 3)
        self.e = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.e(self.i(x.view(len(x), 3, 2))).mean(1))
        return out


def by_double_backward(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, training: list[bool] | None = None
) -> Tensor:
    model = copy.deepcopy(model).double().eval()
    for child, mode in zip(model.children(), training or [], strict=False):
        child.training = mode
    parameters = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(model(X.double()), Y)
    gradient = torch.autograd.grad(value, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def test_attention_has_its_hessian() -> None:
    torch.manual_seed(0)
    model = Attention()
    found = dense(hessian(make_objective(model, F.cross_entropy, (X, Y), dtype=torch.float64, batch_size=7)))
    assert (found - by_double_backward(model)).norm() <= 1e-10 * found.norm()


def composed(v: Tensor, g: Tensor) -> Tensor:
    return v * (g / v.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, old_weight_norm], ids=["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore")
def test_weight_norm_has_its_hessian(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Against the formula written out: torch's own kernel gives second derivatives that are not symmetric."""
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))
    made = make_objective(model, F.cross_entropy, (X, Y), dtype=torch.float64)
    names = list(made.parameters)
    g = next(n for n in names if n.endswith(("original0", "weight_g")))
    v = next(n for n in names if n.endswith(("original1", "weight_v")))

    def loss(*values: Tensor) -> Tensor:
        by = dict(zip(names, values, strict=True))
        hidden = torch.tanh(F.linear(X.double(), composed(by[v], by[g]), by["0.bias"]))
        return F.cross_entropy(F.linear(hidden, by["2.weight"], by["2.bias"]), Y)

    values = [p.detach().clone() for p in made.parameters.values()]
    blocks = torch.autograd.functional.hessian(loss, tuple(values))
    expected = torch.cat(
        [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for row, p in zip(blocks, values, strict=True)]
    )
    assert (dense(hessian(made)) - expected).norm() <= 1e-10 * expected.norm()


def with_history(model: nn.Sequential) -> nn.Sequential:
    model[0].kept = model[0](X)  # as neurons keep their state
    return model


def pruned(model: nn.Sequential) -> nn.Sequential:
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def spectral(model: nn.Sequential) -> nn.Sequential:
    model[0] = old_spectral_norm(model[0])
    model(X)
    return model


@pytest.mark.parametrize("change", [with_history, pruned, spectral])
@pytest.mark.filterwarnings("ignore")
def test_modules_that_hold_tensors_with_a_graph_are_copied(change: Callable[[nn.Sequential], nn.Sequential]) -> None:
    torch.manual_seed(0)
    model = change(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    copied = copy_model(model)
    assert torch.equal(copied(X), model(X))
    found = dense(hessian(make_objective(model, F.cross_entropy, (X, Y), dtype=torch.float64)))
    assert (found - found.T).abs().max() <= 1e-12
    assert torch.isfinite(found).all()


class Step(torch.autograd.Function):
    """A spike with the surrogate gradient of a sigmoid."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return g * torch.sigmoid(x) * (1 - torch.sigmoid(x))


class Switched(nn.Module):
    """A neuron whose surrogate is off in evaluation mode, and which normalizes its membrane."""

    def __init__(self) -> None:
        super().__init__()
        self.surrogate_function, self.norm = Step.apply, nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        out: Tensor = self.surrogate_function(h) if self.training else (h > 0).to(x)
        return out


class Neuron(nn.Module):
    """A network with the name of a neuron."""

    def __init__(self, change: Callable[[Neuron, Tensor], Tensor], inner: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.n, self.b = nn.Linear(6, 4), inner or nn.Tanh(), nn.Linear(4, 3)
        self.spike_grad, self.change = torch.tanh, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.b(self.n(self.a(x))))


class SNN(Neuron):
    """The same with another name, and a BatchNorm of its own that changes a buffer in training mode."""

    def __init__(self, change: Callable[[Neuron, Tensor], Tensor], inner: nn.Module | None = None) -> None:
        super().__init__(change, inner)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            x = x - x.mean(0)
        return super().forward(x)


CHANGES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "scale": lambda m, o: o if m.training else 3 * o,
    "dropout": lambda m, o: F.dropout(o, 0.5, m.training),
    "noise": lambda m, o: o + torch.randn_like(o) if m.training else o,
    "batch mean": lambda m, o: o - o.mean(0) if m.training else o,
    "head": lambda m, o: torch.cat([o, o], 1) if m.training else o,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [Neuron, SNN])
@pytest.mark.parametrize("live", [False, True])
def test_only_modules_whose_surrogate_is_off_in_evaluation_mode_stay_in_training_mode(
    change: str, kind: type[Neuron], live: bool
) -> None:
    model = kind(CHANGES[change], Switched() if live else None).train()
    made = make_objective(model, F.cross_entropy, (X, Y), dtype=torch.float64, batch_size=7)
    copied = made.model
    assert [m.training for m in (copied, copied.a, copied.n, copied.b)] == [False, False, live, False]
    assert not live or not copied.n.norm.training  # type: ignore[union-attr]
    assert not float(getattr(copied, "calls", 0.0))
    same = copy.deepcopy(model).double().eval()
    same.n.training = live
    expected = nn.Sequential(same.a, same.n, same.b)
    factor = 3 if change == "scale" else 1
    found = dense(hessian(made))
    wanted = by_double_backward(expected, lambda o, y: F.cross_entropy(factor * o, y), [False, live, False])
    assert (found - wanted).norm() <= 1e-10 * wanted.norm()


def test_trying_the_modes_draws_no_random_numbers_and_leaves_the_model() -> None:
    model = SNN(CHANGES["noise"], Switched())
    before, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    evaluation_mode(model, lambda tried: tried(X))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- losses with tensors of their own
WEIGHTS = torch.tensor([0.5, 2.0, 3.0])
MATRIX = torch.randn(3, 3, generator=torch.Generator().manual_seed(6))
HOT = F.one_hot(torch.arange(8) % 3, 3).float()
OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "positive weights": nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
    "weights of classes": lambda o, y: F.cross_entropy(o, y.argmax(1), weight=WEIGHTS, reduction="sum") / len(o),
    "matrix": lambda o, y: ((o @ MATRIX) - y).square().mean(),
    "einsum": lambda o, y: torch.einsum("ni,ij,nj->n", o, MATRIX, o).square().mean(),
    "where": lambda o, y: torch.where(o > 0, WEIGHTS * o, o.exp()).mean(),
    "linear": lambda o, y: F.linear(o, MATRIX).square().mean(),
    "in place": lambda o, y: (o @ MATRIX).square_().mean(),
    "new tensors": lambda o, y: (
        (torch.zeros(len(o)).index_add(0, torch.arange(len(o)), (o @ MATRIX).sum(1))).exp().mean()
    ),
    "cast": lambda o, y: F.binary_cross_entropy_with_logits(o.float(), y.float(), pos_weight=WEIGHTS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OWN)
def test_tensors_of_the_loss_are_converted_where_they_are_used(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(7)).to(dtype).requires_grad_()
    value = loss_in_double(OWN[name])(outputs, HOT)
    found = torch.autograd.functional.hessian(lambda o: loss_in_double(OWN[name])(o, HOT), outputs.detach())
    assert found.dtype == dtype
    for tensor in ("WEIGHTS", "MATRIX", "HOT"):
        monkeypatch.setitem(globals(), tensor, globals()[tensor].double())
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wide = nn.BCEWithLogitsLoss(pos_weight=WEIGHTS) if name in ("positive weights", "cast") else OWN[name]
        exact = torch.autograd.functional.hessian(lambda o: wide(o, HOT), outputs.detach().double())
        expected = float(wide(outputs.detach().double(), HOT))
    finally:
        torch.set_default_dtype(default)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6 if name == "cast" else 1e-13)
    tolerance = 1e-6 if dtype == torch.float32 or name == "cast" else 1e-12
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_loss_that_fits_well_is_curved_in_float64_with_tensors_of_its_own() -> None:
    """In float32, the second derivative of this loss cancels to noise of more than its size."""
    outputs = 20 * HOT
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    found = torch.autograd.functional.hessian(lambda o: loss_in_double(weighted)(o, HOT.argmax(1)), outputs)
    exact = torch.autograd.functional.hessian(lambda o: F.cross_entropy(o, HOT.argmax(1)), outputs.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-14)


def test_the_error_of_a_loss_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="weight tensor should be defined"):
        loss_in_double(nn.CrossEntropyLoss(weight=torch.ones(4)))(torch.zeros(8, 3), torch.zeros(8).long())


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "NoneType"), (1.5, "float"), (torch.ones(2), r"Tensor of shape \[2\]")]
)
@pytest.mark.parametrize("check", [False, True])
def test_a_loss_that_returns_no_number_is_refused_in_one_line(value: Any, kind: str, check: bool) -> None:
    with pytest.raises(ObjectiveError, match=f"the loss returns a {kind}: it must return a tensor with one number"):
        make_objective(
            nn.Linear(3, 2), lambda outputs, targets: value, (torch.ones(4, 3), torch.zeros(4)), check=check
        ).value_and_gradient()
