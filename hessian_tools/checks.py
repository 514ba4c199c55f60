"""Checks before a number is computed: is the objective a mean over independent samples, without randomness?

A curvature product sums over batches. It is the curvature of the mean loss only if the network is a deterministic
function of each sample, and if the loss is a mean over samples. `check` tests this on the data at hand, once per
objective, and costs a few forward passes on a few samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hessian_tools import nested
from hessian_tools.evaluation import converted_model, copy_model, differentiable, observable, twice_differentiable
from hessian_tools.function_check import check_functions
from hessian_tools.io.errors import ObjectiveError as ObjectiveError
from hessian_tools.loss_check import check_loss
from hessian_tools.loss_check import spread as spread

if TYPE_CHECKING:
    from hessian_tools.objective import Objective

SAMPLES = 12  # of the network's checks, spread evenly over the data
BATCH = 2048  # at most, of a large batch that is compared with parts of it
BYTES = 2**26  # of the largest tensor in a forward pass of a check; eight times that for a batch of the objective
HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative to the largest output


@differentiable
def check(objective: Objective, derivatives: bool = True) -> None:
    """Check that an objective is a mean over independent samples of a deterministic network.

    Args:
        objective: The objective. Its model is not changed.
        derivatives: Whether the derivatives of the network's own autograd functions are checked.

    Raises:
        ObjectiveError: If a forward pass draws random numbers or changes the weights or its inputs, if two passes
            differ, if the output of a sample depends on the other samples of its batch, if the loss is not a mean over
            samples or depends on the weights itself, if a second derivative is missing or wrong, or if the network
            computes in half precision or has complex weights, inputs or outputs.
    """
    if objective.dtype in HALF:
        raise ObjectiveError(
            f"the parameters are {str(objective.dtype).removeprefix('torch.')}: half precision has too few digits for "
            "second derivatives. Convert them, for instance with dtype=torch.float32"
        )
    for name, p in objective.parameters.items():
        if p.is_complex():
            raise ObjectiveError(
                f"parameter '{name}' is complex: the Hessian needs real ones. Store its real and imaginary parts "
                "(torch.view_as_real), or exclude it by params"
            )
    model, x = objective.model, objective.first_inputs(2)
    if any(t.is_complex() for t in nested.tensors(x)):
        raise ObjectiveError("the inputs are complex: pass their real and imaginary parts (torch.view_as_real)")
    largest = max(_deterministic(model, objective.outputs, x)[1], *(8 * t.numel() for t in nested.tensors(x)))
    room = int(BYTES * nested.sample_count(x) / max(largest, 1))
    few = max(2, min(SAMPLES, room))
    for i, (x, y) in enumerate(objective.regrouped([spread(objective.samples, few)]).batches):
        outputs = deterministic(model, objective.outputs, x)
        _check_shape(outputs, nested.sample_count(x))
        forward, wide, found, limit = _in_double(objective, x, outputs)
        _check_samples(forward, wide, found, limit)
        if i == 0:
            two = nested.selected(wide, torch.arange(min(2, len(found))))
            if derivatives:
                check_functions(partial(_without_saving, forward, two))
            most = min(BATCH, max(room, min(8 * room, max(objective.sizes))))
            _check_batch(forward, objective, found, most, limit)
        alike = [targets for targets in objective.targets if targets.shape[1:] == y.shape[1:]]
        check_loss(objective.loss, outputs, torch.cat(alike))


def refuse_autocast(device: torch.device) -> None:
    """Raise ObjectiveError inside `torch.autocast`: products would be rounded to half precision."""
    if torch.is_autocast_enabled(device.type):
        kind = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        raise ObjectiveError(
            f"torch.autocast is on ({kind}): half precision has too few digits for second derivatives. Compute outside "
            "of torch.autocast"
        )


# ---------------------------------------------------------------- randomness and state
class _Refusing(TorchDispatchMode):
    """Raise when an operation draws random numbers, or computes in half precision.

    `where` returns the name of the module at work.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where, self.largest = where, 0.0

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
        if isinstance(result, Tensor):
            self.largest = max(self.largest, 8.0 * result.numel())
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
    """Check that a forward pass draws no random numbers, keeps no state and does not change weights or inputs.

    Args:
        model: The model.
        forward: Runs the model on inputs.
        x: Inputs of a few samples.

    Returns:
        What the forward pass returns.

    Raises:
        ObjectiveError: If a check fails.
    """
    return _deterministic(model, forward, x)[0]


def _deterministic(model: nn.Module, forward: Callable[[Any], Any], x: Any) -> tuple[Any, float]:
    """Return what the forward pass returns, and the bytes of its largest tensor in float64."""
    before = [p.detach().clone() for p in model.parameters()]
    kept = nested.mapped(torch.clone, x)
    with _module_names(model) as where, _Refusing(where) as refusing:
        outputs = as_in_products(forward, x)
    again = as_in_products(forward, x)
    if any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)):
        raise ObjectiveError("a forward pass changes the network's parameters: the Hessian at fixed weights needs none")
    pairs = zip(nested.tensors(kept), nested.tensors(x), strict=True)
    if not all(bool(((a == b) | (a != a)).all()) for a, b in pairs):  # NaN stays NaN
        raise ObjectiveError(
            "a forward pass changes its inputs in place, so that the next one gets others: clone them in the network"
        )
    if isinstance(outputs, Tensor) and (again.shape != outputs.shape or _unlike(outputs, again) > 1e-5):
        raise ObjectiveError(
            "two forward passes on the same inputs give different outputs. The model keeps state between calls: give "
            "{reset}, a function of the model that clears it. Or it draws random numbers outside torch: draw them "
            "before and pass them as inputs",
            reset=...,
        )
    return outputs, refusing.largest


