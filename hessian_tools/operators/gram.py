"""The whole spectrum of the Gauss-Newton matrix of few samples, from the Gram matrix of its factors.

With B = R^T R the second derivative of the loss by the outputs of all N samples and J their Jacobian, the Gauss-Newton
matrix is G = J^T B J. Its eigenvalues that are not zero are those of K = (R J) (R J)^T, which has only N C rows for C
outputs (Dangel et al. 2022, "ViViT", arXiv 2106.02624). So its trace, log determinant and density need no probes.

A row of R J is the gradient of one direction of one sample's outputs. One backward pass per output gives the gradients
of all samples by the outputs y of every layer, because no sample depends on another. With the layer's inputs a they
give K without J:

- a linear map: the sum over positions s, s' of (a_s . a'_s') (b_s . b'_s'), where b is the gradient by y, or, if that
  takes fewer operations, rows of J;
- a convolution, a norm, a bias: rows of J;
- parameters that are used in any other way: rows of J by backward passes for one sample at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from torch import Tensor

from hessian_tools import nested
from hessian_tools.engine.linearized import output_form
from hessian_tools.evaluation import differentiable
from hessian_tools.objective import Batch, Objective
from hessian_tools.operators.layer_gradients import (
    SAMPLES,
    LayerUse,
    by_sample,
    forward_with_uses,
    gradient_rows,
    sample_strides,
)
from hessian_tools.runtime.cuda import full_precision

LEAST = -1e-6  # eigenvalues of B relative to the largest one, from which on they are rounding
ROWS = 8192  # largest number of rows N C
BLOCK = 16  # samples whose factors are multiplied at a time
CHUNK = 2**16  # columns of J in one product, whose sum is in double precision


@dataclass(frozen=True, eq=False)
class Gram:
    """The Gram matrix K = (R J) (R J)^T and its eigenvalues.

    Attributes:
        matrix: K [N C, N C], float64, rows ordered by sample and then by output.
        values: Its eigenvalues in descending order [N C], which are those of G; all others of G are zero.
        roots: R of every batch [n, C, C], with 1 / N of the mean over samples.
    """

    matrix: Tensor
    values: Tensor
    roots: tuple[Tensor, ...]


class GramError(ValueError):
    """The objective has no Gram matrix, or one that is too large. The message says why."""


class _MixedError(GramError):
    """Rows of samples are not told apart as they should be."""


@differentiable
def gram_matrix(objective: Objective, progress: Callable[[int, int], None] | None = None) -> Gram:
    """Compute all eigenvalues of the Gauss-Newton matrix that are not zero.

    Args:
        objective: The loss, its data and its weights. No sample may depend on another.
        progress: Callback with the backward passes done and their total.

    Returns:
        The Gram matrix.

    Raises:
        GramError: If there are more than `ROWS` rows, the outputs of batches differ in number, or the loss is not
            convex in the outputs.
    """
    if any(p.is_complex() for p in objective.parameters.values()):
        raise GramError("the network has complex parameters")
    matrix, roots = assembled(objective, lambda root: root, progress)
    values = torch.linalg.eigvalsh(matrix)
    return Gram(matrix, values.flip(0).clamp_min(0), tuple(roots))


def assembled(
    objective: Objective, chosen: Callable[[Tensor], Tensor], progress: Callable[[int, int], None] | None
) -> tuple[Tensor, list[Tensor]]:
    """Return K and R of every batch. `chosen` maps R [n, C, C] to the rows [n, m, C] that are used."""
    try:
        return _assembled(objective, True, chosen, progress)
    except _MixedError:  # layers whose gradients by sample are not known
        return _assembled(objective, False, chosen, progress)


def _assembled(
    objective: Objective,
    by_layer: bool,
    chosen: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Return K and R, with rows by layer, or all of them by backward passes for each sample."""
    weights = objective.batch_weights()
    parts = _Parts()
    roots: list[Tensor] = []
    done = 0
    for (x, y), weight in ((objective.batches[i], w) for i, w in weights.items()):
        with full_precision(objective.device):
            outputs, uses, others = forward_with_uses(objective, x)
            if not by_layer:
                uses, others = [], set(objective.parameters)
            if roots and outputs[0].numel() != roots[0].shape[2]:
                raise GramError("the batches have outputs of different sizes")
            root = chosen(_root(objective, (x, y), outputs.detach()) * weight**0.5)
            roots.append(root)
            count = root.shape[1]
            if objective.samples * count > ROWS:
                raise GramError(
                    f"{objective.samples} samples with {count} outputs have {objective.samples * count} rows; at most "
                    f"{ROWS} are possible: use fewer samples, or hessian_tools.gram_estimate"
                )
            if outputs.requires_grad:
                report = _reporter(progress, done, len(weights) * count)
                _add(objective, parts, x, outputs, uses, others, root, report)
        done += count
    total = sum(len(root) * root.shape[1] for root in roots)
    matrix = torch.zeros(total, total, dtype=torch.float64)
    for rows in parts.rows.values():
        _add_rows(matrix, torch.cat([part.flatten(0, 1) for part in rows]))
    for pairs in parts.factors.values():
        _add_factors(matrix, pairs)
    matrix = (matrix + matrix.T) / 2
    _verify(objective, matrix, roots)
    return matrix, roots


