"""The scans of `ikun.kernels.dispatch` as Triton kernels for CUDA tensors.

A program takes a block of neurons through all T steps with its state in registers, and then continues with its next
block. A block is [BLOCK, WINDOW] neurons. With pooling, a row of the block holds the four neurons of one window.
Choosing the largest, selecting it and scattering to it then stay within a row and need no atomic operations. The last
row and column of a plane with odd size are in windows of their own, which are incomplete and have no output. Without
pooling, WINDOW is 1.

Scalars (decay, gain, ...) are passed in one small tensor `rates`, for three reasons. A learned decay stays on the
device, a captured CUDA graph finds it at the same address, and float64 values keep their precision (Triton passes
Python floats as float32).
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ikun.kernels.scan import Number, Scan, begin_second

NEURONS = 512  # neurons per block, four per thread
PROGRAMS = 16  # programs per multiprocessor, of 128 threads each
WIDE = 2**31 - 2**24  # from this number of neurons on, positions (also those past the last block) need 64 bits
EXACT = {"enable_fp_fusion": False}  # no fused multiply-adds, so that the spikes are identical to those of torch
FUSED = {"enable_fp_fusion": True}  # said because versions of Triton differ in what they do otherwise


# ---------------------------------------------------------------- kernels
@triton.jit
def _places(
    block, size, POOLED: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Return the positions of a block's neurons, each [BLOCK, WINDOW].

    The result is: the position of the neuron, whether it exists, the position of its output, whether the output exists,
    and the position in a row of a scratch array.
    """
    i = tl.arange(0, BLOCK)
    first = block * BLOCK
    if LONG:
        first = tl.cast(block, tl.int64) * BLOCK
    n = first + i
    if POOLED:
        across: tl.constexpr = (WIDTH + 1) // 2
        each: tl.constexpr = across * ((HEIGHT + 1) // 2)
        plane, row, column = n // each, n % each // across, n % across
        k = tl.arange(0, 4)[None, :]
        place = (plane * (HEIGHT * WIDTH) + 2 * row * WIDTH + 2 * column)[:, None] + (k // 2 * WIDTH + k % 2)
        within = plane * (HEIGHT * WIDTH) < size
        exists = within[:, None] & (k >= 0)
        if HEIGHT % 2 == 1:
            exists &= 2 * row[:, None] + k // 2 < HEIGHT
        if WIDTH % 2 == 1:
            exists &= 2 * column[:, None] + k % 2 < WIDTH
        q = tl.broadcast_to(((plane * (HEIGHT // 2) + row) * (WIDTH // 2) + column)[:, None], place.shape)
        whole = exists & ((row < HEIGHT // 2) & (column < WIDTH // 2))[:, None]
        scratch = 2 * i[:, None] + (k // 2 * (2 * BLOCK) + k % 2)
    else:
        place, scratch = n[:, None], i[:, None]
        exists = place < size
        q, whole = place, exists
    return place, exists, q, whole, scratch


@triton.jit
def _state(state, place, exists, rest, dtype: tl.constexpr):
    """Return the state before the first step: `rest` unless a state is given."""
    v = tl.zeros(place.shape, dtype) + rest
    if state is not None:
        v = tl.load(state + place, exists, 0)
    return v


@triton.jit
def _selected(index, row, place, q, whole):
    """Return which neurons' spikes are the outputs of a step: those in index [T, Q], or all."""
    return whole if index is None else whole & (tl.load(index + row + q, whole, -1) == place)


@triton.jit(do_not_specialize=["steps", "blocks"])
def _value(
    x, z, u, state, index, out, rates, steps, size, outputs, blocks,
    HARD: tl.constexpr, LAST: tl.constexpr, STATIC: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    # The operations and their order are those of neurons.step, see EXACT. y - y is NaN where y is not finite.
    dtype: tl.constexpr = z.dtype.element_ty
    decay, gain, offset = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    threshold, v_reset = tl.load(rates + 3), tl.load(rates + 4)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place, exists, q, whole, _ = _places(block, size, index is not None, HEIGHT, WIDTH, BLOCK, LONG)
        v = _state(state, place, exists, v_reset, dtype)
        for t in range(steps):
            row = tl.cast(t, tl.int64) * size
            xt = tl.load(x + (0 if STATIC else row) + place, exists, 0)
            if u is not None:
                tl.store(u + row + place, xt - v + v_reset, exists)
            h = decay * v + gain * xt + offset
            y = h - threshold
            f = (y >= 0).to(dtype) + (y - y)
            v = h * (1 - f) + v_reset * f if HARD else h - threshold * f
            tl.store(z + row + place, y, exists)
            chosen, there = whole, tl.cast(t, tl.int64) * outputs + q
            if index is not None:
                # Choose the largest entry, and the first or last among equal ones. As in a sequential comparison, NaN
                # wins in the first position and loses in all others.
                k = tl.arange(0, 4)[None, :]
                score = 4 * tl.where(f != f, tl.where(k == 0, 2, -1), (f > 0).to(tl.int32)) + (k if LAST else 3 - k)
                chosen &= score == tl.max(score, 1)[:, None]
                tl.store(index + there, place, chosen)
            tl.store(out + there, f, chosen)
        if state is not None:
            tl.store(state + place, v, exists)


@triton.jit(do_not_specialize=["steps", "blocks"])
def _tangent(
    x, f1, c, u, state, index, out, rates, steps, size, outputs, blocks,
    STATIC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = f1.dtype.element_ty
    decay, gain, dgain = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place, exists, q, whole, _ = _places(block, size, index is not None, HEIGHT, WIDTH, BLOCK, LONG)
        v = _state(state, place, exists, 0, dtype)
        for t in range(steps):
            row = tl.cast(t, tl.int64) * size
            h = decay * v + gain * tl.load(x + (0 if STATIC else row) + place, exists, 0)
            if u is not None:
                h += dgain * tl.load(u + row + place, exists, 0)
            v = tl.load(c + row + place, exists, 0) * h
            s = tl.load(f1 + row + place, exists, 0) * h
            there = tl.cast(t, tl.int64) * outputs
            tl.store(out + there + q, s, _selected(index, there, place, q, whole))
        if state is not None:
            tl.store(state + place, v, exists)


@triton.jit(do_not_specialize=["steps", "blocks"])
def _adjoint(
    g, f1, c, u, z, e, gh, state, index, out, totals, rates, steps, size, outputs, blocks,
    STATIC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = f1.dtype.element_ty
    decay, gain, a, b = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2), tl.load(rates + 3)
    total = tl.zeros((BLOCK, WINDOW), tl.float64)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place, exists, q, whole, _ = _places(block, size, index is not None, HEIGHT, WIDTH, BLOCK, LONG)
        v = _state(state, place, exists, 0, dtype)
        gx = tl.zeros((BLOCK, WINDOW), dtype)
        for i in range(steps):
            back = tl.cast(steps - 1 - i, tl.int64)
            row, there = back * size, back * outputs
            gs = tl.load(g + there + q, _selected(index, there, place, q, whole), 0)
            ft = tl.load(f1 + row + place, exists, 0)
            h = ft * gs + tl.load(c + row + place, exists, 0) * v
            if z is not None:
                slope = gs + v * (a + b * tl.load(z + row + place, exists, 0))
                et = tl.load(e + row + place, exists, 0) * slope + (b + b) * v * ft
                tl.store(e + row + place, et, exists)
            if gh is not None:
                tl.store(gh + row + place, h, exists)
            if u is not None:
                total += (h * tl.load(u + row + place, exists, 0)).to(tl.float64)
            v = decay * h
            if STATIC:
                gx += gain * h
            else:
                tl.store(out + row + place, gain * h, exists)
        if STATIC:
            tl.store(out + place, gx, exists)
        if state is not None:
            tl.store(state + place, v, exists)
    if u is not None:
        tl.store(totals + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["steps", "blocks"])
def _adjoint_tangent(
    g, x, f1, c, e, u, gh, start, state, index, out, kept, totals, rates, steps, size, outputs, blocks,
    REPEATED: tl.constexpr, STATIC: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = f1.dtype.element_ty
    decay, gain, dgain = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    total = tl.zeros((BLOCK, WINDOW), tl.float64)
    # h' [T, BLOCK, WINDOW] of this program, which stays in the L2 cache
    mine = kept + tl.cast(tl.program_id(0), tl.int64) * steps * (BLOCK * WINDOW)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place, exists, q, whole, scratch = _places(block, size, index is not None, HEIGHT, WIDTH, BLOCK, LONG)
        v = _state(start, place, exists, 0, dtype)
        for t in range(steps):
            row = tl.cast(t, tl.int64) * size
            xt = tl.load(x + (0 if REPEATED else row) + place, exists, 0)
            h = decay * v + gain * xt
            if u is not None:
                total += (tl.load(gh + row + place, exists, 0) * (xt - v)).to(tl.float64)
                h += dgain * tl.load(u + row + place, exists, 0)
            tl.store(mine + t * (BLOCK * WINDOW) + scratch, h)
            v = tl.load(c + row + place, exists, 0) * h
        tl.debug_barrier()  # threads may read values that other threads have written
        v = _state(state, place, exists, 0, dtype)
        gx = tl.zeros((BLOCK, WINDOW), dtype)
        for i in range(steps):
            back = tl.cast(steps - 1 - i, tl.int64)
            row, there = back * size, back * outputs
            gs = tl.load(g + there + q, _selected(index, there, place, q, whole), 0)
            h = tl.load(f1 + row + place, exists, 0) * gs + tl.load(c + row + place, exists, 0) * v
            h += tl.load(e + row + place, exists, 0) * tl.load(mine + back * (BLOCK * WINDOW) + scratch)
            v = decay * h
            xt = gain * h
            if u is not None:
                total += (h * tl.load(u + row + place, exists, 0)).to(tl.float64)
                more = dgain * tl.load(gh + row + place, exists, 0)
                v -= more
                xt += more
            if STATIC:
                gx += xt
            else:
                tl.store(out + row + place, xt, exists)
        if STATIC:
            tl.store(out + place, gx, exists)
        if state is not None:
            tl.store(state + place, v, exists)
        tl.debug_barrier()
    if u is not None:
        tl.store(totals + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


# ---------------------------------------------------------------- launches
@cache
def _most(device: torch.device) -> int:
    """Return the maximum number of programs. It is small for the interpreter on the CPU."""
    if device.type != "cuda":
        return 3
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _constants(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of numbers that stays on the device, because captured CUDA graphs read it there."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def _rates(like: Tensor, *numbers: Number) -> Tensor:
    """Return the numbers as one tensor with the dtype and device of `like`."""
    if not any(isinstance(n, Tensor) for n in numbers):
        return _constants(tuple(float(n) for n in numbers), like.dtype, like.device)
    return torch.stack([n.to(like.dtype) if isinstance(n, Tensor) else like.new_full((), n) for n in numbers])


class _Launch:
    """The launch configuration of a kernel.

    Args:
        like: A tensor [T, M] with the dtype and device of the scan.
        plane: Height and width of a pooled plane, or None without pooling.
    """

    def __init__(self, like: Tensor, plane: tuple[int, int] | None) -> None:
        steps, size = like.shape
        height, width = plane or (1, 1)
        planes = size // (height * width)
        window = 1 if plane is None else 4
        block = NEURONS // window
        blocks = -(-planes * ((height + 1) // 2) * ((width + 1) // 2) // block)
        self.like = like
        self.programs = max(1, min(blocks, _most(like.device)))
        self.shape = (self.programs, steps, NEURONS)
        self.outputs = size if plane is None else planes * (height // 2) * (width // 2)
        self.numbers = (steps, size, self.outputs, blocks)
        self.fixed = {"HEIGHT": height, "WIDTH": width, "BLOCK": block, "LONG": size >= WIDE}
        self.window = {"WINDOW": window}

    def __call__(self, kernel: Any, *tensors: Tensor | None, **options: Any) -> None:
        """Launch a kernel on tensors, with compile-time options. Multiply-adds are fused unless EXACT is given."""
        arrays = [t if t is None else t.contiguous() for t in tensors]
        with torch.cuda.device_of(self.like):
            kernel[(self.programs,)](*arrays, *self.numbers, **self.fixed, **{**FUSED, **options})

    def totals(self, learned: bool) -> Tensor | None:
        """Return an empty tensor for the partial sums of dL/dgain, or None without a learned decay."""
        return self.like.new_empty(self.programs, dtype=torch.float64) if learned else None


def _of(scan: Scan) -> _Launch:
    """Return the launch configuration for a scan."""
    return _Launch(scan.f1, None if scan.index is None else (scan.unit // scan.width, scan.width))


def _gx(scan: Scan) -> Tensor:
    """Return an empty tensor for the adjoint of the input [T or 1, M]."""
    return scan.f1.new_empty((1 if scan.static else len(scan.f1), scan.f1.shape[1]))


# The four scans. Arguments and results are those of the functions in ikun.kernels.dispatch.
def value(
    x: Tensor,
    steps: int,
    rates: tuple[Number, ...],
    hard: bool,
    plane: tuple[int, int] | None,
    last: bool,
    learned: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the spikes. See `ikun.kernels.dispatch.value`."""
    size = x.shape[1]
    z = x.new_empty((steps, size))
    launch = _Launch(z, plane)
    u = torch.empty_like(z) if learned else None
    out, index = z.new_empty((steps, launch.outputs)), None
    if plane is not None:
        index = torch.empty_like(out, dtype=torch.int32 if size < 2**31 else torch.int64)
    options = {"HARD": hard, "LAST": last, "STATIC": len(x) == 1}
    launch(_value, x, z, u, state, index, out, _rates(x, *rates), **options, **EXACT)
    return out, z, index, u


def tangent(scan: Scan, dx: Tensor, dgain: Number = 0.0, state: Tensor | None = None) -> Tensor:
    """Compute the tangent of the spikes. See `ikun.kernels.scan.torch_tangent`."""
    out = scan.f1.new_empty((scan.f1 if scan.index is None else scan.index).shape)
    rates = _rates(scan.f1, scan.decay, scan.gain, dgain)
    _of(scan)(_tangent, dx, scan.f1, scan.c, scan.u, state, scan.index, out, rates, STATIC=len(dx) == 1)
    return out


def adjoint(scan: Scan, g: Tensor, z: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Number]:
    """Compute the adjoint of the scan. See `ikun.kernels.scan.torch_adjoint`."""
    if z is not None:
        begin_second(scan, z)
    launch, out = _of(scan), _gx(scan)
    e, gh = (None, None) if z is None else (scan.e, scan.gh)
    totals, rates = launch.totals(scan.u is not None), _rates(scan.f1, scan.decay, scan.gain, *scan.reset)
    tensors = (g, scan.f1, scan.c, scan.u, z, e, gh, state, scan.index, out, totals, rates)
    launch(_adjoint, *tensors, STATIC=scan.static, **launch.window)
    return out, 0.0 if totals is None else totals.sum()


def adjoint_tangent(
    scan: Scan,
    dg: Tensor,
    dx: Tensor,
    dgain: Number = 0.0,
    start: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Number]:
    """Compute the tangent of the adjoint. See `ikun.kernels.scan.torch_adjoint_tangent`."""
    launch, out = _of(scan), _gx(scan)
    totals, rates = launch.totals(scan.u is not None), _rates(scan.f1, scan.decay, scan.gain, dgain)
    kept = scan.f1.new_empty(launch.shape)
    tensors = (dg, dx, scan.f1, scan.c, scan.e, scan.u, scan.gh, start, state, scan.index, out, kept, totals, rates)
    launch(_adjoint_tangent, *tensors, REPEATED=len(dx) == 1, STATIC=scan.static, **launch.window)
    return out, 0.0 if totals is None else totals.sum()
