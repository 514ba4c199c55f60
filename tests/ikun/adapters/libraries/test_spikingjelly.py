"""Tests of networks of SpikingJelly against ours: neurons, modes and surrogates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapted_networks import X, Y, objective_of, products
from torch import Tensor, nn

from hessian_tools.linalg.lanczos import eigenpairs
from hessian_tools.linalg.trace import trace
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import symmetry_error
from hessian_tools.operators.curvature import ggn, hessian
from ikun.adapters import AdapterError, adapt
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.surrogates import Surrogate, spike

functional, layer, neuron, surrogate, encoding, base = (
    pytest.importorskip(f"spikingjelly.activation_based.{name}")
    for name in ("functional", "layer", "neuron", "surrogate", "encoding", "base")
)

STEPS = 4


def paper(mode: str = "m", channels: int = 3) -> nn.Sequential:
    """The network of arXiv 2411.18250, for 8 x 8 images."""

    def spiking() -> nn.Module:
        return neuron.IFNode(surrogate_function=surrogate.ATan(2.0))

    blocks: list[nn.Module] = []
    for inputs in (1, channels):
        convolution = layer.Conv2d(inputs, channels, 3, padding=1, bias=False)
        blocks += [convolution, layer.BatchNorm2d(channels), spiking(), layer.MaxPool2d(2, 2)]
    blocks += [layer.Flatten(), layer.Linear(channels * 4, channels * 16, bias=False), spiking()]
    net = nn.Sequential(*blocks, layer.Linear(channels * 16, 10, bias=False), spiking())
    functional.set_step_mode(net, mode)
    return net


def pair(mode: str = "m", **spec: Any) -> tuple[Network, nn.Module]:
    """(ours, theirs) with the same weights and statistics."""
    torch.manual_seed(1)
    ours, theirs = Network(Spec(channels=3, **spec)), paper(mode)
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(2.5) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
        for buffer in ours.buffers():
            if buffer.dim():
                buffer.add_(0.3 * torch.rand_like(buffer))
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    return ours, theirs


IMAGES = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
DIGITS = torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(0))


def of(model: nn.Module, dtype: torch.dtype = torch.float64, **options: Any) -> Objective:
    return make_objective(model, LOSSES["mse"], (IMAGES, DIGITS), dtype=dtype, batch_size=5, **options)


@pytest.mark.parametrize(("mode", "dtype"), [("m", torch.float32), ("s", torch.float64)])
def test_the_papers_network_has_the_spectrum_of_ours(mode: str, dtype: torch.dtype) -> None:
    """Both by other code: theirs by autograd through their neurons and torch's max-pooling, ours by hand-written passes
    with the first of several equal spikes selected."""
    ours, theirs = pair(mode)
    adapted = adapt(theirs, IMAGES, steps=STEPS)
    assert (adapted.library, adapted.plan.by_step, adapted.warnings) == ("spikingjelly", mode == "s", ())
    assert [found.verdict.kind for found in adapted.surrogates] == ["exact"] * 4
    mine, other = of(ours, dtype), of(adapted.model, dtype, reset=adapted.reset)
    rates = mine.outputs(IMAGES.to(dtype))
    assert torch.equal(rates, other.outputs(IMAGES.to(dtype)))
    assert 0.02 < rates.mean() < 0.9
    for operator in (hessian, ggn):
        ends = []
        for objective in (mine, other):
            op = operator(objective)
            pairs = eigenpairs(op, 5, 5, tol=1e-6, generator=torch.Generator().manual_seed(0))
            estimate = trace(op, probes=4, generator=torch.Generator().manual_seed(1))
            ends.append(torch.cat([pairs.values, torch.tensor([estimate.estimate], dtype=torch.float64)]))
        scale = ends[0].abs().max()
        assert (ends[0] - ends[1]).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12) * scale


def test_the_rule_for_equal_spikes_matters_here() -> None:
    ours, theirs = pair()
    last, _ = pair(ties="last")
    adapted = adapt(theirs, IMAGES, steps=STEPS)
    v = torch.randn(of(ours).size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = hessian(of(ours)) @ v
    assert (hessian(of(adapted.model, reset=adapted.reset)) @ v - expected).norm() < 1e-12 * expected.norm()
    assert (hessian(of(last)) @ v - expected).norm() > 0.01 * expected.norm()


def test_a_replaced_surrogate_is_that_of_our_network() -> None:
    ours, theirs = pair(surrogate="sigmoid:5")
    adapted = adapt(theirs, IMAGES, steps=STEPS, surrogate=lambda h: spike(h, Surrogate.parse("sigmoid:5")))
    assert all(found.replaced for found in adapted.surrogates)
    v = torch.randn(of(ours).size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = hessian(of(ours)) @ v
    torch.testing.assert_close(hessian(of(adapted.model, reset=adapted.reset)) @ v, expected, rtol=1e-10, atol=1e-12)


def small(cls: Any, mode: str = "s", **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(5, 8, bias=False), cls(**settings), layer.Linear(8, 3, bias=False), cls(**settings)
    )
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.abs_().mul_(3)
    functional.set_step_mode(net, mode)
    return net


MLP: dict[str, Any] = {"model": "mlp", "input_shape": (1, 1, 5), "hidden": (8,), "classes": 3, "norm": "none"}


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_lif_with_any_reset_agrees_with_ours(mode: str, soft: bool, detach: bool) -> None:
    options = {"v_reset": None if soft else 0.0, "detach_reset": detach, "surrogate_function": surrogate.ATan()}
    theirs = small(neuron.LIFNode, mode, **options)
    reset = "soft" if soft else "hard"
    ours = Network(Spec(**MLP, neuron="lif", reset=reset, detach_reset=detach))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.data.copy_(q.data)
    expected = make_objective(ours, LOSSES["mse"], (X.view(6, 1, 1, 5), Y), dtype=torch.float64)
    found = objective_of(theirs, steps=STEPS)
    torch.testing.assert_close(products(found), products(expected), rtol=1e-11, atol=1e-13)


def test_a_learned_time_constant_is_a_parameter() -> None:
    theirs = small(neuron.ParametricLIFNode, "m", surrogate_function=surrogate.ATan())
    ours = Network(Spec(**MLP, neuron="plif"))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.data.copy_(q.data)
    expected = make_objective(ours, LOSSES["mse"], (X.view(6, 1, 1, 5), Y), dtype=torch.float64)
    found = objective_of(theirs, steps=STEPS)
    assert list(found.parameters) == ["0.weight", "1.w", "2.weight", "3.w"]
    torch.testing.assert_close(products(found), products(expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["QIFNode", "EIFNode", "KLIFNode", "IzhikevichNode", "ILIFNode", "SlidingPSN"])
def test_other_neurons_give_a_symmetric_hessian(name: str, dtype: torch.dtype) -> None:
    if not hasattr(neuron, name):
        pytest.skip(f"this SpikingJelly has no {name}")
    settings = {"k": 2} if name == "SlidingPSN" else {}
    op = hessian(objective_of(small(getattr(neuron, name), "m", **settings), steps=STEPS, dtype=dtype))
    assert symmetry_error(op, torch.Generator().manual_seed(0)) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert (op @ torch.ones(op.shape[0])).abs().max() > 0


@pytest.mark.skipif(not hasattr(neuron, "ComplementaryLIFNode"), reason="not in this version")
def test_everything_evaluates_except_neurons_without_a_surrogate_there() -> None:
    theirs = small(neuron.ComplementaryLIFNode, "m")
    net = nn.Sequential(*theirs[:2], layer.Dropout(0.5, step_mode="m"), *theirs[2:])
    adapted = adapt(net.eval(), X, steps=STEPS)
    for mode in (True, False):
        adapted.model.train(mode)
        assert [m.training for m in adapted.model.network] == [False, True, False, False, True]  # type: ignore[union-attr]
    assert torch.equal(adapted.model(X), adapted.model(X))
    made = make_objective(adapted.model, LOSSES["mse"], (X, Y), reset=adapted.reset)
    assert [m.training for m in made.model.network] == [False, True, False, False, True]  # type: ignore[union-attr]
    assert made.value_and_gradient()[1].norm() > 0


def test_a_used_model_with_its_own_loop_agrees() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small(neuron.IFNode, "m")

        def forward(self, x: Tensor) -> Tensor:
            rates: Tensor = self.net(x.unsqueeze(0).repeat(STEPS, 1, 1)).mean(0)
            return rates

    model = Own()
    model(X)  # its state now hangs on a graph
    found = objective_of(model)
    expected = objective_of(small(neuron.IFNode, "m"), steps=STEPS)
    assert model.net[1].v.grad_fn is not None  # the user's model is unchanged
    assert list(found.parameters) == ["net.0.weight", "net.2.weight"]
    torch.testing.assert_close(products(found), products(expected))


def test_no_state_is_left_and_none_is_found() -> None:
    adapted = adapt(small(neuron.IFNode, store_v_seq=True), X, steps=STEPS)
    rates = adapted.model(X)
    for module in copy.deepcopy(adapted.model).modules():  # which fails for a state that hangs on a graph
        assert not any(isinstance(value, Tensor) for value in getattr(module, "_memories", {}).values())
    vars(adapted.model)["network"][1].v = 0.5
    assert torch.equal(adapted.model(X), rates)


def test_states_that_start_from_a_tensor_are_not_cleared_in_place() -> None:
    """SpikingJelly's reset writes into them, and the graphs of several batches are kept."""

    class Offset(base.MemoryModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("v", torch.zeros(1, 8))
            self.bias = nn.Parameter(torch.ones(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.v * 0.5 + self.bias
            return x + self.v.square()

    net = nn.Sequential(layer.Linear(5, 8), Offset(), layer.Linear(8, 3), neuron.IFNode())
    adapted = adapt(net, X, steps=STEPS)
    assert adapted.library == "spikingjelly"
    together, apart = (
        make_objective(adapted.model, LOSSES["mse"], (X[:n], Y[:n]), batch_size=3, reset=adapted.reset) for n in (6, 3)
    )
    v = torch.ones(together.size)
    last = make_objective(adapted.model, LOSSES["mse"], (X[3:], Y[3:]), reset=adapted.reset)
    torch.testing.assert_close(hessian(together) @ v, (hessian(apart) @ v + hessian(last) @ v) / 2)


def test_sequences_with_a_wrong_number_of_steps_are_refused() -> None:
    sequences = torch.rand(6, STEPS, 5, generator=torch.Generator().manual_seed(2))
    matrices = [
        products(objective_of(small(neuron.IFNode, mode), sequences, steps=STEPS, sequences=True)) for mode in "sm"
    ]
    torch.testing.assert_close(*matrices)
    adapted = adapt(small(neuron.IFNode), sequences, steps=STEPS, sequences=True)
    with pytest.raises(AdapterError, match=r"samples of 4 steps are needed, \[N, 4, ...\], not \[6, 3, 5\]"):
        adapted.model(sequences[:, :3])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("S2NN", "S2NN.*second derivative is not finite at -1 in float32; give replacement="),
        ("FakeNumericalGradient", "not finite at 0"),
    ],
)
def test_surrogates_without_a_second_derivative_are_refused(function: str, message: str) -> None:
    net = small(neuron.IFNode, surrogate_function=getattr(surrogate, function)())
    with pytest.raises(AdapterError, match=message):
        adapt(net, X, steps=STEPS)
    cured = objective_of(net, steps=STEPS, surrogate=lambda x: spike(x, Surrogate.parse("atan:2")))
    plain = objective_of(small(neuron.IFNode, surrogate_function=surrogate.ATan()), steps=STEPS)
    torch.testing.assert_close(products(cured), products(plain))


def test_random_encoders_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"draws random numbers .rand_like in '0' .PoissonEncoder"):
        adapt(nn.Sequential(encoding.PoissonEncoder(), *small(neuron.IFNode)), X, steps=STEPS)