def _reporter(progress: Callable[[int, int], None] | None, done: int, total: int) -> Callable[[int], None]:
    return lambda k: progress(done + k, total) if progress is not None else None


@differentiable
def gram_numbers(objective: Objective) -> int:
    """Return about how many numbers `gram_matrix` keeps at a time: rows of J, factors, and blocks of products of them.

    Args:
        objective: The objective. Only a few samples of its first batch are run.
    """
    outputs, uses, _ = forward_with_uses(objective, nested.selected(objective.batches[0][0], slice(SAMPLES)))
    n, count, samples = len(outputs), outputs[0].numel(), objective.samples
    if sample_strides(objective, objective.batches[0][0], uses) is None:
        uses = []
    factored = _factored(objective, uses, n, count)
    places: dict[str, int] = defaultdict(int)  # positions by weight: those of all calls are multiplied together
    for i in factored:
        places[uses[i].places["weight"]] += uses[i].y.numel() // uses[i].y.shape[-1] // n
    rows = sum(p.numel() for name, p in objective.parameters.items() if name not in places)
    factors = block = 0
    for name, positions in places.items():
        outs, ins = objective.parameters[name].shape
        factors += positions * (ins + count * outs)
        block = max(block, 2 * (min(BLOCK, samples) * count * positions) ** 2)  # the products, and a permuted copy
    return samples * (count * rows + factors) + block


@differentiable
def gram_eigenvectors(objective: Objective, gram: Gram, count: int) -> Tensor:
    """Return the eigenvectors [P, count] of the largest eigenvalues of G, by one backward pass per batch for each.

    Args:
        objective: The objective of the Gram matrix.
        gram: The Gram matrix.
        count: Number of eigenvectors. Eigenvalues that are zero have none, and their columns are zero.
    """
    found = torch.zeros(objective.size, count, dtype=torch.float64)
    rows, start = len(gram.matrix), 0
    _, ascending = eigh(gram.matrix.numpy(), subset_by_index=[rows - min(count, rows), rows - 1])
    vectors = torch.from_numpy(ascending).flip(1)
    count = vectors.shape[1]
    for ((x, _), _), root in zip(objective.weighted_batches(), gram.roots, strict=True):
        with full_precision(objective.device):
            outputs = objective.outputs(x)
            mine = vectors[start : start + len(root) * root.shape[1]]
            start += len(mine)
            u = torch.einsum("nqk,nqj->nkj", root, mine.view(len(root), root.shape[1], count).to(root))
            for j in range(count):
                grads = torch.autograd.grad(
                    outputs, list(objective.parameters.values()), u[..., j].reshape(outputs.shape).to(outputs),
                    retain_graph=j + 1 < count, allow_unused=True,
                )  # fmt: skip
                found[:, j] += objective.flatten(grads).cpu()
    found[:, :count] /= gram.values[:count].sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return found


