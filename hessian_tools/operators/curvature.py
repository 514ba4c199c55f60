"""Curvature operators of an objective: surrogate Hessian, generalized Gauss-Newton, and empirical Fisher.

Products are computed by backpropagation through time over the objective's samples. The product is traced once and
replayed (`hessian_tools.engine`). A model that cannot be traced uses double backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from hessian_tools import nested
from hessian_tools.checks import refuse_autocast
from hessian_tools.engine.linearized import Linearized
from hessian_tools.engine.product import kept_bytes, linearize_traced
from hessian_tools.evaluation import differentiable
from hessian_tools.objective import Batch, Objective, Streamed
from hessian_tools.operators.base import Operator
from hessian_tools.runtime.cuda import Captured, full_precision, side_stream
from hessian_tools.runtime.storages import Storages
from hessian_tools.runtime.threads import as_in_threads, in_threads

T = TypeVar("T")
Map = Callable[[Tensor], Tensor]  # one batch's product: [P] -> [P]
_unknown_model = Lock()  # a model that cannot be traced may keep state, so that it runs in one thread at a time


class CurvatureOperator(Operator):
    """Mean over an objective's batches of one curvature matrix per batch. In a group, all ranks get the same products.

    The part of a product that depends only on the weights (the primal) is kept for as many batches as fit in `memory`
    bytes of saved tensors, and recomputed for the others.

    On the CPU the batches run in parallel, one thread each. With fewer batches than threads, the columns of a block run
    in parallel instead. Products by autograd run one after the other, because an unknown model may keep state.

    On CUDA, products are in full precision. Products of kept batches become CUDA graphs if their working memory fits in
    `memory` as well. All graphs share one working memory, no larger than the primal of one batch.

    Args:
        objective: The objective.
        linearize: Maps (objective, batch) to the product v [P] -> A_b v [P] of that batch.
        memory: Bytes for the kept primals.

    Attributes:
        path: How the products are computed, known after the first one: "traced", or by "autograd", which takes more
            time and memory, and one thread for all batches. Empty before.
        reason: Why the model could not be traced, in one line. Empty if it was.

    Raises:
        ObjectiveError: If the objective was made without `make_objective` and a check fails (see
            `hessian_tools.checks`), or from a product inside `torch.autocast`.
        FloatingPointError: From a product with the operator, if it is not finite.
    """

    @differentiable
    def __init__(
        self, objective: Objective, linearize: Callable[[Objective, Batch], Linearized], memory: float = 4 * 2**30
    ) -> None:
        super().__init__(objective.size, objective.dtype, objective.device)
        objective.check_once()
        self.objective = objective
        self._linearize = linearize
        self._memory = memory
        self._kept: dict[int, Map] = {}
        self._used = 0.0
        self._graphs = False  # whether the working memory of graphs is counted in `_used`
        self._lock = Lock()  # guards the three attributes above
        self._threads: bool | None = None
        self.path = self.reason = ""

    def _map(self, index: int) -> Map:
        """Return the product of a batch, kept if there is memory for it."""
        if index in self._kept:
            return self._kept[index]
        batches = self.objective.batches
        batch = batches[index]
        if self._used >= self._memory:
            return self._linearized(batch)
        with side_stream(self.device):
            product = self._linearized(batch)
        size = product.nbytes
        if isinstance(batches, Streamed):  # a kept product also holds the inputs that were read
            size = max(size, batch[0].nbytes)
        with self._lock:
            if self._used + size > self._memory:
                self._used = float(self._memory)  # full: later batches are not smaller
                return product
            self._used += size
            self._kept[index] = kept = self._captured(product, size)
        return kept

    def _linearized(self, batch: Batch) -> Linearized:
        product = self._linearize(self.objective, batch)
        if isinstance(product, Linearized) and (not self.path or product.reason):
            self.path, self.reason = product.path, product.reason
        return product

    def _captured(self, product: Linearized, size: int) -> Map:
        """Return a CUDA graph of a kept product if the device is CUDA and there is memory for it."""
        if self.device.type != "cuda" or not product.parallel or not product.nbytes:
            return product
        if not self._graphs and self._used + size <= self._memory:
            self._graphs = True
            self._used += size
        return Captured(product, product.nbytes) if self._graphs else product

    def _over_batches(self, task: Callable[[Map, float], T]) -> Iterator[T]:
        """Yield task(product, weight) for every batch of this rank, in order."""

        def run(item: tuple[int, float]) -> T:
            i, weight = item
            return task(self._map(i), weight)

        items = list(self.objective.batch_weights().items())
        if self._threads is None:
            with as_in_threads(len(items)):
                first = self._map(items[0][0]) if items else None
            self._threads = isinstance(first, Linearized) and first.parallel and self.device.type == "cpu"
        return in_threads(run, items) if self._threads else map(run, items)

    def _columns(self, product: Map, block: Tensor) -> list[Tensor]:
        """Apply a product to every column. With fewer batches than threads, the columns run in parallel."""
        return list((in_threads if self._threads else map)(product, block.unbind(1)))

    @differentiable
    def _apply(self, block: Tensor) -> Tensor:
        refuse_autocast(self.device)

        def part(product: Map, weight: float) -> Tensor:
            columns = self._columns(product, block)
            image = columns[0][:, None] if len(columns) == 1 else torch.stack(columns, 1)
            return image if weight == 1 else weight * image

        total: Tensor | None = None
        with full_precision(self.device):
            for image in self._over_batches(part):
                total = image if total is None else total + image
        total = self.objective.summed(torch.zeros_like(block) if total is None else total.detach())
        # the sum is finite if all entries are, unless it overflows
        if not torch.isfinite(total.sum()) and not torch.isfinite(total).all():
            raise FloatingPointError("a product with the operator is not finite")
        return total

    @differentiable
    def batch_forms(self, *blocks: Tensor, total: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Compute the quadratic forms V^T A_b V of every batch b, or of every part of `Objective.regrouped`.

        Every batch multiplies each column once. Columns are processed in groups of at most half a GiB.

        Args:
            blocks: Blocks V [P, k].
            total: Zeros [P, sum k], float64, to which the products with the columns of all blocks are added, in a
                group those of this process.

        Returns:
            One tensor [B, k, k] per block, float64 on the CPU, and the number of samples [B] of each batch.
        """
        refuse_autocast(self.device)
        self.products += sum(v.shape[1] for v in blocks)
        columns = max(1, 2**29 // (8 * self.shape[0]))

        def forms(product: Map, weight: float) -> tuple[Tensor, list[Tensor]]:
            rows, kept = [], []
            for block in blocks:
                for some in block.split(columns, 1):
                    images = torch.stack(self._columns(product, some.to(self.dtype))).double()
                    rows.append((images @ block).flatten())
                    if total is not None:
                        kept.append(weight * images.T)
            return torch.cat(rows).cpu(), kept

        counts = torch.tensor(self.objective.sizes, dtype=torch.float64)
        rows = torch.zeros(len(counts), sum(v.shape[1] ** 2 for v in blocks), dtype=torch.float64)
        with full_precision(self.device):
            for i, (row, images) in zip(self.objective.share, self._over_batches(forms), strict=True):
                rows[i] = row
                if total is not None:
                    total += torch.cat(images, 1)
        whole = self.objective.summed(rows.to(self.device)).cpu()
        if several := self.objective.parts:  # a part whose samples differ in shape is several batches
            owner = torch.repeat_interleave(torch.arange(len(several)), torch.tensor(several))
            sums = torch.zeros(len(several), whole.shape[1], dtype=torch.float64)
            sums.index_add_(0, owner, counts[:, None] * whole)
            counts = torch.zeros(len(several), dtype=torch.float64).index_add_(0, owner, counts)
            whole = sums / counts[:, None]
        return _square(whole, [v.shape[1] for v in blocks]), counts

    @differentiable
    def sample_forms(self, parts: Sequence[Tensor], *blocks: Tensor) -> tuple[list[Tensor], Tensor] | None:
        """Compute the quadratic forms V^T A_b V of parts of the samples from the tangents of the outputs.

        They are those of `batch_forms` on `Objective.regrouped(parts)`, in less than half of the time: A_b is a mean
        over samples of J^T B J, so that J V and B J V are enough.

        Args:
            parts: One index tensor [n] per part. Samples are numbered from 0 in the order of the batches.
            blocks: Blocks V [P, k].

        Returns:
            As `batch_forms`. None if the operator is not a traced Gauss-Newton or Fisher matrix of a single process, or
            if the tangents of a batch take more than half a GiB.
        """
        refuse_autocast(self.device)
        if self.objective.group is not None:
            return None
        widths = [v.shape[1] for v in blocks]
        vectors = torch.cat(blocks, 1).to(self.device, self.dtype).unbind(1)

        def forms(product: Map, weight: float) -> Tensor:
            outputs = product.outputs if isinstance(product, Linearized) else None
            if outputs is None:
                return torch.empty(0)
            with torch.no_grad():
                first = outputs(vectors[0])
                if 32 * len(vectors) * first[0].numel() > 2**29:
                    return torch.empty(0)
                pairs = [first, *map(outputs, vectors[1:])]
            a, b = (torch.stack([t.reshape(len(t), -1) for t in side], 1).double() for side in zip(*pairs, strict=True))
            halves = zip(a.split(widths, 1), b.split(widths, 1), strict=True)
            return len(a) * torch.cat([(tangents @ curved.mT).flatten(1) for tangents, curved in halves], 1).cpu()

        label = torch.empty(self.objective.samples, dtype=torch.long)
        for i, part in enumerate(parts):
            label[part.cpu()] = i
        rows = torch.zeros(len(parts), sum(k * k for k in widths), dtype=torch.float64)
        with full_precision(self.device):
            for some, each in zip(label.split(self.objective.sizes), self._over_batches(forms), strict=True):
                if len(each) != len(some):
                    return None
                rows.index_add_(0, some, each)
        self.products += sum(widths)
        counts = torch.bincount(label, minlength=len(parts)).double()
        return _square(rows / counts[:, None], widths), counts


def _square(rows: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Split rows [B, sum k^2] into one tensor [B, k, k] per width k. Raises FloatingPointError if one is not finite."""
    if not torch.isfinite(rows).all():
        raise FloatingPointError("a product with the operator is not finite")
    parts = zip(rows.split([k * k for k in widths], 1), widths, strict=True)
    return [part.reshape(-1, k, k).mT for part, k in parts]


def _by_autograd(
    linearize: Callable[[Objective, Batch], Map], objective: Objective, batch: Batch, reason: str
) -> Linearized:
    """Return the product of a batch by double backward, with the memory that its graph holds."""
    with _unknown_model, Storages() as storages:
        product = linearize(objective, batch)
    size = storages.alive([*objective.model.parameters(), *objective.model.buffers(), *nested.tensors(batch)])
    return Linearized(product, size, parallel=False, path="autograd", reason=reason)


@differentiable
def product_bytes(objective: Objective) -> tuple[float, float]:
    """Return about how many bytes the Hessian product of one batch keeps: once, and per sample.

    If the network can be traced, nothing is computed for this. Otherwise it is measured on at most 8 samples.
    """
    if (found := kept_bytes(objective)) is not None:
        return found
    x = objective.first_inputs(8)
    product = _by_autograd(_autograd_hessian, objective, (x, objective.targets[0][:8]), "")
    return 0.0, product.nbytes / nested.sample_count(x)


def _zero(v: Tensor) -> Tensor:
    """The product of a batch with zero curvature."""
    return torch.zeros_like(v)


def _autograd_hessian(objective: Objective, batch: Batch) -> Map:
    """Hessian-vector product of one batch by double backward."""
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


def pushforward(objective: Objective, outputs: Tensor) -> tuple[Map, Map]:
    """Return (v -> J v, u -> J^T u) for the Jacobian J of `outputs` with respect to the parameters.

    J v is computed by double backward, as the transpose of the transpose.

    Args:
        objective: The objective.
        outputs: Outputs of the model with their graph, of any shape, or another function of the parameters.
    """
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
    """Gauss-Newton product of one batch by autograd."""
    x, y = batch
    outputs = objective.outputs(x)
    if not outputs.requires_grad:
        return _zero
    forward, backward = pushforward(objective, outputs)
    leaf = outputs.detach().requires_grad_()
    loss = objective.loss(leaf, y)
    if not loss.requires_grad:
        return _zero
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    if not slope.requires_grad:
        return _zero

    def product(v: Tensor) -> Tensor:
        (curved,) = torch.autograd.grad(slope, leaf, forward(v), retain_graph=True)
        return backward(curved)

    return product


def _autograd_fisher(objective: Objective, batch: Batch) -> Map:
    """Empirical Fisher product of one batch by autograd."""
    x, y = batch
    outputs = objective.outputs(x)
    if not outputs.requires_grad:
        return _zero
    try:
        losses = torch.func.vmap(lambda o, t: objective.loss(o[None], t[None]))(outputs, y)
    except RuntimeError:  # the loss reads values or writes in place, which vmap does not allow
        losses = torch.stack([objective.loss(o[None], t[None]) for o, t in zip(outputs, y, strict=True)])
    if not losses.requires_grad:
        return _zero
    forward, backward = pushforward(objective, losses)
    return lambda v: backward(forward(v) / len(y))


def _linearize(
    kind: str, autograd: Callable[[Objective, Batch], Map], objective: Objective, batch: Batch, memory: float = 0
) -> Linearized:
    """Return the product of a batch: from the traced network, or else by autograd."""
    limit = objective.batch_memory or memory or math.inf
    traced = linearize_traced(objective, batch, kind, limit) if objective.traces else "not asked for"
    return _by_autograd(autograd, objective, batch, traced) if isinstance(traced, str) else traced


linearize_hessian = partial(_linearize, "hessian", _autograd_hessian)
linearize_ggn = partial(_linearize, "ggn", _autograd_ggn)
linearize_fisher = partial(_linearize, "fisher", _autograd_fisher)


def hessian(objective: Objective, memory: float = 4 * 2**30) -> CurvatureOperator:
    """Return the surrogate Hessian, which is indefinite in general.

    It is the exact Hessian of the network in which every spike is replaced by its local second-order Taylor expansion
    (2-jet), with the derivatives of the surrogate.

    Args:
        objective: The objective.
        memory: Bytes for the kept primals (see `CurvatureOperator`).
    """
    return CurvatureOperator(objective, partial(linearize_hessian, memory=memory), memory)


def ggn(objective: Objective, memory: float = 4 * 2**30) -> CurvatureOperator:
    """Return the generalized Gauss-Newton matrix J^T H_out J with surrogate Jacobians J.

    H_out is the Hessian of the loss with respect to the outputs. The matrix is positive semidefinite for a convex loss.

    Args:
        objective: The objective.
        memory: Bytes for the kept primals (see `CurvatureOperator`).
    """
    return CurvatureOperator(objective, partial(linearize_ggn, memory=memory), memory)


def fisher(objective: Objective, memory: float = 4 * 2**30) -> CurvatureOperator:
    """Return the empirical Fisher matrix: the mean over samples of g g^T, with g a sample's surrogate gradient.

    Args:
        objective: The objective.
        memory: Bytes for the kept primals (see `CurvatureOperator`).
    """
    return CurvatureOperator(objective, partial(linearize_fisher, memory=memory), memory)


OPERATORS: dict[str, Callable[[Objective, float], CurvatureOperator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
}
