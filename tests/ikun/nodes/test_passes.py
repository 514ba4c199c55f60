"""The passes of neurons over time: several blocks and threads, and sequences that begin where another ended."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ikun.kernels import dispatch
from ikun.kernels.scan import Scan, torch_adjoint, torch_adjoint_tangent, torch_tangent
from ikun.nodes import passes
from ikun.nodes.autograd import neurons
from ikun.nodes.passes import ScanSpec, encode_spec
from ikun.pooling import selection

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_kernels_give_the_same_over_several_blocks_and_threads(learned: bool, pooled: bool, static: bool) -> None:
    if dispatch.kernels() is None:
        pytest.skip("numba is missing")
    torch.set_num_threads(3)
    torch.manual_seed(0)
    steps, planes, height, width = 3, 401, 7, 9
    size = planes * height * width

    def array() -> Tensor:
        return torch.randn(steps, size, dtype=torch.float64)

    index = selection(torch.randn(steps, 1, planes, height, width).sign(), "first").flatten(1) if pooled else None
    scan = Scan(array(), array(), 0.4, 0.6, static, index, height * width if pooled else 1, array())
    if learned:
        scan.u, scan.gh = array(), array()
    dx, g = array()[: 1 if static else steps], array()
    g = g if index is None else g[:, : index.shape[1]]
    assert torch.allclose(dispatch.tangent(scan, dx, 0.3), torch_tangent(scan, dx, 0.3), rtol=1e-12)
    for fast, slow in (
        (dispatch.adjoint(scan, g), torch_adjoint(scan, g)),
        (dispatch.adjoint_tangent(scan, g, dx, 0.3), torch_adjoint_tangent(scan, g, dx, 0.3)),
    ):
        assert torch.allclose(fast[0], slow[0], rtol=1e-12)
        assert fast[1] == pytest.approx(slow[1], rel=1e-9)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_passes_resume_from_their_state(
    learned: bool, pooled: bool, static: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass over 3 and 4 steps, of several blocks in three threads, is bit for bit the pass over 7."""
    if compiled and dispatch.kernels() is None:
        pytest.skip("numba is missing")
    if not compiled:
        monkeypatch.setattr(dispatch, "kernels", lambda: None)
    torch.set_num_threads(3)
    torch.manual_seed(0)
    steps, shape = 7, (2, 101, 5, 7)
    plane = {"height": 5, "width": 7} if pooled else {}
    rates = (1.0, 1.0) if learned else (1 - 1 / 1.7, 1 / 1.7)
    whole = ScanSpec("atan:2", *rates, 0.7, -0.3, steps=steps, static=static, **plane)  # type: ignore[arg-type]
    gain = torch.tensor(1 / 1.7, dtype=torch.float64) if learned else None
    dgain = torch.tensor(0.4, dtype=torch.float64) if learned else None
    x = torch.randn(1 if static else steps, *shape, dtype=torch.float64).flatten(1)
    dx, zero = torch.randn_like(x), torch.zeros(1, x.shape[1], dtype=torch.float64)

    def at(t: Tensor, span: slice) -> Tensor:
        return t if static else t[span]

    def text(span: slice) -> str:
        return encode_spec(replace(whole, steps=span.stop - span.start))

    everything, halves = slice(0, 7), (slice(0, 3), slice(3, 7))

    def forward(span: slice, v: Tensor | None, dv: Tensor) -> tuple[Tensor, ...]:
        """Spikes, their tangent, the last potential, its tangent, and what the adjoints read."""
        y, z, end, index, u = passes.spikes(at(x, span), v, gain, text(span))
        f1, c = passes.slopes(z, text(span))
        dy, dend = passes.tangent(at(dx, span), dv, dgain, f1, c, index, u, gain, text(span))
        return y, dy, end, dend, z, f1, c, index, u

    def backward(span: slice, seen: tuple[Tensor, ...], dv: Tensor, g: Tensor, dg: Tensor, after: tuple[Tensor, ...]):  # type: ignore[no-untyped-def]
        """gx, its tangent, e, gh, the gradients of the gain, and the adjoints of the first potential."""
        *_, z, f1, c, index, u = seen
        at_ = (index, u, gain, text(span))
        gx, gv, ggain, e, gh = passes.adjoint_kept(g[span], after[0], z, None, f1, c, *at_)
        dgx, dgv, dggain = passes.adjoint_tangent(dg[span], after[1], at(dx, span), dv, dgain, f1, c, e, gh, *at_)
        return gx, dgx, e, gh, ggain, dggain, gv, dgv

    full = forward(everything, None, zero)
    g, dg = torch.randn_like(full[0]), torch.randn_like(full[0])
    expected = backward(everything, full, zero, g, dg, (zero, zero))
    first = forward(halves[0], None, zero)
    second = forward(halves[1], first[2], first[3])
    for k in (0, 1):
        assert torch.equal(torch.cat([first[k], second[k]]), full[k])
    assert torch.equal(second[2], full[2])
    late = backward(halves[1], second, first[3], g, dg, (zero, zero))
    early = backward(halves[0], first, zero, g, dg, late[6:])
    for k in (0, 1):
        if static:
            torch.testing.assert_close(early[k] + late[k], expected[k], rtol=1e-13, atol=1e-13)
        else:
            assert torch.equal(torch.cat([early[k], late[k]]), expected[k])
    for k in (2, 3):
        assert not expected[k].numel() or torch.equal(torch.cat([early[k], late[k]]), expected[k])
    for k in (4, 5):
        torch.testing.assert_close(early[k] + late[k], expected[k])


@pytest.mark.parametrize("ties", ["first", "last"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 7, 9), (1, 5, 1, 2, 2), (2, 3, 8, 16, 16)])
def test_the_kernel_selects_the_entries_of_plain_torch(shape: tuple[int, ...], ties: str) -> None:
    if dispatch.kernels() is None:
        pytest.skip("numba is not usable")
    for s in (torch.randn(shape).sign(), torch.randn(shape, dtype=torch.float64)):
        y, index = dispatch.select(s.flatten(1), shape[-2:], ties)
        expected = selection(s, ties).flatten(1)
        assert torch.equal(index, expected)
        assert torch.equal(y, s.flatten(1).gather(1, expected.long()))


def test_a_traced_gradient_adds_no_zeros_of_the_size_of_a_layer() -> None:
    """The adjoint of the input is the only one: what stands for it in the second derivative has no gradient."""
    x = torch.randn(3, 2, 5, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y, _ = neurons(x, ScanSpec(steps=3, ends=False))
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return g

    called = [str(node.target) for node in make_fx(gradient)(x).graph.nodes]
    assert "ikun.adjoint.default" in called
    assert not [name for name in called if name.startswith(("aten.add.", "aten.zeros."))]
