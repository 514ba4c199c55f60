"""Copy a model, evaluate it with the surrogate gradients of spiking neurons on, and give it second derivatives.

The loss is evaluated in float64.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hessian_tools.io.errors import ObjectiveError
from hessian_tools.rebinding import deep_copy

# Base classes of the spiking neurons of SpikingJelly, snnTorch and others, by name: no library is imported here.
NEURON_CLASSES = frozenset({"BaseNode", "SpikingNeuron", "Neuron", "SNNCell", "SNN"})
SURROGATE_ATTRIBUTES = ("surrogate_function", "spike_grad", "surrogate")


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def differentiable(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function that differentiates, so that it also works inside `torch.no_grad` and `inference_mode`."""

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return wrapped


def is_spiking_neuron(module: nn.Module) -> bool:
    """Whether a module is a spiking neuron: by the name of a base class, or because it holds a surrogate function."""
    if any(c.__name__ in NEURON_CLASSES for c in type(module).__mro__):
        return True
    return any(callable(getattr(module, name, None)) for name in SURROGATE_ATTRIBUTES)


def evaluation_mode(model: nn.Module, forward: Callable[[nn.Module], object]) -> None:
    """Put every module in evaluation mode, except spiking neurons whose surrogate gradient is switched off there.

    Some spiking libraries replace the surrogate in evaluation mode, so that no gradient is left. Every module that
    looks like a neuron (see `is_spiking_neuron`) is tried in both modes, those inside others first. It stays in
    training mode only if more of its outputs then depend on its inputs. Modules inside a neuron, such as a BatchNorm on
    its membrane, are put in evaluation mode.

    Args:
        model: The model.
        forward: Runs a copy of the model on a few inputs, from a cleared state.
    """
    model.eval()
    named = dict(model.named_modules())
    todo = [name for name, module in observable(model) if is_spiking_neuron(module)]
    for name in todo:
        named[name].training = False  # not train(), which would also change the modules inside
    if not todo:
        return
    copied = copy_model(model)
    copies = dict(copied.named_modules())
    inside = {name: {id(m) for m in copies[name].modules()} - {id(copies[name])} for name in todo}
    while todo:
        level = [name for name in todo if not any(id(copies[other]) in inside[name] for other in todo)]
        todo = [name for name in todo if name not in level]
        modules = {name: copies[name] for name in level}
        evaluated = _dependent(copied, modules, forward)
        for module in modules.values():
            module.training = True
        trained = _dependent(copied, modules, forward)
        for name, module in modules.items():
            module.training = named[name].training = bool(trained[name] - evaluated[name])


def _dependent(
    model: nn.Module, modules: dict[str, nn.Module], forward: Callable[[nn.Module], object]
) -> dict[str, set[int]]:
    """Return which outputs of the first call of each module, by position, have a derivative by its inputs."""
    found: dict[str, set[int]] = {name: set() for name in modules}
    leaves: dict[str, list[Tensor]] = {}
    done: set[str] = set()
    handles = []

    def entering(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if name in leaves:
                return None
            own = leaves[name] = []

            def fresh(t: Tensor) -> Tensor:
                if not t.is_floating_point():
                    return t
                own.append(t.detach().requires_grad_())
                return own[-1] * 1  # which the module may write into

            return pytree.tree_map_only(Tensor, fresh, (args, kwargs))

        return hook

    def leaving(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if name in done:
                return
            done.add(name)
            outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
            for i, t in enumerate(outputs):
                if t.requires_grad and t.is_floating_point() and leaves.get(name):
                    slopes = torch.autograd.grad(t.sum(), leaves[name], retain_graph=True, allow_unused=True)
                    if any(slope is not None for slope in slopes):
                        found[name].add(i)

        return hook

    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leaving(name)))
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices), contextlib.suppress(Exception):
            forward(model)  # an error is raised where the model is used
    finally:
        for handle in handles:
            handle.remove()
    return found


def copy_model(model: nn.Module, share: bool = False) -> nn.Module:
    """Copy a model. Unlike copy.deepcopy, this copies functions, and accepts tensors with an autograd graph.

    Lambdas and hooks that refer to the model refer to the copy afterwards. Modules that hold tensors with a graph are
    neurons that keep their state, and pruned or weight-normalized layers. Modules that were compiled by `torch.compile`
    run as they were written, because compiled code has no second derivative.

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
    copied: nn.Module = deep_copy(model, known)
    fresh: dict[Any, nn.Parameter] = {}  # tied parameters stay tied
    for module in copied.modules():
        _compose_weight_norm(module)
        if type(module).__name__ == "OptimizedModule":
            module.forward = module._orig_mod.forward  # type: ignore[union-attr]
        if isinstance(module, nn.Embedding):
            module.sparse = False  # sparse gradients have no second derivative
        if isinstance(module, torch.jit.ScriptModule) and not share:
            for name, p in list(module.named_parameters(recurse=False)):
                made = fresh.setdefault((p.data_ptr(), p.shape), nn.Parameter(p.detach().clone(), p.requires_grad))
                setattr(module, name, made)  # a copied one returns gradients in the dtype that it had before
    return copied


def _copies_itself(module: nn.Module) -> bool:
    """Whether a class outside torch says how it is copied. Those of Sinabs lose `requires_grad`, mode and hooks."""
    return any("__deepcopy__" in vars(c) for c in type(module).__mro__ if not c.__module__.startswith("torch."))


def converted_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the floating-point tensors of a model, in place. Complex ones stay complex, unlike in Module.to."""
    model._apply(lambda t: t.to(dtype if t.is_floating_point() else dtype.to_complex() if t.is_complex() else t.dtype))
    return model


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
        A function of the same outputs and targets. Its derivatives by float32 outputs are float32. It raises
        ObjectiveError if the loss does not return one number.
    """

    def widened(outputs: Tensor, targets: Tensor) -> Tensor:
        with _Widened():
            return loss(outputs, targets)

    chosen: list[Callable[[Tensor, Tensor], Tensor] | None] = []  # how float64 works; None: in no way

    def evaluated(outputs: Tensor, targets: Tensor) -> Tensor:
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

    @functools.wraps(loss)
    def wide(outputs: Tensor, targets: Tensor) -> Tensor:
        value = evaluated(outputs, targets)
        refuse_no_number(value)
        return value

    return wide


def refuse_no_number(value: Any) -> None:
    """Raise ObjectiveError if the value of a loss is not a tensor with one number and no axes."""
    if not isinstance(value, Tensor) or value.dim():
        shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
        raise ObjectiveError(
            f"the loss returns a {type(value).__name__}{shape}: it must return a tensor with one number, the mean over "
            "the samples"
        )


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