def _verify(objective: Objective, matrix: Tensor, roots: Sequence[Tensor]) -> None:
    """Raise GramError unless u . K u is the squared norm of J^T R^T u, for a random u."""
    start, total = 0, torch.zeros(objective.size, dtype=torch.float64)
    random = torch.randn(len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for ((x, _), _), root in zip(objective.weighted_batches(), roots, strict=True):
        with full_precision(objective.device):
            outputs = objective.outputs(x)
            stop = start + len(root) * root.shape[1]
            u = torch.einsum("nqk,nq->nk", root, random[start:stop].view(root.shape[:2]).to(root))
            start = stop
            if outputs.requires_grad:
                weights = list(objective.parameters.values())
                grads = torch.autograd.grad(outputs, weights, u.reshape(outputs.shape).to(outputs), allow_unused=True)
                total += objective.flatten(grads).double().cpu()
    expected, found = float(total @ total), float(random @ matrix @ random)
    slack = 30 * torch.finfo(objective.dtype).eps ** 0.5
    if not abs(found - expected) <= slack * expected + torch.finfo(torch.float64).tiny:
        raise _MixedError("the gradients of the layers do not give those of the network: samples depend on one another")


def _root(objective: Objective, batch: Batch, outputs: Tensor) -> Tensor:
    """Return R [n, C, C] with R^T R the second derivative of the batch's loss by the outputs of each sample."""
    form = output_form("ggn", objective.loss, outputs, batch[1])
    n, count = len(outputs), outputs[0].numel()
    if form is None:
        return torch.zeros(n, count, count, dtype=torch.float64)
    second = torch.zeros(n, count, count, dtype=torch.float64, device=outputs.device)
    for k in range(count):
        unit = torch.zeros_like(outputs).reshape(n, count)
        unit[:, k] = 1
        second[:, :, k] = form[1](unit.view_as(outputs)).reshape(n, count)
    values, vectors = torch.linalg.eigh((second + second.mT) / 2)
    if float(values.min()) < LEAST * float(values.abs().max()):
        raise GramError("the loss is not convex in the outputs: its Gauss-Newton matrix is not a Gram matrix")
    root: Tensor = values.clamp_min(0).sqrt()[..., None] * vectors.mT
    return root


@dataclass
class _Parts:
    """What K is made of. rows: [n, C, p] per batch by parameter; factors: (a [n, S, I], b [n, C, S, O]) per batch."""

    rows: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    factors: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))


def _add(
    objective: Objective, parts: _Parts, x: Any, outputs: Tensor, uses: list[LayerUse], others: set[str], root: Tensor,
    report: Callable[[int], None],
) -> None:  # fmt: skip
    """Add the rows and factors of one batch."""
    n, count = root.shape[:2]
    ys = [use.y for use in uses]
    strides = sample_strides(objective, x, uses)
    if strides is None:
        others = others | {name for use in uses for name in use.places.values()}
        uses, ys, strides = [], [], []
    found: dict[str, list[Tensor]] = defaultdict(list)
    slopes: dict[int, list[Tensor]] = defaultdict(list)
    factored = _factored(objective, uses, n, count)
    for k in range(count):
        u = root[:, k].reshape(outputs.shape).to(outputs)
        grads = torch.autograd.grad(outputs, ys, u, retain_graph=True, allow_unused=True) if ys else ()
        rows: dict[str, Tensor] = {}
        for i, (use, g) in enumerate(zip(uses, grads, strict=True)):
            g = torch.zeros_like(use.y) if g is None else g
            a, b = (by_sample(use, t, n, strides[i]) for t in (use.args["input"], g))
            for place, name in use.places.items():
                if place == "weight" and i in factored:
                    slopes[i].append(b.reshape(n, -1, b.shape[-1]))
                    continue
                row = gradient_rows(use, place, a, b)
                rows[name] = rows[name] + row if name in rows else row
        for name, row in rows.items():
            found[name].append(row)
        report(k + 1)
    for name, each in found.items():
        parts.rows[name].append(torch.stack(each, 1))
    joined: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for i, each in slopes.items():
        a = by_sample(uses[i], uses[i].args["input"], n, strides[i])
        joined[uses[i].places["weight"]].append((a.reshape(n, -1, a.shape[-1]), torch.stack(each, 1)))
    for name, pairs in joined.items():
        parts.factors[name].append((torch.cat([a for a, _ in pairs], 1), torch.cat([b for _, b in pairs], 2)))
    for name, rows_of in _one_by_one(objective, x, sorted(others), root).items():
        parts.rows[name].append(rows_of)


