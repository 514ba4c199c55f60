"""Tests of the Triton scans against plain torch, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from neuron_passes import same, value
from torch import Tensor, nn

from hessian_tools.engine.product import linearize_traced
from hessian_tools.objective import make_objective
from ikun.kernels import dispatch
from ikun.kernels import scan as scan_module
from ikun.kernels.scan import Number, Scan, torch_adjoint, torch_adjoint_tangent, torch_tangent
from ikun.layers import MaxPool
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.neurons import NEURONS, RESETS, Dynamics, Neuron
from ikun.nodes import passes
from ikun.pooling import selection
from ikun.surrogates import Surrogate

pytest.importorskip("triton", reason="Triton is not installed")
from ikun.kernels import triton_kernels as triton_scans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIGHT = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


def neuron_of(kind: str, reset: str, dtype: torch.dtype = torch.float64, v_reset: float = -0.3) -> Neuron:
    dynamics = Dynamics(Surrogate.parse("atan:2"), threshold=0.7, v_reset=v_reset, reset=reset)
    return Neuron(kind, dynamics, tau=1.7).to(DEVICE, dtype)


def rates_of(neuron: Neuron) -> tuple[Number, ...]:
    """As on a device: a learned decay stays a tensor."""
    decay, gain = (r.detach() if isinstance(r, Tensor) else r for r in neuron.rates())
    d = neuron.dynamics
    return decay, gain, (1 - decay) * d.v_reset, d.threshold, d.v_reset


def drives(neuron: Neuron, steps: int, planes: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Random inputs; multiples of 1/8 and of the threshold over the gain, whose sums often hit the threshold."""
    noise = torch.randn((steps, *planes), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = noise.to(DEVICE, dtype)
    yield noise + 0.3
    yield (8 * noise).round() / 8
    gain = float(torch.as_tensor(neuron.rates()[1]).detach())
    exact = (neuron.dynamics.threshold - neuron.dynamics.v_reset) / gain
    yield torch.full_like(noise, exact) + torch.finfo(dtype).eps * noise.round()


def several_blocks(patch: pytest.MonkeyPatch) -> None:
    """For every program."""
    patch.setattr(triton_scans, "NEURONS", 256)
    patch.setattr(triton_scans, "_most", lambda device: 2)


# ---------------------------------------------------------------- value
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", NEURONS)
def test_spikes_are_the_plain_ones_to_the_bit(
    kind: str, reset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "usable", lambda like: False)
    several_blocks(monkeypatch)
    means = []
    for case, (ties, v_reset) in enumerate(itertools.product((None, "first", "last"), (0.0, -0.3))):
        neuron, pool = neuron_of(kind, reset, dtype, v_reset), None if ties is None else MaxPool(ties)
        steps, static, plane = (1 if case == 3 else 4), case % 3 == 0, ((5, 7), (4, 6))[case % 2]
        x = list(drives(neuron, 1 if static else steps, (13, *plane), dtype))[(case + case // 3) % 3]
        with torch.no_grad():
            y, *expected = value(neuron, steps, pool, x)
        hard, pooled = reset == "hard", None if pool is None else plane
        rates, last, learned = rates_of(neuron), ties == "last", kind == "plif"
        found = triton_scans.value(x.flatten(1), steps, rates, hard, pooled, last, learned)
        means.append(float(y.mean()))
        for f, e in zip(found, (y.flatten(1), *expected), strict=True):
            assert (f is None) == (e.numel() == 0)
            assert f is None or same(f, e)
    assert sum(0 < mean < 1 for mean in means) > 3


def test_many_steps_of_a_few_neurons_agree() -> None:
    neuron = neuron_of("lif", "hard", torch.float32)
    x = torch.randn(100, 5, device=DEVICE)
    found = triton_scans.value(x, 100, rates_of(neuron), True, None, False, False)
    assert torch.equal(found[0], neuron(x))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter's NumPy
def test_values_that_are_not_finite_stay_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "usable", lambda like: False)
    x = torch.zeros(3, 1, 2, 4, 6, device=DEVICE)
    x[1].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x[1].view(-1)[[12, 15, 20]] = torch.nan  # first, second and third in their windows
    for ties in (None, "first", "last"):
        neuron, pool = neuron_of("lif", "hard", torch.float32), None if ties is None else MaxPool(ties)
        _, z, index, _ = value(neuron, 3, pool, x)
        plane = None if pool is None else (4, 6)
        y, *found = triton_scans.value(x.flatten(1), 3, rates_of(neuron), True, plane, ties == "last", False)
        torch.testing.assert_close(found[0], z, rtol=0, atol=0, equal_nan=True)
        s = neuron(x).flatten(1)
        if pool is not None:
            assert found[1] is not None
            assert torch.equal(found[1], index)
            s = s.gather(1, index.long())
        torch.testing.assert_close(y, s, rtol=0, atol=0, equal_nan=True)
        assert y[1].isnan().any()


# ---------------------------------------------------------------- the three linear scans
def scan_of(dtype: torch.dtype, steps: int, learned: bool, pooled: bool, static: bool, kind: torch.dtype) -> Scan:
    """With random arrays; odd planes, two of one network's shapes."""
    planes, height, width = 23, 7, 5
    generator = torch.Generator().manual_seed(1)

    def array() -> Tensor:
        drawn = torch.randn(steps, planes * height * width, dtype=torch.float64, generator=generator)
        return drawn.to(DEVICE, dtype)

    index, unit = None, 1
    if pooled:
        index = selection(array().view(steps, 1, planes, height, width).sign(), "first").flatten(1).to(kind)
        unit = height * width
    scan = Scan(array(), array(), 0.4, 0.6, static, index, unit, array(), reset=(0.7, -1.3), width=width)
    return replace(scan, u=array(), gh=array()) if learned else scan


CASES = [
    (torch.float64, 4, False, False, False, torch.int32),
    (torch.float64, 4, True, True, True, torch.int64),
    (torch.float64, 1, False, True, False, torch.int32),
    (torch.float64, 3, True, False, True, torch.int32),
    (torch.float32, 4, True, True, False, torch.int32),
    (torch.float32, 3, False, True, True, torch.int64),
    (torch.float32, 30, True, False, False, torch.int32),
]


@pytest.mark.parametrize(("case", "wide"), [*((case, False) for case in CASES), (CASES[1], True), (CASES[2], True)])
def test_linear_scans_are_the_plain_ones(
    case: tuple[torch.dtype, int, bool, bool, bool, torch.dtype], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    several_blocks(monkeypatch)
    if wide:
        monkeypatch.setattr(triton_scans, "WIDE", 0)
    scan = scan_of(*case)
    dtype, _, learned, _, static, _ = case
    scan.c *= 0.5  # over 30 steps nothing overflows
    g, dx = torch.randn_like(scan.f1), torch.randn_like(scan.f1)[: 1 if static else len(scan.f1)]
    g = g if scan.index is None else g[:, : scan.index.shape[1]]  # not contiguous
    dgain: Number = torch.tensor(0.3, dtype=dtype, device=DEVICE) if learned else 0.3
    twin = copy.deepcopy(scan)
    z = torch.randn_like(scan.f1)
    for keep in (None, z):
        (gx, total), (expected, sum_) = triton_scans.adjoint(scan, g, keep), torch_adjoint(twin, g, keep)
        torch.testing.assert_close(gx, expected, **TIGHT[dtype])
        assert float(total) == pytest.approx(float(sum_), rel=TIGHT[dtype]["rtol"], abs=1e-3 * (dtype is torch.float32))
    for a, b in ((scan.e, twin.e), (scan.gh, twin.gh)):
        assert a is None or torch.testing.assert_close(a, b, **TIGHT[dtype]) is None
    torch.testing.assert_close(triton_scans.tangent(scan, dx, dgain), torch_tangent(scan, dx, dgain), **TIGHT[dtype])
    (gx, total), (expected, sum_) = (
        function(scan, g, dx, dgain) for function in (triton_scans.adjoint_tangent, torch_adjoint_tangent)
    )
    torch.testing.assert_close(gx, expected, **TIGHT[dtype])
    assert float(total) == pytest.approx(float(sum_), rel=TIGHT[dtype]["rtol"], abs=1e-3 * (dtype is torch.float32))


@pytest.mark.parametrize("pooled", [False, True])
def test_segments_of_time_that_hand_on_their_state_make_the_whole(pooled: bool) -> None:
    scan = scan_of(torch.float64, 5, True, pooled, False, torch.int32)
    size, parts = scan.f1.shape[1], (slice(0, 2), slice(2, 5))

    def segment(part: slice) -> Scan:
        names = ("f1", "c", "index", "e", "u", "gh")
        return replace(scan, **{n: a if (a := getattr(scan, n)) is None else a[part].clone() for n in names})

    dx = torch.randn_like(scan.f1)
    g = torch.randn_like(scan.f1 if scan.index is None else scan.index, dtype=torch.float64)
    neuron = neuron_of("plif", "hard")
    arguments = (rates_of(neuron), True, (7, 5) if pooled else None, False, True)
    whole = triton_scans.value(dx, 5, *arguments)
    v = torch.full((1, size), neuron.dynamics.v_reset, dtype=torch.float64, device=DEVICE)
    pieces = [triton_scans.value(dx[part], part.stop - part.start, *arguments, v) for part in parts]
    for k, expected in enumerate(whole):
        assert expected is None or torch.equal(torch.cat([piece[k] for piece in pieces]), expected)  # type: ignore[misc]

    zeros = torch.zeros_like(v)
    dv, starts, tangents = zeros.clone(), [], []
    for part in parts:
        starts.append(dv.clone())
        tangents.append(triton_scans.tangent(segment(part), dx[part], 0.3, dv))
    torch.testing.assert_close(torch.cat(tangents), triton_scans.tangent(scan, dx, 0.3), rtol=1e-12, atol=1e-12)

    expected, total = triton_scans.adjoint_tangent(scan, g, dx, 0.3)
    gv, found, sums = zeros.clone(), [], 0.0
    for part, start in zip(parts[::-1], starts[::-1], strict=True):
        before = start.clone()
        gx, more = triton_scans.adjoint_tangent(segment(part), g[part], dx[part], 0.3, start, gv)
        assert torch.equal(start, before)
        found.append(gx)
        sums += float(more)
    torch.testing.assert_close(torch.cat(found[::-1]), expected, rtol=1e-12, atol=1e-12)
    assert sums == pytest.approx(float(total), rel=1e-10)

    expected, total = triton_scans.adjoint(scan, g)
    gv, found = zeros.clone(), []
    for part in parts[::-1]:
        found.append(triton_scans.adjoint(segment(part), g[part], None, gv)[0])
    torch.testing.assert_close(torch.cat(found[::-1]), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- whole networks
def on_the_way(patch: pytest.MonkeyPatch) -> set[str]:
    """CPU tensors take the way of CUDA tensors; numbers stay tensors. Returns the names of the scans that will run."""
    used: set[str] = set()

    def noted(name: str, *arguments: Any) -> Any:
        used.add(name)
        return getattr(triton_scans, name)(*arguments)

    def number(t: Tensor | float) -> Number:
        return t.detach() if isinstance(t, Tensor) else float(t)

    scans = {name: partial(noted, name) for name in ("value", "tangent", "adjoint", "adjoint_tangent")}
    patch.setattr(dispatch, "on_device", lambda like: SimpleNamespace(**scans))
    patch.setattr(dispatch, "usable", lambda like: True)
    for module in (scan_module, passes):
        patch.setattr(module, "scalar", number)
    return used


NETWORKS = [
    {"neuron": "plif", "reset": "hard", "ties": "last"},
    {"neuron": "plif", "reset": "soft", "norm": "none", "coding": "poisson"},
    {"neuron": "lif", "reset": "soft", "detach_reset": True},
]
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="compiled here: tests/test_gpu.py has networks")


@interpreted
@pytest.mark.parametrize("fields", NETWORKS)
def test_products_and_gradients_of_a_network_agree(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    small = {"input_shape": (1, 5, 6), "channels": 2, "classes": 3, "timesteps": 3, "v_reset": -0.1, "threshold": 0.5}
    net = Network(Spec(**{**small, **fields})).to(torch.float64)  # type: ignore[arg-type]
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.data.mul_(2).add_(0.2)  # so that all layers fire
    x = torch.rand((4, 3, 1, 5, 6) if fields.get("coding") == "poisson" else (4, 1, 5, 6), dtype=torch.float64)
    objective = make_objective(net, LOSSES["ce"], (x, torch.arange(4) % 3))
    batch, v = objective.batches[0], torch.randn(objective.size, dtype=torch.float64)

    def results() -> list[Tensor]:
        y = net(x)
        products = [linearize_traced(objective, batch, kind) for kind in ("hessian", "ggn")]
        gradients = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        return [y.detach(), *gradients, *(product(v) for product in products if not isinstance(product, str))]

    expected = results()
    used = on_the_way(monkeypatch)
    found = results()
    assert len(used) == 4
    assert torch.equal(found[0], expected[0])
    assert len(found) == len(expected) == len(list(net.parameters())) + 3
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float64
        assert (f - e).norm() <= 1e-12 * e.norm()
    assert all(e.norm() > 0 for e in expected)


@interpreted
def test_failing_triton_warns_once_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("no C compiler")

    scan = scan_of(torch.float64, 3, False, True, False, torch.int32)
    state = {"broken": True, "triton broken": False}
    monkeypatch.setattr(dispatch, "_state", state)
    monkeypatch.setattr(dispatch, "on_device", lambda like: None if state["triton broken"] else triton_scans)
    monkeypatch.setattr(triton_scans, "tangent", fail)
    with pytest.warns(UserWarning, match=r"Triton failed \(no C compiler\): spikes run in plain torch on CUDA, slower"):
        found = dispatch.tangent(scan, scan.f1)
    assert torch.equal(found, torch_tangent(scan, scan.f1, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.tangent(scan, scan.f1)
