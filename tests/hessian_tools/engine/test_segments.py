"""Products in segments of the network: the same numbers in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.engine import segments
from hessian_tools.engine.linearized import output_form
from hessian_tools.engine.programs import program_of, state_of
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.curvature import OPERATORS


class Loop(nn.Module):
    """A recurrent network over many steps, with a readout at every step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.inward, self.inside, self.outward = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, out = x.new_zeros(len(x), 6), x.new_zeros(len(x), 4)
        for _ in range(self.steps):
            h = torch.tanh(self.inward(x) + self.inside(h))
            out = out + self.outward(h)
        return out / self.steps


class Residual(nn.Module):
    """Blocks whose input is added to their output, and a last layer that reads all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3)) for _ in range(5))
        self.last = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for block in self.blocks:
            x = x + block(x)
            seen.append(x)
        return self.last(torch.cat(seen, 1))


NETWORKS = {"loop": lambda: Loop(12), "residual": Residual, "one layer": lambda: nn.Linear(3, 4)}


def _objective(name: str) -> Objective:
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(4, (7,))
    return make_objective(NETWORKS[name]().double(), nn.functional.cross_entropy, (x, y), check=False)


def _in_segments(o: Objective, kind: str, count: int, v: Tensor, folds: bool = True) -> tuple[Tensor, int]:
    x, y = o.batches[0]
    program = program_of(o, x, kind == "hessian", folds)
    assert not isinstance(program, str)
    assert program.module is not None
    plan = segments.plan_of(program.module, program.results, count, program.samples)
    cut = segments.segmented(program.module, program.results, plan, program.samples)
    values = dict(zip(program.values, [*state_of(o.model).values(), x], strict=True))
    values.update(zip(program.vector, o.split(v), strict=True))

    def close(outputs: Tensor, tangent: Tensor, here: dict[str, Tensor]) -> bool:
        form = output_form(kind, o.loss, outputs, y)
        assert form is not None
        here[program.slope], here[program.tangent] = form[0], form[1](tangent)
        return True

    with torch.no_grad():
        return o.flatten(segments.product(cut, values, close)), cut.nbytes


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_product_is_the_same_to_the_last_bit(name: str, kind: str, count: int) -> None:
    o = _objective(name)
    v = torch.randn(o.size, dtype=torch.float64)
    assert torch.equal(_in_segments(o, kind, count, v)[0], OPERATORS[kind](o, 1e9) @ v)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_a_batch_that_does_not_fit_runs_in_segments(kind: str) -> None:
    o = _objective("loop")
    v = torch.randn(o.size, 2, dtype=torch.float64)
    whole, cut = OPERATORS[kind](o, 1e9), OPERATORS[kind](o, 4000)
    torch.testing.assert_close(cut @ v, whole @ v, rtol=1e-12, atol=1e-14)
    assert any(isinstance(found, segments.Segments) for found in o.programs.values())


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_more_segments_take_less_memory(kind: str) -> None:
    o = _objective("loop")
    v = torch.randn(o.size, dtype=torch.float64)
    held = [_in_segments(o, kind, count, v, folds=False)[1] for count in (1, 2, 4)]
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.95 * held[0]
