"""The trace of the GGN of the loss read out at each time step.

For outputs o_t at step t, the GGN of that step is J_t^T H_t J_t, where H_t is the Hessian of the loss of o_t with
respect to o_t. One product u = J v with the Jacobian of the outputs at all steps gives v^T G_t v = u_t^T H_t u_t for
every t, so the traces of all steps share their probes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessian_tools.analysis.uncertainty.sampling_error import samples_concentration, withheld
from hessian_tools.evaluation import differentiable
from hessian_tools.linalg.trace import estimate_forms
from hessian_tools.objective import Loss, Objective
from hessian_tools.operators.curvature import pushforward
from hessian_tools.results.operator_spectrum import Trace
from hessian_tools.results.spectrum import StepTrace
from hessian_tools.runtime.cuda import full_precision

SEPARABLE = 1e-4  # largest relative difference between a loss and the mean of its values at single steps


def mean_over_steps(loss: Loss) -> Loss:
    """Return the mean over steps of a loss, as a loss of outputs over time [N, T, ...].

    Args:
        loss: A loss of the outputs of one step [N, ...].
    """

    def over_time(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([loss(step, targets) for step in outputs.unbind(1)]).mean(0)

    return over_time


@differentiable
def step_forms(
    objective: Objective,
    probes: int,
    generator: torch.Generator,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Compute quadratic forms of the GGN of every step, for random signs.

    Args:
        objective: An objective whose outputs are [N, T, ...] and whose loss is a mean over steps (`mean_over_steps`).
        probes: Number of probes n.
        generator: Random generator of the probes.
        progress: Called with (products done, products needed, NaN).

    Returns:
        "forms": v^T G_t v [n, T]; "samples": their mean over probes for every sample [N, T], zero for samples of other
        processes; "losses": the loss of every step [T].

    Raises:
        ValueError: If the outputs have no axis of time, or the loss is not a mean over steps.
        FloatingPointError: If a form is not finite.
    """
    with torch.no_grad():
        shape = objective.outputs(objective.first_inputs(1)).shape
    if len(shape) < 3:
        raise ValueError(f"traces per time step need outputs over time [N, T, K], not {list(shape)}")
    signs = 2.0 * torch.randint(0, 2, (probes, objective.size), generator=generator, dtype=torch.int8) - 1
    signs = signs.to(objective.device, objective.dtype)
    forms, samples, losses = (
        torch.zeros(*rows, shape[1], dtype=torch.float64, device=objective.device)
        for rows in ((probes,), (objective.samples,), ())
    )
    ends = torch.tensor(objective.sizes).cumsum(0).tolist()
    share, done = objective.batch_weights(), 0
    with full_precision(objective.device):
        for i, weight in share.items():
            x, y = objective.batches[i]
            outputs = objective.outputs(x)
            losses += weight * _step_losses(objective, outputs.detach(), y)
            for k, one in enumerate(_forms_of(objective, outputs, y, signs)):
                forms[k] += weight * one.mean(0)
                samples[ends[i] - len(y) : ends[i]] += one / probes
                done += 1
                if progress is not None:
                    progress(done, probes * len(share), float("nan"))
    found = {"forms": forms, "samples": samples, "losses": losses}
    whole = {name: objective.summed(value).cpu() for name, value in found.items()}
    if not torch.isfinite(whole["forms"]).all():
        raise FloatingPointError("the trace of a time step is not finite")
    return whole


def step_traces(found: dict[str, Any]) -> tuple[StepTrace, ...]:
    """Return the traces of all steps with their errors, from the result of `step_forms`."""
    traces = []
    for t, (forms, samples) in enumerate(zip(found["forms"].T, found["samples"].T, strict=True)):
        probed = estimate_forms(forms)
        n, share = len(samples), samples_concentration(samples)
        error, least = withheld(float(samples.std() / n**0.5) if n > 1 else float("nan"), share)
        trace = Trace(probed.estimate, probed.stderr, probed.ci95, probed.probes, error, share, least)
        traces.append(StepTrace(t + 1, float(found["losses"][t]), trace))
    return tuple(traces)


def _step_losses(objective: Objective, outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss [T] of the outputs of each step, after a check that the loss is the mean of these."""
    with torch.no_grad():
        alone = [objective.loss(step[:, None].expand(outputs.shape).contiguous(), y) for step in outputs.unbind(1)]
        values, whole = torch.stack(alone).double(), float(objective.loss(outputs, y))
    apart = abs(float(values.mean()) - whole) <= SEPARABLE * max(abs(whole), float(values.abs().max()))
    if not (apart and _coupling(objective, outputs, y) <= SEPARABLE):
        raise ValueError("traces per time step need a loss that is the mean of the losses of single steps")
    return values


def _coupling(objective: Objective, outputs: Tensor, y: Tensor) -> float:
    """Return the size of H u at other steps than the first, relative to H u, for a random u at the first step."""
    leaf = outputs.double().requires_grad_()
    (slope,) = torch.autograd.grad(objective.loss(leaf, y), leaf, create_graph=True)
    if not slope.requires_grad:
        return 0.0
    u = torch.zeros_like(leaf)
    draws = torch.randn(u[:, 0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[:, 0] = draws.to(u.device)
    (curved,) = torch.autograd.grad(slope, leaf, u)
    whole = float(curved.norm())
    return float(curved[:, 1:].norm()) / whole if whole else 0.0


def _forms_of(objective: Objective, outputs: Tensor, y: Tensor, signs: Tensor) -> list[Tensor]:
    """Return v^T G_nt v [N, T] of one batch for every probe v."""
    leaf = outputs.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(objective.loss(leaf, y), leaf, create_graph=True)
    if not slope.requires_grad or not outputs.requires_grad:
        return [torch.zeros(outputs.shape[:2], dtype=torch.float64, device=outputs.device) for _ in signs]
    forward, _ = pushforward(objective, outputs)
    found = []
    for v in signs:
        u = forward(v).double()
        (curved,) = torch.autograd.grad(slope, leaf, u, retain_graph=True)
        # the loss is a mean over N samples and T steps, so each sample and step has the factor N T
        found.append(outputs.shape[0] * outputs.shape[1] * (u * curved).flatten(2).sum(2).detach())
    return found
