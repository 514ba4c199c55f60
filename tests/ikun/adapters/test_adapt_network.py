"""Tests of adapting networks: plain torch, unknown neurons, and models that cannot be analysed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyhessian
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from hessian_tools.engine.linearized import Linearized
from hessian_tools.engine.product import linearize_traced
from hessian_tools.linalg.lanczos import eigenpairs
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from ikun.adapters import AdapterError, adapt
from ikun.networks import Network, Spec
from ikun.surrogates import Surrogate, spike

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(24, 1, 8, 8, generator=GENERATOR), torch.randint(0, 4, (24,), generator=GENERATOR)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 4))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(36, 4),
    )


class Branched(nn.Module):
    """Not a chain of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.skip = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.skip(x.flatten(1))
        return y


@pytest.mark.parametrize("build", [mlp, cnn, Branched])
def test_products_and_eigenvalues_agree_with_curvlinops_and_pyhessian(build: Callable[[], nn.Module]) -> None:
    adapted = adapt(build(), X)
    assert (adapted.library, adapted.reset, adapted.surrogates, adapted.warnings) == ("none", None, (), ())
    objective = make_objective(adapted.model, F.cross_entropy, (X, Y), dtype=torch.float64, batch_size=7)
    op = hessian(objective)
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = op @ v
    curvlinops = pytest.importorskip("curvlinops")
    parameters = list(objective.parameters.values())
    model = objective.model
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, list(objective.batches))
    np.testing.assert_allclose((theirs @ v).numpy(), found.numpy(), rtol=1e-5, atol=1e-10)
    (top,) = eigenpairs(op, 1, tol=1e-9, generator=torch.Generator().manual_seed(0)).values
    (reference,) = eigsh(theirs.to_scipy(), 1, which="LA", return_eigenvectors=False)
    assert float(top) == pytest.approx(reference, rel=1e-5)
    whole = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(X.double(), Y), cuda=False)
    images = pyhessian.utils.hessian_vector_product(whole.gradsH, whole.params, objective.split(v))
    torch.testing.assert_close(objective.flatten(images), found, rtol=1e-5, atol=1e-9)


def test_plain_networks_and_own_networks_are_traced() -> None:
    for model in (mlp(), Network(Spec(channels=2, classes=4))):
        adapted = adapt(model, X)
        objective = make_objective(adapted.model, F.cross_entropy, (X, Y), reset=adapted.reset)
        assert isinstance(linearize_traced(objective, objective.batches[0], "hessian"), Linearized)


# ---------------------------------------------------------------- neurons of unknown make
class ActFun(torch.autograd.Function):
    """As many research codes have it: a constant threshold inside, a box for a derivative."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v.gt(0.5).float()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (v,) = ctx.saved_tensors
        return g * ((v - 0.5).abs() < 0.4).float()


class Context(torch.autograd.Function):
    """An autograd function in the newer style, with setup_context."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * torch.exp(-(x - 0.5).square())


class Sloped(torch.autograd.Function):
    """With a slope as its second argument; right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g / (1 + (math.pi * ctx.slope / 2 * x).square()), None


class Detached(Sloped):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g / (1 + (math.pi * ctx.slope / 2 * x.detach()).square()), None


class Own(nn.Module):
    """Three steps of integrate-and-fire neurons, no library."""

    def __init__(self, fire: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(5, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.fc1.weight.abs_().mul_(3)
        self.fire = (fire,)  # hidden from the search for attributes

    def forward(self, x: Tensor) -> Tensor:
        v, total = torch.zeros(len(x), 8).to(x), torch.zeros(len(x), 3).to(x)
        for _ in range(3):
            v = v + self.fc1(x)
            s = self.fire[0](v - 1)
            v = v * (1 - s)
            total = total + self.fc2(s)
        return total / 3


SMALL = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))


def test_functions_called_by_name_are_found_in_the_graph_and_tried() -> None:
    assert adapt(Own(lambda x: ActFun.apply(x + 0.5)), SMALL).warnings == ()
    assert adapt(Own(lambda x: Sloped.apply(x, 2.0)), SMALL).warnings == ()
    with pytest.raises(AdapterError, match="autograd function Detached: its derivative is cut off from the graph"):
        adapt(Own(lambda x: Detached.apply(x, 2.0)), SMALL)


@pytest.mark.parametrize("function", [ActFun, Context])
def test_a_function_of_one_argument_needs_no_constants(function: Any) -> None:
    apply = function.apply  # taken before anything could listen to it
    assert adapt(Own(lambda x: apply(x + 0.5)), SMALL).warnings == ()


def test_a_function_whose_constants_are_not_seen_is_a_warning() -> None:
    apply = Detached.apply
    (warning,) = adapt(Own(lambda x: apply(x, 2.0)), SMALL).warnings
    assert warning == (
        "the second derivative of the autograd function Detached could not be checked: it takes more than one argument"
    )


class Neuron(nn.Module):
    """A layer of unknown class that keeps its membrane."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.v: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.v + x
        s: Tensor = self.function(h - 1)
        self.v = h * (1 - s)
        return s


