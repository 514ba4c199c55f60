"""The curvature product of one batch of any network that can be traced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hessian_tools import nested
from hessian_tools.engine import segments, tape
from hessian_tools.engine.folding import Folded, fold
from hessian_tools.engine.graph import Rule
from hessian_tools.engine.linearized import Linearized, output_form
from hessian_tools.engine.reasons import UntraceableError
from hessian_tools.engine.rewriting import Rewriting
from hessian_tools.engine.trace import Program, run_stage, trace_product
from hessian_tools.evaluation import copy_model, twice_differentiable
from hessian_tools.runtime.storages import Storages

if TYPE_CHECKING:
    from hessian_tools.objective import Batch, Objective

ROUNDING = 100  # outputs of the traced network may differ by this many units of rounding
MOST_SEGMENTS = 64  # of a product; every segment is a function of its own
_lock = Lock()


@dataclass(frozen=True)
class Tracing:
    """How networks with a certain kind of module are traced. Such modules have it as their attribute `tracing`.

    Attributes:
        rewriting: The mode in which the forward pass runs.
        rules: Rules by which the traced graph is simplified.
    """

    rewriting: type[Rewriting] = Rewriting
    rules: tuple[Rule, ...] = ()


def linearize_traced(objective: Objective, batch: Batch, kind: str, memory: float = 0) -> Linearized | str:
    """Return the curvature product of one batch, or why the network cannot be traced.

    Args:
        objective: The objective.
        batch: Inputs and targets.
        kind: "hessian", "ggn" or "fisher".
        memory: If the values that the product keeps take more bytes, it keeps none and runs in segments
            (`hessian_tools.engine.segments`). 0: it never does.
    """
    x, y = batch
    state = _state(objective.model)
    program = _program(objective, state, x, kind == "hessian")
    if isinstance(program, str):
        return program
    if program.constant:
        return Linearized(torch.zeros_like, 0, path="traced")
    if 0 < memory < program.nbytes:
        return _in_segments(objective, batch, kind, program, memory)
    values: dict[str, Any] = dict(zip(program.values, [*state.values(), *nested.tensors(x)], strict=True))
    with torch.no_grad():
        (outputs,) = run_stage(program, 0, values)
    with Storages() as storages:
        form = output_form(kind, objective.loss, outputs, y)
    if form is None:
        return Linearized(torch.zeros_like, 0, path="traced")
    slope, curve = form
    values[program.slope] = slope.contiguous()
    del outputs, form, slope
    with torch.no_grad():
        run_stage(program, 1, values)
    needed = {name for part in program.parts[2:] for name in part.inputs}
    kept = {name: value for name, value in values.items() if name in needed}
    del values
    storages.add(kept.values())

    def product(v: Tensor) -> Tensor:
        here = dict(kept)
        here.update(zip(program.vector, (part.clone() for part in objective.split(v)), strict=True))
        (tangent,) = run_stage(program, 2, here)
        here[program.tangent] = curve(tangent).contiguous()
        return objective.flatten(run_stage(program, 3, here))

    return Linearized(product, storages.alive([*state.values(), *nested.tensors(x), y]), path="traced")


def _in_segments(objective: Objective, batch: Batch, kind: str, program: Program, memory: float) -> Linearized:
    """Return a product that keeps nothing and runs in segments, in as many as fit or at most as pay off."""
    x, y = batch
    cut = _cut(objective, program, memory)
    if program.folded and cut.nbytes > memory:  # a segment then has all steps of a layer
        plain = _program(objective, _state(objective.model), x, kind == "hessian", False)
        if isinstance(plain, Program) and (other := _cut(objective, plain, memory)).nbytes < cut.nbytes:
            program, cut = plain, other

    def product(v: Tensor) -> Tensor:
        values: dict[str, Any] = dict(
            zip(program.values, [*_state(objective.model).values(), *nested.tensors(x)], strict=True)
        )
        values.update(zip(program.vector, (part.clone() for part in objective.split(v)), strict=True))

        def close(outputs: Tensor, tangent: Tensor, here: dict[str, Tensor]) -> bool:
            form = output_form(kind, objective.loss, outputs, y)
            if form is not None:
                slope, curve = form
                here[program.slope], here[program.tangent] = slope.contiguous(), curve(tangent).contiguous()
            return form is not None

        found = segments.product(cut, values, close)
        return objective.flatten(found) if found else torch.zeros_like(v)

    return Linearized(product, 0, path="traced")


def _cut(objective: Objective, program: Program, memory: float) -> segments.Segments:
    """Return a program in segments. It is cut at the first call."""
    count = math.ceil(2 * program.nbytes / memory)
    key = (program, count)
    with _lock:
        if (cut := objective.programs.get(key)) is None:
            assert program.module is not None
            outputs, tangent, *image = program.results
            cut = segments.segmented(program.module, outputs, tangent, image, min(count, MOST_SEGMENTS))
            objective.programs[key] = cut
    return cut


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def _program(objective: Objective, state: dict[str, Tensor], x: Any, second: bool, folds: bool = True) -> Program | str:
    """Return the traced product for the shape of x, traced at the first call. folds: time steps may be stacked."""
    model = objective.model
    leaves, _, structure = nested.flattened(x)
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in leaves)
    key = (model, tuple(objective.parameters), second, kinds, structure, folds)
    with _lock:
        found = objective.programs.get(key)
        if found is None:
            found = _traced(objective, state, x, second, folds)
            objective.programs[key] = found
    return found


def _traced(objective: Objective, state: dict[str, Tensor], x: Any, second: bool, folds: bool) -> Program | str:
    """Trace the product. The outputs must be those of the network."""
    offered = [t for m in objective.model.modules() if isinstance(t := getattr(m, "tracing", None), Tracing)]
    tracing = offered[0] if offered else Tracing()
    with torch.no_grad():
        expected = objective.outputs(x)
    if not isinstance(expected, Tensor):
        return f"the network returns a {type(expected).__name__}, not a tensor"
    model = copy_model(objective.model, share=True)
    values = [*state.values(), *nested.tensors(x)]
    folded = _folded(objective, model, state, x) if folds else None
    for forward, hoist in [*([(folded, True)] if folded else []), (None, True), (None, False)]:
        if objective.reset is not None:
            objective.reset(model)
        rewriting = partial(tracing.rewriting, hoist)
        try:
            program = trace_product(
                model, state, list(objective.parameters), x, expected, second, rewriting, tracing.rules, forward
            )
        except UntraceableError as error:
            if forward is not None:
                continue
            return str(error)
        with torch.no_grad():
            (outputs,) = run_stage(program, 0, dict(zip(program.values, values, strict=True)))
        if _same(outputs, expected):
            return program
    return "the traced network gives other outputs than the network"


def _folded(objective: Objective, model: nn.Module, state: dict[str, Tensor], x: Any) -> Folded | None:
    """Return the network with its time steps stacked, if that changes no spike."""
    _, inputs_of, _ = nested.flattened(x)
    if objective.reset is not None:
        objective.reset(model)
    try:
        with twice_differentiable():
            record = tape.record(model, state, nested.tensors(x), lambda parts: nested.call(model, inputs_of(parts)))
        folded = fold(record)
        same = folded is not None and folded.spikes_as([*state.values(), *nested.tensors(x)])
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
