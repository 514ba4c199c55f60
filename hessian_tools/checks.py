"""Checks before a number is computed: is the objective a mean over independent samples, without randomness?

A curvature product sums over batches. It is the curvature of the mean loss only if the network is a deterministic
function of each sample, and if the loss is a mean over samples. `check` tests this on the data at hand, once per
objective, and costs a few forward passes on a few samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hessian_tools import nested
from hessian_tools.evaluation import copy_model, observable, twice_differentiable
from hessian_tools.io.errors import ParameterError

if TYPE_CHECKING:
    from hessian_tools.objective import Objective

SAMPLES = 12  # of the network's checks, spread evenly over the data
LOSS_SAMPLES = 2048  # of the loss's check, spread evenly over the data
HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative to the largest output


class ObjectiveError(ParameterError):
    """The model or the loss does not define a mean over independent samples; one line that says why and what to do."""


def check(objective: Objective) -> None:
    """Check that an objective is a mean over independent samples of a deterministic network.

    Args:
        objective: The objective. Its model is not changed.

    Raises:
        ObjectiveError: If a forward pass draws random numbers or changes the weights, if two passes differ, if the
            output of a sample depends on the other samples of its batch, if the loss is not a mean over samples, or if
            the network computes in half precision.
    """
    if objective.dtype in HALF:
        raise ObjectiveError(
            f"the parameters are {str(objective.dtype).removeprefix('torch.')}: half precision has too few digits for "
            "second derivatives. Convert them, for instance with dtype=torch.float32"
        )
    indices = spread(objective.samples, SAMPLES)
    x, y = objective.regrouped([indices]).batches[0]
    with torch.no_grad():
        outputs = deterministic(objective.model, objective.outputs, x)
        _check_shape(outputs, nested.sample_count(x))
        _check_samples(objective, x, outputs)
    _check_loss(objective, outputs, y)


def refuse_autocast(device: torch.device) -> None:
    """Raise ObjectiveError inside `torch.autocast`: products would be rounded to half precision."""
    if torch.is_autocast_enabled(device.type):
        kind = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        raise ObjectiveError(
            f"torch.autocast is on ({kind}): half precision has too few digits for second derivatives. Compute outside "
            "of torch.autocast"
        )


def spread(count: int, most: int) -> Tensor:
    """Return at most `most` indices [n] spread evenly over range(count)."""
    indices: Tensor = torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long().unique()
    return indices


# ---------------------------------------------------------------- randomness and state
class _Refusing(TorchDispatchMode):
    """Raise when an operation draws random numbers, or computes in half precision.

    `where` returns the name of the module at work.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_constant(func, args, kwargs or {}):
            name = str(func).removeprefix("aten.").split(".")[0]
            raise ObjectiveError(
                f"the forward pass draws random numbers ({name}{self.where()}): a Hessian needs a fixed function. "
                "Switch that layer off in evaluation mode, or draw the numbers before and pass them as inputs"
            )
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in HALF:
            kind = str(result.dtype).removeprefix("torch.")
            raise ObjectiveError(
                f"the forward pass computes in {kind}{self.where()}: half precision has too few digits for second "
                "derivatives. Switch off torch.autocast, and convert the network to float32"
            )
        return result


