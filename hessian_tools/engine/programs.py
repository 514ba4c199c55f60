"""Find the traced product of a network: traced once for batches of any number of samples, or else for each of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hessian_tools import nested
from hessian_tools.engine import resizing, tape
from hessian_tools.engine.folding import Folded, fold
from hessian_tools.engine.graph import Rule
from hessian_tools.engine.reasons import UntraceableError, reason_of
from hessian_tools.engine.rewriting import Rewriting
from hessian_tools.engine.trace import Program, run_stage, trace_product
from hessian_tools.evaluation import copy_model, twice_differentiable

if TYPE_CHECKING:
    from hessian_tools.objective import Objective

ROUNDING = 100  # outputs of the traced network may differ by this many units of rounding
DERIVATIVE_ERROR = 30  # and derivatives by this many square roots of it
SAMPLES = 4  # at most so many samples are used to compare derivatives
lock = Lock()  # held while a network is traced or cut


@dataclass(frozen=True)
class Tracing:
    """How networks with a certain kind of module are traced. Such modules have it as their attribute `tracing`.

    Attributes:
        rewriting: The mode in which the forward pass runs.
        rules: Rules by which the traced graph is simplified.
    """

    rewriting: type[Rewriting] = Rewriting
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class _General:
    """A product for as many samples as `resizing.SAMPLES`, or None if the network has none."""

    program: Program | None


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def program_of(objective: Objective, x: Any, second: bool, folds: bool = True) -> Program | str:
    """Return the traced product for the shape of x, or why the network cannot be traced.

    Args:
        objective: The objective, which keeps its programs.
        x: Inputs of the batch.
        second: Whether the product contains the second derivatives of the model, as that of the Hessian does.
        folds: Whether operations of several time steps may be joined (`hessian_tools.engine.folding` and `sums`). A
            product in segments takes less memory if they are not.
    """
    leaves, _, structure = nested.flattened(x)
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in leaves)
    key = (objective.model, tuple(objective.parameters), second, folds, structure, kinds)
    with lock:
        found: Program | str | None = objective.programs.get(key)
        if found is None:
            with _without_log():
                objective.programs[key] = found = _found(objective, x, second, folds)
    return found


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep torch from logging the errors of operations in a trace, after which another way is taken."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _found(objective: Objective, x: Any, second: bool, folds: bool) -> Program | str:
    """Return a product whose outputs are those of the network."""
    with torch.no_grad():
        expected = objective.outputs(x)
    if not isinstance(expected, Tensor):
        return f"the network returns a {type(expected).__name__}, not a tensor"
    values = [*state_of(objective.model).values(), *nested.tensors(x)]

    def agrees(program: Program) -> bool:
        with torch.no_grad():
            (outputs,) = run_stage(program, 0, dict(zip(program.values, values, strict=True)))
        return _same(outputs, expected)

    if (program := _for_any_number(objective, x, expected, second, folds, agrees)) is not None:
        return program
    reason = "the traced network gives other outputs or derivatives than the network"
    for model, forward, hoist in _ways(objective, x, x, folds, None):
        try:
            program = _trace(objective, model, x, expected, second, hoist, forward, folds)
        except UntraceableError as error:
            if forward is not None:
                continue
            return str(error)
        try:
            if agrees(program) and _derives(program, objective, x):
                return program
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that fails when it is called by itself, as oneDNN's LSTM does
            reason = reason_of(error)
    return reason


def _for_any_number(
    objective: Objective, x: Any, outputs: Tensor, second: bool, folds: bool, agrees: Callable[[Program], bool]
) -> Program | None:
    """Return the product that was traced for any number of samples, for that of x; None if there is none.

    It is traced at the first call.
    """
    leaves, rebuilt, structure = nested.flattened(x)
    orders = [resizing.axis_order(t) if t.dim() else None for t in leaves]
    if None in orders or not outputs.dim() or any(len(t) != len(outputs) for t in leaves):
        return None
    kinds = tuple((t.shape[1:], order, t.dtype, t.device) for t, order in zip(leaves, orders, strict=True))
    key = (objective.model, tuple(objective.parameters), second, folds, structure, kinds, outputs.shape[1:])

    def fitted(general: Program) -> Program | None:
        program = general.resized(len(outputs))
        try:
            return program if agrees(program) else None
        except (RuntimeError, ValueError, IndexError):  # a number in the graph depends on the samples in another way
            return None

    if key in objective.programs:
        known = objective.programs[key].program
        return None if known is None else fitted(known)
    objective.programs[key] = _General(None)
    mode = resizing.fake_mode()
    many = rebuilt([resizing.enlarged(t, order, mode) for t, order in zip(leaves, orders, strict=True) if order])
    wanted = resizing.enlarged(outputs, tuple(range(outputs.dim())), mode)
    for model, forward, hoist in _ways(objective, x, many, folds, mode):
        if not hoist:
            break
        try:
            general = _trace(objective, model, many, wanted, second, hoist, forward, folds)
        except UntraceableError:
            continue
        usable = general.module is not None and resizing.can_resize(general.module)
        if usable and (program := fitted(general)) is not None:
            few = nested.selected(x, slice(SAMPLES))
            try:
                right = _derives(general.resized(nested.sample_count(few)), objective, few)
            except (RuntimeError, ValueError, IndexError):  # buffers that have as many samples as x
                right = False
            if right:
                objective.programs[key] = _General(general)
                return program
    return None


def share_programs(known: Objective, other: Objective, change: Callable[[str], str]) -> None:
    """Give an objective the products of another one, so that its network is not traced.

    Their networks differ only in texts that are arguments of operations, such as the parameters of neurons. A product
    that does not multiply by the Jacobian of the other network is left out. Every product is compared with the network
    again when it is used first.

    Args:
        known: The objective whose products were traced.
        other: The objective that gets them.
        change: Function of a text that returns that of the other network.
    """
    few = nested.selected(known.batches[0][0], slice(SAMPLES))
    for key, value in list(known.programs.items()):
        program = value.program if isinstance(value, _General) else None
        if program is None or program.module is None or program.constant or key[0] is not known.model:
            continue
        changed = program.with_texts(change)
        if _derives(changed.resized(nested.sample_count(few)), other, few):
            other.programs[(other.model, *key[1:])] = _General(changed)


def _derives(program: Program, objective: Objective, x: Any) -> bool:
    """Return whether the product multiplies by the Jacobian J and by its transpose as autograd does.

    One backward pass of the network itself, for a random direction u of the outputs, is compared with J^T u, and its
    norm with u . J v for v along J^T u. A program that would take more memory than a batch may is not run for this.
    """
    if program.nbytes > (objective.batch_memory or math.inf):
        return True
    weights = list(objective.parameters.values())
    with torch.enable_grad():
        outputs = objective.outputs(x)
        u = _draw(outputs)
        found = torch.autograd.grad(outputs, weights, u, allow_unused=True) if outputs.requires_grad else ()
    expected = objective.flatten(found or [None] * len(weights))
    size = expected.norm()
    if not size.isfinite():
        return True
    if program.constant:
        return not size.any()
    tiny = torch.finfo(size.dtype).tiny
    v = expected / size.clamp_min(tiny)  # so that u . J v is the norm of J^T u
    with torch.no_grad():
        values = dict(zip(program.values, [*state_of(objective.model).values(), *nested.tensors(x)], strict=True))
        run_stage(program, 0, values)
        values[program.slope] = torch.zeros_like(u)
        run_stage(program, 1, values)
        values.update(zip(program.vector, (part.clone() for part in objective.split(v)), strict=True))
        (tangent,) = run_stage(program, 2, values)
        values[program.tangent] = u
        transposed = objective.flatten(run_stage(program, 3, values))
    slack = DERIVATIVE_ERROR * torch.finfo(size.dtype).eps ** 0.5 * size.clamp_min(tiny)
    return bool((transposed - expected).norm() <= slack) and bool(((tangent * u).sum() - size).abs() <= slack)


def _draw(like: Tensor) -> Tensor:
    """Return random normal numbers, always the same."""
    source = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=source, dtype=torch.float64).to(like.device, like.dtype)


def _ways(
    objective: Objective, x: Any, traced: Any, folds: bool, mode: FakeTensorMode | None
) -> Iterator[tuple[nn.Module, Folded | None, bool]]:
    """Yield a copy of the model, and how it can run while it is traced: with stacked steps, and with layers run once.

    Stacked steps are calls of modules of the copy, so that it has to be the one that is traced.

    Args:
        objective: The objective.
        x: Inputs of a batch.
        traced: The inputs that are traced, x or as many samples as `resizing.SAMPLES`.
        folds: Whether time steps may be stacked.
        mode: The mode of `traced`, if they are fake tensors.
    """
    model = copy_model(objective.model, share=True)
    if folds and (folded := _folded(objective, model, x, traced, mode)) is not None:
        yield model, folded, True
    yield model, None, True
    yield model, None, False


def _trace(
    objective: Objective,
    model: nn.Module,
    x: Any,
    outputs: Tensor,
    second: bool,
    hoist: bool,
    forward: Folded | None,
    joins: bool,
) -> Program:
    """Trace the product of a copy of the objective's model."""
    offered = [t for m in objective.model.modules() if isinstance(t := getattr(m, "tracing", None), Tracing)]
    tracing = offered[0] if offered else Tracing()
    if objective.reset is not None:
        objective.reset(model)
    rewriting = partial(tracing.rewriting, hoist)
    state, names = state_of(objective.model), list(objective.parameters)
    return trace_product(model, state, names, x, outputs, second, rewriting, tracing.rules, forward, joins)


def _folded(objective: Objective, model: nn.Module, x: Any, traced: Any, mode: FakeTensorMode | None) -> Folded | None:
    """Return the network with its time steps stacked, if that changes no spike."""
    _, inputs_of, _ = nested.flattened(x)
    state = state_of(objective.model)
    if objective.reset is not None:
        objective.reset(model)

    def forward(parts: Sequence[Tensor]) -> Any:
        return nested.call(model, inputs_of(parts))

    try:
        with twice_differentiable():
            record = tape.record(model, state, nested.tensors(traced), forward, mode)
        folded = fold(record)
        if folded is None:
            return None
        here = folded if mode is None else folded.resized(nested.sample_count(x))
        same = here.spikes_as([*state.values(), *nested.tensors(x)])
    except Exception:  # tracing tells why
        return None
    return folded if same else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two outputs are the same up to rounding, in which no spike differs."""
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.is_floating_point() and not b.is_complex():
        return torch.equal(a, b)
    size = b.abs()[b.isfinite()]
    error = ROUNDING * torch.finfo(b.dtype).eps * float(size.max()) if len(size) else 0.0
    return torch.allclose(a, b, rtol=0, atol=error, equal_nan=True)
