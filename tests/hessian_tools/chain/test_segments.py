"""Tests of products in segments of time: agreement with the unsegmented ones, and peak memory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from objectives import firing_objective
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessian_tools.chain import second_order, segments
from hessian_tools.chain.layers import Carry
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators import curvature as operators
from hessian_tools.operators.base import symmetry_error
from ikun import spiking_layers as spikes
from ikun.kernels import dispatch, scan
from ikun.layers import MaxPool
from ikun.losses import LOSSES
from ikun.neurons import Dynamics, Neuron
from ikun.surrogates import Surrogate

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("hessian", "ggn", "fisher")


def error(kind: str, objective: Objective) -> float:
    """Relative error of the segmented product against the whole chain's."""
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = second_order.linearize(objective, objective.batches[0], kind)
    parts = segments.linearize_in_segments(objective, objective.batches[0], kind)
    assert whole is not None
    assert parts is not None
    assert parts.nbytes == 0
    exact = whole(v)
    assert exact.norm() > 1e-6
    return float((parts(v) - exact).norm() / exact.norm())


CONFIGURATIONS = list(
    itertools.product(("if", "lif", "plif"), ("hard", "soft"), (False, True), ("none", "bn"), ("csnn", "mlp"))
)


@pytest.mark.parametrize("index", range(len(CONFIGURATIONS)))
def test_products_in_segments_are_those_of_the_whole_chain(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    neuron, reset, detach_reset, norm, model = CONFIGURATIONS[index]
    bits = index // 2 + index // 4 + index // 24
    fields = {
        "coding": ("direct", "poisson")[bits % 2],
        "ties": ("first", "last")[bits // 2 % 2],
        "surrogate": ("atan:2", "sigmoid:4", "triangle:1")[bits % 3],
    }
    objective = firing_objective(
        ("mse", "ce")[(bits + index) % 2],
        timesteps=7,
        neuron=neuron,
        reset=reset,
        detach_reset=detach_reset,
        norm=norm,
        model=model,
        **fields,
    )
    for length in (1, 3, 7):
        monkeypatch.setattr(segments, "length", lambda objective, length=length: length)
        assert max(error(kind, objective) for kind in KINDS) < 1e-12


@pytest.mark.parametrize("coding", ["direct", "poisson"])
@pytest.mark.parametrize("neuron", ["lif", "plif"])
def test_products_of_long_sequences_agree(neuron: str, coding: str) -> None:
    objective = firing_objective(timesteps=100, neuron=neuron, coding=coding)
    assert segments.length(objective) == 10
    assert max(error(kind, objective) for kind in KINDS) < 1e-12


@pytest.mark.parametrize("params", ["fc*", "conv2.weight", "norm1.*", "*.logit", "spike3.logit", "conv1.weight,fc1*"])
def test_products_agree_for_a_part_of_the_parameters(params: str) -> None:
    objective = firing_objective(neuron="plif", params=params, timesteps=5)
    assert max(error(kind, objective) for kind in KINDS) < 1e-12


@pytest.mark.parametrize("coding", ["direct", "poisson"])
def test_products_agree_for_plain_torch_and_relaxed_networks(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error("hessian", firing_objective(relaxed=True, neuron="plif", timesteps=5, coding=coding)) < 1e-12
    compiled = firing_objective(neuron="plif", timesteps=5, coding=coding)
    v = torch.randn(compiled.size, dtype=torch.float64)
    product = segments.linearize_in_segments(compiled, compiled.batches[0], "hessian")
    assert product is not None
    expected = product(v)
    monkeypatch.setattr(dispatch, "kernels", lambda: None)
    assert (product(v) - expected).norm() < 1e-13 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_loss_and_gradient_are_those_of_the_whole_chain(dtype: torch.dtype) -> None:
    """The spikes are the same ones: their counts are."""
    for fields in ({"neuron": "lif"}, {"neuron": "plif", "reset": "soft", "coding": "poisson", "model": "mlp"}):
        objective = firing_objective(timesteps=23, dtype=dtype, **fields).rebatched(2)
        cut = replace(objective, segmentation=segments)
        for x, _ in objective.batches:
            with torch.no_grad():
                counts, expected = 23 * cut.outputs(x), 23 * objective.outputs(x)
            assert torch.equal(counts.round(), expected.round())
            assert (counts - expected).abs().max() < 1e-4
            assert cut.outputs(x).requires_grad
        (loss, gradient), (plain_loss, plain) = cut.value_and_gradient(), objective.value_and_gradient()
        tight = 1e-12 if dtype == torch.float64 else 1e-5
        assert loss == pytest.approx(plain_loss, rel=tight)
        assert (gradient - plain).norm() < tight * plain.norm()


def test_operators_give_the_same_in_segments() -> None:
    objective = firing_objective(timesteps=9, neuron="plif").rebatched(2)
    cut, block = replace(objective, segmentation=segments), torch.randn(objective.size, 2, dtype=torch.float64)
    for factory in operators.OPERATORS.values():
        exact = factory(objective, 1e9) @ block
        for memory in (0.0, 1e9):
            assert (factory(cut, memory) @ block - exact).norm() < 1e-12 * exact.norm()
    assert symmetry_error(operators.hessian(cut), torch.Generator().manual_seed(0)) < 1e-13


def test_networks_that_cannot_be_cut_run_whole() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
    data = torch.randn(7, 1, 5, 6, dtype=torch.float64), torch.arange(7) % 4
    changed = firing_objective(timesteps=20)
    changed.model.add_module("extra", nn.LayerNorm(3, dtype=torch.float64))
    for objective in (make_objective(net.double(), LOSSES["ce"], data), firing_objective(timesteps=1), changed):
        cut, v = replace(objective, segmentation=segments), torch.randn(objective.size, dtype=torch.float64)
        assert not segments.possible(cut)
        assert segments.bytes_per_sample(cut) is None
        assert segments.linearize_in_segments(cut, cut.batches[0], "hessian") is None
        torch.testing.assert_close(operators.hessian(cut) @ v, operators.hessian(objective) @ v)
        torch.testing.assert_close(cut.value_and_gradient(), objective.value_and_gradient())
    with_reset = replace(firing_objective(timesteps=20), reset=lambda model: None, segmentation=segments)
    assert not segments.possible(with_reset)


def test_a_loss_without_a_gradient_gives_zero() -> None:
    objective = replace(
        firing_objective(timesteps=5), loss=lambda o, y: torch.zeros(()).double(), segmentation=segments
    )
    product = segments.linearize_in_segments(objective, objective.batches[0], "hessian")
    assert product is not None
    assert product(torch.ones(objective.size).double()).abs().max() == 0
    assert objective.value_and_gradient()[1].abs().max() == 0


# ---------------------------------------------------------------- the scans
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("kind", ["lif", "plif"])
def test_scans_resume_from_their_state(
    kind: str, pooled: bool, static: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass over 3 and 4 steps, of several blocks in three threads, is bit for bit the pass over 7."""
    if compiled and dispatch.kernels() is None:
        pytest.skip("numba is missing")
    if not compiled:
        monkeypatch.setattr(dispatch, "kernels", lambda: None)
    torch.set_num_threads(3)
    torch.manual_seed(0)
    neuron = Neuron(kind, Dynamics(Surrogate.parse("atan:2"), 0.7, -0.3), tau=1.7).double()
    pool, steps, shape = MaxPool() if pooled else None, 7, (2, 101, 5, 7)
    x = torch.randn(1 if static else steps, *shape, dtype=torch.float64)
    dx = torch.randn_like(x)
    dp = [torch.tensor(0.4, dtype=torch.float64)][: kind == "plif"]

    def at(t: Tensor, span: slice) -> Tensor:
        return t[0] if static else t[span].flatten(0, 1)

    def layer(span: slice, carry: Any = None) -> tuple[Tensor, spikes.Spikes]:
        return spikes.linearize_neurons(neuron, span.stop - span.start, static, pool, at(x, span), carry)

    whole, halves = slice(0, 7), (slice(0, 3), slice(3, 7))
    carry = Carry()
    with torch.no_grad():
        y, full = layer(whole)
        g, dg = torch.randn_like(y), torch.randn_like(y)
        expected = full.tangent(at(dx, whole), dp), full.adjoint(g, None, True), None
        found_y, found_dy, parts = [], [], []
        for span in halves:
            out, part = layer(span, carry)
            found_y.append(out)
            found_dy.append(part.tangent(at(dx, span), dp))
            parts.append(part)
        assert torch.equal(torch.cat(found_y), y)
        assert torch.equal(torch.cat(found_dy), expected[0])
        back = []
        rows = len(y) // steps
        for span, part in list(zip(halves, parts, strict=True))[::-1]:
            here = slice(span.start * rows, span.stop * rows)
            gx, gp = part.adjoint(g[here], None, True)
            back.append((gx, gp, *part.adjoint_tangent(dg[here], at(dx, span), dp, None)))
        dgx, dgp = full.adjoint_tangent(dg, at(dx, whole), dp, None)
        for found, exact in (((r[0] for r in back), expected[1][0]), ((r[2] for r in back), dgx)):
            late, early = found
            if static:
                torch.testing.assert_close(early + late, exact, rtol=1e-13, atol=1e-13)
            else:
                assert torch.equal(torch.cat([early, late]), exact)
        for k, exact_p in ((1, expected[1][1]), (3, dgp)):
            for a, b, c in zip(*(r[k] for r in back), exact_p, strict=True):
                torch.testing.assert_close(a + b, c)
        for name in ("e", "gh"):
            pieces = [getattr(part.scan, name) for part in parts]
            if pieces[0] is not None:
                assert torch.equal(torch.cat(pieces), getattr(full.scan, name))


# ---------------------------------------------------------------- memory
class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time, those of a KiB or less aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.live: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (s := t.untyped_storage()).nbytes() > 1024 and s._cdata not in inside:
                self.live.append((StorageWeakRef(s), s.nbytes()))
        self.live = [(ref, size) for ref, size in self.live if not ref.expired()]
        self.bytes = max(self.bytes, sum(size for _, size in self.live))
        return out


@pytest.mark.parametrize("coding", ["direct", "poisson"])
def test_memory_grows_like_the_square_root_of_time(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PIECE", 1024)  # as small as this network asks for
    found: dict[bool, list[float]] = {False: [], True: []}
    for steps in (16, 64, 256):
        whole = firing_objective(timesteps=steps, coding=coding, channels=4, input_shape=(1, 8, 8), classes=2)
        for objective in (whole, replace(whole, segmentation=segments)):
            with Peak() as peak:
                operators.linearize_hessian(objective, objective.batches[0])(torch.ones(objective.size).double())
            found[objective.segmented].append(peak.bytes)
            each = segments.bytes_per_sample(objective)
            assert each is not None
            assert 0.8 < peak.bytes / (5 * each) < 2  # what batch sizes are chosen by, and the work of a product
    assert found[False][2] / found[False][1] > 3.7
    assert max(b / a for a, b in itertools.pairwise(found[True])) < 2.2
    assert found[True][2] < found[False][2] / 6