def _is_constant(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a dropout has rate 0, or is applied outside training, so that it draws nothing that matters."""
    name = str(func)
    if "native_dropout" in name:
        return len(args) > 2 and (args[1] == 0 or args[2] is False)
    return "rrelu_with_noise" in name and not (args[4] if len(args) > 4 else kwargs.get("training", False))


@contextmanager
def _module_names(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Yield a function that names the innermost module whose forward is running, as " in 'layer' (Class)"."""
    stack: list[str] = []
    handles = []

    def leave(*_: object) -> None:
        if stack:
            stack.pop()

    def entering(label: str) -> Callable[..., None]:
        return lambda *_: stack.append(label)

    for name, module in observable(model):
        label = f" in '{name}' ({type(module).__name__})" if name else ""
        handles.append(module.register_forward_pre_hook(entering(label)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: next((label for label in reversed(stack) if label), "")
    finally:
        for handle in handles:
            handle.remove()


def deterministic(model: nn.Module, forward: Callable[[Any], Any], x: Any) -> Any:
    """Check that a forward pass draws no random numbers, keeps no state and does not change the weights.

    Args:
        model: The model.
        forward: Runs the model on inputs.
        x: Inputs of a few samples.

    Returns:
        What the forward pass returns.

    Raises:
        ObjectiveError: If a check fails.
    """
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        with _module_names(model) as where, _Refusing(where):
            outputs = forward(x)
        again = forward(x)
    if any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)):
        raise ObjectiveError("a forward pass changes the network's parameters: the Hessian at fixed weights needs none")
    if isinstance(outputs, Tensor) and (again.shape != outputs.shape or _distance(outputs, again) > 1e-5):
        raise ObjectiveError(
            "two forward passes on the same inputs give different outputs. The model keeps state between calls: give "
            "{reset}, a function of the model that clears it. Or it draws random numbers outside torch: draw them "
            "before and pass them as inputs",
            reset=...,
        )
    return outputs


def _check_shape(outputs: Any, count: int) -> None:
    """Refuse outputs that are not one floating-point tensor with one entry per sample."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = f"{outputs.dtype} tensor" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ObjectiveError(f"the network returns a {kind}: one floating-point tensor is needed")
    if outputs.dim() < 1 or len(outputs) != count:
        raise ObjectiveError(
            f"the network returns outputs of shape {list(outputs.shape)} for {count} samples: the first axis must "
            "count the samples"
        )


# ---------------------------------------------------------------- independent samples
def _check_samples(objective: Objective, x: Any, outputs: Tensor) -> None:
    """Refuse a network in which the output of a sample depends on the others: in other orders and other sizes."""
    n = len(outputs)
    if n < 2:
        return
    run, x, outputs = _in_double(objective, x, outputs)
    limit = TOLERANCE.get(outputs.dtype, 1e-2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(outputs.device)
    few, rest = order[: n // 3], order[n // 3 :]  # every sample once more, in smaller company
    groups = ((order, "their order"), (few, "the others"), (rest, "the others"), (order[:1], "the others"))
    for index, what in groups:
        if not len(index):
            continue
        try:
            found = run(nested.selected(x, index))
        except (RuntimeError, ValueError, IndexError):
            if len(index) > 1:
                raise
            continue  # a network that accepts no single sample
        distance = _distance(outputs[index], found) if found.shape == outputs[index].shape else float("inf")
        if not distance <= limit:
            raise ObjectiveError(
                f"the output of a sample depends on {what} in the batch (by {distance:.1g} of the outputs' size), so "
                "the loss is not a mean over samples. Likely causes: batch statistics (a BatchNorm without running "
                "statistics, x - x.mean(0)), or an axis of time taken for the axis of samples"
            )


def _in_double(objective: Objective, x: Any, outputs: Tensor) -> tuple[Callable[[Any], Tensor], Any, Tensor]:
    """Return (forward, inputs, outputs) in float64 where the model runs in it, so that round-off flips no spikes."""
    if outputs.dtype == torch.float64:
        return objective.outputs, x, outputs
    try:
        if objective.reset is not None:
            objective.reset(objective.model)
        model = copy_model(objective.model).double()
        wide = nested.converted(x, outputs.double())

        def run(part: Any) -> Tensor:
            if objective.reset is not None:
                objective.reset(model)
            with twice_differentiable():
                out: Tensor = nested.call(model, part)
            return out

        found = run(wide)
    except Exception:  # a model that fixes its dtype: float32 has to do
        return objective.outputs, x, outputs
    if found.dtype != torch.float64 or found.shape != outputs.shape:
        return objective.outputs, x, outputs
    return run, wide, found


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest entry of `a`; NaN entries in the same places are equal."""
    if not a.numel():
        return 0.0
    size = a.abs().nan_to_num(0.0, 0.0, 0.0).max()
    gap = torch.where(a == b, torch.zeros_like(a), (a - b).abs())
    gap = gap.nan_to_num(0.0 if a.isnan().equal(b.isnan()) else 1e30)
    return float(gap.max() / size.clamp_min(torch.finfo(a.dtype).tiny))


# ---------------------------------------------------------------- the loss
def _check_loss(objective: Objective, outputs: Tensor, y: Tensor) -> None:
    """Refuse a loss that is not a mean over samples, changes its targets, or keeps state."""
    targets = torch.cat(objective.targets)
    index = spread(len(targets), LOSS_SAMPLES)
    wanted = targets[index.to(targets.device)]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(outputs), (len(wanted),), generator=generator)
    mixed = outputs.detach()[rows.to(outputs.device)].double()
    wanted = wanted.double() if wanted.is_floating_point() else wanted
    shift = torch.randn(mixed.shape, generator=generator, dtype=torch.float64).to(mixed.device)
    noisy = mixed + shift * (mixed.std().nan_to_num(0.0) + 1)
    # Samples with equal outputs lose alike, which would hide unequal weights; not every loss accepts any output.
    for found in (noisy, mixed):
        value = _try_loss(objective, found, wanted)
        if value is not None and bool(torch.isfinite(value)):
            return _check_mean(objective, found, wanted, value)
    value = objective.loss(mixed.to(outputs.dtype), wanted)  # the user's own error, if there is one
    if not isinstance(value, Tensor) or value.dim():
        kind = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ObjectiveError(f"the loss returns {kind}: it must return one number, the mean over the samples")


def _try_loss(objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor | None:
    try:
        value = objective.loss(outputs.clone(), targets.clone())
    except Exception:
        return None
    return value.detach().double() if isinstance(value, Tensor) and not value.dim() else None


def _check_mean(objective: Objective, outputs: Tensor, targets: Tensor, value: Tensor) -> None:
    kept = targets.clone()
    again = objective.loss(outputs.clone(), kept).detach().double()
    if not torch.equal(kept, targets):
        raise ObjectiveError("the loss changes its targets in place: it must leave them as they are (clone them first)")
    scale = float(value.abs())
    if abs(float(again - value)) > 1e-9 * scale:
        raise ObjectiveError("the loss gives two values for the same outputs and targets: it keeps state, or is random")
    n = len(targets)
    order = torch.argsort(targets.flatten(1).sum(1) if targets.dim() > 1 else targets, stable=True)
    for cuts in ([1, max(1, n // 3)], [max(1, n // 2)]):
        parts = [p for p in torch.tensor_split(order.cpu(), cuts) if len(p)]
        values = [_try_loss(objective, outputs[p.to(outputs.device)], targets[p.to(targets.device)]) for p in parts]
        if any(v is None for v in values):
            continue
        found = [float(v) for v in values if v is not None]
        mean = sum(v * len(p) for v, p in zip(found, parts, strict=True)) / n
        scale = max(scale, *(abs(v) for v in found))
        if not abs(mean - float(value)) <= 1e-5 * scale:
            raise ObjectiveError(
                f"the loss is not a mean over samples: it is {float(value):.5g} for {n} samples, but the mean of its "
                f"parts is {mean:.5g}. Likely causes: class weights, ignore_index, reduction='sum', or targets [N] "
                "broadcast against outputs [N, 1]"
            )