def _clear(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Neuron):
            module.v = 0.0


def layers(function: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), Neuron(function), nn.Linear(8, 3, bias=False), Neuron(function))
    with torch.no_grad():
        for p in net.parameters():
            p.abs_().mul_(3)
    return net


def test_unknown_neurons_are_tried_by_themselves() -> None:
    with pytest.raises(AdapterError, match=r"neuron '1' \(Neuron\): its derivative is cut off from the graph"):
        adapt(layers(lambda x: Detached.apply(x, 2.0)), SMALL, steps=4, reset=_clear)


def test_an_attribute_that_is_the_apply_of_a_function_can_be_replaced() -> None:
    class Fixed(Detached):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return Detached.forward(ctx, x, 2.0)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return Detached.backward(ctx, g)[0]

    net = layers(Fixed.apply)
    with pytest.raises(AdapterError, match=r"surrogate Fixed \('1.function'\): its derivative is cut off"):
        adapt(net, SMALL, steps=4, reset=_clear)
    ours = Surrogate.parse("atan:2")
    adapted = adapt(net, SMALL, steps=4, reset=_clear, surrogate=lambda x: spike(x, ours))
    mine = Network(
        Spec(model="mlp", input_shape=(1, 1, 5), hidden=(8,), classes=3, norm="none", timesteps=4, surrogate="atan:2")
    )
    for p, q in zip(mine.parameters(), net.parameters(), strict=True):
        p.data.copy_(q.data)
    y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(0))
    found, expected = (
        make_objective(model, F.cross_entropy, (x, y), dtype=torch.float64, reset=reset)
        for model, x, reset in ((adapted.model, SMALL, adapted.reset), (mine, SMALL.view(6, 1, 1, 5), None))
    )
    torch.testing.assert_close(dense(hessian(found)), dense(hessian(expected)), rtol=1e-10, atol=1e-13)
    assert list(found.parameters) == ["0.weight", "2.weight"]


# ---------------------------------------------------------------- what cannot be analysed
def test_a_state_that_is_not_cleared_is_found() -> None:
    """The sizes of batches differ at first: a state that goes by the sample is seen there, any other later."""
    net = layers(lambda x: Sloped.apply(x, 2.0))
    with pytest.raises(
        AdapterError, match=r"runs on 2 samples, but not on 3 after that: the network keeps state.*give reset="
    ):
        adapt(net, SMALL, steps=4)
    with pytest.raises(
        AdapterError, match=r"two forward passes on the same inputs give different.*keeps state.*give reset="
    ):
        adapt(net, SMALL)


def test_a_random_backward_pass_is_found() -> None:
    class Noisy(Sloped):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g * torch.rand_like(g), None

    with pytest.raises(AdapterError, match="two gradients at the same inputs differ"):
        adapt(Own(lambda x: Noisy.apply(x, 2.0)), SMALL)


