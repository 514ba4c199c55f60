"""Variants of an adapted network: relaxed spikes, the reversed tie rule of max-pooling, and outputs over time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hessian_tools.evaluation import copy_model
from ikun.adapters.adapt_network import Adapted
from ikun.adapters.base import AdapterError
from ikun.adapters.summary import inputs_of
from ikun.adapters.time.loop import InTime, clear_state
from ikun.nodes.variants import Changed, Relaxing, ReversingTies

STEP = 1e-5  # of the central difference that tests the derivative of a relaxed network
NEAR = 1e-4  # relative error of that difference


def clear(model: nn.Module) -> None:
    """Clear the state of a variant. It is the argument `reset` of `make_objective`."""
    clear_state(model.model if isinstance(model, Changed) else model)


def other_nodes(adapted: Adapted) -> str:
    """Return why not all spiking neurons are nodes; empty if they are."""
    if not adapted.nodes:
        return "it has no spiking neurons of a library whose equations are known"
    return next((f"neuron '{path}': {reason}" for path, reason in adapted.nodes.items() if reason), "")


def over_time(adapted: Adapted) -> Adapted:
    """Return the network with its outputs over time [N, T, ...], before any readout.

    Raises:
        AdapterError: If it returns one output per sample, or reads out only the valid steps of padded sequences.
    """
    model = adapted.model
    if not isinstance(model, InTime) or model.plan.time_axis is None:
        raise AdapterError(
            "traces per time step need a network that returns outputs over time, [T, N, K], but it returns one output "
            "per sample; if the first axis of its outputs is time, give {readout}",
            readout=...,
        )
    if model.plan.valid is not None:
        raise AdapterError("traces per time step are not defined for padded sequences: leave out {valid}", valid=...)
    plan = replace(model.plan, readout="none")
    return replace(adapted, model=InTime(model.network, plan, model.clear, model.live), plan=plan)


def relaxed_network(adapted: Adapted, x: Tensor) -> Adapted:
    """Replace every spike by F(h - threshold), with F the integral of the surrogate's derivative.

    Args:
        adapted: The network. Its reset must not be detached.
        x: A few inputs [N, ...].

    Returns:
        The relaxed network.

    Raises:
        AdapterError: If it has none. A step or a detached reset outside of the neurons' equations is found by a
            difference of its outputs in float64.
    """
    if reason := other_nodes(adapted):
        raise AdapterError("the network has no relaxed form: {}", reason)
    found = replace(adapted, model=Changed(adapted.model, Relaxing), reset=clear)
    try:
        error = _difference(found.model, x)
    except ValueError as problem:
        raise AdapterError("the network has no relaxed form: {}", problem) from None
    if not error <= NEAR:
        raise AdapterError(
            "the network has no relaxed form: its derivatives are not those of its outputs (a detached reset, or a "
            "step outside of the neurons)"
        )
    return found


def _difference(model: nn.Module, x: Tensor) -> float:
    """Return the relative error of a directional derivative, against a central difference in float64."""
    twin = copy_model(model).double()
    parameters = [p for p in twin.parameters() if p.is_floating_point()]
    x = x.to(parameters[0].device, torch.float64 if x.is_floating_point() else x.dtype)
    generator = torch.Generator().manual_seed(0)
    v = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * p.detach().abs().mean()
        for p in parameters
    ]
    weights = None
    ends = []
    for sign in (0, 1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, v, strict=True):
                p.add_(d, alpha=(sign if sign >= 0 else -2) * STEP)
        clear(twin)
        y = twin(x)
        if weights is None:
            weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            gradient = torch.autograd.grad((weights * y).sum(), parameters, allow_unused=True)
            exact = sum(float((g * d).sum()) for g, d in zip(gradient, v, strict=True) if g is not None)
        else:
            ends.append(float((weights * y).sum().detach()))
    clear(twin)
    found = (ends[0] - ends[1]) / (2 * STEP)
    return abs(found - exact) / max(abs(exact), 1e-12)


def ties_reversed(adapted: Adapted) -> Adapted:
    """Return the network whose max-pooling selects the last of several equal entries."""
    return replace(adapted, model=Changed(adapted.model, ReversingTies), reset=clear)


def max_pools(adapted: Adapted, x: Tensor) -> int:
    """Return how often the network calls max-pooling, for a few inputs."""
    mode = ReversingTies()
    clear(adapted.model)
    with torch.no_grad(), mode:
        adapted.model(inputs_of(adapted, x))
    clear(adapted.model)
    return mode.count
