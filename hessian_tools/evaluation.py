"""Copy a model, evaluate it with the surrogate gradients of spiking neurons on, and give it second derivatives.

The loss is evaluated in float64.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hessian_tools.rebinding import deep_copy

# Base classes of the spiking neurons of SpikingJelly, snnTorch and others, by name: no library is imported here.
NEURON_CLASSES = frozenset({"BaseNode", "SpikingNeuron", "Neuron", "SNNCell", "SNN"})
SURROGATE_ATTRIBUTES = ("surrogate_function", "spike_grad", "surrogate")


def is_spiking_neuron(module: nn.Module) -> bool:
    """Whether a module is a spiking neuron: by the name of a base class, or because it holds a surrogate function."""
    if any(c.__name__ in NEURON_CLASSES for c in type(module).__mro__):
        return True
    return any(callable(getattr(module, name, None)) for name in SURROGATE_ATTRIBUTES)


def evaluation_mode(model: nn.Module) -> None:
    """Put every module in evaluation mode except the spiking neurons, which stay in training mode.

    Some spiking libraries replace the surrogate gradient in evaluation mode, so that no gradient is left. Modules
    inside a neuron, such as a BatchNorm on its membrane, are put in evaluation mode.
    """
    model.eval()
    for module in model.modules():
        if is_spiking_neuron(module):
            module.training = True  # not train(), which would also change the modules inside


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model. Unlike copy.deepcopy, this copies functions, and accepts tensors with an autograd graph.

    Lambdas and hooks that refer to the model refer to the copy afterwards. Modules that hold tensors with a graph are
    neurons that keep their state, and pruned or weight-normalized layers.
    """
    held = (t for module in model.modules() for t in _tensors(vars(module)) if t.grad_fn is not None)
    copied: nn.Module = deep_copy(model, {id(t): t.detach().clone() for t in held})
    fresh: dict[Any, nn.Parameter] = {}  # tied parameters stay tied
    for module in copied.modules():
        _compose_weight_norm(module)
        if isinstance(module, torch.jit.ScriptModule):
            for name, p in list(module.named_parameters(recurse=False)):
                made = fresh.setdefault((p.data_ptr(), p.shape), nn.Parameter(p.detach().clone(), p.requires_grad))
                setattr(module, name, made)  # a copied one returns gradients in the dtype that it had before
    return copied


def observable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules of a model that accept hooks: all but scripted and traced ones."""
    return ((name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule))


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention with the kernel that has a second derivative; the fused ones have none."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _compose_weight_norm(module: nn.Module) -> None:
    """Compute weight normalization from elementary operations.

    The second derivative of torch's own kernel is wrong on the CPU, by about 20% in PyTorch 2.13.
    """
    if type(module).__name__ == "_WeightNorm":  # torch.nn.utils.parametrizations.weight_norm
        dim: int = module.dim  # type: ignore[assignment]
        module.forward = lambda g, v: _weight_norm(v, g, dim)
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ == "WeightNorm":  # torch.nn.utils.weight_norm
            known: Any = hook
            known.compute_weight = lambda m, k=known: _weight_norm(
                getattr(m, f"{k.name}_v"), getattr(m, f"{k.name}_g"), k.dim
            )


def _weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()] if dim != -1 else list(range(v.dim()))
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists and tuples."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(part)


# ---------------------------------------------------------------- the loss
def loss_in_double(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Evaluate a loss in float64, whatever the dtype of the outputs.

    In float32, the second derivative of a cross-entropy cancels to noise once the network fits its data. Tensors that
    the loss itself holds, such as weights of the positive class, are converted where it uses them. A loss that accepts
    float64 in neither way, for example a scripted one, is evaluated as it is.

    Args:
        loss: The function loss(outputs, targets).

    Returns:
        A function of the same outputs and targets. Its derivatives by float32 outputs are float32.
    """

    def widened(outputs: Tensor, targets: Tensor) -> Tensor:
        with _Widened():
            return loss(outputs, targets)

    chosen: list[Callable[[Tensor, Tensor], Tensor] | None] = []  # how float64 works; None: in no way

    @functools.wraps(loss)
    def wide(outputs: Tensor, targets: Tensor) -> Tensor:
        if not outputs.is_floating_point() or chosen == [None]:
            return loss(outputs, targets)
        double = outputs.double(), targets.double() if targets.is_floating_point() else targets
        if chosen and chosen[0] is not None:
            return chosen[0](*double)
        for way in (loss, widened):
            try:
                value = way(*double)
            except (RuntimeError, TypeError, ValueError):
                if way is widened and outputs.dtype == torch.float64:
                    raise  # the loss's own error
                continue
            if way is widened or getattr(value, "dtype", torch.float64) == torch.float64:  # not converted by the loss
                chosen[:] = [way]
                return value
        value = loss(outputs, targets)  # the loss's own error, if it has one
        chosen[:] = [None]
        return value

    return wide


class _Widened(TorchFunctionMode):
    """Convert floating-point tensors to float64 where an operation uses them, unless it writes into them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
        if not writes and name not in ("double", "to", "type", "__get__"):
            args, kwargs = pytree.tree_map_only(Tensor, _double, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _double(t: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return t.double() if t.is_floating_point() else t
