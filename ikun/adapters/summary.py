"""Describe an adapted network in plain values, and measure the firing rates of its neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessian_tools import nested
from ikun.adapters.adapt_network import LIBRARIES, Adapted
from ikun.adapters.libraries.nir import NirNeuron
from ikun.adapters.two_jet import Jet

RESETS = {"subtract": "soft", "zero": "hard"}  # name in snnTorch -> name here


def described(adapted: Adapted, x: Any) -> dict[str, Any]:
    """Describe a network in plain values. A value is None if the library does not define it.

    Args:
        adapted: The network.
        x: A few inputs [N, ...].

    Returns:
        Library, neurons, reset, surrogates and further properties. "threshold" is None if the neurons differ in it.
        "timesteps" is None for a network without time, and "readout" is None for outputs without time.
        "trained_surrogate" names the network's own surrogates, also if they were replaced.
    """
    plan, neurons = adapted.plan, neurons_of(adapted)
    normalized = any(isinstance(m, _BatchNorm) for m in adapted.model.modules())
    return {
        "library": adapted.library,
        "neuron": _one([_class(m) for m in neurons]),
        "reset": _one([_reset(m) for m in neurons]),
        "detach_reset": _one([_detached(m) for m in neurons]),
        "threshold": _one([_threshold(m) for m in neurons]),
        "norm": "bn" if normalized else "none",
        "coding": "sequences" if plan.sequences else "direct",
        "ties": "first",  # which of several equal maxima in a window torch's max pooling selects
        "timesteps": plan.steps or _steps(adapted, x),
        "one call": None if plan.steps is None else "one step" if plan.by_step else "all steps",
        "output": plan.output,
        "readout": None if plan.time_axis is None else plan.readout,
        "valid": plan.valid,
        "trained_surrogate": ", ".join(dict.fromkeys(f.label for f in adapted.surrogates)) or None,
        "surrogates": [
            {
                "name": f.name,
                "label": f.label,
                "kind": f.verdict.kind,
                "reason": f.verdict.reason,
                "replaced": f.replaced,
            }
            for f in adapted.surrogates
        ],
        "warnings": list(adapted.warnings),
    }


def neurons_of(adapted: Adapted) -> list[nn.Module]:
    """Return the spiking modules."""
    known = [m for m in LIBRARIES[adapted.library].neurons(adapted.model) if not isinstance(m, Jet)]
    return known or [m for m in adapted.model.modules() if isinstance(m, NirNeuron) and m.kind != "LI"]


def inputs_of(adapted: Adapted, x: Any) -> Any:
    """Move inputs to the device of the network's weights, and floating-point inputs to their dtype."""
    like = next((p for p in adapted.model.parameters() if p.is_floating_point()), None)
    return x if like is None else nested.converted(x, like)


def firing_rates(adapted: Adapted, x: Any) -> dict[str, dict[str, float]]:
    """Measure how often neurons fire.

    Args:
        adapted: The network.
        x: Inputs [N, ...].

    Returns:
        For each layer of neurons whose outputs are 0 or 1, by name: "firing_rate", the mean over neurons, samples and
        time, and "dead", the share of neurons that never fire.
    """
    library, neurons = LIBRARIES[adapted.library], {id(m) for m in neurons_of(adapted)}
    sums: dict[str, list[Tensor]] = {}
    graded: set[str] = set()

    def hook(name: str, timed: bool) -> Any:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) and out else out
            if not isinstance(out, Tensor) or bool(((out != 0) & (out != 1)).any()):
                graded.add(name)
            else:
                sums.setdefault(name, []).append(out.double().flatten(0, 1).mean(0) if timed else out.double().mean(0))

        return note

    named = [(name, m) for name, m in adapted.model.named_modules() if id(m) in neurons]
    handles = [m.register_forward_hook(hook(name, library.takes_time(m))) for name, m in named]
    try:
        with torch.no_grad():
            nested.call(adapted.model, inputs_of(adapted, x))
    finally:
        for handle in handles:
            handle.remove()
    rates = {name: torch.stack(parts).mean(0) for name, parts in sums.items() if name not in graded}
    return {n: {"firing_rate": float(r.mean()), "dead": float((r == 0).double().mean())} for n, r in rates.items()}


def _one(values: list[Any]) -> Any:
    """Return the value that all have in common. Different texts are joined; other different values give None."""
    found = list(dict.fromkeys(values))
    if len(found) > 1 and all(isinstance(value, str) for value in found):
        return ", ".join(found)
    return found[0] if len(found) == 1 else None


def _class(module: nn.Module) -> str:
    return module.kind if isinstance(module, NirNeuron) else type(module).__name__


def _reset(module: nn.Module) -> str | None:
    if isinstance(module, NirNeuron):
        return "soft" if module.soft else "hard"
    if isinstance(mechanism := getattr(module, "reset_mechanism", None), str):
        return RESETS.get(mechanism, mechanism)
    if hasattr(module, "v_threshold"):
        return "soft" if getattr(module, "v_reset", None) is None else "hard"
    return None


def _detached(module: nn.Module) -> bool | None:
    found = getattr(module, "detach_reset", getattr(module, "reset_delay", None))
    return found if isinstance(found, bool) else None


def _threshold(module: nn.Module) -> float | None:
    found = getattr(
        module, "v_threshold", getattr(module, "threshold", getattr(getattr(module, "p", None), "v_th", None))
    )
    try:
        values = torch.as_tensor(found, dtype=torch.float64).flatten().unique().tolist()
    except (TypeError, ValueError, RuntimeError):
        return None
    return values[0] if len(values) == 1 else None


@torch.no_grad()
def _steps(adapted: Adapted, x: Any) -> int | None:
    """Return the number of time steps of a network that runs through time by itself, from its outputs."""
    axis, over_time = adapted.plan.time_axis, getattr(adapted.model, "over_time", None)
    if axis is None or over_time is None:
        return None
    if adapted.reset is not None:
        adapted.reset(adapted.model)
    steps = int(over_time(inputs_of(adapted, x)).shape[axis])
    if adapted.reset is not None:
        adapted.reset(adapted.model)
    return steps
