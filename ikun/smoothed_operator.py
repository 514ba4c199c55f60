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

Each call of neurons counts as a layer of its own, so that neurons of a recurrent layer have their own means at every
step. Between the calls, the product is that of the network itself, at its own weights and spikes: sums of residual
branches, recurrent weights, states that a library hands on. Some networks need more to be said:

- Outputs that are not mean rates of spiking neurons, or their sums over time, such as a membrane or a linear readout:
  the product is J^T H_out J, with the second derivative H_out of the loss at the mean outputs over the draws.
- Output neurons with recurrent weights: their currents are shifted, and their answer to their own spikes is not.
- The correction for the last hidden layer applies if the output neurons read a linear map of spikes. It does not
  apply behind a residual sum or a norm.
- Max-pooling of anything but spikes, in one or three dimensions, or with `ceil_mode` keeps the network's own rule.
- A reset by zero that takes place at the next step (snnTorch) is held fixed where a neuron fires.

Means over shifted currents use the distribution of the draws, convolved with a Gaussian of half its standard deviation
and shrunk to keep the variance (smoothed bootstrap). Derivatives act on this Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from hessian_tools.engine.linearized import Linearized, curved
from hessian_tools.evaluation import copy_model, differentiable, is_spiking_neuron, twice_differentiable
from hessian_tools.objective import Batch, Loss, Objective
from hessian_tools.operators.curvature import CurvatureOperator, linearize_ggn, linearize_hessian
from hessian_tools.perturbation import noise, noise_scales
from hessian_tools.runtime.cuda import full_precision
from ikun.averages import CallPlan, Noisy, floor_of, moments_of
from ikun.networks import Network
from ikun.nodes.recording import Averaging, Readout, Recording, record_calls
from ikun.nodes.rewriting import TRACING

SMOOTHED_DRAWS = 16  # default number of perturbed networks


@differentiable
def smoothed(
    objective: Objective,
    memory: float = 4 * 2**30,
    *,
    scale: float = 0.1,
    draws: int = SMOOTHED_DRAWS,
    seed: int = 0,
    order: int = 1,
) -> CurvatureOperator:
    """Build the noise-matched Gauss-Newton operator of an objective.

    The operator is symmetric but not always positive semidefinite, because the mean loss of a discrete output can have
    negative curvature. A learned decay of the output neurons is held fixed.

    Args:
        objective: The objective. All spiking neurons of its network must be nodes (`ikun.nodes`).
        memory: Memory in bytes for linearized batches, as in `CurvatureOperator`.
        scale: Noise scale s, relative to the root mean square of each filter.
        draws: Number of perturbed networks.
        seed: Random seed of the noise.
        order: 1 for the Gauss-Newton form with the correction of the last hidden layer; 2 for all second derivatives of
            the mean network (see docs/calibration.md).

    Returns:
        The operator.

    Raises:
        ValueError: If scale is not positive, draws is less than 2, order is not 1 or 2, or the operator does not
            support the objective (see `unsupported`).
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"noise must be a positive number (relative to each filter's rms), not {scale}")
    if draws < 2:
        raise ValueError(f"at least 2 draws of noise are needed, not {draws}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, not {order}")
    if reason := unsupported(objective):
        raise ValueError(reason)
    averaged = _Averaged(objective, order)
    outputs, seen = _recorded(objective, copy_model(objective.model), objective.first_inputs(64))
    plan = CallPlan.of(outputs, seen.calls)
    averaged.plan = plan if order == 1 else replace(plan, closing=False)
    return CurvatureOperator(objective, partial(_linearize, averaged, scale=scale, draws=draws, seed=seed), memory)


def unsupported(objective: Objective) -> str:
    """Explain why an objective has no noise-matched operator. The text is empty if it has one."""
    model = copy_model(objective.model)
    own = {id(m) for net in model.modules() if isinstance(net, Network) for m in net.modules()}
    for name, module in model.named_modules():
        if name and is_spiking_neuron(module) and not hasattr(module, "tracing") and id(module) not in own:
            return f"operator smoothed needs neurons whose equations are known, and those of '{name}' are not"
    x = objective.first_inputs(1)
    outputs, seen = _recorded(objective, model, x)
    if not seen.calls:
        return "operator smoothed needs a network with spiking neurons whose equations are known"
    if any(call.spec.relaxed for call in seen.calls):
        return "operator smoothed needs spikes, and a relaxed network has none"
    averaged = _Averaged(objective)
    averaged.plan = CallPlan.of(outputs, seen.calls)
    averaged.set({f"f1_{i}": torch.zeros_like(call.z) for i, call in enumerate(seen.calls)}, seen.alone)
    with torch.enable_grad():
        out = averaged.objective(lambda o, y: o.sum()).outputs(x)
        weights = list(objective.parameters.values())
        parts = torch.autograd.grad(out.sum(), weights, allow_unused=True) if out.requires_grad else ()
    if all(part is None for part in parts):
        return "operator smoothed needs parameters of layers before the output neurons: choose other parameters"
    return ""


def _recorded(objective: Objective, model: nn.Module, x: Tensor) -> tuple[Tensor, Recording]:
    """Run a copy of the objective's model and return its outputs and the calls of its neurons."""
    if objective.reset is not None:
        objective.reset(model)
    with full_precision(objective.device), twice_differentiable():
        return record_calls(model, x)


