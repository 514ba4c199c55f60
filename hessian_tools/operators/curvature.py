"""Symmetric linear operators. An algorithm sees `.shape`, `.dtype`, `.device` and `op @ v`, v [P] or [P, k].

hessian, ggn and fisher are products through backpropagation in time over an objective's samples, by the passes of
second_order.py where every layer of the model has them (segment by segment of time if the objective says so), by double
backward elsewhere; dense, scaled, shifted, projected and summed ones are algebra on any operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock

import torch
from torch import Tensor

from hessian_tools.chain import second_order, segments
from hessian_tools.objective import Batch, Objective, Streamed
from hessian_tools.operators.base import Operator
from hessian_tools.runtime.cuda import Captured, full_precision, side_stream
from hessian_tools.runtime.threads import in_threads

Map = Callable[[Tensor], Tensor]  # one batch's product: [P] -> [P]


class CurvatureOperator(Operator):
    """Mean over an objective's batches of one curvature matrix per batch; under a group, all ranks get the same.

    The part that depends on the weights alone (the primal) is kept for as many batches as fit into `memory` bytes of
    saved tensors and recomputed for the rest. On the CPU the batches (the columns of a block, where there are fewer
    batches than threads) run side by side, one thread each, unless they go through autograd, where a model of unknown
    make may keep state. On CUDA products are in full precision, and those of
    kept batches become CUDA graphs where their work fits as well (it takes no more than one batch's primal, once for
    all). A product that is not finite raises FloatingPointError.
    """

    def __init__(
        self, objective: Objective, linearize: Callable[[Objective, Batch], Map], memory: float = 4 * 2**30
    ) -> None:
        super().__init__(objective.size, objective.dtype, objective.device)
        self.objective = objective
        self._linearize = linearize
        self._memory = memory
        self._kept: dict[int, Map] = {}
        self._used = 0.0
        self._graphs = False  # whether the work of graphs is counted in `used`
        self._lock = Lock()  # of the three above
        self._threads: bool | None = None

    def _map(self, index: int) -> Map:
        if index in self._kept:
            return self._kept[index]
        batches = self.objective.batches
        batch = batches[index]
        if self._used >= self._memory:
            return self._linearize(self.objective, batch)
        product, size = _measured(self.objective, batch, self._linearize)
        if isinstance(batches, Streamed):  # what is kept holds what was read, too
            size = max(size, batch[0].nbytes)
        with self._lock:
            if self._used + size <= self._memory:
                self._used += size
                self._kept[index] = product = self._captured(product, size)
            else:
                self._used = float(self._memory)  # full: the batches that follow are not smaller
        return product

    def _captured(self, product: Map, size: int) -> Map:
        """On CUDA a graph of a kept product, if there is room for its work."""
        if self.device.type != "cuda" or not isinstance(product, second_order.Linearized) or not product.nbytes:
            return product
        if not self._graphs and self._used + size <= self._memory:
            self._graphs = True
            self._used += size
        return Captured(product, product.nbytes) if self._graphs else product

    def _over_batches(self, task: Callable[[Map, float], Tensor]) -> Iterator[Tensor]:
        """task(product, weight) for every batch of this rank, in order."""

        def run(item: tuple[int, float]) -> Tensor:
            i, weight = item
            return task(self._map(i), weight)

        items = list(self.objective.batch_weights().items())
        if self._threads is None:
            hand_written = bool(items) and isinstance(self._map(items[0][0]), second_order.Linearized)
            self._threads = hand_written and self.device.type == "cpu"
        return in_threads(run, items) if self._threads else map(run, items)

    def _columns(self, product: Map, block: Tensor) -> list[Tensor]:
        """product of every column; with fewer batches than threads, the columns run side by side."""
        return list((in_threads if self._threads else map)(product, block.unbind(1)))

    def _apply(self, block: Tensor) -> Tensor:
        total = torch.zeros_like(block)
        with full_precision(self.device):
            for part in self._over_batches(lambda a, weight: weight * torch.stack(self._columns(a, block), 1)):
                total += part
        total = self.objective.summed(total)
        if not torch.isfinite(total).all():
            raise FloatingPointError("a product with the operator is not finite")
        return total

    def batch_forms(self, *blocks: Tensor) -> tuple[list[Tensor], Tensor]:
        """V' A_b V of every batch b [B, k, k], for each block V [P, k]; and the samples of each batch [B].

        Float64, on the CPU; one product with every batch and column, as many columns at a time as take half a GiB.
        """
        self.products += sum(v.shape[1] for v in blocks)
        columns = max(1, 2**29 // (8 * self.shape[0]))

        def forms(product: Map, weight: float) -> Tensor:
            rows = []
            for block in blocks:
                for some in block.split(columns, 1):
                    images = torch.stack(self._columns(product, some.to(self.dtype))).double()
                    rows.append((images @ block).flatten())
            return torch.cat(rows).cpu()

        counts = torch.tensor(self.objective.sizes, dtype=torch.float64)
        rows = torch.zeros(len(counts), sum(v.shape[1] ** 2 for v in blocks), dtype=torch.float64)
        with full_precision(self.device):
            for i, row in zip(self.objective.share, self._over_batches(forms), strict=True):
                rows[i] = row
        parts = self.objective.summed(rows.to(self.device)).cpu().split([v.shape[1] ** 2 for v in blocks], 1)
        shapes = [v.shape[1] for v in blocks]
        return [part.reshape(-1, k, k).mT for part, k in zip(parts, shapes, strict=True)], counts


def _measured(objective: Objective, batch: Batch, linearize: Callable[[Objective, Batch], Map]) -> tuple[Map, int]:
    """A batch's product and the bytes that it keeps."""
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), side_stream(objective.device):
        product = linearize(objective, batch)
    return product, getattr(product, "nbytes", 0) or sum(saved.values())


