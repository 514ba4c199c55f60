"""The noise-matched Gauss-Newton operator: curvature of the true spiking loss under noise in the weights.

The spiking loss is piecewise constant; its mean under noise has a curvature, L_s(w) = E L(w + s D z), z standard
normal, D the root mean square of each weight's filter (forward.noise_scales). This operator is a Gauss-Newton
approximation of that Hessian in which no training surrogate occurs. docs/calibration.md has the derivation. In short,
with currents, potentials and spikes of `draws` perturbed networks:

- a neuron's mean spike answers to its potential by the density of h at the threshold, N(threshold; mean h, var h),
  mean and variance over the draws, per sample, neuron and step: a Gaussian surrogate of that very width;
- where a layer's input is the same at all steps, its whole spike train answers to a constant shift of the current. That
  response is computed outright, by shifting the currents of the draws (spike trains then differ by more than a Gaussian
  in h knows: a spike moved by one step);
- a max-pooled spike is there if any of its entries fires, so its mean answers to one entry where the others are silent:
  the share of the draws in which they are (no tie rule occurs);
- the outputs are counts of a few spikes, and the mean loss of a count is not the loss of the mean count. So the product
  is split before the output neurons: their currents' tangent, averaged over time, meets the second derivative of the
  mean loss E l(rate(current + noise)) by that current. With rates r, r' and r'' derivatives of E r, m'' that of
  E (r - mean r)^2, and the loss l expanded to second order about the mean rates,
      M = diag(l_k r_k'' + l_kk m_k'' / 2) + (l_kj r_k' r_j')_(k != j),
  exact for a quadratic loss and independent output neurons;
- the same is true of a hidden neuron: with a spike of its own the loss changes by a step, and its mean is linear in the
  neuron's probability, so that the square of that probability's change does not occur. What occurs instead, for neurons
  near their threshold at weights where the loss is stationary, is sqrt(2) times that square on average over neurons. It
  is corrected for the last hidden layer, where it is largest.

Means over shifts are those of the draws' own distribution, widened by a Gaussian of half its standard deviation and
shrunk to keep its variance (smoothed bootstrap); derivatives fall on that Gaussian.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from hessian_tools.chain.layers import Affine, Layer, Tangents, Want
from hessian_tools.chain.second_order import Linearized, chain_of, curved, layers_at
from hessian_tools.objective import Batch, Objective
from hessian_tools.operators.curvature import CurvatureOperator
from hessian_tools.perturbation import noise, noise_scales

SMOOTHED_DRAWS = 16
SHARE = 0.5  # of the noise's standard deviation that is Gaussian
CELLS = 8  # of the shift, per draw; the cells of the draws are staggered
REACH = 3.5  # of the shift, in standard deviations of that Gaussian
FLOOR = 1e-3  # least standard deviation, in thresholds: nothing passes through a neuron without noise


class SpikingLayer(Layer, Protocol):
    """Neurons over T steps and M samples x neurons, with the pooling behind them; see ikun.spiking_layers.Spikes."""

    z: Tensor | None  # h - threshold [T, M]
    static: bool
    threshold: float

    def fire(self, x: Tensor) -> Tensor: ...

    def alone(self, fired: Tensor) -> Tensor | None: ...

    def averaged(self, mean: Tensor, spread: Tensor, alone: Tensor | None) -> Layer: ...

    def responding(self, response: Tensor, alone: Tensor | None) -> Layer: ...


def smoothed(
    objective: Objective, memory: float = 4 * 2**30, *, scale: float = 0.1, draws: int = SMOOTHED_DRAWS, seed: int = 0
) -> CurvatureOperator:
    """The noise-matched Gauss-Newton operator of an objective whose network ends in mean rates of spiking neurons.

    scale: s, relative to the root mean square of each filter. Symmetric, not always positive semidefinite: a discrete
    output has mean losses that curve down. A learned decay of the output neurons is held fixed. Raises ValueError for
    what `unsupported` names, for s <= 0 and draws < 2.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"noise must be a positive number (of each filter's root mean square), not {scale}")
    if draws < 2:
        raise ValueError(f"at least 2 draws of noise are needed, not {draws}")
    if reason := unsupported(objective):
        raise ValueError(reason)
    return CurvatureOperator(objective, partial(_linearize, scale=scale, draws=draws, seed=seed), memory)


