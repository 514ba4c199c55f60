"""Find the weight layers and neurons of any torch module, and which layers feed which neurons.

Layers and neurons are found by class. Their connections are found by tracing one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ikun.initializers.probe import Arguments, Reset, Stage, Weights, entering, evaluating, forward, reset_states
from ikun.neurons import Neuron

FOREIGN = ("BaseNode", "SpikingNeuron")  # base classes of the neurons of SpikingJelly and of snnTorch


def is_neuron(module: nn.Module, kinds: tuple[type, ...] = ()) -> bool:
    """Return whether a module is a layer of spiking neurons.

    Args:
        module: The module.
        kinds: Classes of neurons. If empty, these are the neurons of ikun, SpikingJelly and snnTorch.

    Returns:
        Whether it is an instance of one of these classes.
    """
    if kinds:
        return isinstance(module, kinds)
    return isinstance(module, Neuron) or any(c.__name__ in FOREIGN for c in type(module).__mro__)


def stages_of_module(
    module: nn.Module,
    x: Tensor | None,
    stand_in: Callable[[nn.Module], Neuron],
    neurons: tuple[type, ...] = (),
    reset: Reset = reset_states,
) -> tuple[Stage, ...]:
    """Find the stages of any module, in the order of one forward pass on x.

    A weight layer feeds the neurons whose input its output reaches with no other weight layer or neuron in between. Its
    norm is the one that receives only its output. It is recurrent if its neurons call it, or if their spikes reach its
    input. Without x, the order of registration is used: neurons and norm are the next ones, and no layer is recurrent.

    Args:
        module: The module.
        x: A batch as the module's forward takes it, or None.
        stand_in: Maps neurons to ikun neurons that model them.
        neurons: Classes of neurons, as in `is_neuron`.
        reset: Function that resets the module's state.

    Returns:
        The stages.

    Raises:
        ValueError: If no convolution and no linear layer is called, or if the same neurons follow different layers at
            different calls.
    """
    names = {m: name for name, m in module.named_modules()}
    watched = [m for m in names if isinstance(m, Weights | _BatchNorm) or is_neuron(m, neurons)]
    weights, norms, feeds, recurrent = _registered(watched) if x is None else _traced(module, x, watched, reset)
    if not weights:
        raise ValueError("the module calls no convolution and no linear layer: there is nothing to initialize")
    found = []
    for m in weights:
        neuron = feeds.get(m)
        model = None if neuron is None else stand_in(neuron)
        found.append(Stage(names[m], m, norms.get(m), neuron, model, m in recurrent))
    return tuple(found)


# The weight layers in order, the norm of a layer, the neurons of a layer, and the recurrent layers
Links = tuple[list[Weights], dict[nn.Module, _BatchNorm], dict[nn.Module, nn.Module], set[nn.Module]]


def _registered(watched: Sequence[nn.Module]) -> Links:
    """Connect layers in the order of registration."""
    weights: list[Weights] = []
    norms: dict[nn.Module, _BatchNorm] = {}
    feeds: dict[nn.Module, nn.Module] = {}
    for m in watched:
        if isinstance(m, Weights):
            weights.append(m)
        elif isinstance(m, _BatchNorm):
            norms.update(dict.fromkeys(weights[-1:], m))
        else:
            feeds.update({w: m for w in weights if w not in feeds})
    return weights, norms, feeds, set()


def _traced(module: nn.Module, x: Tensor, watched: Sequence[nn.Module], reset: Reset) -> Links:
    """Connect layers by tracing one forward pass.

    The output of every weight layer and neuron is detached and marked with its own leaf of the autograd graph. The
    leaves that a tensor depends on are then the layers that it comes from. Recurrent neurons receive additional inputs
    at later calls. Neurons whose inputs at different calls have no layer in common are therefore shared by several
    places of the module, and this is refused.
    """
    weights: dict[Weights, None] = {}
    norms: dict[nn.Module, _BatchNorm] = {}
    feeds: dict[nn.Module, nn.Module] = {}
    recurrent: set[nn.Module] = set()
    sources: dict[nn.Module, set[nn.Module]] = {}
    calls: dict[nn.Module, list[set[nn.Module]]] = {}  # the sources of the neurons' input at every call that has any
    marks: dict[Tensor, nn.Module] = {}
    running: list[nn.Module] = []  # neurons whose forward is currently running

    def enter(m: nn.Module, arguments: Arguments, named: dict[str, Tensor]) -> None:
        """Record what a module's input comes from."""
        behind = _behind(entering(arguments, named), marks)
        if isinstance(m, _BatchNorm):
            if len(behind) == 1:
                norms.setdefault(next(iter(behind)), m)
        elif isinstance(m, Weights):
            weights.setdefault(m)
            sources.setdefault(m, set()).update(behind)
            if running:
                feeds[m] = running[-1]
                recurrent.add(m)
        else:
            running.append(m)
            calls.setdefault(m, []).extend([behind] if behind else [])
            for w in behind:
                feeds.setdefault(w, m)

    def leave(m: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Mark a module's output."""
        if not isinstance(m, Weights):
            running.pop()
        first, rest = (output, ()) if isinstance(output, Tensor) else (output[0], output[1:])
        mark = torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=True)
        marks[mark] = m
        marked = first.detach() + mark
        return marked if isinstance(output, Tensor) else (marked, *rest)

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in watched]
    handles += [m.register_forward_hook(leave) for m in watched if not isinstance(m, _BatchNorm)]
    try:
        with evaluating(module), torch.enable_grad():
            reset(module)
            forward(module, x)
    finally:
        for handle in handles:
            handle.remove()
    reset(module)
    names = {m: name for name, m in module.named_modules()}
    for neuron, seen in calls.items():
        if seen and not set.intersection(*seen):
            layers = ", ".join(sorted({names[m] for behind in seen for m in behind}))
            raise ValueError(f"neurons {names[neuron]} follow several layers ({layers}): give each layer its own")
    recurrent |= {w for w, behind in sources.items() if feeds.get(w) in behind}
    return list(weights), norms, feeds, recurrent


def _behind(tensor: Tensor, marks: dict[Tensor, nn.Module]) -> set[nn.Module]:
    """Return the layers whose marks are leaves of the tensor's autograd graph."""
    found, known, open_ = set(), set(), [tensor.grad_fn]
    while open_:
        node = open_.pop()
        if node is None or node in known:
            continue
        known.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf in marks:
            found.add(marks[leaf])
        open_.extend(following for following, _ in node.next_functions)
    return found
