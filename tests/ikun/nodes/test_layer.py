"""Tests of the nodes of ikun's own neurons against the plain network: identical spikes, equal gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from neuron_passes import same, value
from torch import Tensor, nn

from ikun.kernels import dispatch
from ikun.kernels import scan as scan_module
from ikun.kernels.scan import Scan, scatter, torch_slopes
from ikun.layers import MaxPool
from ikun.losses import LOSSES
from ikun.networks import MODELS, Network, Spec
from ikun.neurons import NEURONS, RESETS, Dynamics, Neuron
from ikun.nodes import passes
from ikun.nodes.layer import spec_of
from ikun.surrogates import FAMILIES, Surrogate

pytestmark = pytest.mark.usefixtures("one_thread")

compiled = pytest.mark.skipif(dispatch.kernels() is None, reason="numba is missing")
STEPS = 4


def neuron_of(kind: str, reset: str, dtype: torch.dtype, v_reset: float = -0.3, **fields: object) -> Neuron:
    """With a learned decay that is not a round number."""
    surrogate = Surrogate.parse("atan:2")
    dynamics = Dynamics(surrogate, threshold=0.7, v_reset=v_reset, reset=reset, **fields)  # type: ignore[arg-type]
    return Neuron(kind, dynamics, tau=1.7).to(dtype)


def drives(neuron: Neuron, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Random inputs; multiples of 1/8 and of the threshold over the gain, whose sums often hit the threshold."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, dtype=dtype, generator=generator)
    yield noise + 0.3
    yield (8 * noise).round() / 8
    decay, gain = (float(torch.as_tensor(r).detach()) for r in neuron.rates())
    d = neuron.dynamics
    exact = (d.threshold - (decay * d.v_reset + (1 - decay) * d.v_reset)) / gain
    yield torch.full(shape, exact, dtype=dtype) + torch.finfo(dtype).eps * noise.round()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", NEURONS)
def test_spikes_are_the_plain_ones_to_the_bit(
    kind: str, reset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for v_reset, static, ties in itertools.product((0.0, -0.3), (False, True), (None, "first", "last")):
        neuron = neuron_of(kind, reset, dtype, v_reset)
        pool = None if ties is None else MaxPool(ties)
        for x in drives(neuron, (1 if static else STEPS, 3, 41, 5, 7), dtype):  # more than one block, odd planes
            with torch.no_grad():
                found = value(neuron, STEPS, pool, x)
                with monkeypatch.context() as patch:
                    patch.setattr(dispatch, "kernels", lambda: None)
                    expected = value(neuron, STEPS, pool, x)
                s = neuron(x.expand(STEPS, *x.shape[1:]))
            assert torch.equal(found[0], s if pool is None else pool(s))
            assert 0 < s.mean() < 1
            assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@compiled
def test_whole_numbers_are_rounded_like_the_others() -> None:
    x = torch.rand(STEPS, 1, 5000) * 3
    for reset in RESETS:
        neuron = Neuron("lif", Dynamics(Surrogate.parse("atan"), threshold=1, v_reset=0, reset=reset), tau=1.7)
        assert torch.equal(value(neuron, STEPS, None, x)[0], neuron(x))


@compiled
def test_values_that_are_not_finite_stay_visible() -> None:
    x = torch.zeros(STEPS, 1, 6)
    x[1, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for reset in RESETS:
        neuron = neuron_of("lif", reset, torch.float32)
        found, expected = value(neuron, STEPS, None, x)[0], neuron(x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
        assert found[1, 0, :3].isnan().all()


def by_hand(neuron: Neuron, z: Tensor, f1: Tensor, f2: Tensor, gs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c, e, gh) [T, M] by the table of derivatives, one neuron at a time in NumPy."""
    d, decay = neuron.dynamics, float(torch.as_tensor(neuron.rates()[0]).detach())
    out = np.zeros((3, *z.shape))
    for m in range(z.shape[1]):
        gv = 0.0
        for t in reversed(range(len(z))):
            a, first, second, g = (float(array[t, m]) for array in (z, f1, f2, gs))
            h, s = a + d.threshold, float(a >= 0)
            if d.reset == "soft":
                c = 1.0 if d.detach_reset else 1 - d.threshold * first
                e = g * second if d.detach_reset else (g - d.threshold * gv) * second
            else:
                c = 1 - s if d.detach_reset else 1 - s + (d.v_reset - h) * first
                e = g * second if d.detach_reset else (g + gv * (d.v_reset - h)) * second - 2 * gv * first
            gh = first * g + c * gv
            out[:, t, m] = c, e, gh
            gv = decay * gh
    return torch.from_numpy(out[0]), torch.from_numpy(out[1]), torch.from_numpy(out[2])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("pooled", [False, True])
