"""Check that a loss is a mean over samples: its values and its derivatives by the outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessian_tools.evaluation import refuse_no_number
from hessian_tools.io.errors import ObjectiveError

Loss = Callable[[Tensor, Tensor], Tensor]
SAMPLES = 2048  # at most, spread evenly over the data
BYTES = 2**25  # of their outputs in float64
LIKELY = "Likely causes: class weights, ignore_index, reduction='sum', or targets [N] broadcast against outputs [N, 1]"


def spread(count: int, most: int) -> Tensor:
    """Return at most `most` indices [n] spread evenly over range(count)."""
    indices: Tensor = torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long().unique()
    return indices


def check_loss(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    """Check a loss on outputs of a few samples, which are combined with many targets.

    Args:
        loss: The loss.
        outputs: Outputs [n, ...] of the network for a few samples.
        targets: Targets [N, ...] of all samples.

    Raises:
        ObjectiveError: If the loss is not a mean over samples, changes its targets, keeps state, does not depend on the
            outputs, or depends on weights by another way than the outputs.
    """
    most = max(2, min(SAMPLES, BYTES // (8 * max(1, outputs[0].numel()))))
    wanted = targets[spread(len(targets), most).to(targets.device)]
    wanted = wanted.double() if wanted.is_floating_point() else wanted
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(outputs), (len(wanted),), generator=generator)
    mixed = outputs.detach()[rows.to(outputs.device)].double()
    noise = torch.randn(mixed.shape, generator=generator, dtype=torch.float64).to(mixed.device)
    noisy = noise.mul_(mixed.std().nan_to_num(0.0) + 1).add_(mixed)
    # Samples with equal outputs lose alike, which would hide unequal weights; not every loss accepts any output.
    for found in (noisy, mixed):
        tried = _try_loss(loss, found, wanted.clone())
        if tried is not None and bool(torch.isfinite(tried[0])):
            _check_slope(loss, found[:2], wanted[:2], tried[1])
            return _check_mean(loss, found, wanted, *tried)
    refuse_no_number(loss(mixed.to(outputs.dtype), wanted))  # or the user's own error, if there is one


def _try_loss(loss: Loss, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return the loss and its gradient by the outputs (None if it has none); None if the loss fails."""
    leaf = outputs.detach().requires_grad_()
    try:
        value = loss(leaf * 1, targets)
        if not isinstance(value, Tensor) or value.dim():
            return None
        slope = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
    except Exception:
        return None
    return value.detach(), None if slope is None or not slope.isfinite().all() else slope


def _check_slope(loss: Loss, outputs: Tensor, targets: Tensor, slope: Tensor | None) -> None:
    """Refuse a loss that does not depend on the outputs, or that depends on weights itself."""
    leaf = outputs.detach().requires_grad_()
    try:
        value, constant = loss(leaf * 1, targets.clone()), loss(outputs.detach(), targets.clone())
        alone = torch.autograd.grad(value, leaf, allow_unused=True)[0] is None if value.requires_grad else True
    except Exception:
        return  # a loss that needs more than two samples
    if slope is None and alone:
        raise ObjectiveError("the loss does not depend on the outputs: it is constant, or it detaches them")
    if constant.requires_grad:
        raise ObjectiveError(
            "the loss depends on weights by another way than the outputs, for example through a penalty. Their "
            "curvature would be missing: give the loss without the regularizer"
        )


def _check_mean(loss: Loss, outputs: Tensor, targets: Tensor, value: Tensor, slope: Tensor | None) -> None:
    kept = targets.clone()
    again = _try_loss(loss, outputs, kept)
    if not torch.equal(kept, targets):
        raise ObjectiveError("the loss changes its targets in place: it must leave them as they are (clone them first)")
    exact = value.dtype == torch.float64
    value = value.double()
    if again is not None and (
        abs(float(again[0] - value)) > 1e-9 * float(value.abs()) or _unlike(again[1], slope, exact) > 1
    ):
        raise ObjectiveError("the loss gives two values for the same outputs and targets: it keeps state, or is random")
    n = len(targets)
    order = _order(targets).cpu()
    for cuts in ([1, max(1, n // 3)], [max(1, n // 2)]):
        parts = [p for p in torch.tensor_split(order, cuts) if len(p)]
        values, slopes = [], None if slope is None else torch.zeros_like(slope)
        for p in parts:
            tried = _try_loss(loss, outputs[p.to(outputs.device)], targets[p.to(targets.device)])
            if tried is None:
                break
            values.append(float(tried[0]))
            if slopes is not None and tried[1] is not None:
                slopes[p.to(outputs.device)] = tried[1] * (len(p) / n)
            else:
                slopes = None
        if len(values) < len(parts):
            continue
        mean = sum(v * len(p) for v, p in zip(values, parts, strict=True)) / n
        # an offset of the loss must not hide how its values differ
        limit = 1e-5 * (max(values) - min(values)) + (1e-9 if exact else 1e-5) * max(abs(v) for v in values)
        if not abs(mean - float(value)) <= limit:
            raise ObjectiveError(
                f"the loss is not a mean over samples: it is {float(value):.5g} for {n} samples, but the mean of its "
                f"parts is {mean:.5g}. {LIKELY}"
            )
        if slopes is not None and _unlike(slopes, slope, exact) > 1:
            raise ObjectiveError(
                "the loss is not a mean over samples: its derivative by the outputs of one sample depends on the other "
                f"samples. {LIKELY}"
            )


def _unlike(a: Tensor | None, b: Tensor | None, exact: bool) -> float:
    """Return the largest difference of two gradients [n, ...] in units of what is tolerated."""
    if a is None or b is None or not a.numel():
        return 0.0
    size = a.abs().maximum(b.abs())
    relative, column, overall = (1e-5, 1e-6, 1e-13) if exact else (1e-3, 1e-4, 1e-6)
    limit = relative * size + column * size.amax(0) + overall * size.max()
    return float(((a - b).abs() / limit.clamp_min(torch.finfo(a.dtype).tiny)).max())


def _order(targets: Tensor) -> Tensor:
    """Return the indices that sort targets [N, ...] of any dtype."""
    keys = torch.view_as_real(targets) if targets.is_complex() else targets
    return torch.argsort(keys.double().flatten(1).sum(1) if keys.dim() > 1 else keys, stable=True)
