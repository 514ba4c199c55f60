"""Weight initializers by name, each with its formula and source, for ikun's networks and for any torch module.

fi, fo: fan in and out, the kernel area included. m = E[f'(h - threshold)^2] of the layer's neurons.

| name | weights | source |
| --- | --- | --- |
| ikun | N(0, alpha / (fi E[x^2] m)) | Theorem 1 of arXiv 2411.18250 |
| ikun_v1 | N(0, beta / fi), beta = 1 / mean of 1/(1 + x^2) on 1,000 points of [-1, 1] | its released code |
| ikun_v2 | N(0, beta / (fi + fo)) | its released code (which lacks fo of a convolution) |
| xavier | U(-a, a), a^2 = 6 / (fi + fo) | Glorot & Bengio 2010 |
| kaiming | U(-a, a), a^2 = 6 / fi | He et al. 2015, gain for ReLU |
| lecun | N(0, 1 / fi) | LeCun et al. 1998 |
| normal | N(0, 0.02^2) | the comparison of arXiv 2411.18250 |
| orthogonal | orthonormal rows or columns | Saxe et al. 2014 |
| delta_orthogonal | kernels zero but for the centre, orthogonal times 1/sqrt(m) | Xiao et al. 2018; the gain is ours |
| lsuv | orthonormal, then W / sqrt(Var(out)) until it is 1 | Mishkin & Matas 2016 |
| fluctuation | N(0, ((threshold - rest) / xi)^2 / (fi nu e2)), xi = 1 | Rossbroich, Gygax & Zenke 2022 |
| firing | N(0, 1 / (gain^2 fi P(u > threshold))), u of the layer before | Micheli et al. 2024 |
| gradient_stable | V of decay^2 + (gain^2 fi E[V^2] + (decay threshold)^2) m = 1 | Herranz-Celotti & Rouat 2022, IV |
| tdbn | as kaiming; BatchNorm weights start at alpha threshold | Zheng et al. 2021 |

ikun.rules says what of each is the source's and what is ours. ikun, delta_orthogonal, lsuv, fluctuation, firing and
gradient_stable measure on a batch, layer by layer, with h pooled over time, samples and units: nu and P are E[x^2] of
the layer's input. Biases become 0. BatchNorm parameters keep their start, but for tdbn.
gradient_stable sets recurrent V alone, and all else as xavier.

ikun and firing need the law of h, which itself depends on the weights. law='empirical' (default) solves this fixed
point on the batch. law='analytic' takes h ~ N(0, s^2) and E[x^2] = P(h >= threshold) behind the first layer, for a
chain of layers; the fixed point of ikun is then s^2 E[f'(N(-threshold, s^2))^2] = alpha, and firing has s = 1. Before
a BatchNorm the scale of the weights does not reach h, whose law is the BatchNorm's: measured in the empirical case,
N(0, gamma^2) in the analytic one. A recurrent layer adds E[x^2] of its own spikes, its own fan and the same m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy import special
from torch import Tensor, nn
from torch.nn import init

from ikun import rules
from ikun.modules import stages_of_module
from ikun.networks import Network
from ikun.neurons import Dynamics, Neuron
from ikun.rules import Solution
from ikun.stages import Probe, Reset, Stage, reset_states, stages_of
from ikun.statistics import fans
from ikun.surrogates import Surrogate, expected_square

LAWS = ("empirical", "analytic")

Fill = Callable[[Tensor, torch.Generator], object]


def released_beta() -> float:
    """1.2737...: the constant of the released code, 1 / mean of 1/(1 + x^2) over linspace(-1, 1, 1000)."""
    return float(1 / (1 / (1 + torch.linspace(-1, 1, 1000, dtype=torch.float64).square())).mean())


def _normal(variance: Callable[[int, int], float]) -> Fill:
    return lambda w, g: w.normal_(0, math.sqrt(variance(*fans(w))), generator=g)


FILLS: dict[str, Fill] = {
    "ikun_v1": _normal(lambda fan_in, fan_out: released_beta() / fan_in),
    "ikun_v2": _normal(lambda fan_in, fan_out: released_beta() / (fan_in + fan_out)),
    "xavier": lambda w, g: init.xavier_uniform_(w, generator=g),
    "kaiming": lambda w, g: init.kaiming_uniform_(w, nonlinearity="relu", generator=g),
    "lecun": _normal(lambda fan_in, fan_out: 1 / fan_in),
    "normal": _normal(lambda fan_in, fan_out: 0.02**2),
    "orthogonal": lambda w, g: init.orthogonal_(w, generator=g),
}
RULES: dict[str, Callable[[Probe, torch.Generator], list[Solution]]] = {
    "delta_orthogonal": rules.delta_orthogonal,
    "lsuv": rules.lsuv,
    "fluctuation": rules.fluctuation,
    "firing": rules.firing,
    "gradient_stable": rules.gradient_stable,
}
NAMES = ("ikun", *FILLS, *RULES, "tdbn")


@dataclass(frozen=True)
class Initialized:
    """What an initialization found, () for a rule that measures nothing, and how many forward passes it took."""

    solutions: tuple[Solution, ...]
    forward_passes: int


def initialize(
    network: Network,
    name: str,
    *,
    generator: torch.Generator,
    x: Tensor | None = None,
    alpha: float = 1.0,
    law: str = "empirical",
    gain: float = 1.0,
) -> Initialized:
    """Draw all weights of `network` in place.

    x: a batch of network inputs, for the rules that measure. alpha: of ikun and tdbn. law: of ikun and firing. gain:
    the variance of all weights over that of the initializer, which is multiplied by it at the end. Where the network's
    own norm is tdbn, the initializer of that name leaves its weights as they are.
    Raises ValueError for an unknown name or law, alpha or gain <= 0, a missing batch, or a rule without a solution.
    """
    return _draw(Probe(network, stages_of(network), x), name, generator, alpha, law, gain)


def initialize_module(
    module: nn.Module,
    name: str,
    *,
    generator: torch.Generator,
    x: Tensor | None = None,
    surrogate: str = "atan:2",
    threshold: float = 1.0,
    neurons: type | tuple[type, ...] | None = None,
    alpha: float = 1.0,
    gain: float = 1.0,
    reset: Reset | None = None,
) -> Initialized:
    """Draw all convolution and linear weights of any torch module in place, and set their biases to 0.

    Its neurons are found by class: ikun's, SpikingJelly's and snnTorch's, or the given `neurons`. x is what the
    module's forward takes; order and pairing come from one forward pass on it (without x from the order of
    registration, enough for rules that do not measure). The membrane of a neuron that is not ikun's is not looked
    into: h is the current that enters it, accumulated by ikun's own IF neuron with this surrogate and threshold (so
    gradient_stable, which needs a leak, has no solution there). reset: brings the module's state back before every
    forward, instead of the libraries' own ways. alpha, gain: as in initialize().
    Raises ValueError as initialize(), or where a rule that measures finds no neurons.
    """
    if isinstance(module, Network):
        return initialize(module, name, generator=generator, x=x, alpha=alpha, gain=gain)
    model = Neuron("if", Dynamics(Surrogate.parse(surrogate), threshold))
    kinds = () if neurons is None else neurons if isinstance(neurons, tuple) else (neurons,)
    back = reset or reset_states
    stages = stages_of_module(module, x, model, kinds, back)
    if (name == "ikun" or name in RULES) and all(s.neuron is None for s in stages):
        raise ValueError(f"no spiking neurons found for {name}: name their class with `neurons`")
    found = _draw(Probe(module, stages, x, back), name, generator, alpha, "empirical", gain)
    return Initialized(found.solutions, found.forward_passes + (x is not None))


def _draw(probe: Probe, name: str, generator: torch.Generator, alpha: float, law: str, gain: float) -> Initialized:
    if name not in NAMES:
        raise ValueError(f"unknown initializer '{name}': choose one of {', '.join(NAMES)}")
    if law not in LAWS:
        raise ValueError(f"unknown law '{law}': choose one of {', '.join(LAWS)}")
    for option, value in (("alpha", alpha), ("gain", gain)):
        if not 0 < value < math.inf:
            raise ValueError(f"{option} must be positive, not {value}")
    if probe.x is None and (name == "ikun" or name in RULES):
        raise ValueError(f"the {name} initializer needs a batch of inputs")
    with torch.no_grad():
        if name == "tdbn":
            _thresholds(probe, alpha)
        for s in probe.stages:
            if s.weights.bias is not None:
                s.weights.bias.zero_()
        if name in ("ikun", "firing") and law == "analytic":
            found = _analytic(name, probe, generator, alpha)
        elif name == "ikun":
            found = rules.ikun(probe, generator, alpha)
        elif name in RULES:
            found = RULES[name](probe, generator)
        else:
            for s in probe.stages:
                FILLS["kaiming" if name == "tdbn" else name](s.weights.weight, generator)
            found = []
        for s in probe.stages:
            s.weights.weight.mul_(math.sqrt(gain))
    return Initialized(tuple(replace(s, variance=gain * s.variance) for s in found), probe.passes)


def _thresholds(probe: Probe, alpha: float) -> None:
    normed = [s for s in probe.stages if s.norm is not None and s.norm.affine]
    if not normed:
        raise ValueError("the tdbn initializer sets BatchNorm's weights, and this network has no norm: choose another")
    if isinstance(probe.module, Network) and probe.module.spec.norm == "tdbn":
        return
    for s in normed:
        if s.norm is not None and s.model is not None:
            s.norm.weight.fill_(alpha * s.model.dynamics.threshold)


def _analytic(name: str, probe: Probe, generator: torch.Generator, alpha: float) -> list[Solution]:
    """ikun and firing under the Gaussian law."""
    assert probe.x is not None
    square, found = float(probe.x.double().square().mean()), []
    for s in probe.stages:
        rules.normal(s.weights, generator)
        rules.require(name, s.name, square)
        solution, square = _gaussian(name, s, square, alpha)
        s.weights.weight.mul_(math.sqrt(solution.variance))
        found.append(solution)
    return found


def _gaussian(name: str, stage: Stage, square: float, alpha: float) -> tuple[Solution, float]:
    """The layer's solution, and the model's E[x^2] = P(h >= threshold) for the next layer."""
    assert stage.model is not None  # only ikun's networks come here, where neurons follow every layer
    fan_in, _ = fans(stage.weights.weight)
    surrogate, threshold = stage.model.dynamics.surrogate, stage.model.dynamics.threshold
    if name == "firing":
        variance = 1 / (rules.constants(stage.model)[1] ** 2 * fan_in * square)
        return Solution(stage.name, variance, square, math.nan, 1, True), float(special.ndtr(-threshold))
    s = rules.potential_scale(surrogate, threshold, alpha) if stage.norm is None else float(stage.norm.weight.mean())
    moment = expected_square(surrogate, -threshold, s)
    rules.require(name, stage.name, square, moment)
    variance = alpha / (fan_in * square * moment)
    return Solution(stage.name, variance, square, moment, 1, True), float(special.ndtr(-threshold / s))
