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

The module rules says what is the source's and what is ours. ikun, delta_orthogonal, lsuv, fluctuation, firing and
gradient_stable measure on a batch, layer by layer, with h pooled over time, samples and units: nu and P are E[x^2] of
the layer's input. Biases become 0. BatchNorm parameters keep their start, but for tdbn.
gradient_stable sets recurrent V alone, and all else as xavier.

ikun and firing need the law of h, which itself depends on the weights. law='empirical' (default) solves this fixed
point on the batch. law='analytic' takes h ~ N(0, s^2) and E[x^2] = P(h >= threshold) behind the first layer, for a
chain of layers; what a weight layer adds to s^2, fi Var(W) E[x^2], is then alpha / m for ikun and 1 for firing. Before
a BatchNorm the scale of the weights does not reach h: what is added is the BatchNorm's variance, measured in the
empirical case, gamma^2 in the analytic one. A recurrent layer has E[x^2] of its own spikes, its own fan and the same m.
So with k layers without a norm before the same neurons (2 with recurrence, 1 behind a norm) ikun's fixed point is
(s^2 - gamma^2) E[f'(N(-threshold, s^2))^2] = k alpha, gamma = 0 without a norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from scipy import special
from torch import Tensor, nn
from torch.nn import init
from torch.nn.parameter import is_lazy

from ikun.initializers import rules
from ikun.initializers.foreign_neurons import stand_in
from ikun.initializers.module_graph import stages_of_module
from ikun.initializers.names import INITIALIZERS, LAWS
from ikun.initializers.probe import Probe, Reset, Stage, reset_states, stages_of
from ikun.initializers.rules import Solution
from ikun.layer_statistics import fans
from ikun.layers import Add
from ikun.networks import Network
from ikun.surrogates import expected_square

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


@dataclass(frozen=True)
class Initialized:
    """What an initialization found, () for a rule that measures nothing, and how many forward passes it took.

    untouched: parameters of two or more dimensions that it left as they were.
    """

    solutions: tuple[Solution, ...]
    forward_passes: int
    untouched: tuple[str, ...] = ()


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
    own norm is tdbn, the initializer of that name leaves its weights as they are. Frozen parameters
    (requires_grad=False) stay as they are, and rules that measure see the network with them.
    Raises ValueError for an unknown name or law, alpha or gain <= 0, a batch that is missing, empty or not finite,
    weights that cannot be written to (computed, tied, without values), the analytic law where branches are added, or a
    rule without a solution.
    """
    _check(network, name, x, alpha, law, gain)
    return _draw(Probe(network, stages_of(network), x), name, generator, alpha, law, gain)


def initialize_module(
    module: nn.Module,
    name: str,
    *,
    generator: torch.Generator,
    x: Tensor | None = None,
    surrogate: str | None = None,
    threshold: float | None = None,
    neurons: type | tuple[type, ...] | None = None,
    alpha: float = 1.0,
    gain: float = 1.0,
    reset: Reset | None = None,
) -> Initialized:
    """Draw the convolution and linear weights of any torch module in place, and set their biases to 0.

    All else stays as it is, and the result's `untouched` names it: transposed convolutions, torch's RNN, LSTM, GRU,
    Bilinear, MultiheadAttention and Embedding, layers that forward does not call on x, and frozen weights
    (requires_grad=False) with their biases. Rules that measure see the module with them.
    Its neurons are found by class: ikun's, SpikingJelly's and snnTorch's, or the given `neurons`. x is what the
    module's forward takes; order and pairing come from one forward pass on it (without x from the order of
    registration, enough for rules that do not measure). Rules that measure the membrane have it from ikun's own neuron
    with the leak, reset, threshold and surrogate that `membranes.stand_in` reads; surrogate and threshold, if given, in
    place of those. reset: brings the module's state back before every forward, instead of the libraries' own ways.
    alpha, gain: as in initialize().
    Raises ValueError as initialize(), for a threshold <= 0, where a rule that measures finds no neurons, and where
    neurons are shared by several places of the module.
    """
    if isinstance(module, Network):
        return initialize(module, name, generator=generator, x=x, alpha=alpha, gain=gain)
    _check(module, name, x, alpha, "empirical", gain)
    if threshold is not None and not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be positive, not {threshold}")
    kinds = () if neurons is None else neurons if isinstance(neurons, tuple) else (neurons,)
    back = reset or reset_states
    stages = stages_of_module(module, x, partial(stand_in, surrogate=surrogate, threshold=threshold), kinds, back)
    if (name == "ikun" or name in RULES) and all(s.neuron is None for s in stages):
        raise ValueError(f"no spiking neurons found for {name}: name their class with `neurons`")
    found = _draw(Probe(module, stages, x, back), name, generator, alpha, "empirical", gain)
    return replace(found, forward_passes=found.forward_passes + (x is not None))


def _check(module: nn.Module, name: str, x: Tensor | None, alpha: float, law: str, gain: float) -> None:
    """What can be refused before anything is touched."""
    if name not in INITIALIZERS:
        raise ValueError(f"unknown initializer '{name}': choose one of {', '.join(INITIALIZERS)}")
    if law not in LAWS:
        raise ValueError(f"unknown law '{law}': choose one of {', '.join(LAWS)}")
    for option, value in (("alpha", alpha), ("gain", gain)):
        if not 0 < value < math.inf:
            raise ValueError(f"{option} must be positive, not {value}")
    if any(p.is_meta for p in module.parameters()):
        raise ValueError("the module is on the meta device and has no values yet: module.to_empty(device=...) first")
    if name == "ikun" or name in RULES:
        if x is None:
            raise ValueError(f"the {name} initializer needs a batch of inputs")
        if not x.numel():
            raise ValueError(f"the {name} initializer measures on x, and x {list(x.shape)} is empty: give samples")
        if not x.isfinite().all():
            raise ValueError(f"the {name} initializer measures on x, and x has NaN or Inf: clean it first")


def _writable(probe: Probe) -> None:
    """Raises ValueError where writing to a layer's weight would not set it, or set another's too."""
    owners: dict[int, str] = {}
    for s in probe.drawn:
        if not {"weight", "bias"} <= s.weights._parameters.keys():
            raise ValueError(f"layer {s.name}: its weight is computed (weight_norm, pruning, ...): remove that first")
        if is_lazy(s.weights.weight):
            raise ValueError(f"layer {s.name} has no shape yet: give a batch x, or call the module once")
        owner = owners.setdefault(s.weights.weight.data_ptr(), s.name)
        if owner != s.name:
            raise ValueError(f"layers {owner} and {s.name} share one weight: untie them, or freeze it")
    if not owners:
        raise ValueError("all weights are frozen (requires_grad=False): there is nothing to initialize")


def _draw(probe: Probe, name: str, generator: torch.Generator, alpha: float, law: str, gain: float) -> Initialized:
    _writable(probe)
    with torch.no_grad():
        if name == "tdbn":
            _thresholds(probe, alpha)
        for s in probe.drawn:
            if s.weights.bias is not None and s.weights.bias.requires_grad:
                s.weights.bias.zero_()
        if name in ("ikun", "firing") and law == "analytic":
            found = _analytic(name, probe, generator, alpha)
        elif name == "ikun":
            found = rules.ikun(probe, generator, alpha)
        elif name in RULES:
            found = RULES[name](probe, generator)
        else:
            for s in probe.drawn:
                FILLS["kaiming" if name == "tdbn" else name](s.weights.weight, generator)
            found = []
        for s in probe.drawn:
            s.weights.weight.mul_(math.sqrt(gain))
    drawn = {id(s.weights.weight) for s in probe.drawn}
    untouched = tuple(
        key for key, p in probe.module.named_parameters() if id(p) not in drawn and (is_lazy(p) or p.dim() > 1)
    )
    return Initialized(tuple(replace(s, variance=gain * s.variance) for s in found), probe.passes, untouched)


def _thresholds(probe: Probe, alpha: float) -> None:
    normed = [s for s in probe.stages if s.norm is not None and s.norm.affine]
    if not normed:
        raise ValueError("the tdbn initializer sets BatchNorm's weights, and this network has no norm: choose another")
    if isinstance(probe.module, Network) and probe.module.spec.norm == "tdbn":
        return
    for s in normed:
        if s.norm is not None and s.model is not None and s.norm.weight.requires_grad:
            s.norm.weight.fill_(alpha * s.model.dynamics.threshold)


def _analytic(name: str, probe: Probe, generator: torch.Generator, alpha: float) -> list[Solution]:
    """ikun and firing under the Gaussian law, for one of ikun's networks, where neurons follow every layer."""
    if any(isinstance(m, Add) for m in probe.module.modules()):
        raise ValueError("law 'analytic' is for a chain of layers, and this network adds branches: choose empirical")
    if len(probe.drawn) < len(probe.stages):
        raise ValueError("law 'analytic' takes all weights for drawn, and some are frozen: choose empirical")
    assert probe.x is not None
    square, found = float(probe.x.double().square().mean()), []
    for group in probe.groups():
        solutions, square = _gaussian(name, group, square, alpha)
        for s, solution in zip(group, solutions, strict=True):
            rules.normal(s.weights, generator)
            s.weights.weight.mul_(math.sqrt(solution.variance))
        found += solutions
    return found


def _gaussian(name: str, group: Sequence[Stage], square: float, alpha: float) -> tuple[list[Solution], float]:
    """The solutions of layers before the same neurons, and the model's E[x^2] = P(h >= threshold) behind these."""
    model = group[0].model
    assert model is not None
    surrogate, threshold = model.dynamics.surrogate, model.dynamics.threshold
    fixed = sum(float(s.norm.weight.mean()) ** 2 for s in group if s.norm is not None)
    free = sum(s.norm is None for s in group)
    if name == "firing" or not free:
        scale = math.sqrt(fixed + free)
    else:
        scale = rules.potential_scale(surrogate, threshold, free * alpha, fixed)
    rate = float(special.ndtr(-threshold / scale))
    moment = math.nan if name == "firing" else expected_square(surrogate, -threshold, scale)
    divisor, top = (rules.constants(model)[1] ** 2, 1.0) if name == "firing" else (moment, alpha)
    found = []
    for s in group:
        x = rate if s.recurrent else square
        rules.require(name, s.name, x, divisor)
        found.append(Solution(s.name, top / (fans(s.weights.weight)[0] * x * divisor), x, moment, 1, True))
    return found, rate
