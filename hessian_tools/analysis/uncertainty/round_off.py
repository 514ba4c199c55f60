"""The error of float32 products: how far they are from the same products in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hessian_tools import nested
from hessian_tools.checks import spread
from hessian_tools.engine.product import kept_bytes
from hessian_tools.evaluation import converted_model, copy_model
from hessian_tools.objective import Objective, to
from hessian_tools.operators.base import Operator

SAMPLES = 256  # at most so many samples, and at most one batch, are used
AGREE = 1e-3  # relative difference of outputs above which a spike differs between the two
SAFETY = 4.0
VECTORS = 4  # at most so many products are compared
GRAPH = 6  # bytes of a double backward in float64, relative to those that a traced product keeps in float32
ROOM = 4 * 2**30  # bytes of a batch if no limit is given


def relative_round_off(
    objective: Objective, factory: Callable[[Objective, float], Operator], vectors: Tensor
) -> list[float]:
    """Estimate the round-off of an operator's products, relative to the size of the operator.

    The products with each vector are computed in the objective's dtype and in float64, on at most 256 samples and at
    most as many as one batch has. With fewer samples the estimate is larger, because the errors of samples average out.
    Of more than `VECTORS` vectors only `VECTORS` are used, and the largest of their errors is that of all.
    Samples for which a spike differs between the two are left out: that is not round-off of a product. In a group, each
    process computes the products with some of the vectors.

    Args:
        objective: The objective.
        factory: Makes the operator of an objective, with the memory for kept primals in bytes.
        vectors: Unit vectors [P, k], for example eigenvectors. The largest of their products is the operator's size.

    Returns:
        For each vector four times the error of its product relative to the largest product, at least the machine
        precision of the dtype. All are 0.0 in float64.
    """
    count = vectors.shape[1]
    if count > VECTORS:
        few = vectors[:, spread(count, VECTORS).to(vectors.device)]
        return [max(relative_round_off(objective, factory, few))] * count
    if objective.dtype == torch.float64:
        return [0.0] * count
    least = float(torch.finfo(objective.dtype).eps)
    try:
        pair = _both(objective)
    except (RuntimeError, TypeError, ValueError):  # a model that fixes its dtype
        return [least] * count
    if pair is None:
        return [least] * count
    group = objective.group
    own = torch.arange(count) if group is None else torch.arange(count)[group.rank :: group.size]
    norms = torch.zeros(2, count, dtype=torch.float64, device=objective.device)
    narrow, wide = factory(pair[0], 0.0), factory(pair[1], objective.batch_memory or ROOM)
    for some in own.split(torch.get_num_threads()) if len(own) else ():  # a few at a time, to save memory
        columns = vectors[:, some]
        image = (wide @ columns).double()
        norms[0, some] = image.norm(dim=0)
        norms[1, some] = ((narrow @ columns).double() - image).norm(dim=0)
    sizes, errors = objective.summed(norms)
    size = float(sizes.max())
    return [max(least, SAFETY * float(error) / size) if size else least for error in errors]


def round_off_samples(objective: Objective) -> int:
    """Return on how many samples the products are compared: as many as the memory of a batch allows, at least one."""
    return max(1, min(SAMPLES, objective.samples, max(objective.sizes), _room(objective)))


def _room(objective: Objective) -> int:
    """Return about how many samples a double backward in float64 can have in half the memory of a batch."""
    if (found := kept_bytes(objective)) is None:
        return SAMPLES
    once, each = found
    return int(((objective.batch_memory or ROOM) / 2 / GRAPH - once) / max(each, 1))


@torch.no_grad()
def _both(objective: Objective) -> tuple[Objective, Objective] | None:
    """Return the objective on a few samples in its own dtype and in float64; None if no sample is comparable."""
    index = spread(objective.samples, round_off_samples(objective))
    part = replace(objective.regrouped([index]), group=None)
    if objective.reset is not None:
        objective.reset(objective.model)  # a state with an autograd graph belongs to another dtype
    model = converted_model(copy_model(objective.model), torch.float64)
    named = dict(model.named_parameters())
    parameters: dict[str, Tensor] = {name: named[name] for name in objective.parameters}
    x, y = part.batches[0]
    part = replace(part, batches=part.batches[:1])  # those of the first shape, if shapes differ
    like = next(iter(parameters.values()))
    batch = (nested.converted(x, like), to(y, like))
    wide = replace(part, model=model, parameters=parameters, batches=(batch,), traces=_room(objective) < len(y))
    outputs, exact = part.outputs(x), wide.outputs(batch[0])
    gap = (outputs.double() - exact).abs().reshape(len(exact), -1).amax(1)
    alike = gap <= AGREE * exact.abs().max()
    if not alike.any():
        return None
    chosen = alike.nonzero().flatten().cpu()
    return part.regrouped([chosen]), wide.regrouped([chosen])
