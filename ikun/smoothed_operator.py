"""The noise-matched Gauss-Newton operator: curvature of the spiking loss under noise in the weights.

The loss of a spiking network is piecewise constant in the weights w, but its mean under noise has a curvature:

    L_s(w) = E L(w + s D z)

Here z is standard normal and D is the root mean square of each weight's filter
(`hessian_tools.perturbation.noise_scales`). The operator is a Gauss-Newton approximation of the Hessian of L_s. It does
not use the training surrogate. The derivation is in docs/calibration.md. In short, the operator is computed from the
currents, potentials and spikes of `draws` perturbed networks:

- Hidden neurons: the derivative of a neuron's mean spike with respect to its potential is the density of h at the
  threshold, N(threshold; mean h, var h). Mean and variance are taken over the draws, per sample, neuron and time step.
  The result is a Gaussian surrogate whose width matches the noise.
- Layers whose input is the same at all steps: the whole spike train responds to a constant shift of the current. This
  response is computed directly, by shifting the currents of the draws. It includes changes that a Gaussian in h does
  not describe, such as a spike that moves by one step.
- Max-pooling: a pooled spike is present if any entry of its window fires. Its mean therefore responds to an entry only
  where all other entries are silent. The derivative is the fraction of draws in which they are, and no tie rule is
  needed.
- Outputs: they are counts of a few spikes, and the mean loss of a count differs from the loss of the mean count. The
  product is therefore split before the output neurons. The tangent of their currents, averaged over time, is multiplied
  by the second derivative M of the mean loss E l(rate(current + noise)) with respect to that current. With r' and r''
  the derivatives of the mean rates E r, m'' the second derivative of E (r - mean r)^2, and the loss l expanded to
  second order about the mean rates,

      M = diag(l_k r_k'' + l_kk m_k'' / 2) + (l_kj r_k' r_j')_(k != j)

  This is exact for a quadratic loss and independent output neurons.
- Last hidden layer: a single spike of a hidden neuron also changes the loss by a step. The mean loss is linear in the
  neuron's firing probability, so the true curvature does not contain the square of the change of this probability,
  which a Gauss-Newton product contains. For neurons near their threshold, at weights where the loss is stationary, the
  true term is on average sqrt(2) times this square. The correction is applied to the last hidden layer, where it is
  largest.

Means over shifted currents use the distribution of the draws, convolved with a Gaussian of half its standard deviation
and shrunk to keep the variance (smoothed bootstrap). Derivatives act on this Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from hessian_tools.chain.affine import Affine
from hessian_tools.chain.layers import Layer, Tangents, Want
from hessian_tools.chain.second_order import Linearized, chain_of, curved, layers_at
from hessian_tools.evaluation import copy_model, differentiable
from hessian_tools.objective import Batch, Objective
from hessian_tools.operators.curvature import CurvatureOperator
from hessian_tools.perturbation import noise, noise_scales

SMOOTHED_DRAWS = 16  # default number of perturbed networks
SHARE = 0.5  # width of the smoothing Gaussian, relative to the standard deviation of the current
CELLS = 8  # cells of the quadrature over the shift, per draw; the cells of different draws are staggered
REACH = 3.5  # largest shift, in standard deviations of the smoothing Gaussian
FLOOR = 1e-3  # smallest standard deviation, in thresholds; without noise a neuron would have no derivative


class SpikingLayer(Layer, Protocol):
    """Neurons over T steps and M samples x neurons, with the pooling that follows them.

    `ikun.spiking_layers.Spikes` implements this protocol and documents its methods.
    """

    z: Tensor | None  # h - threshold [T, M]
    static: bool
    threshold: float

    def fire(self, x: Tensor) -> Tensor: ...

    def alone(self, fired: Tensor) -> Tensor | None: ...

    def averaged(self, mean: Tensor, spread: Tensor, alone: Tensor | None) -> Layer: ...

    def responding(self, response: Tensor, alone: Tensor | None) -> Layer: ...


@differentiable
def smoothed(
    objective: Objective, memory: float = 4 * 2**30, *, scale: float = 0.1, draws: int = SMOOTHED_DRAWS, seed: int = 0
) -> CurvatureOperator:
    """Build the noise-matched Gauss-Newton operator of an objective.

    The operator is symmetric but not always positive semidefinite, because the mean loss of a discrete output can have
    negative curvature. A learned decay of the output neurons is held fixed.

    Args:
        objective: The objective. Its network must end in the mean rates of spiking neurons.
        memory: Memory in bytes for linearized batches, as in `CurvatureOperator`.
        scale: Noise scale s, relative to the root mean square of each filter.
        draws: Number of perturbed networks.
        seed: Random seed of the noise.

    Returns:
        The operator.

    Raises:
        ValueError: If scale is not positive, draws is less than 2, or the operator does not support the objective (see
            `unsupported`).
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"noise must be a positive number (relative to each filter's rms), not {scale}")
    if draws < 2:
        raise ValueError(f"at least 2 draws of noise are needed, not {draws}")
    if reason := unsupported(objective):
        raise ValueError(reason)
    return CurvatureOperator(objective, partial(_linearize, scale=scale, draws=draws, seed=seed), memory)


