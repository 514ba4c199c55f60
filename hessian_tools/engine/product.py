"""The curvature product of one batch of any network that can be traced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessian_tools import nested
from hessian_tools.engine import segments
from hessian_tools.engine.linearized import Linearized, output_form
from hessian_tools.engine.programs import lock, program_of, state_of
from hessian_tools.engine.trace import Program, run_stage
from hessian_tools.runtime.storages import Storages

ALIGNED = 64  # bytes, as torch aligns its own memory on the CPU

if TYPE_CHECKING:
    from hessian_tools.objective import Batch, Objective


def linearize_traced(objective: Objective, batch: Batch, kind: str, memory: float = math.inf) -> Linearized | str:
    """Return the curvature product of one batch, or why the network cannot be traced.

    Args:
        objective: The objective.
        batch: Inputs and targets.
        kind: "hessian", "ggn" or "fisher".
        memory: If the values that the product keeps take more bytes, it keeps none and runs in segments
            (`hessian_tools.engine.segments`).
    """
    x, y = batch
    state = state_of(objective.model)
    program = program_of(objective, x, kind == "hessian")
    if isinstance(program, str):
        return program
    if program.constant:
        return Linearized(torch.zeros_like, 0, path="traced")
    if program.nbytes > memory:
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

    def pushed(v: Tensor, here: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        here.update(zip(program.vector, _aligned(objective.split(v)), strict=True))
        (tangent,) = run_stage(program, 2, here)
        return tangent, curve(tangent).contiguous()

    def product(v: Tensor) -> Tensor:
        here = dict(kept)
        _, here[program.tangent] = pushed(v, here)
        return objective.flatten(run_stage(program, 3, here))

    nbytes = storages.alive([*state.values(), *nested.tensors(x), y])
    return Linearized(
        product, nbytes, path="traced", outputs=None if kind == "hessian" else lambda v: pushed(v, dict(kept))
    )


def _aligned(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield tensors that are contiguous and begin at a multiple of `ALIGNED` bytes, so that sums have the same bits."""
    for part in parts:
        whole = part.contiguous()
        yield whole.clone() if whole.data_ptr() % ALIGNED else whole


def _in_segments(objective: Objective, batch: Batch, kind: str, program: Program, memory: float) -> Linearized:
    """Return a product that keeps nothing and runs in segments, in as many as fit or at most as pay off."""
    x, y = batch
    program, plan = _best_plan(objective, x, kind == "hessian", program, memory)
    key = (program, plan.count)
    with lock:
        if (cut := objective.programs.get(key)) is None:
            assert program.module is not None
            cut = segments.segmented(program.module, program.results, plan, program.samples)
            objective.programs[key] = cut

    def product(v: Tensor) -> Tensor:
        values: dict[str, Any] = dict(
            zip(program.values, [*state_of(objective.model).values(), *nested.tensors(x)], strict=True)
        )
        values.update(zip(program.vector, _aligned(objective.split(v)), strict=True))

        def close(outputs: Tensor, tangent: Tensor, here: dict[str, Tensor]) -> bool:
            form = output_form(kind, objective.loss, outputs, y)
            if form is not None:
                slope, curve = form
                here[program.slope], here[program.tangent] = slope.contiguous(), curve(tangent).contiguous()
            return form is not None

        found = segments.product(cut, values, close)
        return objective.flatten(found) if found else torch.zeros_like(v)

    return Linearized(product, 0, path="traced")


def _best_plan(
    objective: Objective, x: Any, second: bool, program: Program, memory: float
) -> tuple[Program, segments.SegmentPlan]:
    """Return how a product is cut, and the program that is cut: one that joins no steps in time if that takes less."""
    assert program.module is not None
    plan = segments.plan_within(program.module, program.results, memory, program.samples)
    if plan.nbytes > memory:
        other = program_of(objective, x, second, folds=False)
        if isinstance(other, Program) and other.module is not None and not other.constant:
            steps = segments.plan_within(other.module, other.results, memory, other.samples)
            if steps.nbytes < plan.nbytes:
                return other, steps
    return program, plan


def kept_bytes(objective: Objective) -> tuple[float, float] | None:
    """Return how many bytes the Hessian product of one batch keeps: once, and per sample. None if it is not traced.

    Only the outputs of two samples are computed. The network is traced once for this and for the products.
    """
    x = objective.first_inputs(2)
    program = program_of(objective, x, second=True)
    if isinstance(program, str):
        return None
    once, each = program.kept_bytes
    return (once, each) if program.samples else (0, once / nested.sample_count(x))


def least_bytes(objective: Objective) -> float:
    """Return about how many bytes the Hessian product of one sample takes, in as many segments as save memory.

    0 if the network cannot be traced.
    """
    x = objective.first_inputs(1)
    program = program_of(objective, x, second=True)
    if isinstance(program, str) or program.constant:
        return 0.0
    return _best_plan(objective, x, True, program, 0)[1].nbytes
