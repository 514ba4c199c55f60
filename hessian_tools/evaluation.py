"""Copy a model, evaluate it with the surrogate gradients of spiking neurons on, and give it second derivatives."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def copy_model(model: nn.Module, share: bool = False) -> nn.Module:
    """Copy a model. Unlike copy.deepcopy, this accepts modules that hold tensors with an autograd graph.

    Examples are neurons that keep their state, and pruned or weight-normalized layers. Modules that were compiled by
    `torch.compile` run as they were written, because compiled code has no second derivative.

    Args:
        model: The model.
        share: Whether the copy has the parameters and buffers of the model itself.
    """
    held = (t for module in model.modules() for t in _tensors(vars(module)) if t.grad_fn is not None)
    known: dict[int, Any] = {id(t): t.detach().clone() for t in held}
    if share:
        known |= {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for module in reversed(list(model.modules())):
        if _copies_itself(module):
            known[id(module)] = twin = type(module).__new__(type(module))
            vars(twin).update(copy.deepcopy(vars(module), known))
    copied = copy.deepcopy(model, known)
    for module in copied.modules():
        _compose_weight_norm(module)
        if type(module).__name__ == "OptimizedModule":
            module.forward = module._orig_mod.forward  # type: ignore[union-attr]
    return copied


def _copies_itself(module: nn.Module) -> bool:
    """Whether a class outside torch says how it is copied. Those of Sinabs lose `requires_grad`, mode and hooks."""
    return any("__deepcopy__" in vars(c) for c in type(module).__mro__ if not c.__module__.startswith("torch."))


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