def unsupported(objective: Objective) -> str:
    """Explain why an objective has no noise-matched operator. The text is empty if it has one."""
    found = None if objective.reset is not None else layers_at(objective.model, objective.first_inputs(1))
    neurons = [] if found is None else _spiking(found[1])
    if found is None or not neurons or neurons[-1][0] != len(found[1]) - 2:
        return "operator smoothed needs an ikun network that ends in the mean rates of spiking neurons"
    if any(((y := found[1][i + 1][0]) * (1 - y)).any() for i, _, _ in neurons):
        return "operator smoothed needs spikes, and a relaxed network has none"
    before = [layer for _, layer in found[1][: neurons[-1][0]]]
    if chain_of(objective, before, neurons[-1][2].parameters) is None:
        return "operator smoothed needs parameters of layers before the output neurons: choose other parameters"
    return ""


def _spiking(layers: list[tuple[Tensor, Layer]]) -> list[tuple[int, Tensor, SpikingLayer]]:
    """Return the index, the input and the layer of every layer of spiking neurons."""
    return [(i, x, cast(SpikingLayer, layer)) for i, (x, layer) in enumerate(layers) if hasattr(layer, "responding")]


@torch.no_grad()
def _linearize(objective: Objective, batch: Batch, *, scale: float, draws: int, seed: int) -> Linearized:
    """Compute the operator's product on one batch from `draws` perturbed networks."""
    x, y = batch
    found = layers_at(objective.model, x)
    assert found is not None  # checked by unsupported()
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
            step = z - means[i]  # Welford's algorithm
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
    assert chain is not None  # checked by unsupported()
    classes = shape[1]

    def product(v: Tensor) -> Tensor:
        current, count = chain.tangent(v)[0].split([classes, own.shape[1]], 1)
        return chain.adjoint(torch.cat([form(current), own * count], 1))

    return Linearized(product, chain.nbytes)


@dataclass(frozen=True)
class _Closing:
    """The readout as the last layer of the chain, [T N, F] -> [N, K + F].

    The first K outputs are the mean over time of the readout's outputs. The other F are the sum over time of its
    inputs.
    """

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
    """Yield the outputs and the layers of the network with perturbed weights, once per draw."""
    model = copy_model(objective.model)
    named = dict(model.named_parameters())
    weights, unit = objective.weights(), scale * noise_scales(objective)
    for index in range(draws):
        parts = objective.split(weights + unit * noise(objective, seed, index))
        for name, value in zip(objective.parameters, parts, strict=True):
            named[name].copy_(value)
        found = layers_at(model, x)
        assert found is not None  # the unperturbed network has the same layers
        yield found


def _shifts(draws: int, index: int) -> Iterator[tuple[float, float, float]]:
    """Yield (u, w1, w2) for the cells of one draw.

    u is a shift in standard deviations. w1 and w2 are its weights in the first and second derivative, at 0, of the mean
    over a standard normal shift. They are the integrals of -phi' and phi'' over the cell, so a function that is
    constant in each cell is integrated exactly.
    """
    width = 2 * REACH / CELLS
    first = width * ((index + 0.5) / draws - 0.5) - REACH
    edges = [first + width * (k + 0.5) for k in range(CELLS)]  # outer cells are infinite: a constant gives 0
    ones = [0.0, *(_normal(u) for u in edges), 0.0]
    twos = [0.0, *(u * _normal(u) for u in edges), 0.0]
    for k in range(CELLS + 1):
        yield first + width * k, ones[k] - ones[k + 1], twos[k] - twos[k + 1]


def _normal(u: float) -> float:
    """Return the standard normal density at u."""
    return math.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def _responses(
    fire: Callable[[Tensor], Tensor], currents: list[Tensor], floor: float = FLOOR
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate E fire(current + a) with respect to the constant a.

    Args:
        fire: Maps currents to spikes or to functions of spikes.
        currents: The currents of the draws, [T, M] or [1, M] each.
        floor: Smallest standard deviation of a current.

    Returns:
        The first derivative, the second derivative, and the width of the smoothing Gaussian [1, M].
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
    """Return E r', E r'' and the second derivative of E (r - mean)^2 by a constant current, each [N, K]."""
    both, curved_rates, _ = _responses(
        lambda current: torch.stack([(r := rates(current)).flatten(), (r - mean).square().flatten()]), currents, floor
    )
    return both[0].view_as(mean), curved_rates[0].view_as(mean), curved_rates[1].view_as(mean)


def _output_form(
    objective: Objective, outputs: Tensor, y: Tensor, first: Tensor, second: Tensor, square: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Build the second derivative M of the mean loss with respect to the outputs' mean currents.

    Args:
        objective: The objective, for its loss.
        outputs: Mean outputs over the draws [N, K].
        y: Labels of the batch.
        first: E r' [N, K].
        second: E r'' [N, K].
        square: Second derivative of E (r - mean r)^2 [N, K].

    Returns:
        The map from a tangent a' [N, K] to M a', and the diagonal of M [N, K].
    """
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
    rest = diagonal - own * first.square()  # minus the diagonal part that hessian() adds
    return (lambda a: rest * a + first * hessian(first * a)), diagonal