def batch_size_within(objective: Objective, memory: float, most: int = 2048) -> int:
    """How many samples one batch's primal may hold within `memory` bytes, from a trial on 8 of them; at least 1.

    0 where one sample of a long sequence is too many (segments.py). Large batches are faster as long as they fit (the
    overhead is per batch).
    """
    if each := segments.bytes_per_sample(objective):
        return int(min(most, memory / each))
    x = objective.first_inputs(8)
    _, size = _measured(objective, (x, objective.targets[0][:8]), _linearize_hessian)
    return int(max(1, min(most, memory * len(x) / max(size, 1))))


def _zero(v: Tensor) -> Tensor:
    return torch.zeros_like(v)


def _autograd_hessian(objective: Objective, batch: Batch) -> Map:
    parameters = list(objective.parameters.values())
    x, y = batch
    loss = objective.loss(objective.outputs(x), y)
    if not loss.requires_grad:
        return _zero
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    live = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    if not live:
        return _zero
    chosen = [gradients[i] for i in live]

    def product(v: Tensor) -> Tensor:
        parts = objective.split(v)
        return objective.flatten(
            torch.autograd.grad(chosen, parameters, [parts[i] for i in live], retain_graph=True, allow_unused=True)
        )

    return product


def _pushforward(objective: Objective, outputs: Tensor) -> tuple[Map, Map]:
    """(v -> J v, u -> J' u) for the Jacobian of `outputs`; J v by the transpose of a transpose."""
    parameters = list(objective.parameters.values())
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, parameters, dummy, create_graph=True, allow_unused=True)
    live = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]

    def forward(v: Tensor) -> Tensor:
        if not live:
            return torch.zeros_like(outputs)
        parts = objective.split(v)
        chosen = [pulled[i] for i in live]
        (result,) = torch.autograd.grad(chosen, dummy, [parts[i] for i in live], retain_graph=True)
        return result

    def backward(u: Tensor) -> Tensor:
        return objective.flatten(torch.autograd.grad(outputs, parameters, u, retain_graph=True, allow_unused=True))

    return forward, backward


def _autograd_ggn(objective: Objective, batch: Batch) -> Map:
    x, y = batch
    outputs = objective.outputs(x)
    if not outputs.requires_grad:
        return _zero
    forward, backward = _pushforward(objective, outputs)
    leaf = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(objective.loss(leaf, y), leaf, create_graph=True)
    if not slope.requires_grad:
        return _zero

    def product(v: Tensor) -> Tensor:
        (curved,) = torch.autograd.grad(slope, leaf, forward(v), retain_graph=True)
        return backward(curved)

    return product


def _autograd_fisher(objective: Objective, batch: Batch) -> Map:
    x, y = batch
    outputs = objective.outputs(x)
    if not outputs.requires_grad:
        return _zero
    losses = torch.func.vmap(lambda o, t: objective.loss(o[None], t[None]))(outputs, y)
    forward, backward = _pushforward(objective, losses)
    return lambda v: backward(forward(v) / len(y))


def _by_hand(objective: Objective, batch: Batch, kind: str) -> Map | None:
    found = segments.linearize_in_segments(objective, batch, kind) if objective.segmented else None
    return found or second_order.linearize(objective, batch, kind)


def _linearize_hessian(objective: Objective, batch: Batch) -> Map:
    return _by_hand(objective, batch, "hessian") or _autograd_hessian(objective, batch)


def _linearize_ggn(objective: Objective, batch: Batch) -> Map:
    return _by_hand(objective, batch, "ggn") or _autograd_ggn(objective, batch)


def _linearize_fisher(objective: Objective, batch: Batch) -> Map:
    return _by_hand(objective, batch, "fisher") or _autograd_fisher(objective, batch)


def hessian(objective: Objective, memory: float = 4 * 2**30) -> CurvatureOperator:
    """The surrogate Hessian: the exact Hessian of the network whose spikes are their local 2-jets. Indefinite."""
    return CurvatureOperator(objective, _linearize_hessian, memory)


def ggn(objective: Objective, memory: float = 4 * 2**30) -> CurvatureOperator:
    """Generalized Gauss-Newton J' H_out J with surrogate Jacobians; positive semidefinite for a convex loss."""
    return CurvatureOperator(objective, _linearize_ggn, memory)


def fisher(objective: Objective, memory: float = 4 * 2**30) -> CurvatureOperator:
    """Empirical Fisher: the mean over samples of g g', g a sample's surrogate gradient."""
    return CurvatureOperator(objective, _linearize_fisher, memory)


OPERATORS: dict[str, Callable[[Objective, float], CurvatureOperator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
}
