"""The loss at perturbed weights, by forward passes only: no derivatives and no surrogate gradients.

Noise is relative to the weights. The unit of noise of a weight is the root mean square of its filter. A filter that is
rescaled before a BatchNorm leaves the function unchanged, and it is perturbed in the same way (Li et al. 2018, section
4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import local
from typing import TypeVar

import torch
from torch import Tensor, nn

from hessian_tools import nested
from hessian_tools.evaluation import copy_model
from hessian_tools.io.errors import ObjectiveError
from hessian_tools.objective import Objective, Streamed
from hessian_tools.runtime.cuda import full_precision
from hessian_tools.runtime.threads import in_threads
from hessian_tools.seeding import stream


def filter_norms(objective: Objective) -> Tensor:
    """Return the norm of the filter of every weight [P].

    A filter is the set of all weights into one unit. For vectors and scalars it is |entry|.
    """
    norms = []
    for p in objective.parameters.values():
        p = p.detach()
        rows = p.flatten(1).norm(dim=1) if p.dim() > 1 else p.abs()
        norms.append(rows.reshape(rows.shape + (1,) * (p.dim() - rows.dim())).expand_as(p))
    return objective.flatten(norms)


S = TypeVar("S")


def noise_scales(objective: Objective) -> Tensor:
    """Return the root mean square of the filter of every weight [P] (see `filter_norms`)."""
    sizes = [p.new_full(p.shape, p.shape[1:].numel() if p.dim() > 1 else 1) for p in objective.parameters.values()]
    return filter_norms(objective) / objective.flatten(sizes).sqrt()


def noise(objective: Objective, seed: int, index: int) -> Tensor:
    """Draw a standard normal vector [P].

    The stream depends only on the seed and P, so that all checkpoints of one network get the same numbers.

    Args:
        objective: The objective, for P, device and dtype.
        seed: Random seed.
        index: Number of the vector in the stream. A vector with an odd index is the negative of the one before it
            (antithetic pairs).
    """
    z = torch.randn(objective.size, generator=stream(seed, index // 2), dtype=torch.float64)
    return (-z if index % 2 else z).to(objective.device, objective.dtype)


def outputs_at(objective: Objective, point: Callable[[S], Tensor], items: Sequence[S]) -> Iterator[Tensor]:
    """Compute the network's outputs [N, ...] on all samples at several points in weight space.

    On the CPU the points run in parallel, one thread each. The objective's own model is not changed. In a group the
    processes share the batches if all of them have one shape, so every process must ask for the same points.

    Args:
        objective: The objective.
        point: Maps an item to weights [P].
        items: The items, one per point.

    Returns:
        An iterator over the outputs, in the order of `items`.
    """
    own, sizes = local(), objective.sizes
    divided = objective.group is not None and _alike(objective)  # otherwise one process only could find an error
    share = objective.share if divided else range(len(sizes))
    if objective.reset is not None:
        objective.reset(objective.model)  # deepcopy fails on a state that has an autograd graph

    @torch.no_grad()
    def run(item: S) -> Tensor:
        model, parameters = _private_copy(objective, own)
        values = objective.split(point(item))
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
        parts = []
        for i in share or range(1):
            if objective.reset is not None:
                objective.reset(model)
            with full_precision(objective.device):
                # the inputs are not bound to a name, so they are freed before the next batch is read
                parts.append(nested.call(model, objective.batches[i][0]))
        _require_unchanged(parameters, values)
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError("the batches have outputs of different shapes: pad all samples to one length")
        if not divided:
            return torch.cat(parts)
        whole: Tensor = parts[0].new_zeros(sum(sizes), *parts[0].shape[1:])
        places = whole.split(sizes)
        for i, part in zip(share, parts, strict=False):  # a process without a batch ran one for its shape only
            places[i].copy_(part)
        return whole

    found = in_threads(run, items) if objective.device.type == "cpu" else map(run, items)
    return map(objective.summed, found) if divided else found


def batch_losses(
    objective: Objective, points: Callable[[S, int], Iterable[Tensor]], items: Sequence[S], count: int
) -> Iterator[Tensor]:
    """Compute the loss of every batch at points in weight space that may differ from batch to batch.

    On the CPU the items run in parallel, one thread each. The objective's own model is not changed. In a group the
    processes share the batches, so every process must ask for the same items.

    Args:
        objective: The objective.
        points: Maps an item and the index of a batch to `count` vectors of weights [P].
        items: The items.
        count: Number of points per item and batch.

    Returns:
        An iterator over the losses [count, B], float64 on the CPU, in the order of `items`. The loss of the objective
        is their mean over the batches, weighted by the number of samples.

    Raises:
        ObjectiveError: If a forward pass changes the parameters.
    """
    own = local()
    if objective.reset is not None:
        objective.reset(objective.model)  # deepcopy fails on a state that has an autograd graph

    @torch.no_grad()
    def run(item: S) -> Tensor:
        model, parameters = _private_copy(objective, own)
        found = torch.zeros(count, len(objective.batches), dtype=torch.float64)
        for b in objective.share:
            x, y = objective.batches[b]
            for j, weights in enumerate(points(item, b)):
                values = objective.split(weights)
                for p, value in zip(parameters, values, strict=True):
                    p.copy_(value)
                if objective.reset is not None:
                    objective.reset(model)
                with full_precision(objective.device):
                    out = nested.call(model, x)
                _require_unchanged(parameters, values)
                found[j, b] = float(objective.loss(out.double(), _wide(y)))
        return found

    found = in_threads(run, items) if objective.device.type == "cpu" else map(run, items)
    return (objective.summed(t.to(objective.device)).cpu() for t in found)


def _private_copy(objective: Objective, own: local) -> tuple[nn.Module, list[Tensor]]:
    """Return this thread's copy of the objective's model and its parameters, in the order of the weights."""
    if not hasattr(own, "model"):
        own.model = copy_model(objective.model)
        named = dict(own.model.named_parameters())
        own.parameters = [named[name] for name in objective.parameters]
    return own.model, own.parameters


def _require_unchanged(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Raise ObjectiveError unless the parameters have these values."""
    if not all(torch.equal(p, value.to(p)) for p, value in zip(parameters, values, strict=True)):
        raise ObjectiveError("a forward pass changes the network's parameters: a Hessian needs fixed weights")