class _Averaged(nn.Module):
    """The network with averaged derivatives of its neurons, which are buffers, so that it is traced only once.

    It returns the mean currents of the output neurons [N, K], followed by the counts of the spikes that they read
    [N, F] if the plan has a closing linear map. Without output neurons it returns the outputs of the network.

    Attributes:
        plan: What the calls of the neurons are.
        order: 1 if second derivatives are left out, 2 if not.
        shared: What its copies share. The lock is held from `set` to the end of the linearization.
    """

    tracing = TRACING
    network: nn.Module

    def __init__(self, objective: Objective, order: int = 1) -> None:
        super().__init__()
        self.network = copy_model(objective.model, share=True)
        self.plan, self.order = CallPlan([], [], []), order
        self.shared = _Shared(objective)

    def set(self, arrays: dict[str, Tensor], alone: Sequence[Tensor]) -> None:
        """Set f1_k, f2_k, c_k, c2_k [T, M] of every call k, and the share of every entry of every pooling."""
        arrays = {name: t for name, t in arrays.items() if self.order > 1 or "2_" not in name}
        named = {**arrays, **{f"share_{k}": share for k, share in enumerate(alone)}}
        for name in [*self._buffers]:
            delattr(self, name)
        for name, value in named.items():
            self.register_buffer(name, value)

    def objective(self, loss: Loss) -> Objective:
        """Return the objective of this network with a loss of its outputs."""
        source = self.shared.objective
        reset = source.reset
        return replace(
            source,
            model=self,
            loss=loss,
            parameters={f"network.{name}": p for name, p in source.parameters.items()},
            reset=None if reset is None else lambda model: reset(cast(_Averaged, model).network),
            programs=self.shared.programs,
        )

    def forward(self, x: Tensor) -> Tensor:
        def slopes(k: int) -> tuple[Tensor, ...]:
            f1: Tensor = getattr(self, f"f1_{k}")
            if self.order > 1:
                return f1, *(getattr(self, f"{name}_{k}") for name in ("f2", "c", "c2"))
            return f1, getattr(self, f"c_{k}", f1)

        with Averaging(slopes, lambda k: getattr(self, f"share_{k}")) as mode:
            out: Tensor = self.network(x)
        if not self.plan.last:
            return out
        calls = [mode.calls[i] for i in self.plan.last]
        current = torch.cat([call.x for call in calls]).mean(0)
        if not self.plan.closing:
            return current
        reads = [call.readout for call in calls if call.readout is not None]
        count = sum(r.inputs.reshape(-1, len(current), r.inputs.shape[-1]).sum(0) for r in reads)
        return torch.cat([current, cast(Tensor, count)], 1)


