"""Weight initializers by name, for ikun's networks and for any torch module.

fi and fo are fan in and fan out, including the kernel area. m = E[f'(h - threshold)^2] of the layer's neurons, with h
their membrane potential.

| name | weights | source |
| --- | --- | --- |
| ikun | N(0, alpha / (fi E[x^2] m)) | Theorem 1 of arXiv 2411.18250 |
| ikun_v1 | N(0, beta / fi), beta = 1 / mean of 1/(1 + x^2) on 1,000 points of [-1, 1] | its released code |
| ikun_v2 | N(0, beta / (fi + fo)) | its released code (which omits fo for a convolution) |
| xavier | U(-a, a), a^2 = 6 / (fi + fo) | Glorot & Bengio 2010 |
| kaiming | U(-a, a), a^2 = 6 / fi | He et al. 2015, gain for ReLU |
| lecun | N(0, 1 / fi) | LeCun et al. 1998 |
| normal | N(0, 0.02^2) | the comparison of arXiv 2411.18250 |
| orthogonal | orthonormal rows or columns | Saxe et al. 2014 |
| delta_orthogonal | kernels zero except at the centre, orthogonal times 1/sqrt(m) | Xiao et al. 2018; the gain is ours
|
| lsuv | orthonormal, then W / sqrt(Var(out)) until Var(out) is 1 | Mishkin & Matas 2016 |
| fluctuation | N(0, ((threshold - rest) / xi)^2 / (fi nu e2)), xi = 1 | Rossbroich, Gygax & Zenke 2022 |
| firing | N(0, 1 / (gain^2 fi P(u > threshold))), u: potential of the preceding layer | Micheli et al. 2024 |
| two_sided | N(0, sqrt(v / (E[x^2] M)) / fi), so that forward gain times backward gain is 1 | ours |
| relay | a I in hidden layers of one width, with backward gain 1; else N(0, v / (fi E[x^2])) | ours |
| gradient_stable | V with decay^2 + (gain^2 fi E[V^2] + (decay threshold)^2) m = 1 | Herranz-Celotti & Rouat 2022, IV |
| tdbn | as kaiming; BatchNorm weights start at alpha threshold | Zheng et al. 2021 |

`ikun.initializers.rules`, `ikun.initializers.fluctuation` and `ikun.initializers.two_sided` state what is taken from
each source and what is our own choice, and the last explains v and M. ikun, delta_orthogonal, lsuv, fluctuation,
firing, two_sided and gradient_stable measure on a batch, and pool h over time, samples and units. nu and P in the table
are E[x^2] of the layer's input. Biases are set to 0. BatchNorm parameters keep their values, except with tdbn.
gradient_stable applies to the recurrent weights V only, and all other weights are drawn as with xavier.

ikun and firing need the distribution (law) of h, which itself depends on the weights:

- law='empirical' (the default) solves this fixed point on the batch.
- law='analytic' assumes a chain of layers, h ~ N(0, s^2), and E[x^2] = P(h >= threshold) after the first layer. A
  weight layer contributes fi Var(W) E[x^2] to s^2. This is alpha / m for ikun and 1 for firing.

Before a BatchNorm, the scale of the weights does not affect h. The contribution is then the variance of the BatchNorm's
output. It is measured in the empirical case, and is gamma^2 in the analytic one. A recurrent layer has the E[x^2] of
its own spikes, its own fan in, and the m of its neurons.

Let k be the number of layers without a norm before the same neurons. It is 1 for a feedforward layer, 2 for a recurrent
layer, and 1 for a recurrent layer with a norm after its input weights. The fixed point of ikun is then

    (s^2 - gamma^2) E[f'(N(-threshold, s^2))^2] = k alpha

with gamma = 0 without a norm.
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
from ikun.initializers.fluctuation import fluctuation
from ikun.initializers.foreign_neurons import stand_in
from ikun.initializers.module_graph import stages_of_module
from ikun.initializers.names import INITIALIZERS, LAWS
from ikun.initializers.probe import Probe, Reset, Stage, reset_states, stages_of
from ikun.initializers.relay import relay
from ikun.initializers.rules import Solution
from ikun.initializers.two_sided import two_sided
from ikun.layer_statistics import fans
from ikun.layers import Add
from ikun.networks import Network
from ikun.surrogates import expected_square

Fill = Callable[[Tensor, torch.Generator], object]


def released_beta() -> float:
    """Return 1 / mean of 1/(1 + x^2) over linspace(-1, 1, 1000) = 1.2737..., the constant of the released code."""
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
    "fluctuation": fluctuation,
    "firing": rules.firing,
    "two_sided": two_sided,
    "relay": relay,
    "gradient_stable": rules.gradient_stable,
}


@dataclass(frozen=True)
class Initialized:
    """The outcome of an initialization.

    Attributes:
        solutions: One solution per layer, or () for an initializer that does not measure.
        forward_passes: Number of forward passes.
        untouched: Names of the parameters with two or more dimensions that were not changed.
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
    """Initialize all weights of one of ikun's networks in place.

    Frozen parameters (requires_grad=False) are not changed, and initializers that measure see the network with them. If
    the norm of the network is tdbn, the initializer tdbn leaves its BatchNorm weights unchanged.

    Args:
        network: The network.
        name: Name of the initializer, one of `INITIALIZERS`.
        generator: Source of random numbers.
        x: A batch of network inputs, for initializers that measure.
        alpha: Parameter of ikun and tdbn. 1 is the literal reading of the theorem; `train` uses 0.1 for ikun,
            with which small networks learn faster.
        law: Law of h of ikun and firing, one of `LAWS`.
        gain: Factor by which the variance of all weights is multiplied at the end.

    Returns:
        The outcome.

    Raises:
        ValueError: If name or law is unknown, alpha or gain is not positive, or the batch is missing, empty or not
            finite. Also if a weight cannot be written to (it is computed, tied or has no values), the analytic law
            meets residual branches or frozen weights, or a rule has no solution.
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
    """Initialize the convolution and linear weights of any torch module in place, and set their biases to 0.

    All other parameters keep their values and are named in the result's `untouched`. These are transposed convolutions,
    torch's RNN, LSTM, GRU, Bilinear, MultiheadAttention and Embedding, layers that forward does not call on x, and
    frozen weights (requires_grad=False) with their biases. Initializers that measure see the module with them.

    Spiking neurons are found by class: those of ikun, SpikingJelly and snnTorch, or the given `neurons`. One forward
    pass on x gives the order of the layers and the neurons that each layer feeds. Without x, the order of registration
    is used, which is sufficient for initializers that do not measure. Initializers that need the membrane potential
    compute it with ikun neurons that have the leak, reset, threshold and surrogate read by
    `ikun.initializers.foreign_neurons.stand_in`.

    Args:
        module: The module.
        name: Name of the initializer, one of `INITIALIZERS`.
        generator: Source of random numbers.
        x: A batch as the module's forward takes it.
        surrogate: Surrogate to use instead of that of the neurons, for example "atan:2".
        threshold: Threshold to use instead of that of the neurons.
        neurons: Class or classes of the spiking neurons.
        alpha: Parameter of ikun and tdbn. 1 is the literal reading of the theorem; `train` uses 0.1 for ikun,
            with which small networks learn faster.
        gain: Factor by which the variance of all weights is multiplied at the end.
        reset: Function that resets the module's state before every forward pass. The default resets SpikingJelly and
            snnTorch neurons.

    Returns:
        The outcome.

    Raises:
        ValueError: As `initialize`. Also if threshold is not positive, an initializer that measures finds no neurons,
            or the module uses the same neurons in several places.
    """
    if isinstance(module, Network):
        return initialize(module, name, generator=generator, x=x, alpha=alpha, gain=gain)
    _check(module, name, x, alpha, "empirical", gain)
    if threshold is not None and not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be positive and finite, not {threshold}")
    kinds = () if neurons is None else neurons if isinstance(neurons, tuple) else (neurons,)
    back = reset or reset_states
    stages = stages_of_module(module, x, partial(stand_in, surrogate=surrogate, threshold=threshold), kinds, back)
    if (name == "ikun" or name in RULES) and all(s.neuron is None for s in stages):
        raise ValueError(f"no spiking neurons found for {name}: pass their class as `neurons`")
    found = _draw(Probe(module, stages, x, back), name, generator, alpha, "empirical", gain)
    return replace(found, forward_passes=found.forward_passes + (x is not None))


def _check(module: nn.Module, name: str, x: Tensor | None, alpha: float, law: str, gain: float) -> None:
    """Refuse invalid arguments before anything is changed."""
    if name not in INITIALIZERS:
        raise ValueError(f"unknown initializer '{name}': choose one of {', '.join(INITIALIZERS)}")
    if law not in LAWS:
        raise ValueError(f"unknown law '{law}': choose one of {', '.join(LAWS)}")
    for option, value in (("alpha", alpha), ("gain", gain)):
        if not 0 < value < math.inf:
            raise ValueError(f"{option} must be positive and finite, not {value}")
    if any(p.is_meta for p in module.parameters()):
        raise ValueError("the module is on the meta device and has no values yet: call module.to_empty(device=...)")
    if name == "ikun" or name in RULES:
        if x is None:
            raise ValueError(f"the {name} initializer needs a batch of inputs: pass x")
        if not x.numel():
            raise ValueError(f"the {name} initializer measures on x, but x {list(x.shape)} is empty: pass samples")
        if not x.isfinite().all():
            raise ValueError(f"the {name} initializer measures on x, but x has NaN or Inf entries: remove them")


def _writable(probe: Probe) -> None:
    """Raise ValueError if writing to a layer's weight would not set it, or would also set that of another layer."""
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
    """Draw all weights that are not frozen. See `initialize`."""
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
    """Set the weights of the BatchNorm layers to alpha times the threshold of their neurons (tdbn)."""
    normed = [s for s in probe.stages if s.norm is not None and s.norm.affine]
    if not normed:
        raise ValueError("the tdbn initializer sets BatchNorm weights, but this network has no norm: choose another")
    if isinstance(probe.module, Network) and probe.module.spec.norm == "tdbn":
        return
    for s in normed:
        if s.norm is not None and s.model is not None and s.norm.weight.requires_grad:
            s.norm.weight.fill_(alpha * s.model.dynamics.threshold)


def _analytic(name: str, probe: Probe, generator: torch.Generator, alpha: float) -> list[Solution]:
    """Apply ikun or firing with the analytic law to one of ikun's networks, where neurons follow every layer."""
    if any(isinstance(m, Add) for m in probe.module.modules()):
        raise ValueError("law 'analytic' is for a chain of layers, but this network has branches: choose empirical")
    if len(probe.drawn) < len(probe.stages):
        raise ValueError("law 'analytic' needs all weights to be drawn, but some are frozen: choose empirical")
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
    """Solve the analytic law for the layers that feed the same neurons.

    Args:
        name: "ikun" or "firing".
        group: The layers.
        square: E[x^2] of their input. A recurrent layer uses that of its own spikes.
        alpha: Parameter of ikun.

    Returns:
        The solutions, and E[x^2] = P(h >= threshold) after the neurons.
    """
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