def unsupported(objective: Objective) -> str:
    """Why an objective has no such operator; empty if it has one."""
    found = None if objective.reset is not None else layers_at(objective.model, objective.first_inputs(1))
    neurons = [] if found is None else _spiking(found[1])
    if found is None or not neurons or neurons[-1][0] != len(found[1]) - 2:
        return "operator smoothed needs a network of this package that ends in the mean rates of spiking neurons"
    if any(((y := found[1][i + 1][0]) * (1 - y)).any() for i, _, _ in neurons):
        return "operator smoothed is about spikes: a relaxed network has none"
    before = [layer for _, layer in found[1][: neurons[-1][0]]]
    if chain_of(objective, before, neurons[-1][2].parameters) is None:
        return "operator smoothed finds no layer of this network that has the chosen parameters: choose others"
    return ""


def _spiking(layers: list[tuple[Tensor, Layer]]) -> list[tuple[int, Tensor, SpikingLayer]]:
    return [(i, x, cast(SpikingLayer, layer)) for i, (x, layer) in enumerate(layers) if hasattr(layer, "responding")]


@torch.no_grad()
def _linearize(objective: Objective, batch: Batch, *, scale: float, draws: int, seed: int) -> Linearized:
    x, y = batch
    found = layers_at(objective.model, x)
    assert found is not None  # see unsupported()
    neurons = _spiking(found[1])
    layers = [layer for _, layer in found[1]]
    means = {i: torch.zeros_like(cast(Tensor, layer.z)) for i, _, layer in neurons}
    squares = {i: torch.zeros_like(mean) for i, mean in means.items()}
    last = neurons[-1][0]
    alone: dict[int, Tensor | None] = dict.fromkeys(means)
    currents: dict[int, list[Tensor]] = {i: [] for i, _, layer in neurons if layer.static or i == last}
    outputs = torch.zeros_like(found[0])
    for out, perturbed in _perturbed(objective, x, scale, draws, seed):
        outputs += out / draws
        for i, _, layer in _spiking(perturbed):
            z = cast(Tensor, layer.z)
            step = z - means[i]  # Welford's
            means[i] += step / (len(currents[last]) + 1)
            squares[i] += step * (z - means[i])
            if (share := layer.alone((z >= 0).to(z))) is not None:
                alone[i] = share / draws if alone[i] is None else cast(Tensor, alone[i]) + share / draws
        for i, current, layer in _spiking(perturbed):
            if i in currents:
                currents[i].append(current.reshape(1 if layer.static else len(means[i]), -1))
    for i, _, layer in neurons[:-1]:
        floor = FLOOR * layer.threshold
        if layer.static:
            layers[i] = layer.responding(_responses(layer.fire, currents[i], floor)[0], alone[i])
        else:
            layers[i] = layer.averaged(means[i], (squares[i] / (draws - 1)).sqrt().clamp_min(floor), alone[i])
    counting = neurons[-1][2]
    steps, shape = len(means[last]), outputs.shape

    def rates(current: Tensor) -> Tensor:
        return counting.fire(current).reshape(steps, *shape).mean(0)

    moments = _moments(rates, currents[last], outputs, FLOOR * counting.threshold)
    form, diagonal = _output_form(objective, outputs, y, *moments)
    readout = layers[last - 1]
    hidden = len(neurons) > 1 and neurons[-2][0] == last - 2 and isinstance(readout, Affine)
    if hidden:
        closing: list[Layer] = [_Closing(cast(Affine, readout), steps)]
        own = (math.sqrt(2) - 1) * diagonal @ (cast(Affine, readout).folded / steps).square()
    else:
        closing, own = [readout] if counting.static else [readout, layers[-1]], diagonal[:, :0]
    chain = chain_of(objective, [*layers[: last - 1], *closing], counting.parameters)
    assert chain is not None  # see unsupported()
    classes = shape[1]

    def product(v: Tensor) -> Tensor:
        current, count = chain.tangent(v)[0].split([classes, own.shape[1]], 1)
        return chain.adjoint(torch.cat([form(current), own * count], 1))

    return Linearized(product, chain.nbytes)


@dataclass(frozen=True)
class _Closing:
    """A readout [T N, F] -> [N, K + F]: the mean over time of its outputs, then the sum over time of its inputs."""

    readout: Affine
    steps: int

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.readout.parameters

    def tangent(self, dx: Tensor | None, dp: Tangents) -> Tensor:
        current = self.readout.tangent(dx, dp).unflatten(0, (self.steps, -1)).mean(0)
        if dx is None:
            return torch.cat([current, current.new_zeros(len(current), self.readout.folded.shape[1])], 1)
        return torch.cat([current, dx.unflatten(0, (self.steps, -1)).sum(0)], 1)

    def adjoint(self, g: Tensor, want: Want, keep: bool) -> tuple[Tensor | None, Tangents]:
        current, count = g.split(list(self.readout.folded.shape), 1)
        gx, gp = self.readout.adjoint((current / self.steps).repeat(self.steps, 1), want, keep)
        return (gx if gx is None else gx + count.repeat(self.steps, 1)), gp

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Tangents, want: Want
    ) -> tuple[Tensor | None, Tangents]:
        raise NotImplementedError("a Gauss-Newton product has no second-order pass")


