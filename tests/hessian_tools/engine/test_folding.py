"""Networks that step through time run their layers for all steps at once: the same product, fewer operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.engine.folding import Folded, fold
from hessian_tools.engine.linearized import Linearized
from hessian_tools.engine.tape import UnrecordableError, record, run_step
from hessian_tools.engine.trace import Program
from hessian_tools.objective import make_objective
from hessian_tools.operators import curvature

STEPS = 5
aten = torch.ops.aten


class Leak(nn.Module):
    """h = h / 2 + x, which returns tanh(h), with a state."""

    rests_at_zero = True

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, (after,) = run_step(self, x, (h,))
        assert after is not None
        return y, after

    def advance(self, x: Tensor, state: Any) -> Any:
        h = x + (0 if state[0] is None else 0.5 * state[0])
        return torch.tanh(h), (h,)

    def over_time(self, x: Tensor, steps: int, state: Any) -> Tensor:
        h, found = 0 if state[0] is None else state[0], []
        for t in range(steps):
            h = 0.5 * h + x[t if len(x) > 1 else 0]
            found.append(h)
        return torch.tanh(torch.stack(found))


class Layered(nn.Module):
    """Two layers, step by step; the input is the same at all steps, or a sequence."""

    def __init__(self, sequence: bool = True, feedback: bool = False, membrane: bool = False) -> None:
        super().__init__()
        self.sequence, self.feedback, self.membrane = sequence, feedback, membrane
        self.conv, self.norm, self.fc = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(12, 4)
        self.first, self.second = Leak(), Leak()

    def forward(self, x: Tensor) -> Tensor:
        a, b, y, out = x.new_zeros(len(x), 3, 4, 4), x.new_zeros(len(x), 4), x.new_zeros(len(x), 4), []
        for t in range(STEPS):
            current = self.norm(self.conv(x[:, t] if self.sequence else x[:, 0]))
            if self.feedback:
                current = current + y.mean(1)[:, None, None, None]
            s, a = self.first(current, a)
            y, b = self.second(self.fc(F.max_pool2d(s, 2).flatten(1)) * 1.5, b)
            out.append(b if self.membrane else y)
        return torch.stack(out).mean(0)


class Mixed(nn.Module):
    """A recurrent cell in plain torch with an autograd function of its own, entries by iteration, and an odd order."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.inside, self.outward = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, found = x.new_zeros(len(x), 6), []
        for part in x.flatten(2)[..., :8].unbind(1):
            h = Cube.apply(0.3 * (self.inward(part) + self.inside(h)))  # type: ignore[no-untyped-call]
            found.append(self.outward(h))
        return torch.stack([found[i] for i in (3, 1, 4, 0, 2)]).square().mean(0) + found[2] * found[4]


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 + x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * (3 * x**2 + 1)


def _product(model: nn.Module, kind: str) -> tuple[Tensor, Tensor, Counter[Any]]:
    torch.manual_seed(0)
    x, y = torch.randn(3, STEPS, 2, 4, 4, dtype=torch.float64), torch.arange(3)
    o = make_objective(model.double().eval(), F.cross_entropy, (x, y), check=False)
    v = torch.randn(o.size, dtype=torch.float64)
    op = curvature.OPERATORS[kind](o, 1e9)
    mine = op @ v
    assert op.path == "traced"
    theirs = Linearized(getattr(curvature, f"_autograd_{kind}")(o, o.batches[0]), 0)(v)
    (program,) = (p for p in o.programs.values() if isinstance(p, Program))
    calls: Counter[Any] = Counter()
    for part in program.parts:
        calls.update(n.target for n in part.run.graph.nodes if n.op == "call_function")  # type: ignore[attr-defined]
    return mine, theirs, calls


def _convolutions(calls: Counter[Any]) -> int:
    return calls[aten.convolution.default] + calls[aten.convolution_backward.default]


NETWORKS = {
    "sequence": Layered,
    "same input": lambda: Layered(sequence=False),
    "feedback": lambda: Layered(feedback=True),
    "membrane": lambda: Layered(membrane=True),
    "mixed": Mixed,
}


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_product_is_that_of_autograd(name: str, kind: str) -> None:
    mine, theirs, _ = _product(NETWORKS[name](), kind)
    assert torch.linalg.vector_norm(mine - theirs) <= 1e-13 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("sequence", [True, False])
def test_layers_run_once_for_all_steps(sequence: bool) -> None:
    """One value, one tangent, one gradient of the weights and its tangent."""
    *_, calls = _product(Layered(sequence), "hessian")
    assert _convolutions(calls) <= 4
    assert calls[aten.max_pool2d_with_indices.default] == 1


def test_a_linear_map_before_a_recurrent_cell_is_one_call() -> None:
    *_, calls = _product(Mixed(), "ggn")
    assert calls[aten.mm.default] + calls[aten.addmm.default] <= 8 * STEPS + 4


def test_little_memory_is_enough_without_stacks() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, STEPS, 2, 4, 4, dtype=torch.float64), torch.arange(3)
    o = make_objective(Layered().double().eval(), F.cross_entropy, (x, y), check=False)
    v = torch.randn(o.size, dtype=torch.float64)
    torch.testing.assert_close(curvature.OPERATORS["hessian"](o, 5000) @ v, curvature.OPERATORS["hessian"](o, 1e9) @ v)
    assert {p.folded for p in o.programs.values() if isinstance(p, Program)} == {True, False}


def _folded(model: nn.Module, x: Tensor) -> Folded | None:
    state = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return fold(record(model, state, [x], lambda parts: model(*parts)))


def test_calls_that_cannot_be_told_are_not_recorded() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).add_(x)

    with pytest.raises(UnrecordableError, match="in place"):
        _folded(InPlace(), torch.ones(2, 3))
    hidden = Cube.apply  # bound before the forward pass is recorded

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return hidden(self.layer(x)) * 2  # type: ignore[no-any-return, no-untyped-call]

    with pytest.raises(UnrecordableError, match="autograd function"):
        _folded(Hidden(), torch.ones(2, 3))


def test_other_values_are_found() -> None:
    """A module whose steps at once give something else is run step by step."""

    class Wrong(Leak):
        def over_time(self, x: Tensor, steps: int, state: Any) -> Tensor:
            return super().over_time(x, steps, state) * (1 + 1e-12)

    model = Layered().double().eval()
    x = torch.randn(3, STEPS, 2, 4, 4, dtype=torch.float64)
    found = _folded(model, x)
    assert found is not None
    assert found.spikes_as([*model.parameters(), *model.buffers(), x])
    model.second = Wrong()
    found = _folded(model, x)
    assert found is not None
    assert not found.spikes_as([*model.parameters(), *model.buffers(), x])
