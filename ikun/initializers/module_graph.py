"""The weight layers and neurons of any torch module, found by class and by what reaches what in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ikun.initializers.probe import Arguments, Reset, Stage, Weights, entering, evaluating, forward, reset_states
from ikun.neurons import Neuron

FOREIGN = ("BaseNode", "SpikingNeuron")  # the base classes of the neurons of SpikingJelly and of snnTorch


def is_neuron(module: nn.Module, kinds: tuple[type, ...] = ()) -> bool:
    """Whether it is of one of the kinds; without kinds: one of ikun's, SpikingJelly's or snnTorch's neurons."""
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
    """The stages of any module in the order of one forward pass on x.

    A weight layer feeds the neurons whose input its output reaches, with no other weight layer or neuron between them;
    its norm is the one that takes its output alone. It is recurrent if its neurons call it, or if their spikes reach
    its input. Without x, in the order of registration: neurons and norm are then the next ones, nothing is recurrent.
    stand_in gives the model of neurons. Raises ValueError if no convolution and no linear layer is called,
    or if the same neurons stand behind different layers at different calls.
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


Links = tuple[list[Weights], dict[nn.Module, _BatchNorm], dict[nn.Module, nn.Module], set[nn.Module]]


def _registered(watched: Sequence[nn.Module]) -> Links:
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
    """Outputs of weight layers and neurons are cut from their history and marked by a leaf of the autograd graph each,
    so that the leaves behind a tensor are the layers that it comes from. What comes back to neurons is added to what
    they had at first: neurons with nothing in common at two calls are shared by two places of the module."""
    weights: dict[Weights, None] = {}
    norms: dict[nn.Module, _BatchNorm] = {}
    feeds: dict[nn.Module, nn.Module] = {}
    recurrent: set[nn.Module] = set()
    sources: dict[nn.Module, set[nn.Module]] = {}
    calls: dict[nn.Module, list[set[nn.Module]]] = {}  # what is behind the input of neurons, if anything
    marks: dict[Tensor, nn.Module] = {}
    running: list[nn.Module] = []  # neurons within their call

    def enter(m: nn.Module, arguments: Arguments, named: dict[str, Tensor]) -> None:
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
            raise ValueError(f"neurons {names[neuron]} stand behind several layers ({layers}): give each its own")
    recurrent |= {w for w, behind in sources.items() if feeds.get(w) in behind}
    return list(weights), norms, feeds, recurrent


def _behind(tensor: Tensor, marks: dict[Tensor, nn.Module]) -> set[nn.Module]:
    """The layers whose marks are leaves of the tensor's graph."""
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