@torch.no_grad()
def _perturbed(
    objective: Objective, x: Tensor, scale: float, draws: int, seed: int
) -> Iterator[tuple[Tensor, list[tuple[Tensor, Layer]]]]:
    """(outputs, layers) of the network with noise in its weights, for every draw."""
    model = copy.deepcopy(objective.model)
    named = dict(model.named_parameters())
    weights, unit = objective.weights(), scale * noise_scales(objective)
    for index in range(draws):
        parts = objective.split(weights + unit * noise(objective, seed, index))
        for name, value in zip(objective.parameters, parts, strict=True):
            named[name].copy_(value)
        found = layers_at(model, x)
        assert found is not None  # as at the weights themselves
        yield found


def _shifts(draws: int, index: int) -> Iterator[tuple[float, float, float]]:
    """(u, weights of the first and second derivative at 0 of a standard normal mean) for the cells of one draw.

    Integrals of -phi' and phi'' over the cell, so that functions constant in each cell come out exactly.
    """
    width = 2 * REACH / CELLS
    first = width * ((index + 0.5) / draws - 0.5) - REACH
    edges = [first + width * (k + 0.5) for k in range(CELLS)]  # the outer cells are infinite: a constant has slope 0
    ones = [0.0, *(_normal(u) for u in edges), 0.0]
    twos = [0.0, *(u * _normal(u) for u in edges), 0.0]
    for k in range(CELLS + 1):
        yield first + width * k, ones[k] - ones[k + 1], twos[k] - twos[k + 1]


def _normal(u: float) -> float:
    return math.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def _responses(
    fire: Callable[[Tensor], Tensor], currents: list[Tensor], floor: float = FLOOR
) -> tuple[Tensor, Tensor, Tensor]:
    """First and second derivatives of E fire(current + a) by the constant a, and the Gaussian's width [1, M].

    currents: one [T, M] or [1, M] a draw. floor: least standard deviation.
    """
    mean = torch.stack(currents).mean(0)
    variance = sum((c - mean).square() for c in currents) / (len(currents) - 1)
    width = SHARE * cast(Tensor, variance).sqrt().mean(0, keepdim=True).clamp_min(floor)
    first = second = torch.zeros(())
    for index, current in enumerate(currents):
        shrunk = mean + math.sqrt(1 - SHARE**2) * (current - mean)
        for u, one, two in _shifts(len(currents), index):
            fired = fire(shrunk + u * width)
            first, second = first + one * fired, second + two * fired
    return first / len(currents) / width, second / len(currents) / width.square(), width


def _moments(
    rates: Callable[[Tensor], Tensor], currents: list[Tensor], mean: Tensor, floor: float = FLOOR
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by a constant current, all [N, K]: E r', E r'', and the second of E (r - mean)^2."""
    both, curved_rates, _ = _responses(
        lambda current: torch.stack([(r := rates(current)).flatten(), (r - mean).square().flatten()]), currents, floor
    )
    return both[0].view_as(mean), curved_rates[0].view_as(mean), curved_rates[1].view_as(mean)


def _output_form(
    objective: Objective, outputs: Tensor, y: Tensor, first: Tensor, second: Tensor, square: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """a' -> M a' for the outputs' mean currents [N, K], and M's diagonal [N, K]."""
    with torch.enable_grad():
        at = outputs.detach().requires_grad_()
        loss = objective.loss(at, y)
        (slope,) = torch.autograd.grad(loss, at, create_graph=True)

    def hessian(v: Tensor) -> Tensor:
        return curved(slope, at, v)

    own = torch.zeros_like(outputs)
    for k in range(outputs.shape[1]):
        unit = torch.zeros_like(outputs)
        unit[:, k] = 1
        own[:, k] = hessian(unit)[:, k]
    diagonal = slope.detach() * second + 0.5 * own * square
    rest = diagonal - own * first.square()  # without what hessian() adds on the diagonal
    return (lambda a: rest * a + first * hessian(first * a)), diagonal