class _Shared:
    """What copies of `_Averaged` share: the objective of the network itself, the traced programs, and a lock."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.programs, self.lock = objective, dict[Any, Any](), Lock()

    def __deepcopy__(self, memo: object) -> _Shared:
        return self


@torch.no_grad()
def _linearize(
    averaged: _Averaged, objective: Objective, batch: Batch, *, scale: float, draws: int, seed: int
) -> Linearized:
    """Compute the operator's product on one batch from `draws` perturbed networks."""
    x, y = batch
    outputs, base = _recorded(objective, copy_model(objective.model), x)
    model = copy_model(objective.model)  # its weights change
    plan = averaged.plan
    noisy = Noisy(plan, base)
    named = dict(model.named_parameters())
    weights, unit = objective.weights(), scale * noise_scales(objective)
    outputs = torch.zeros_like(outputs)
    for index in range(draws):
        parts = objective.split(weights + unit * noise(objective, seed, index))
        for name, value in zip(objective.parameters, parts, strict=True):
            named[name].copy_(value)
        out, seen = _recorded(objective, model, x)
        outputs += out / draws
        noisy.add(seen, index, draws)
    slope, form = _form(objective, plan, base, noisy, outputs, y)

    def expanded(o: Tensor, _: Tensor) -> Tensor:
        step = o - o.detach()
        value: Tensor = (slope.to(o) * step).sum() + (_Linear.apply(step, form) * step).sum() / 2
        return value

    with averaged.shared.lock:
        averaged.set(noisy.slopes(), noisy.alone)
        if averaged.order > 1:
            return linearize_hessian(averaged.objective(expanded), batch)
        return linearize_ggn(averaged.objective(lambda o, _: (_Linear.apply(o, form) * o).sum() / 2), batch)


class _Linear(torch.autograd.Function):
    """o -> A o for a symmetric linear map A, which can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, form: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.form = form
        return form(o.detach()).to(o)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Linear.apply(g, ctx.form), None


def _form(
    objective: Objective, plan: CallPlan, base: Recording, noisy: Noisy, outputs: Tensor, y: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return two derivatives of the mean loss by what `_Averaged` returns, the second one as a map of tangents.

    The first one is that by the currents, without the counts.
    """
    if not plan.last:
        gradient, form = _output_hessian(objective, outputs, y)
        return gradient.detach(), form
    calls = [base.calls[i] for i in plan.last]
    steps, factor = sum(call.steps for call in calls), plan.factor

    def rates(current: Tensor) -> Tensor:
        return factor * noisy.fire(plan.last, current).reshape(steps, *outputs.shape).mean(0)

    moments = moments_of(rates, noisy.currents[plan.last[0]], outputs, floor_of(calls[0]))
    form, diagonal = _output_form(objective, outputs, y, *moments)
    slope = _output_hessian(objective, outputs, y)[0].detach() * moments[0]
    if not plan.closing:
        return slope, form
    classes = outputs.shape[1]
    weight = cast(Readout, calls[0].readout).weight
    own = (math.sqrt(2) - 1) * diagonal @ (weight / steps).square()

    def whole(o: Tensor) -> Tensor:
        current, count = o.split([classes, own.shape[1]], 1)
        return torch.cat([form(current), own * count], 1)

    return slope, whole


def _output_hessian(objective: Objective, outputs: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the gradient of the loss by the outputs, and H_out as a map of tangents."""
    with torch.enable_grad():
        at = outputs.detach().requires_grad_()
        loss = objective.loss(at, y)
        (slope,) = torch.autograd.grad(loss, at, create_graph=True)
    return slope, lambda v: curved(slope, at, v.to(at))


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
    slope, hessian = _output_hessian(objective, outputs, y)
    own = torch.zeros_like(outputs)
    for k in range(outputs.shape[1]):
        unit = torch.zeros_like(outputs)
        unit[:, k] = 1
        own[:, k] = hessian(unit)[:, k]
    diagonal = slope.detach() * second + 0.5 * own * square
    rest = diagonal - own * first.square()  # minus the diagonal part that hessian() adds
    return (lambda a: rest * a + first * hessian(first * a)), diagonal