def as_in_products(forward: Callable[[Any], Any], x: Any, *, small: bool = True) -> Any:
    """Run a forward pass with gradients on, as in a product, but without the memory of a backward pass.

    A model that differentiates in its forward pass needs that memory. With many samples (not `small`), it is run
    without gradients.
    """
    out = _without_saving(forward, x, torch.enable_grad() if small else torch.no_grad())
    return out.detach() if isinstance(out, Tensor) else out


def _without_saving(forward: Callable[[Any], Any], x: Any, otherwise: AbstractContextManager[Any] | None = None) -> Any:
    """Run a forward pass whose graph is complete but for the saved tensors, unless the pass itself needs them."""
    needed = []

    def unpack(_: object) -> Tensor:
        needed.append(True)
        raise RuntimeError("the forward pass differentiates")

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: None, unpack):
            return forward(x)
    except Exception as error:
        if not needed and "saved tensor hooks" not in str(error):  # which torch.func does not allow
            raise
    with otherwise or torch.enable_grad():
        return forward(x)


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
Forward = Callable[[Any], Any]  # inputs [n, ...] -> outputs [n, ...]


def _check_samples(forward: Forward, x: Any, outputs: Tensor, limit: float) -> None:
    """Refuse a network in which the output of a sample depends on the others: in other orders and other sizes."""
    n = len(outputs)
    if n < 2:
        return
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(outputs.device)
    few, rest = order[: n // 3], order[n // 3 :]  # every sample once more, in smaller company
    groups = ((order, "their order"), (few, "the others"), (rest, "the others"), (order[:1], "the others"))
    for index, what in groups:
        if not len(index):
            continue
        try:
            found = as_in_products(forward, nested.selected(x, index))
        except (RuntimeError, ValueError, IndexError):
            if len(index) > 1:
                raise
            continue  # a network that accepts no single sample
        _compare(outputs[index], found, what, limit)


def _check_batch(forward: Forward, objective: Objective, outputs: Tensor, most: int, limit: float) -> None:
    """The same with a large batch, because some layers couple samples only there."""
    if min(most, objective.samples) <= len(outputs):
        return
    x = objective.regrouped([spread(objective.samples, most)]).batches[0][0]
    x = nested.mapped(lambda t: t.to(outputs.dtype) if t.is_floating_point() else t, x)
    whole = as_in_products(forward, x, small=False)
    cut = len(whole) // 3
    for part in (slice(cut), slice(cut, None)):
        found = as_in_products(forward, nested.selected(x, torch.arange(len(whole))[part]), small=False)
        _compare(whole[part], found, "the others", limit)


def _compare(outputs: Tensor, found: Tensor, what: str, limit: float) -> None:
    """Refuse outputs of the same samples that differ."""
    if bool(outputs.isfinite().all()) != bool(found.isfinite().all()):
        raise ObjectiveError(
            "the network's outputs are finite in one batch and NaN or infinite in another one with the same samples: "
            "find what depends on the batch or on earlier calls"
        )
    distance = _unlike(outputs, found) if found.shape == outputs.shape else float("inf")
    if not distance <= limit:
        raise ObjectiveError(
            f"the output of a sample depends on {what} in the batch (by {distance:.1g} of the outputs' size), so "
            "the loss is not a mean over samples. Likely causes: batch statistics (a BatchNorm without running "
            "statistics, x - x.mean(0)), or an axis of time taken for the axis of samples"
        )


class _Precision(TorchDispatchMode):
    """Note whether an operation computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.single = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.single |= isinstance(result, Tensor) and result.dtype in (torch.float32, torch.complex64)
        return result


def _in_double(objective: Objective, x: Any, outputs: Tensor) -> tuple[Forward, Any, Tensor, float]:
    """Return (forward, inputs, outputs, tolerance) in float64 if the model runs in it: round-off must flip no spikes.

    The tolerance is that of float32 if a part of the model stays in it.
    """
    narrow = objective.outputs, x, outputs
    forward: Forward = objective.outputs
    try:
        if outputs.dtype != torch.float64:
            if objective.reset is not None:
                objective.reset(objective.model)
            model = converted_model(copy_model(objective.model), torch.float64)
            x = nested.converted(x, outputs.double())

            def forward(part: Any) -> Any:
                if objective.reset is not None:
                    objective.reset(model)
                with twice_differentiable():
                    return nested.call(model, part)

        with _Precision() as precision:
            found = as_in_products(forward, x)
    except Exception:  # a model that fixes its dtype: float32 has to do
        return *narrow, TOLERANCE.get(outputs.dtype, 1e-2)
    if found.dtype != torch.float64 or found.shape != outputs.shape:
        return *narrow, TOLERANCE.get(outputs.dtype, 1e-2)
    return forward, x, found, TOLERANCE[torch.float32 if precision.single else torch.float64]


def _unlike(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of its column (the same output of all samples).

    NaN entries in the same places are equal. Differences below the round-off of the largest entry of all do not count.
    """
    if not a.numel():
        return 0.0
    size = a.abs().nan_to_num(0.0, 0.0, 0.0)
    gap = torch.where(a == b, torch.zeros_like(size), (a - b).abs())
    gap = gap.nan_to_num(0.0 if a.isnan().equal(b.isnan()) else 1e30)
    info = torch.finfo(a.dtype) if a.is_floating_point() or a.is_complex() else torch.finfo(torch.float32)
    gap = torch.where(gap <= 64 * info.eps * size.max(), torch.zeros_like(gap), gap)
    columns = size.reshape(len(a), -1).amax(0) if a.dim() else size.reshape(1)
    return float((gap.reshape(-1, len(columns)) / columns.clamp_min(info.tiny)).max())
