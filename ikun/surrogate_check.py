"""Test whether the derivative of a spike function is correct to second order.

Surrogates are autograd functions with a hand-written backward pass. Training uses the first derivative only. A Hessian
differentiates the backward pass once more, and this may raise an error or, often silently, give zeros or NaN. The test
compares f'' from double backward with the numerical derivative of f'. It uses points away from 0, where surrogates have
kinks. It works with functions and neurons of any library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessian_tools.evaluation import differentiable

VERDICTS = ("exact", "zero", "opaque", "nan", "wrong", "unknown")
Spike = Callable[[Tensor], Tensor]  # element-wise: x = h - threshold [...] -> spikes [...]
DISTANCES = torch.tensor([0.0371, 0.0917, 0.213, 0.437, 0.871, 1.37, 2.71], dtype=torch.float64)
STEP = 1e-2  # step of the numerical derivative, relative to the distance from 0
STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))  # weights of f'(x + k step) / step
TOLERANCE = 1e-2  # relative error of f'' that single precision allows


@dataclass(frozen=True)
class Verdict:
    """The result of a test of f''.

    Attributes:
        kind: One of `VERDICTS`. exact: f'' is correct. zero: f'' is 0 although f' varies. opaque: double backward
            raises an error, or f' is cut off from the autograd graph. nan: f' or f'' is not finite somewhere. wrong:
            f'' has another value, or changes from call to call. unknown: the test was not possible.
        reason: Explanation as a phrase. It is empty if kind is exact.
        error: The largest value of |f'' - numerical| / (|numerical| + f' / distance from 0).
    """

    kind: str
    reason: str = ""
    error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether kind is "exact"."""
        return self.kind == "exact"


def is_step(spike: Spike) -> bool:
    """Return whether the values of a function are 0 below 0 and 1 above 0.

    This is not the case for a surrogate in its smooth mode or for graded spikes.
    """
    try:
        with torch.no_grad():
            below, above = spike(-DISTANCES.float()), spike(DISTANCES.float())
    except (RuntimeError, TypeError):
        return False
    return bool((below == 0).all() and (above == 1).all())


@differentiable
def check_surrogate(spike: Spike, parameters: Sequence[Tensor] = ()) -> Verdict:
    """Test a spike function of x = h - threshold.

    Surrogates with a width below 1e-4 are too narrow for this test. NaN is also looked for in single precision, and at
    x = 0, -1 and 1, which are common values for a neuron without input.

    Args:
        spike: Maps x [...] to spikes [...], element by element.
        parameters: Tensors inside the function that are trained, such as its width.

    Returns:
        The verdict.
    """
    near = torch.cat([DISTANCES, DISTANCES / 100])
    for dtype in (torch.float32, torch.float64):
        grid = torch.arange(-10, 11, dtype=dtype) / 2
        if verdict := _not_finite(spike, torch.cat([grid, near.to(dtype), -near.to(dtype)])):
            return verdict
    origin = torch.zeros((), dtype=torch.float64)
    verdict = _compared(spike, origin, torch.cat([near, -near]))
    return check_parameters(spike, origin, parameters) if parameters and verdict.exact else verdict


def trained_parameters(spike: Spike) -> list[Tensor]:
    """Return the tensors that require a gradient and on which a spike function depends, other than its argument."""
    x = DISTANCES.float().requires_grad_()
    try:
        with torch.enable_grad():
            y = spike(x)
    except (RuntimeError, TypeError):
        return []
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    todo: list[Any] = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor) and leaf is not x:
            found[id(leaf)] = leaf
        todo += [following for following, _ in node.next_functions]
    return list(found.values())


