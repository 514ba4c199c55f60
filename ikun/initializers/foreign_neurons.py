"""Models of other libraries' neurons: ikun neurons with the same leak, threshold, reset and surrogate.

The parameters are read from the attributes of the neuron classes that this module knows.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ikun.neurons import Dynamics, Neuron
from ikun.surrogates import Surrogate

# SpikingJelly's surrogate classes with alpha as their only parameter, and ikun's names
SURROGATES = {
    "ATan": "atan",
    "Sigmoid": "sigmoid",
    "Erf": "erf",
    "SoftSign": "softsign",
    "PiecewiseExp": "piecewise_exp",
}
USUAL = "atan:2"  # used if the surrogate of a neuron cannot be read


class StandIn(Neuron):
    """Neurons with a given decay and gain.

    Args:
        dynamics: Threshold, reset and surrogate.
        decay: Factor of the previous potential.
        gain: Factor of the input current.
    """

    def __init__(self, dynamics: Dynamics, decay: float, gain: float) -> None:
        super().__init__("if" if decay == 1 else "lif", dynamics)
        self.decay, self.gain = decay, gain

    def rates(self) -> tuple[Tensor | float, Tensor | float]:
        """Return decay and gain."""
        return self.decay, self.gain


def stand_in(neuron: nn.Module, surrogate: str | None = None, threshold: float | None = None) -> Neuron:
    """Return ikun neurons that model the given neurons.

    Known are SpikingJelly's IFNode, LIFNode and ParametricLIFNode, with the surrogates in `SURROGATES`, and snnTorch's
    Leaky and RLeaky. The reset of snnTorch's neurons is modelled without its delay of one step. Their surrogate cannot
    be read, so it is taken to be atan:2, their default. Learned or multiple leaks and thresholds are replaced by their
    mean. All other neurons are modelled as IF neurons with threshold 1.

    Args:
        neuron: The neurons.
        surrogate: Surrogate to use instead of that of the neurons.
        threshold: Threshold to use instead of that of the neurons.

    Returns:
        The model. It is `neuron` itself if that is one of ikun's.
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
    """Return decay and gain, or (1, 1) if they are not known."""
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
    """Return whether the neuron has the membrane update of the class `other`."""
    return getattr(type(neuron), "neuronal_charge", None) is getattr(other, "neuronal_charge", None)


def _reset(neuron: nn.Module) -> tuple[float, str]:
    """Return v_reset and the kind of reset, "hard" or "soft"."""
    if hasattr(neuron, "reset_mechanism"):
        return 0.0, "soft" if neuron.reset_mechanism == "subtract" else "hard"
    v_reset = getattr(neuron, "v_reset", 0.0)
    return (0.0, "soft") if v_reset is None else (_mean(v_reset), "hard")


def _surrogate(neuron: nn.Module) -> str:
    """Return the text form of the neuron's surrogate, or `USUAL` if it is not known."""
    function = getattr(neuron, "surrogate_function", None)
    name, alpha = SURROGATES.get(type(function).__name__), getattr(function, "alpha", None)
    return f"{name}:{_mean(alpha):g}" if name and alpha is not None else USUAL


def _mean(value: object, otherwise: float = 1.0) -> float:
    """Return the mean of a number or a tensor, or `otherwise` for other types."""
    if isinstance(value, Tensor):
        return float(value.detach().double().mean())
    return float(value) if isinstance(value, int | float) else otherwise