def test_state_written_in_place_is_found() -> None:
    class InPlace(Own):
        def forward(self, x: Tensor) -> Tensor:
            v, total = torch.zeros(len(x), 8), torch.zeros(len(x), 3)
            for _ in range(3):
                v += self.fc1(x)
                total = total + self.fc2(self.fire[0](v * v - 1))
            return total / 3

    with pytest.raises(AdapterError, match=r"first derivative fails: .*the state must not be written in place"):
        adapt(InPlace(lambda x: Sloped.apply(x, 2.0)), SMALL)


def returning(make: Callable[[Tensor], Any]) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Any:
            return make(self.fc(x))

    return Model()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda y: {"a": y, "b": y}, {}, "the network returns a, b: give output=, one of them"),
        (lambda y: {"a": y, "b": y}, {"output": "c"}, "output='c': the network returns a, b"),
        (lambda y: [y, y], {}, "returns a list of 2 outputs: give output=, the number of one of them"),
        (lambda y: (y, y), {"output": "2"}, "output='2': the network returns 2 outputs"),
        (lambda y: {1, 2}, {}, "the network returns set: wrap it in a module that returns a tensor"),
        (lambda y: y + torch.rand(3), {}, r"draws random numbers \(rand\)"),
        (lambda y: y.sum(), {}, r"3 samples gave outputs of shape \[\]"),
        (lambda y: y.sum(0), {"steps": 4}, r"3 samples gave outputs of shape \[4, 3\]"),
        (lambda y: y[:, 0], {"steps": 4}, r"shape \[4, 3\], which has no axis for classes"),
        (lambda y: y.detach(), {}, "depend on no parameter"),
        (lambda y: y / 0, {}, "the network's outputs are not finite"),
        (lambda y: y, {"output": "membrane"}, "output='membrane' needs"),
        (lambda y: y, {"output": "current"}, "output='current' needs a network that returns a tuple"),
        (lambda y: y, {"readout": "median"}, "readout='median' is not one of mean, sum, last, max"),
        (lambda y: y, {"readout": "max"}, "readout='max' needs outputs over time"),
        (lambda y: y, {"steps": 0}, "steps=0: at least one time step is needed"),
        (lambda y: y, {"sequences": True}, "sequences=True needs steps="),
        (
            lambda y: y,
            {"library": "brian"},
            "library='brian' is not one of spikingjelly, snntorch, norse, sinabs, none",
        ),
        (lambda y: y, {"surrogate": lambda x: (x > 0).float()}, "surrogate= cannot be used: it has no derivative"),
        (lambda y: y, {"surrogate": torch.sigmoid}, "surrogate= was given, but the network has no surrogate"),
        (lambda y: y.transpose(0, 1), {"steps": 4, "time_first": True}, r"give time_first=False"),
    ],
)
def test_one_line_for_everything_that_does_not_fit(
    make: Callable[[Tensor], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        adapt(returning(make), SMALL, **options)
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"the network fails on inputs of shape \[3, 7\]: mat1 and mat2"):
        adapt(mlp(), torch.rand(2, 7))
    with pytest.raises(AdapterError, match="at least one sample"):
        adapt(mlp(), X[:0])
    with pytest.raises(AdapterError, match="no parameter that requires a gradient"):
        adapt(mlp().requires_grad_(False), X)


@pytest.mark.parametrize("time_first", [True, False])
def test_the_time_axis_is_put_where_the_model_expects_it(time_first: bool) -> None:
    """A model that takes all steps at once, its output over time: the same as step by step."""

    class Together(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = mlp()[3]  # type: ignore[index]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x).cumsum(0 if time_first else 1)
            return y

    model, x = Together(), torch.rand(6, 4, 12)
    adapted = adapt(model, x, steps=4, sequences=True, time_first=time_first, readout="last")
    torch.testing.assert_close(adapted.model(x), model.fc(x).sum(1))
    direct = adapt(model, x[:, 0], steps=4, time_first=time_first)
    torch.testing.assert_close(direct.model(x[:, 0]), model.fc(x[:, 0]) * 2.5)


def test_the_users_model_is_left_alone_and_wrappings_are_opened() -> None:
    model = cnn()
    model[1].eval()  # type: ignore[index]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    adapted = adapt(nn.DataParallel(model), X)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert list(adapted.model.state_dict()) == list(before)
