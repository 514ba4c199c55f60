"""Convolutions with 3 x 3 kernels by 16 matrix products per 2 x 2 outputs, where the definition takes 36.

Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin and Gray 2016, arXiv 1509.09308): y = A' [(G w G') . (B' x B)] A, in
which the dot is a matrix product over the channels, one per entry of the 4 x 4 tiles. The derivatives are adjoints of
the same four factors, so that a Hessian product transforms every tangent once, and sums are taken in transformed space.

Rounding differs from that of the direct convolution. `fast_convolution` is therefore for derivatives, not for values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.engine import winograd_kernels
from hessian_tools.runtime.openmp import side_by_side

# Measured against oneDNN's convolutions (AVX2, one thread): with fewer channels, transforms take longer than they save.
CHANNELS = 64  # least number of input and of output channels
WIDE = 128  # with fewer, matrix products of many tiles are slower than the convolution
TILES = 32  # most of them per sample
KERNELS = ("inputs", "inputs_adjoint", "outputs", "outputs_adjoint", "weights", "weights_adjoint")


@cache
def _compiled() -> dict[str, Callable[..., Any]] | None:
    """Return the kernels by name, or None after a warning if numba cannot be used."""
    try:
        import numba

        sources: list[Any] = [getattr(winograd_kernels, name) for name in KERNELS]
        try:
            found = [numba.njit(nogil=True, cache=True, error_model="numpy")(source) for source in sources]
        except RuntimeError:  # no writable directory for the cache
            found = [numba.njit(nogil=True, error_model="numpy")(source) for source in sources]
        return dict(zip(KERNELS, found, strict=True))
    except Exception as error:  # a broken installation may raise any exception
        warnings.warn(f"numba is not usable ({error}): convolutions are slower", stacklevel=2)
        return None


def suits(x: Tensor, w: Tensor, geometry: Sequence[Any]) -> bool:
    """Return whether a convolution of x with w is faster in this form. It depends on one sample's shape."""
    stride, padding, dilation, transposed, _, groups = geometry
    if x.dim() != 4 or tuple(w.shape[2:]) != (3, 3) or transposed or groups != 1 or x.device.type != "cpu":
        return False
    if set(stride) | set(dilation) != {1} or padding[0] != padding[1] or padding[0] > 2:
        return False
    if x.dtype not in (torch.float32, torch.float64) or w.dtype != x.dtype or not len(x):
        return False
    least = min(w.shape[:2])
    if least < CHANNELS or min(x.shape[2:]) + 2 * padding[0] < 3:
        return False
    down, across = _tiles(x.shape, padding[0])
    if down * across == 1 or (least < WIDE and down * across > TILES):  # for one tile, transforms of weights weigh more
        return False
    return _compiled() is not None