def test_kernels_of_other_makes_are_left_for_torch() -> None:
    net = small(neuron.IFNode, "m")
    for module in net.modules():
        if isinstance(module, neuron.IFNode):
            vars(module)["backend" if not hasattr(type(module), "backend") else "_backend"] = "cupy"
    adapted = adapt(net, X, steps=STEPS)
    assert [m.backend for m in adapted.model.modules() if isinstance(m, neuron.IFNode)] == ["torch", "torch"]


def test_neurons_whose_class_takes_all_steps_are_known_by_name() -> None:
    """Up to SpikingJelly 0.0.0.0.12 such neurons have no step_mode: their samples must not be taken for time."""

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.surrogate_function = neuron.IFNode().surrogate_function

        def forward(self, x: Tensor) -> Tensor:
            v, out = torch.zeros_like(x[0]), []
            for current in x:
                v = v + current
                s = self.surrogate_function(v - 1.0)
                v = v * (1 - s)
                out.append(s)
            return torch.stack(out)

    old = type("MultiStepIFNode", (Old,), {"__module__": "spikingjelly.clock_driven.neuron"})
    expected = small(neuron.IFNode, "m")
    net = nn.Sequential(*(old() if isinstance(m, neuron.IFNode) else m for m in expected))
    x = torch.rand(6, STEPS, 5, generator=torch.Generator().manual_seed(2))
    net, expected = (nn.Sequential(*m).eval() for m in (net, expected))
    options = {"steps": STEPS, "sequences": True}
    torch.testing.assert_close(
        products(objective_of(net, x, **options)), products(objective_of(expected, x, **options))
    )
