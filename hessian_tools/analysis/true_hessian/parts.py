"""The smoothed loss's own Hessian by parts: quadratic forms, projections on subspaces, trace, and products.

The estimates use values of the loss only (`hessian_tools.linalg.stein`), so that they hold for every network with a
forward pass. `hessian_tools.analysis.true_hessian.analysis` puts them together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessian_tools.analysis.true_hessian import sampling
from hessian_tools.analysis.true_hessian.sampling import Sampler, draw_mean
from hessian_tools.evaluation import differentiable
from hessian_tools.linalg.stein import SteinHessian
from hessian_tools.objective import Objective
from hessian_tools.results.true_hessian import DrawMean


@differentiable
def true_forms(
    objective: Objective, v: Tensor, noise: float, *, observations: int = 32, group: int = 64, seed: int = 0
) -> list[DrawMean]:
    """Measure v'H_s v for given directions, H_s the Hessian of the smoothed loss by the weights. Unbiased.

    Args:
        objective: The loss, its data and its weights. Only forward passes are made.
        v: Directions [P] or [P, k] in the units of the weights, of any length.
        noise: Noise scale s, relative to the root mean square of each filter.
        observations: Number of observations per direction, of 10 forward passes each; at least 2, and 10 for an
            interval.
        group: Number of samples that share a draw of the noise.
        seed: Random seed. It must not be one that the choice of `v` depends on.

    Returns:
        The curvature along each direction, with its errors over the draws.

    Raises:
        ValueError: If `v` is zero, has another number of rows than there are weights, or moves a weight that has no
            noise.
        FloatingPointError: If the loss is not finite under the noise.
    """
    sampler = sampling.make_sampler(objective, noise, group=group, seed=seed)
    found = []
    for i, q in enumerate(_in_units_of_noise(sampler, v).unbind(1)):
        length = float(q.norm())
        found.append(draw_mean(sampling.line_values(sampler, q / length, observations, i), length**2))
    return found


@differentiable
def true_projection(
    objective: Objective, v: Tensor, noise: float, *, observations: int = 200, group: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Measure V'H_s V for a given subspace, H_s the Hessian of the smoothed loss by the weights. Unbiased.

    The number of weights does not add to its error. Eigenvalues of the measured matrix are not unbiased: the largest
    one is too large on average, the smallest one too small.

    Args:
        objective: The loss, its data and its weights. Only forward passes are made.
        v: Linearly independent directions V [P, k] in the units of the weights.
        noise: Noise scale s, relative to the root mean square of each filter.
        observations: Number of observations, of 3 forward passes each; at least 2.
        group: Number of samples that share a draw of the noise.
        seed: Random seed. It must not be one that the choice of `v` depends on.

    Returns:
        V'H_s V and the standard errors of its entries over the draws, both [k, k] and float64 on the CPU.

    Raises:
        ValueError: As in `true_forms`, and if the directions are linearly dependent.
        FloatingPointError: If the loss is not finite under the noise.
    """
    sampler = sampling.make_sampler(objective, noise, group=group, seed=seed)
    basis, r = torch.linalg.qr(_in_units_of_noise(sampler, v))
    sizes = r.diagonal().abs()
    if float(sizes.min()) < 1e-8 * float(sizes.max()):
        raise ValueError("the directions are linearly dependent")
    second, y = sampling.projection(sampler, basis, observations)
    values = r.T.cpu() @ sampling.entries(second, y, sampler.weights) @ r.cpu()
    return values.mean(0), values.std(0) / observations**0.5


@differentiable
def true_trace(
    objective: Objective, noise: float, *, observations: int = 64, group: int = 64, seed: int = 0
) -> DrawMean:
    """Measure the trace of D H_s D, H_s the Hessian of the smoothed loss and D the unit of the noise. Unbiased.

    Args:
        objective: The loss, its data and its weights. Only forward passes are made.
        noise: Noise scale s, relative to the root mean square of each filter.
        observations: Number of observations, of 6 forward passes each.
        group: Number of samples that share a draw of the noise.
        seed: Random seed.
    """
    sampler = sampling.make_sampler(objective, noise, group=group, seed=seed)
    return draw_mean(sampling.trace_values(sampler, observations)[0])


@differentiable
def true_operator(
    objective: Objective, noise: float, *, pairs: int = 1000, group: int = 64, seed: int = 0, memory: float = 2**30
) -> SteinHessian:
    """Return an unbiased estimate of D H_s D as an operator: `op @ v`, and `op.product(v)` with standard errors.

    The mean of a product over seeds is exact for every vector v that does not depend on the draws. Eigenvalues of the
    estimate are not unbiased: the largest one is too large on average, the smallest one too small.

    Args:
        objective: The loss, its data and its weights. Only forward passes are made.
        noise: Noise scale s, relative to the root mean square of each filter.
        pairs: Number of pairs z, -z of draws, with 2 forward passes each; at least 2.
        group: Number of samples that share a draw of the noise.
        seed: Random seed.
        memory: Bytes for draws that are kept.
    """
    sampler = sampling.make_sampler(objective, noise, group=group, seed=seed)
    return sampling.stein_hessian(sampler, sampling.search_differences(sampler, pairs), memory=memory)


def _in_units_of_noise(sampler: Sampler, v: Tensor) -> Tensor:
    """Return D^-1 v [P, k] for directions v [P] or [P, k] in the units of the weights, float64.

    Raises:
        ValueError: If a direction is zero or not finite, moves a weight without noise, or has a wrong number of rows.
    """
    columns = v.detach().to(sampler.unit.device, torch.float64).reshape(len(v), -1)
    if len(columns) != sampler.objective.size:
        raise ValueError(f"directions have {len(columns)} entries, but there are {sampler.objective.size} weights")
    noisy = (sampler.unit > 0)[:, None]
    if bool((columns[~noisy[:, 0]] != 0).any()):
        raise ValueError("a direction moves a weight whose filter is zero: it has no noise, and no smoothed curvature")
    unit = sampler.unit.double()[:, None]
    q = torch.where(noisy, columns / torch.where(noisy, unit, 1), 0)
    norms = q.norm(dim=0)
    if not bool(((norms > 0) & norms.isfinite()).all()):
        raise ValueError("a direction is zero or not finite")
    return q