def check_parameters(spike: Spike, origin: Tensor, parameters: Sequence[Tensor]) -> Verdict:
    """Test the second derivatives of a spike function f(x; p) by its own trained parameters p.

    A Hessian needs the derivatives by x and by p to be those of one function: the derivative of f_p by x and that of
    f_x by p are equal, and double backward gives them and f_pp. The test uses one random direction in p.

    Args:
        spike: Maps x [...] to spikes [...], element by element.
        origin: The threshold, a scalar.
        parameters: The tensors p. They are changed during the test and restored.

    Returns:
        The verdict.
    """
    generator = torch.Generator().manual_seed(0)
    kept = [p.detach().clone() for p in parameters]
    along = []
    for p in kept:
        factor = 0.5 + torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
        along.append(torch.where(p == 0, torch.ones_like(p), p) * factor)
    errors = []
    try:
        for offset in torch.cat([DISTANCES, -DISTANCES]).to(origin):
            near, far = (_mixed(spike, origin + offset, offset, parameters, kept, along, h) for h in (1e-3, 2e-3))
            if near is None or far is None:
                return Verdict("nan", "its derivatives by its own parameters are not finite")
            (exact, numerical, size), (_, wide, _) = near, far
            if size > 1e-6 and (numerical - wide).abs().max() < TOLERANCE * size:  # not at a jump of the derivative
                errors.append(float((exact - numerical).abs().max() / size))
    except RuntimeError as error:
        return Verdict("opaque", f"its derivatives by its own parameters fail ({first_line(error)})")
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
    if not errors:
        return Verdict("unknown", "its derivatives by its own parameters are 0 or have jumps at all tested points")
    if max(errors) <= TOLERANCE:
        return Verdict("exact", error=max(errors))
    return Verdict("wrong", "the second derivatives by its own parameters are not those of its gradient", max(errors))