def _tiles(shape: Sequence[int], pad: int) -> tuple[int, int]:
    """Return the numbers of tiles of inputs [N, C, H, W], vertically and horizontally."""
    down, across = ((n + 2 * pad - 1) // 2 for n in shape[2:])
    return down, across


def _run(name: str, arguments: Sequence[Any], count: int, out: Tensor) -> Tensor:
    """Run a kernel on `count` channels, divided among the threads."""
    kernels = _compiled()
    assert kernels is not None
    arrays = [a.contiguous().numpy() if isinstance(a, Tensor) else a for a in arguments]
    threads = max(1, min(torch.get_num_threads(), count, 1 + out.numel() // 32768))
    edges = [count * i // threads for i in range(threads + 1)]
    side_by_side([partial(kernels[name], *arrays, a, b, out.numpy()) for a, b in pairwise(edges)])
    return out


# ---------------------------------------------------------------- the linear maps and their adjoints, for a trace
def winograd_inputs(x: Tensor, pad: int) -> Tensor:
    """Transform inputs [N, C, H, W] to [16, C, N * tiles]."""
    down, across = _tiles(x.shape, pad)
    out = x.new_empty(16, x.shape[1], len(x) * down * across)
    return _run("inputs", (x, pad, down, across), x.shape[1], out)


def winograd_inputs_adjoint(v: Tensor, shape: Sequence[int], pad: int) -> Tensor:
    """The adjoint of `winograd_inputs` for inputs of a shape."""
    return _run("inputs_adjoint", (v, pad, *_tiles(shape, pad)), shape[1], v.new_empty(list(shape)))


def winograd_outputs(m: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Transform products [16, O, N * tiles] to outputs of a shape [N, O, H, W], and add a bias [O]."""
    tiles = ((shape[2] + 1) // 2, (shape[3] + 1) // 2)
    shift = np.empty(0, m.numpy().dtype) if bias is None else bias
    return _run("outputs", (m, shift, *tiles), shape[1], m.new_empty(list(shape)))


def winograd_outputs_adjoint(g: Tensor) -> Tensor:
    """The adjoint of `winograd_outputs` by m."""
    down, across = (g.shape[2] + 1) // 2, (g.shape[3] + 1) // 2
    return _run("outputs_adjoint", (g, down, across), g.shape[1], g.new_empty(16, g.shape[1], len(g) * down * across))


def winograd_weights(w: Tensor) -> Tensor:
    """Transform weights [O, C, 3, 3] to [16, O, C]."""
    return _run("weights", (w,), len(w), w.new_empty(16, *w.shape[:2]))


def winograd_weights_adjoint(u: Tensor) -> Tensor:
    """The adjoint of `winograd_weights`."""
    return _run("weights_adjoint", (u,), u.shape[1], u.new_empty(*u.shape[1:], 3, 3))


MAPS = (
    winograd_inputs, winograd_inputs_adjoint, winograd_outputs, winograd_outputs_adjoint, winograd_weights,
    winograd_weights_adjoint,
)  # fmt: skip
_ops = {p.__name__: torch.library.custom_op(f"hessian_tools::{p.__name__}", p, mutates_args=()) for p in MAPS}
OPS = {name: getattr(torch.ops.hessian_tools, name).default for name in _ops}
LINEAR = {OPS[name] for name in OPS if name != "winograd_outputs"}  # that one adds a bias


@_ops["winograd_inputs"].register_fake
def _(x: Tensor, pad: int) -> Tensor:
    down, across = _tiles(x.shape, pad)
    return x.new_empty(16, x.shape[1], len(x) * down * across)


@_ops["winograd_inputs_adjoint"].register_fake
def _(v: Tensor, shape: Sequence[int], pad: int) -> Tensor:
    return v.new_empty(list(shape))


@_ops["winograd_outputs"].register_fake
def _(m: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return m.new_empty(list(shape))


@_ops["winograd_outputs_adjoint"].register_fake
def _(g: Tensor) -> Tensor:
    return g.new_empty(16, g.shape[1], len(g) * ((g.shape[2] + 1) // 2) * ((g.shape[3] + 1) // 2))


@_ops["winograd_weights"].register_fake
def _(w: Tensor) -> Tensor:
    return w.new_empty(16, *w.shape[:2])


@_ops["winograd_weights_adjoint"].register_fake
def _(u: Tensor) -> Tensor:
    return u.new_empty(*u.shape[1:], 3, 3)


# ---------------------------------------------------------------- autograd functions
class _Map(torch.autograd.Function):
    """A linear map with its adjoint, which is differentiated as often as needed."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, name: str, adjoint: str, here: tuple[Any, ...], there: tuple[Any, ...]) -> Tensor:
        ctx.others = adjoint, name, there, here
        y: Tensor = OPS[name](t, *here)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Map.apply(g, *ctx.others), None, None, None, None


class _Product(torch.autograd.Function):
    """Products of matrices, ab, ab' or a'b. Its derivatives are such products, not transposes of them, so that the sum
    of two of them is computed in place."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.form = form
        return torch.bmm(a.transpose(1, 2) if form == "a'b" else a, b.transpose(1, 2) if form == "ab'" else b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        left, right = {
            "ab": ((g, b, "ab'"), (a, g, "a'b")),
            "ab'": ((g, b, "ab"), (g, a, "a'b")),
            "a'b": ((b, g, "ab'"), (a, g, "ab")),
        }[ctx.form]
        want = ctx.needs_input_grad
        return _Product.apply(*left) if want[0] else None, _Product.apply(*right) if want[1] else None, None


class _Outputs(torch.autograd.Function):
    """(m, bias) -> y."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
        ctx.shape = shape
        y: Tensor = OPS["winograd_outputs"](m, bias, shape)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        gm, gb = _OutputsAdjoint.apply(g, ctx.shape, ctx.needs_input_grad[1])
        return gm, gb, None


class _OutputsAdjoint(torch.autograd.Function):
    """g -> (gm, gb)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, shape: Sequence[int], want: bool) -> Any:
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return OPS["winograd_outputs_adjoint"](g), g.sum((0, 2, 3)) if want else None

    @staticmethod
    def backward(ctx: Any, am: Tensor | None, ab: Tensor | None) -> Any:
        if am is not None:
            return _Outputs.apply(am, ab, ctx.shape), None, None
        return None if ab is None else ab.reshape(1, -1, 1, 1).expand(ctx.shape), None, None


def fast_convolution(x: Tensor, w: Tensor, bias: Tensor | None, pad: int) -> Tensor:
    """Return the convolution of x [N, C, H, W] with w [O, C, 3, 3] and a bias [O], up to rounding.

    Args:
        x: Inputs.
        w: Weights.
        bias: Bias, or None.
        pad: Number of zeros around the inputs.
    """
    shape = [len(x), len(w), x.shape[2] + 2 * pad - 2, x.shape[3] + 2 * pad - 2]
    u = _Map.apply(w, "winograd_weights", "winograd_weights_adjoint", (), ())
    v = _Map.apply(x, "winograd_inputs", "winograd_inputs_adjoint", (pad,), (list(x.shape), pad))
    y: Tensor = _Outputs.apply(_Product.apply(u, v, "ab"), bias, shape)
    return y
