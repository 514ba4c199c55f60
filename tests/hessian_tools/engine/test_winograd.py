"""Faster forms of convolutions: the same derivatives as those of the convolution itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.engine import nodes
from hessian_tools.engine.convolution import blocks, winograd
from hessian_tools.engine.linearized import Linearized
from hessian_tools.engine.trace import Program
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators import curvature


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of few channels use Winograd's form."""
    monkeypatch.setattr(winograd, "CHANNELS", 1)


def derivatives(convolve: Callable[..., Tensor], x: Tensor, w: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return the output, first derivatives and products with the second ones, all along fixed random tensors."""
    generator = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, dtype=t.dtype, generator=generator)

    inputs = [t.clone().requires_grad_() for t in (x, w, bias) if t is not None]
    y = convolve(*inputs)
    g = like(y).requires_grad_()
    first = torch.autograd.grad(y, inputs, g, create_graph=True)
    second = torch.autograd.grad(first, [g, *inputs[:2]], [like(t) for t in first])
    alone = torch.autograd.grad(convolve(*inputs), inputs[1:2], g, create_graph=True)  # only by the weights
    return [y, *first, *second, *alone, *torch.autograd.grad(alone, [g, inputs[0]], [like(w)])]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("size", [(3, 3), (4, 6), (5, 9), (2, 1), (13, 12), (5, 70), (3, 250)])
def test_winograds_convolution_is_the_convolution(size: tuple[int, int], pad: int, small: None) -> None:
    if min(size) + 2 * pad < 3:
        pytest.skip("no output")
    torch.manual_seed(0)
    x, w = torch.randn(3, 2, *size, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    for bias in (None, torch.randn(4, dtype=torch.float64)):
        large = min(size) + 2 * pad - 2 >= 3
        assert winograd.suits(x, w, ([1, 1], [pad, pad], [1, 1], False, [0, 0], 1)) == large

        def ours(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
            return winograd.fast_convolution(x, w, bias, pad)

        def plain(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.conv2d(x, w, bias, padding=pad)

        same(derivatives(ours, x, w, bias), derivatives(plain, x, w, bias))


def test_two_threads_compute_the_same(small: None) -> None:
    x, w = torch.randn(64, 5, 16, 16), torch.randn(7, 5, 3, 3)
    expected = winograd.fast_convolution(x, w, None, 1)
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(winograd.fast_convolution(x, w, None, 1), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_other_convolutions_keep_their_form(dtype: torch.dtype, small: None) -> None:
    one, geometry = torch.randn(2, 2, 4, 4), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    w = torch.randn(2, 2, 3, 3)
    assert winograd.suits(one, w, geometry)
    assert not winograd.suits(one.to(dtype), w.to(dtype), geometry)
    assert not winograd.suits(one[:0], w, geometry)
    assert not winograd.suits(one, torch.randn(2, 2, 3, 1), geometry)
    for place, value in ((0, [2, 2]), (1, [1, 0]), (1, [3, 3]), (2, [2, 2]), (3, True), (5, 2)):
        other = list(geometry)
        other[place] = value
        assert not winograd.suits(one, w, other)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 1), (4, 6)])
def test_weights_that_meet_only_padding_are_left_out(
    size: tuple[int, int], kernel: tuple[int, int], padding: int, stride: int, dilation: int
) -> None:
    if any(n + 2 * padding < dilation * (k - 1) + 1 for n, k in zip(size, kernel, strict=True)):
        pytest.skip("no output")
    torch.manual_seed(0)
    x, w = torch.randn(2, 2, *size, dtype=torch.float64), torch.randn(3, 2, *kernel, dtype=torch.float64)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1)
    kept, fewer = nodes.trimmed(x, w, geometry)
    plain = F.conv2d(x, w, None, stride, padding, dilation)
    torch.testing.assert_close(F.conv2d(x, kept, None, *fewer[:3]), plain, rtol=1e-12, atol=1e-12)
    found = derivatives(lambda x, w: nodes.convolution(x, w, None, geometry), x, w, None)
    same(found, derivatives(lambda x, w: F.conv2d(x, w, None, stride, padding, dilation), x, w, None))


def test_a_3_by_3_kernel_on_one_position_is_one_product() -> None:
    x, w = torch.randn(2, 4, 1, 1), torch.randn(5, 4, 3, 3)
    kept, geometry = nodes.trimmed(x, w, ([1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    assert (tuple(kept.shape), geometry[1]) == ((5, 4, 1, 1), [0, 0])
    assert nodes._is_product(x, kept, geometry)


class Blocks(nn.Module):
    """Residual blocks down to maps of one position, with weights that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.inner = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.down, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = x + torch.tanh(self.inner(x))
        x = x + torch.tanh(self.inner(x))
        x = torch.tanh(self.down(F.avg_pool2d(x, 2)))
        x = torch.tanh(self.last(x))
        y: Tensor = self.head(x.flatten(1))
        return y


def objective() -> Objective:
    torch.manual_seed(0)
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(3, (5,))
    return make_objective(Blocks().double(), F.cross_entropy, (x, y), check=False)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_products_are_those_of_double_backward(kind: str, small: None) -> None:
    o = objective()
    v = torch.randn(o.size, dtype=torch.float64)
    op = curvature.OPERATORS[kind](o, 1e9)
    found = op @ v
    assert op.path == "traced"
    expected = Linearized(getattr(curvature, f"_autograd_{kind}")(o, o.batches[0]), 0)(v)
    assert torch.linalg.vector_norm(found - expected) <= 1e-12 * torch.linalg.vector_norm(expected)
    torch.testing.assert_close(curvature.OPERATORS[kind](o, 0) @ v, expected, rtol=1e-11, atol=1e-13)


def test_products_are_added_to_each_other_and_values_are_the_networks(small: None) -> None:
    o = objective()
    curvature.OPERATORS["hessian"](o, 1e9) @ torch.ones(o.size, dtype=torch.float64)
    (program,) = (p for p in o.programs.values() if isinstance(p, Program))
    calls: list[Counter[Any]] = [Counter(n.target for n in p.run.graph.nodes) for p in program.parts]  # type: ignore[attr-defined]
    aten = torch.ops.aten
    assert calls[0][aten.convolution.default] == 5
    after = calls[2] + calls[3]
    runs = [n for p in program.parts[2:] for n in p.run.graph.nodes if n.target is blocks.run_blocks]  # type: ignore[attr-defined]
    assert len(runs) == 5  # the tangents of 3 uses of 2 convolutions, and the adjoints of those that need inputs'
    assert [len(n.args[2]) for n in runs] == [1, 2, 2, 2, 2]  # products that are added: U x' and U' x
    assert sum(len(pairs) for n in runs for pairs in n.args[4]) == 4
    assert after[aten.bmm.default] + after[aten.baddbmm_.default] == 1  # the first convolution's weights
    assert after[aten.convolution.default] + after[aten.convolution_backward.default] <= 4  # the one with stride 2


class Wide(nn.Module):
    """Convolutions of images that are wide enough to be transformed one by one, with weights that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x + torch.tanh(self.inner(x)) + torch.sin(self.inner(x * x))
        y: Tensor = self.head(torch.tanh(x).mean((2, 3)))
        return y


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize(("samples", "width", "block"), [(7, 62, 1), (20, 14, 8)])  # tiles of 8 samples are mixed
def test_blocks_of_samples_have_the_product_of_all_samples(
    samples: int, width: int, block: int, kind: str, threads: int, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(samples, 2, 6, width, dtype=torch.float64), torch.randint(3, (samples,))
    o = make_objective(Wide().double(), F.cross_entropy, (x, y), check=False)
    v = torch.randn(o.size, dtype=torch.float64)
    expected = Linearized(getattr(curvature, f"_autograd_{kind}")(o, o.batches[0]), 0)(v)
    sizes: list[int] = []

    def note(x: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(x))
        return to_tiles(x, *rest)

    to_tiles = winograd.to_tiles
    monkeypatch.setattr(winograd, "to_tiles", note)
    each = 8 * 36 * 6 * 2 * ((width + 2) // 4)  # bytes of the tiles of two tensors
    monkeypatch.setattr(blocks, "BLOCK_BYTES", each if block == 1 else 3 * each)
    torch.set_num_threads(threads)
    try:
        for memory in (1e9, 0):
            found = curvature.OPERATORS[kind](o, memory) @ v
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    finally:
        torch.set_num_threads(1)
    # Values are transformed at once and tangents in blocks. 4 samples are also those of a comparison with autograd.
    assert set(sizes) | {4} == {samples, block, 4}


def test_wide_images_keep_their_form(small: None) -> None:
    w, geometry = torch.randn(2, 2, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert winograd.suits(torch.randn(1, 2, 4, 254), w, geometry)
    assert not winograd.suits(torch.randn(1, 2, 4, 255), w, geometry)