def _mixed(
    spike: Spike,
    at: Tensor,
    offset: Tensor,
    parameters: Sequence[Tensor],
    kept: Sequence[Tensor],
    along: Sequence[Tensor],
    step: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return f_xp, f_px and f_pp by double backward, the same numerically, and their size; p along one direction."""

    def gradient(x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            for p, value, direction in zip(parameters, kept, along, strict=True):
                p.copy_(value + scale * direction)
        x = x.detach().reshape(1).clone().requires_grad_()
        with torch.enable_grad():
            y = spike(x).sum()
            fx, *fp = torch.autograd.grad(y, [x, *parameters], create_graph=True, allow_unused=True)
            parts = [(g * d).sum() for g, d in zip(fp, along, strict=True) if g is not None]
            return x, x.new_zeros(()) if fx is None else fx.sum(), sum(parts, x.new_zeros(()))

    def second(value: Tensor, by: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        if not value.requires_grad:
            return torch.zeros((), dtype=at.dtype)
        found = torch.autograd.grad(value, list(by), retain_graph=True, allow_unused=True)
        parts = [(g * d).sum().to(at) for g, d in zip(found, directions, strict=True) if g is not None]
        return sum(parts, torch.zeros_like(at))

    (_, up, up_p), (_, down, down_p) = gradient(at, step), gradient(at, -step)
    shift = step * offset
    (_, _, right), (_, _, left) = gradient(at + shift, 0.0), gradient(at - shift, 0.0)
    x, fx, fp = gradient(at, 0.0)
    one = [torch.ones_like(x)]
    exact = torch.stack([second(fx, parameters, along), second(fp, [x], one), second(fp, parameters, along)])
    mixed = (up - down) / (2 * step)
    numerical = torch.stack([mixed, (right - left) / (2 * shift), (up_p - down_p) / (2 * step)]).detach()
    # f_px must also equal f_xp: the field is a gradient
    exact, numerical = torch.cat([exact, numerical[1:2]]), torch.cat([numerical, mixed.detach().reshape(1)])
    size = numerical.abs().max() + fx.detach().abs() + (fp.detach() / offset).abs()
    if not torch.isfinite(torch.cat([exact, numerical])).all():
        return None
    return exact.detach(), numerical, size


@differentiable
def check_neuron(
    neuron: Spike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    parameters: Sequence[Tensor] = (),
) -> Verdict:
    """Test the spikes of a neuron in its first time step from rest.

    The threshold, in units of the current, is searched between -1000 and 1000. The derivative is taken with respect to
    the current. The first step has no preceding reset, so a numerical derivative does not miss the derivative of the
    reset.

    Args:
        neuron: Maps currents [B] to spikes [B, ...]. Every output must depend only on its own current.
        dtype: Data type of the currents.
        device: Device of the currents.
        parameters: Tensors inside the neuron's spike function that are trained, such as its width.

    Returns:
        The verdict.
    """

    def spikes(c: Tensor) -> Tensor:
        return neuron(c).flatten(1).sum(1)

    try:
        with torch.no_grad():
            threshold = _threshold(spikes, dtype, device)
            if threshold is None:
                return Verdict("unknown", "no constant current from -1000 to 1000 makes it fire")
            scale = threshold.abs() if threshold.abs() > 1e-5 else torch.ones_like(threshold)  # the threshold is 0
            offsets = torch.cat([DISTANCES, -DISTANCES]).to(threshold) * scale
            if not torch.equal(spikes(threshold + offsets.flip(0)), spikes(threshold + offsets).flip(0)):
                return Verdict("unknown", "its outputs depend on the order of its inputs")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return Verdict("unknown", f"it could not be run on its own ({first_line(error)})")
    if _coupled(spikes, threshold + offsets):
        return Verdict("unknown", "its outputs depend on each other's inputs")
    at_rest = torch.stack([torch.zeros_like(threshold), threshold, 2 * threshold])
    verdict = _not_finite(spikes, torch.cat([at_rest, threshold + offsets])) or _compared(spikes, threshold, offsets)
    return check_parameters(neuron, threshold.double(), parameters) if parameters and verdict.exact else verdict


def _coupled(spikes: Spike, x: Tensor) -> bool:
    """Whether an output has a derivative by the input of another, as in a layer that takes an axis for time."""
    x = x.detach().requires_grad_()
    try:
        with torch.enable_grad():
            y = spikes(x)
            pairs = [(torch.autograd.grad(y[i::2].sum(), x, retain_graph=True)[0], 1 - i) for i in (0, 1)]
    except RuntimeError:
        return False  # the tests of the derivatives say what fails
    return any(bool((g[other::2] != 0).any()) for g, other in pairs)


def _threshold(spikes: Spike, dtype: torch.dtype, device: torch.device | None) -> Tensor | None:
    """Return the current closest to 0 at which the number of spikes changes; None if there is none."""
    size = torch.cat([torch.zeros(1), torch.logspace(-3, 3, 121)]).to(device, dtype)
    for currents in (size, -size):
        found = None
        for _ in range(6):  # every iteration reduces the bracket by a factor of 100
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
    """Return f' and f'' at x [B], or a Verdict if one raises. f'' is None where it is not in the graph."""
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
    """Return a verdict if f' or f'' is not finite at some x [B]."""
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
    """Compare f'' at origin + offsets [B] with the numerical derivative of f'.

    Points where f' is negligible or has a jump are skipped.
    """
    x = origin + offsets
    found, again = _derivatives(function, x), _derivatives(function, x)
    if isinstance(found, Verdict) or isinstance(again, Verdict):
        return found if isinstance(found, Verdict) else Verdict("opaque", "it can be differentiated only once")
    first, second = found
    if not torch.equal(first, again[0]):
        return Verdict("wrong", "its derivative is random")
    # use the steps after rounding: this matters in single precision for a threshold far from 0
    step = (x + STEP * offsets) - x
    slopes = {k: _derivatives(function, x + k * step) for k in (-4, -2, -1, 1, 2, 4)}
    values = {k: v[0] for k, v in slopes.items() if not isinstance(v, Verdict)}
    numerical = torch.stack([w * values[k] for k, w in STENCIL]).sum(0) / step
    wide = torch.stack([w * values[2 * k] for k, w in STENCIL]).sum(0) / (2 * step)
    scale = numerical.abs() + first.abs() / offsets.abs()
    used = (first.abs() > 1e-4 * first.abs().max()) & ((numerical - wide).abs() < 10 * TOLERANCE * scale)
    if not used.any():
        return Verdict("unknown", "its derivative is 0 or has jumps at all tested points")
    numerical, scale = numerical[used], scale[used]
    varies = bool((numerical.abs() > TOLERANCE * scale).any())
    if second is None:
        reason = "its derivative is cut off from the graph: f'' would be taken as 0 although f' varies"
        return Verdict("opaque", reason, 1.0) if varies else Verdict("exact")
    second = second[used]
    error = float(((second - numerical).abs() / scale).max())
    if error <= TOLERANCE:
        return Verdict("exact", error=error)
    if not second.any():
        return Verdict("zero", "f'' is 0 although f' varies", error)
    return Verdict("wrong", f"f'' differs from the derivative of f' by {100 * error:.0f}%", error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, cut to 160 characters."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."
