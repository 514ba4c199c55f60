"""Is the derivative of a spike right to the second order? Found out by trying, for functions and neurons of any make.

Surrogates are autograd functions whose backward pass was written by hand. A network trains with it; a Hessian
differentiates it once more, and there it may raise, give zeros, or give NaN, mostly without a word. The test compares
f'' as double backward gives it with the numerical derivative of f', on points away from 0, where surrogates have kinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

VERDICTS = ("exact", "zero", "opaque", "nan", "wrong", "unknown")
Spike = Callable[[Tensor], Tensor]  # element by element: x = h - threshold [...] -> spikes [...]
DISTANCES = torch.tensor([0.0371, 0.0917, 0.213, 0.437, 0.871, 1.37, 2.71], dtype=torch.float64)
STEP = 1e-2  # of the numerical derivative, as a share of the distance from 0
STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))  # weights of f'(x + k step) / step
TOLERANCE = 1e-2  # of f'' against its numerical value: what single precision allows


@dataclass(frozen=True)
class Verdict:
    """What double backward makes of f''.

    kind: exact; zero (it comes out 0 although f' varies); opaque (it raises, or is cut off from the graph); nan (f' or
    f'' is not finite somewhere); wrong (it is something else, or changes from call to call); unknown (could not be
    tried). reason: a phrase, empty if exact. error: the largest |f'' - numerical| / (|numerical| + f' / distance).
    """

    kind: str
    reason: str = ""
    error: float = 0.0

    @property
    def exact(self) -> bool:
        return self.kind == "exact"


def is_step(spike: Spike) -> bool:
    """Whether the values are 0 below 0 and 1 above: not so for a surrogate in its smooth mode or with graded spikes."""
    try:
        with torch.no_grad():
            below, above = spike(-DISTANCES.float()), spike(DISTANCES.float())
    except (RuntimeError, TypeError):
        return False
    return bool((below == 0).all() and (above == 1).all())


def check_surrogate(spike: Spike) -> Verdict:
    """The verdict on a function of x = h - threshold.

    Narrow ones (a width below 1e-4) are not seen. NaN is looked for in single precision as well, and at x = 0, -1, 1,
    where a neuron without input is.
    """
    near = torch.cat([DISTANCES, DISTANCES / 100])
    for dtype in (torch.float32, torch.float64):
        grid = torch.arange(-10, 11, dtype=dtype) / 2
        if verdict := _not_finite(spike, torch.cat([grid, near.to(dtype), -near.to(dtype)])):
            return verdict
    return _compared(spike, torch.zeros((), dtype=torch.float64), torch.cat([near, -near]))


def check_neuron(neuron: Spike, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Verdict:
    """The verdict on a neuron: currents [B] -> spikes [B, ...] of the first step from rest, each from its own current.

    Its threshold, in units of the current, is looked for between -1000 and 1000. The derivative is by the current: in
    the first step from rest there is no reset whose spike a numerical derivative would take for constant.
    """

    def spikes(c: Tensor) -> Tensor:
        return neuron(c).flatten(1).sum(1)

    try:
        with torch.no_grad():
            threshold = _threshold(spikes, dtype, device)
            if threshold is None:
                return Verdict("unknown", "no constant current from -1000 to 1000 makes it fire")
            scale = threshold.abs() if threshold.abs() > 1e-5 else torch.ones_like(threshold)  # it was 0
            offsets = torch.cat([DISTANCES, -DISTANCES]).to(threshold) * scale
            if not torch.equal(spikes(threshold + offsets.flip(0)), spikes(threshold + offsets).flip(0)):
                return Verdict("unknown", "its outputs depend on the order of its inputs")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return Verdict("unknown", f"it could not be run alone ({first_line(error)})")
    at_rest = torch.stack([torch.zeros_like(threshold), threshold, 2 * threshold])
    return _not_finite(spikes, torch.cat([at_rest, threshold + offsets])) or _compared(spikes, threshold, offsets)


def _threshold(spikes: Spike, dtype: torch.dtype, device: torch.device | None) -> Tensor | None:
    """The current nearest to 0 behind which there are more spikes, or fewer; None if there is none."""
    size = torch.cat([torch.zeros(1), torch.logspace(-3, 3, 121)]).to(device, dtype)
    for currents in (size, -size):
        found = None
        for _ in range(6):  # each narrows the bracket to a hundredth
            counts = spikes(currents)
            changed = (counts[1:] != counts[:-1]).nonzero()
            if not len(changed):
                break
            low, found = currents[changed[0, 0]], currents[changed[0, 0] + 1]
            currents = torch.lerp(low, found, torch.linspace(0, 1, 101).to(low))
        if found is not None:
            return found
    return None


def _derivatives(function: Spike, x: Tensor) -> tuple[Tensor, Tensor | None] | Verdict:
    """(f', f'') at x [B], f'' None where it is cut off from the graph; a Verdict if one of them raises."""
    x = x.detach().requires_grad_()
    try:
        with torch.enable_grad():
            y = function(x)
            if not y.requires_grad:
                return Verdict("opaque", "it has no derivative at all: is the surrogate switched off?")
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True)
            if first is None:
                return Verdict("opaque", "its derivative does not reach its input")
    except (RuntimeError, TypeError) as error:
        return Verdict("opaque", f"its first derivative fails ({first_line(error)})")
    if not first.requires_grad:
        return first.detach(), None
    try:
        (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
    except RuntimeError as error:
        return Verdict("opaque", f"its second derivative fails ({first_line(error)})")
    return first.detach(), second


def _not_finite(function: Spike, x: Tensor) -> Verdict | None:
    found = _derivatives(function, x)
    if isinstance(found, Verdict):
        return found
    for name, value in zip(("first", "second"), found, strict=True):
        if value is not None and not torch.isfinite(value).all():
            where = x[~torch.isfinite(value)][0].item()
            kind = str(x.dtype).removeprefix("torch.")
            return Verdict("nan", f"its {name} derivative is not finite at {where:.3g} in {kind}")
    return None


def _compared(function: Spike, origin: Tensor, offsets: Tensor) -> Verdict:
    """f'' at origin + offsets [B] against the numerical derivative of f', where f' is not negligible or has a jump."""
    x = origin + offsets
    found, again = _derivatives(function, x), _derivatives(function, x)
    if isinstance(found, Verdict) or isinstance(again, Verdict):
        return found if isinstance(found, Verdict) else Verdict("opaque", "it can be differentiated only once")
    first, second = found
    if not torch.equal(first, again[0]):
        return Verdict("wrong", "its derivative is random")
    # with the steps as they are after rounding, which matters for a threshold far from 0 in single precision
    step = (x + STEP * offsets) - x
    slopes = {k: _derivatives(function, x + k * step) for k in (-4, -2, -1, 1, 2, 4)}
    values = {k: v[0] for k, v in slopes.items() if not isinstance(v, Verdict)}
    numerical = torch.stack([w * values[k] for k, w in STENCIL]).sum(0) / step
    wide = torch.stack([w * values[2 * k] for k, w in STENCIL]).sum(0) / (2 * step)
    scale = numerical.abs() + first.abs() / offsets.abs()
    used = (first.abs() > 1e-4 * first.abs().max()) & ((numerical - wide).abs() < 10 * TOLERANCE * scale)
    if not used.any():
        return Verdict("unknown", "its derivative is 0, or has jumps, wherever it was tried")
    numerical, scale = numerical[used], scale[used]
    varies = bool((numerical.abs() > TOLERANCE * scale).any())
    if second is None:
        reason = "its derivative is cut off from the graph: f'' would count as 0, though f' varies"
        return Verdict("opaque", reason, 1.0) if varies else Verdict("exact")
    second = second[used]
    error = float(((second - numerical).abs() / scale).max())
    if error <= TOLERANCE:
        return Verdict("exact", error=error)
    if not second.any():
        return Verdict("zero", "f'' comes out as 0, though f' varies", error)
    return Verdict("wrong", f"f'' differs from the derivative of f' by {100 * error:.0f}%", error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, in at most 160 characters."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."