def _factored(objective: Objective, uses: list[LayerUse], n: int, count: int) -> set[int]:
    """Return which uses are summed by factors. All uses of a weight are, or none."""
    factored = {i for i, use in enumerate(uses) if use.func is F.linear and _factors_pay(objective, use, n, count)}
    shared = defaultdict(set)
    for i, use in enumerate(uses):
        shared[use.places.get("weight")].add(i in factored)
    return {i for i in factored if shared[uses[i].places.get("weight")] == {True}}


def _factors_pay(objective: Objective, use: LayerUse, n: int, count: int) -> bool:
    """Return whether the products of factors take fewer operations than rows of J, for all samples."""
    weight = use.args["weight"]
    positions = use.y.numel() // weight.shape[0] // n
    total = objective.samples
    rows = total * count
    explicit = rows * weight.numel() * (positions + rows)
    factored = (total * positions) ** 2 * weight.shape[1] + (rows * positions) ** 2 * (weight.shape[0] + 1)
    return bool(factored < explicit)


def _one_by_one(objective: Objective, x: Any, names: Sequence[str], root: Tensor) -> dict[str, Tensor]:
    """Return the rows [n, C, p] of parameters that are used in other ways, by backward passes for each sample."""
    if not names:
        return {}
    weights = [objective.parameters[name] for name in names]
    found = {name: p.new_zeros(len(root), root.shape[1], p.numel()) for name, p in zip(names, weights, strict=True)}
    for i, units in enumerate(root):
        try:
            outputs = objective.outputs(nested.selected(x, slice(i, i + 1)))
        except RuntimeError as error:
            raise GramError(f"the network does not run on one sample ({str(error).splitlines()[0]})") from None
        for k, u in enumerate(units if outputs.requires_grad else ()):
            u = u.reshape(outputs.shape).to(outputs)
            grads = torch.autograd.grad(outputs, weights, u, retain_graph=True, allow_unused=True)
            for name, g in zip(names, grads, strict=True):
                if g is not None:
                    found[name][i, k] = g.flatten()
    return found


def _add_rows(matrix: Tensor, rows: Tensor) -> None:
    """Add rows rows^T."""
    for part in rows.split(CHUNK, 1):
        matrix += (part @ part.T).double().cpu()


def _add_factors(matrix: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Add the sums over positions of (a_s . a'_s') (b_s . b'_s')."""
    for i, (a, b, rows) in enumerate(_placed(pairs)):
        for j, (other_a, other_b, columns) in enumerate(_placed(pairs)):
            if j <= i:
                n, m = len(a), len(other_a)
                inputs = torch.einsum("nsi,mti->nmst", a, other_a)
                slopes = torch.einsum("nkso,mlto->nkmlst", b, other_b)
                block = torch.einsum("nmst,nkmlst->nkml", inputs, slopes).reshape(n * b.shape[1], m * b.shape[1])
                matrix[rows, columns] += block.double().cpu()
                if j < i:
                    matrix[columns, rows] += block.T.double().cpu()


def _placed(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield the factors of few samples at a time, with their rows of K."""
    start = 0
    for a, b in pairs:
        for few_a, few_b in zip(a.split(BLOCK), b.split(BLOCK), strict=True):
            stop = start + len(few_b) * few_b.shape[1]
            yield few_a, few_b, slice(start, stop)
            start = stop