def _alike(objective: Objective) -> bool:
    """Return whether the batches differ in nothing but their number of samples."""
    if isinstance(objective.batches, Streamed):
        return True
    return len({nested.signature(batch) for batch in objective.batches}) == 1


def targets(objective: Objective) -> Tensor:
    """Return the targets [N, ...] of all samples, in the order of `outputs_at`.

    Raises:
        ValueError: If the targets of the batches differ in shape.
    """
    if len({y.shape[1:] for y in objective.targets}) > 1:
        raise ValueError("the batches have targets of different shapes: pad all samples to one length")
    return torch.cat(objective.targets)


@torch.no_grad()
def mean_loss(objective: Objective, outputs: Tensor) -> float:
    """Return the mean loss of outputs [N, ...], in float64."""
    return float(objective.loss(outputs.double(), _wide(targets(objective))))


@torch.no_grad()
def sample_losses(objective: Objective, outputs: Tensor) -> Tensor:
    """Return the loss [N] of every sample, in float64."""
    found, wanted = outputs.double(), _wide(targets(objective))
    try:
        losses: Tensor = torch.func.vmap(lambda o, y: objective.loss(o[None], y[None]))(found, wanted)
    except RuntimeError:  # the loss reads values, which vmap does not allow: one sample at a time
        losses = torch.stack([objective.loss(o[None], y[None]) for o, y in zip(found, wanted, strict=True)])
    return losses


def accuracy(objective: Objective, outputs: Tensor) -> float:
    """Return the fraction of samples that are classified correctly (see `count_correct`), or NaN."""
    right = count_correct(outputs, targets(objective))
    return math.nan if right is None else float(right) / len(outputs)


def count_correct(outputs: Tensor, labels: Tensor) -> Tensor | None:
    """Count the samples that are classified correctly.

    Args:
        outputs: Outputs [N, K], one per class, or logits [N, 1] or [N] of class 1 of two classes. Outputs over time
            [N, T, K] are averaged over T, for one label per sample.
        labels: Class labels [N] from 0 to K - 1, or the same in one-hot form [N, K] of any dtype.

    Returns:
        The number of correct samples, a scalar tensor; None if the targets are not such labels, or if a single output
        could be a probability as well as a logit (all of them between 0 and 1).
    """
    if outputs.dim() == 3 and (labels.dim() == 1 or labels.shape == outputs[:, 0].shape):
        outputs = outputs.mean(1)
    if labels.shape == outputs.shape and labels.dim() == 2 and labels.shape[1] > 1 and not labels.is_complex():
        one = labels == 1
        labels = one.long().argmax(1) if bool((one | (labels == 0)).all() & (one.sum(1) == 1).all()) else labels
    if labels.is_floating_point() or labels.dim() != 1 or not len(labels):
        return None
    low, high = int(labels.min()), int(labels.max())
    if outputs.dim() == 2 and outputs.shape[1] > 1:
        return (outputs.argmax(1) == labels).sum() if 0 <= low and high < outputs.shape[1] else None
    if outputs.numel() != len(labels) or low < 0 or high > 1 or bool(((outputs >= 0) & (outputs <= 1)).all()):
        return None
    return ((outputs.flatten() > 0) == labels.bool()).sum()


def class_count(labels: Tensor) -> int | None:
    """Return the number of classes of labels [N], their largest plus one, or of one-hot ones [N, K]; else None."""
    if labels.is_complex() or not labels.numel():
        return None
    if labels.dim() == 2 and bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()):
        return labels.shape[1]
    return None if labels.dim() != 1 or labels.is_floating_point() or int(labels.min()) < 0 else int(labels.max()) + 1


def _wide(y: Tensor) -> Tensor:
    """Convert floating-point targets to float64."""
    return y.double() if y.is_floating_point() else y