def test_kept_coefficients_are_the_tables(
    plain: bool, detach_reset: bool, reset: str, pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(dispatch, "kernels", lambda: None)
    monkeypatch.setattr(scan_module, "PIECE", 50)  # several pieces, the last one short
    neuron = neuron_of("plif", reset, torch.float64, detach_reset=detach_reset)
    x = torch.randn(STEPS * 2, 3, 4, 5, dtype=torch.float64)
    timed = x.unflatten(0, (STEPS, -1))
    pool = MaxPool() if pooled else None
    spec, gain = spec_of(neuron, timed, STEPS, pool), neuron.rates()[1]
    assert isinstance(gain, Tensor)
    text = passes.encode_spec(spec)
    with torch.no_grad():
        y, z, _, index, u = passes.spikes(timed.flatten(1), None, gain, text)
        f1, found_c = passes.slopes(z, text)
        g = torch.randn_like(y)
        gx, *_, found_e, found_gh = passes.adjoint_kept(g, None, z, None, f1, found_c, index, u, gain, text)
    gs = scatter(g, passes._scan(spec, f1, found_c, index, u, gain))
    surrogate = neuron.dynamics.surrogate
    c, e, gh = by_hand(neuron, z, surrogate.first(z), surrogate.second(z), gs)
    for found, expected in ((found_c, c), (found_e, e), (found_gh, gh), (gx, gain.detach() * gh)):
        torch.testing.assert_close(found.to(expected), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- the neurons of a network as nodes
def trained(dtype: torch.dtype, **fields: object) -> tuple[Network, Tensor, Tensor]:
    torch.manual_seed(1)
    small = {"input_shape": (1, 9, 10), "channels": 3, "hidden": (17, 9), "classes": 4, "timesteps": 3, "tau": 1.6}
    net = Network(Spec(**{**small, "threshold": 0.6, "v_reset": -0.1, **fields}))  # type: ignore[arg-type]
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.data.mul_(2).add_(0.02 if net.spec.model == "mlp" else 0.1)  # so that all layers fire
    x = torch.rand(8, *net.spec.input_shape)
    if net.spec.coding == "poisson":
        x = torch.bernoulli(x[:, None].expand(8, 3, *net.spec.input_shape))
    return net.to(dtype), x.to(dtype), torch.arange(8) % 4


CONFIGURATIONS = list(itertools.product(NEURONS, RESETS, (False, True), ("csnn", "mlp")))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", range(len(CONFIGURATIONS)))
def test_training_gradient_is_the_plain_one(index: int, dtype: torch.dtype) -> None:
    neuron, reset, detach_reset, model = CONFIGURATIONS[index]
    fields = {
        "coding": ("direct", "poisson")[index // 2 % 2],
        "ties": ("first", "last")[index // 4 % 2],
        "surrogate": ("atan:2", "sigmoid:4", "triangle:1")[index % 3],
        "norm": ("bn", "none")[index // 3 % 2],
    }
    net, x, y = trained(dtype, neuron=neuron, reset=reset, detach_reset=detach_reset, model=model, **fields)
    net.train()
    plain, fast = net(x, plain=True), net(x)
    assert torch.equal(plain, fast)
    parameters = list(net.parameters())
    expected = torch.autograd.grad(LOSSES["ce"](plain, y), parameters)
    found = torch.autograd.grad(LOSSES["ce"](fast, y), parameters)
    assert any("_Spikes" in type(f).__name__ for f in nodes(fast))
    assert not any("_Spikes" in type(f).__name__ for f in nodes(plain))
    for f, e in zip(found, expected, strict=True):
        assert e.norm() > 0
        assert (f - e).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * e.norm()


def nodes(y: Tensor) -> list[object]:
    """The nodes of y's graph."""
    found, stack = [], [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.append(node)
            stack += [n for n, _ in node.next_functions]
    return found


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("neuron", "reset"), [("lif", "soft"), ("plif", "hard")])
def test_second_derivatives_are_the_plain_ones(model: str, neuron: str, reset: str, dtype: torch.dtype) -> None:
    net, x, y = trained(dtype, model=model, neuron=neuron, reset=reset, ties="last")
    parameters = list(net.parameters())
    found = []
    for plain in (True, False):
        gradient = torch.autograd.grad(LOSSES["ce"](net(x, plain=plain), y), parameters, create_graph=True)
        total = sum(g.square().sum() for g in gradient)
        found.append(torch.autograd.grad(total, parameters))
    for e, f in zip(*found, strict=True):
        assert e.norm() > 0
        assert (f - e).norm() <= (2e-4 if dtype == torch.float32 else 1e-11) * e.norm()


@compiled
def test_third_derivatives_are_refused() -> None:
    net, x, y = trained(torch.float64)
    parameters = list(net.parameters())
    for _ in range(2):
        gradient = torch.autograd.grad(LOSSES["mse"](net(x), y), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradient), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in second).backward()  # type: ignore[union-attr]


@compiled
def test_hooks_see_every_call_of_neurons_and_pooling() -> None:
    net, x, _ = trained(torch.float32, coding="direct")
    expected, seen = net(x), []
    for name in ("spike1", "pool2"):
        net.get_submodule(name).register_forward_hook(lambda _, arguments, out: seen.append((arguments[0].shape, out)))
    assert torch.equal(net(x), expected)
    assert [shape for shape, _ in seen] == [(3, 8, 3, 9, 10), (3, 8, 3, 4, 5)]
    assert [out.shape for _, out in seen] == [(3, 8, 3, 9, 10), (3, 8, 3, 2, 2)]


@compiled
def test_a_learned_decay_changed_before_backward_does_not_change_the_gradient() -> None:
    net, x, y = trained(torch.float64, neuron="plif")
    parameters = list(net.parameters())
    expected = torch.autograd.grad(LOSSES["mse"](net(x), y), parameters)
    loss = LOSSES["mse"](net(x), y)
    with torch.no_grad():
        net.get_submodule("spike1").logit.add_(1)  # type: ignore[operator, union-attr]
    for found, exact in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("why", ["no numba", "relaxed", "half"])
def test_nodes_without_kernels_have_the_same_values_and_gradients(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no numba":
        monkeypatch.setattr(dispatch, "kernels", lambda: None)
    net, x, y = trained(torch.bfloat16 if why == "half" else torch.float64, relaxed=why == "relaxed")
    found, plain = net(x), net(x, plain=True)
    assert torch.equal(found, plain) or (why == "relaxed" and torch.allclose(found, plain, rtol=1e-14))
    gradients = [torch.autograd.grad(LOSSES["ce"](o, y), list(net.parameters())) for o in (found, plain)]
    for f, e in zip(*gradients, strict=True):
        assert (f - e).norm() <= (0.1 if why == "half" else 1e-12) * e.norm()


def at_the_edges(surrogate: Surrogate, dtype: torch.dtype) -> torch.Tensor:
    """z [5, M]: random ones, 0, both sides of every kink, far out; more than one thread's share."""
    width = surrogate.parameter
    far = torch.tensor([0.0, 1e-6, 0.49, 0.51, 0.99, 1.01, 1e3, 1e6], dtype=dtype) * width
    random = torch.randn(5 * dispatch.GRAIN - 2 * len(far), dtype=dtype, generator=torch.Generator().manual_seed(0))
    return torch.cat([far, -far, random]).view(5, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_and_their_derivatives_are_the_formulas(
    family: str, reset: str, detach: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    surrogate = Surrogate.parse(family)
    d = Dynamics(surrogate, threshold=0.7, v_reset=-0.2 if reset == "hard" else 0.0, reset=reset, detach_reset=detach)
    z = at_the_edges(surrogate, dtype)
    near = {"rtol": 2e-6, "atol": 1e-12} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 1e-16}
    exact = z.double()
    first, silent = surrogate.first(exact), (exact < 0).double()
    felt = torch.zeros_like(exact) if detach else (-0.2 - 0.7 - exact if reset == "hard" else exact.new_tensor(-0.7))
    c = (silent if reset == "hard" else 1) + felt * first
    g = torch.randn(z.shape, dtype=dtype)
    for known in (True, False):
        if not known:
            monkeypatch.setattr(dispatch, "kernels", lambda: None)
        found = dispatch.slopes(d, z)
        torch.testing.assert_close(found[0].double(), first, **near)
        torch.testing.assert_close(found[1].double(), c, rtol=near["rtol"], atol=5 * near["rtol"])
        scan = Scan(*found, 0.0, 1.0, False, None, 1, e=torch.empty_like(z), surrogate=surrogate)
        dispatch.adjoint(scan, g, z)  # without memory: e = f'' gs
        assert scan.e is not None
        expected = surrogate.second(exact) * g
        torch.testing.assert_close(scan.e.double(), expected, rtol=5 * near["rtol"], atol=1e-12)


@compiled
@pytest.mark.parametrize("family", FAMILIES)
def test_every_surrogate_in_pieces_is_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(2, 501, dtype=torch.float64)
    d = Dynamics(Surrogate.parse(family))
    results = []
    for piece in (64, 10**6):
        monkeypatch.setattr(scan_module, "PIECE", piece)
        f1, c = torch.empty_like(z), torch.empty_like(z)
        torch_slopes(d, z, f1, c)
        results.append((f1, c))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(results[0][0], d.surrogate.first(z), rtol=1e-14, atol=1e-16)
