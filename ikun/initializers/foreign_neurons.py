"""Other libraries' neurons as ikun's own: leak, threshold, reset and surrogate, as far as their classes are known."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ikun.neurons import Dynamics, Neuron
from ikun.surrogates import Surrogate

# SpikingJelly's surrogates of one parameter, alpha
SURROGATES = {
    "ATan": "atan",
    "Sigmoid": "sigmoid",
    "Erf": "erf",
    "SoftSign": "softsign",
    "PiecewiseExp": "piecewise_exp",
}
USUAL = "atan:2"


class StandIn(Neuron):
    """Neurons of the given decay and gain."""

    def __init__(self, dynamics: Dynamics, decay: float, gain: float) -> None:
        super().__init__("if" if decay == 1 else "lif", dynamics)
        self.decay, self.gain = decay, gain

    def rates(self) -> tuple[Tensor | float, Tensor | float]:
        return self.decay, self.gain


def stand_in(neuron: nn.Module, surrogate: str | None = None, threshold: float | None = None) -> Neuron:
    """ikun's neurons for other ones; itself if it is ikun's. surrogate, threshold: in place of its own.

    Known are SpikingJelly's IFNode, LIFNode and ParametricLIFNode, with its surrogates of SURROGATES, and snnTorch's
    Leaky and RLeaky, whose reset is taken without its delay of a step and whose surrogate cannot be read: atan:2, its
    usual one. Of learned or several leaks and thresholds the mean. Anything else stands for IF neurons of threshold 1.
    """
    if isinstance(neuron, Neuron):
        return neuron
    decay, gain = _leak(neuron)
    own = neuron.v_threshold if hasattr(neuron, "v_threshold") else getattr(neuron, "threshold", 1.0)
    dynamics = Dynamics(
        Surrogate.parse(surrogate or _surrogate(neuron)),
        _mean(own) if threshold is None else threshold,
        *_reset(neuron),
    )
    return StandIn(dynamics, decay, gain)


def _leak(neuron: nn.Module) -> tuple[float, float]:
    """(decay, gain), (1, 1) where they are not known."""
    known = [c.__name__ for c in type(neuron).__mro__ if _charges_as(neuron, c)]
    if "LIFNode" in known and hasattr(neuron, "tau"):
        rate = 1 / _mean(neuron.tau)
    elif "ParametricLIFNode" in known and hasattr(neuron, "w"):
        rate = 1 / (1 + math.exp(-_mean(neuron.w)))
    elif type(neuron).__name__ in ("Leaky", "RLeaky") and hasattr(neuron, "beta"):
        return min(1.0, max(0.0, _mean(neuron.beta))), 1.0
    else:
        return 1.0, 1.0
    return 1 - rate, rate if getattr(neuron, "decay_input", True) else 1.0


def _charges_as(neuron: nn.Module, other: type) -> bool:
    """Whether its membrane is charged as the class `other` has it."""
    return getattr(type(neuron), "neuronal_charge", None) is getattr(other, "neuronal_charge", None)


def _reset(neuron: nn.Module) -> tuple[float, str]:
    """(v_reset, hard or soft)."""
    if hasattr(neuron, "reset_mechanism"):
        return 0.0, "soft" if neuron.reset_mechanism == "subtract" else "hard"
    v_reset = getattr(neuron, "v_reset", 0.0)
    return (0.0, "soft") if v_reset is None else (_mean(v_reset), "hard")


def _surrogate(neuron: nn.Module) -> str:
    function = getattr(neuron, "surrogate_function", None)
    name, alpha = SURROGATES.get(type(function).__name__), getattr(function, "alpha", None)
    return f"{name}:{_mean(alpha):g}" if name and alpha is not None else USUAL


def _mean(value: object, otherwise: float = 1.0) -> float:
    """Of a number or of a tensor of any shape; `otherwise` for what is neither."""
    if isinstance(value, Tensor):
        return float(value.detach().double().mean())
    return float(value) if isinstance(value, int | float) else otherwise
