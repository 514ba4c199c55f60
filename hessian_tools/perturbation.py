"""The true loss at other weights: forward passes alone, no derivative and no surrogate.

Noise is relative: a weight's unit of noise is the root mean square of its filter, so that a filter rescaled before a
BatchNorm, which leaves the function as it was, is disturbed in the same way (Li et al. 2018, section 4).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from threading import local
from typing import TypeVar

import torch
from torch import Tensor

from hessian_tools.objective import Objective
from hessian_tools.runtime.cuda import full_precision
from hessian_tools.runtime.threads import in_threads
from hessian_tools.seeding import stream


def filter_norms(objective: Objective) -> Tensor:
    """[P]: for every weight, the norm of its filter (all weights into one unit); for vectors and scalars, |entry|."""
    norms = []
    for p in objective.parameters.values():
        p = p.detach()
        rows = p.reshape(p.shape[0], -1).norm(dim=1) if p.dim() > 1 else p.abs()
        norms.append(rows.reshape(rows.shape + (1,) * (p.dim() - rows.dim())).expand_as(p))
    return objective.flatten(norms)


S = TypeVar("S")


def noise_scales(objective: Objective) -> Tensor:
    """[P]: for every weight, the root mean square of its filter (all weights into one unit); |entry| for vectors."""
    sizes = [p.new_full(p.shape, p[0].numel() if p.dim() > 1 else 1) for p in objective.parameters.values()]
    return filter_norms(objective) / objective.flatten(sizes).sqrt()


def noise(objective: Objective, seed: int, index: int) -> Tensor:
    """Standard normal [P], number `index` of a stream that depends on nothing but the seed and P: checkpoints of one
    network get the same numbers. An odd one is the negative of the one before (antithetic pairs)."""
    z = torch.randn(objective.size, generator=stream(seed, index // 2), dtype=torch.float64)
    return (-z if index % 2 else z).to(objective.device, objective.dtype)


def outputs_at(objective: Objective, point: Callable[[S], Tensor], items: Sequence[S]) -> Iterator[Tensor]:
    """The network's outputs [N, ...] for all samples at the weights point(item) [P], for every item in order.

    On the CPU the points are computed side by side, one thread each. The objective's own model is not touched.
    """
    own = local()
    if objective.reset is not None:
        objective.reset(objective.model)  # a state with a graph cannot be copied

    @torch.no_grad()
    def run(item: S) -> Tensor:
        if not hasattr(own, "model"):
            own.model = copy.deepcopy(objective.model)
            named = dict(own.model.named_parameters())
            own.parameters = [named[name] for name in objective.parameters]
            ours = hasattr(own.model, "second_order_chain")  # another model may call anything `value`
            own.forward = getattr(own.model, "value", own.model) if ours else own.model
        for p, value in zip(own.parameters, objective.split(point(item)), strict=True):
            p.copy_(value)
        parts = []
        for i in range(len(objective.batches)):
            if objective.reset is not None:
                objective.reset(own.model)
            with full_precision(objective.device):
                parts.append(own.forward(objective.batches[i][0]))  # not bound to a name: gone before the next is read
        return torch.cat(parts)

    return in_threads(run, items) if objective.device.type == "cpu" else map(run, items)


def targets(objective: Objective) -> Tensor:
    """Targets [N, ...] of all samples, in the order of outputs_at."""
    return torch.cat(objective.targets)


@torch.no_grad()
def mean_loss(objective: Objective, outputs: Tensor) -> float:
    """The loss of outputs [N, ...], in float64."""
    return float(objective.loss(outputs.double(), _wide(targets(objective))))


@torch.no_grad()
def sample_losses(objective: Objective, outputs: Tensor) -> Tensor:
    """Every sample's loss [N], in float64."""
    found, wanted = outputs.double(), _wide(targets(objective))
    try:
        losses: Tensor = torch.func.vmap(lambda o, y: objective.loss(o[None], y[None]))(found, wanted)
    except RuntimeError:  # a loss that asks for values: one sample after the other
        losses = torch.stack([objective.loss(o[None], y[None]) for o, y in zip(found, wanted, strict=True)])
    return losses


def accuracy(objective: Objective, outputs: Tensor) -> float:
    """Share of samples whose largest output is the target class; NaN where targets are no classes."""
    y = targets(objective)
    if y.is_floating_point() or y.dim() != 1 or outputs.dim() != 2:
        return float("nan")
    return float((outputs.argmax(1) == y).double().mean())


def _wide(y: Tensor) -> Tensor:
    return y.double() if y.is_floating_point() else y
