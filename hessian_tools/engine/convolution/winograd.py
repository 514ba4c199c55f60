"""Convolutions with 3 x 3 kernels by 36 matrix products per 4 x 4 outputs, where the definition takes 144.

Winograd's minimal filtering F(4 x 4, 3 x 3) (Lavin and Gray 2016, arXiv 1509.09308): y = A' [(G w G') . (B' x B)] A, in
which the dot is a matrix product over the channels, one per entry of the 6 x 6 tiles. The derivatives are adjoints of
the same four factors, so that a Hessian product transforms every tangent once, and sums are taken in transformed space.

Rounding differs from that of the direct convolution: in float32 1.6e-6 of the result are lost, where that loses 4e-7.
`fast_convolution` is therefore for derivatives, not for values.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.runtime.openmp import side_by_side

CHANNELS = 24  # least number of input and of output channels: with fewer, transforms take longer than they save
WIDEST = 256  # columns that the kernels have room for
INPUTS, OUTPUTS = (0,) * 6, (0,) * 4  # sizes of tiles, as the kernels take them


@cache
def _kernels() -> Any:
    """Return the module of kernels, or None after a warning if numba cannot be used."""
    try:
        from hessian_tools.engine.convolution import kernels
    except Exception as error:  # a broken installation may raise any exception
        warnings.warn(f"numba is not usable ({error}): convolutions are slower", stacklevel=2)
        return None
    return kernels


def suits(x: Tensor, w: Tensor, geometry: Sequence[Any]) -> bool:
    """Return whether a convolution of x with w is faster in this form. It depends on one sample's shape."""
    stride, padding, dilation, transposed, _, groups = geometry
    if x.dim() != 4 or tuple(w.shape[2:]) != (3, 3) or transposed or groups != 1 or x.device.type != "cpu":
        return False
    if set(stride) | set(dilation) != {1} or padding[0] != padding[1] or padding[0] > 2:
        return False
    if x.dtype not in (torch.float32, torch.float64) or w.dtype != x.dtype or not len(x):
        return False
    if min(w.shape[:2]) < CHANNELS or min(x.shape[2:]) + 2 * padding[0] < 5:  # 3 x 3 outputs
        return False
    if x.shape[3] + 2 * padding[0] > WIDEST:
        return False
    return _kernels() is not None


def tile_counts(shape: Sequence[int], pad: int) -> tuple[int, int]:
    """Return the numbers of tiles of inputs [N, C, H, W], vertically and horizontally."""
    down, across = ((n + 2 * pad + 1) // 4 for n in shape[2:])
    return down, across


def samples_together(across: int) -> int:
    """Return the number of samples whose tiles are mixed. Blocks of samples are multiples of it."""
    return int(_kernels().group_size(across))


def _run(name: str, arguments: Sequence[Any], count: int, out: Tensor, threads: int = 0) -> Tensor:
    """Run a kernel on `count` channels, divided among the threads (0: as many as torch uses and the work is worth)."""
    kernel = getattr(_kernels(), name)
    arrays = [a.contiguous().numpy() if isinstance(a, Tensor) else a for a in arguments]
    threads = threads or max(1, min(torch.get_num_threads(), count, 1 + out.numel() // 32768))
    edges = [count * i // threads for i in range(threads + 1)]
    side_by_side([partial(kernel, *arrays, a, b, out.numpy()) for a, b in pairwise(edges)])
    return out


def to_tiles(x: Tensor, pad: int, inputs: bool, out: Tensor, threads: int = 0) -> Tensor:
    """Transform inputs, or gradients by outputs, [N, C, H, W] to `out` [36, C, N * tiles]."""
    counts = tile_counts(x.shape, pad if inputs else 1)
    return _run("images", (INPUTS if inputs else OUTPUTS, x, pad, *counts), x.shape[1], out, threads)


def to_images(v: Tensor, bias: Tensor | None, pad: int, inputs: bool, out: Tensor, threads: int = 0) -> Tensor:
    """Transform tiles [36, C, N * tiles] to gradients by inputs, or to outputs plus a bias [C], `out` [N, C, H, W]."""
    shift = np.empty(0, v.numpy().dtype) if bias is None else bias
    counts = tile_counts(out.shape, pad if inputs else 1)
    arguments = INPUTS if inputs else OUTPUTS, v, shift, pad, *counts
    return _run("images_adjoint", arguments, out.shape[1], out, threads)


# ---------------------------------------------------------------- the linear maps and their adjoints, for a trace
def winograd_inputs(x: Tensor, pad: int) -> Tensor:
    """Transform inputs [N, C, H, W] to [36, C, N * tiles]."""
    down, across = tile_counts(x.shape, pad)
    return to_tiles(x, pad, True, x.new_empty(36, x.shape[1], len(x) * down * across))


def winograd_inputs_adjoint(v: Tensor, shape: Sequence[int], pad: int) -> Tensor:
    """The adjoint of `winograd_inputs` for inputs of a shape."""
    return to_images(v, None, pad, True, v.new_empty(list(shape)))


def winograd_outputs(m: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Transform products [36, O, N * tiles] to outputs of a shape [N, O, H, W], and add a bias [O]."""
    return to_images(m, bias, 0, False, m.new_empty(list(shape)))


def winograd_outputs_adjoint(g: Tensor) -> Tensor:
    """The adjoint of `winograd_outputs` by m."""
    down, across = tile_counts(g.shape, 1)
    return to_tiles(g, 0, False, g.new_empty(36, g.shape[1], len(g) * down * across))


def winograd_weights(w: Tensor) -> Tensor:
    """Transform weights [O, C, 3, 3] to [36, O, C]."""
    return _run("weights", (w.flatten(2),), len(w), w.new_empty(36, *w.shape[:2]))


def winograd_weights_adjoint(u: Tensor) -> Tensor:
    """The adjoint of `winograd_weights`."""
    flat = _run("weights_adjoint", (u,), u.shape[1], u.new_empty(*u.shape[1:], 9))
    return flat.view(*u.shape[1:], 3, 3)


MAPS = (
    winograd_inputs, winograd_inputs_adjoint, winograd_outputs, winograd_outputs_adjoint, winograd_weights,
    winograd_weights_adjoint,
)  # fmt: skip
_ops = {p.__name__: torch.library.custom_op(f"hessian_tools::{p.__name__}", p, mutates_args=()) for p in MAPS}
OPS = {name: getattr(torch.ops.hessian_tools, name).default for name in _ops}
LINEAR = {OPS[name] for name in OPS if name != "winograd_outputs"}  # that one adds a bias


@_ops["winograd_inputs"].register_fake
def _(x: Tensor, pad: int) -> Tensor:
    down, across = tile_counts(x.shape, pad)
    return x.new_empty(36, x.shape[1], len(x) * down * across)


@_ops["winograd_inputs_adjoint"].register_fake
def _(v: Tensor, shape: Sequence[int], pad: int) -> Tensor:
    return v.new_empty(list(shape))


@_ops["winograd_outputs"].register_fake
def _(m: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    return m.new_empty(list(shape))


@_ops["winograd_outputs_adjoint"].register_fake
def _(g: Tensor) -> Tensor:
    down, across = tile_counts(g.shape, 1)
    return g.new_empty(36, g.shape[1], len(g) * down * across)


@_ops["winograd_weights"].register_fake
def _(w: Tensor) -> Tensor:
    return w.new_empty(36, *w.shape[:2])


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
