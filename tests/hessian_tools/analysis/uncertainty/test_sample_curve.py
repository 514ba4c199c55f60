"""Tests of the curve over the number of samples, on linear regression, whose Hessian is X'X / n for any subset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hessian_tools.analysis.uncertainty.sample_curve import samples_curve, subsets
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import Operator
from hessian_tools.operators.curvature import hessian


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2


def regression(samples: int = 60, size: int = 6, batch_size: int = 25) -> Objective:
    x = torch.randn(samples, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return make_objective(
        nn.Linear(size, 1, bias=False), half_square, (x, x[:, :1]), batch_size=batch_size, dtype=torch.float64
    )


class Spy:
    """An operator factory and a `run` that record their arguments."""

    def __init__(self) -> None:
        self.objectives: list[Objective] = []
        self.names: list[str] = []
        self.memory: list[float] = []

    def operator(self, objective: Objective, memory: float) -> Operator:
        self.objectives.append(objective)
        self.memory.append(memory)
        return hessian(objective, memory)

    def run(self, name: str, op: Operator, compute: Any) -> dict[str, Any]:
        self.names.append(name)
        result: dict[str, Any] = compute(op)
        return result

    def inputs(self) -> list[np.ndarray[Any, Any]]:
        return [torch.cat([x for x, _ in o.batches]).numpy() for o in self.objectives]


def test_every_subset_agrees_with_its_dense_matrix() -> None:
    target, spy = regression(), Spy()
    points = samples_curve(
        target, [1, 7, 30, 45, 60], 3, operator=spy.operator, seed=1, top=3, memory=2**24, run=spy.run
    )
    assert [p.samples for p in points] == [1, 7, 30, 45, 60]
    assert [len(p.traces) for p in points] == [3, 3, 3, 3, 1]
    assert [p.disjoint for p in points] == [True, True, False, False, True]
    subsets_of = iter(spy.inputs())
    for point in points:
        for values, trace in zip(point.eigenvalues, point.traces, strict=True):
            x = next(subsets_of)
            assert len(x) == point.samples
            exact = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
            assert values == pytest.approx(exact[:3], abs=1e-6 * exact[0])
            assert trace == pytest.approx(np.trace(x.T @ x) / len(x), rel=0.5)  # 8 probes for what is not among the top
    assert next(subsets_of, None) is None
    assert len(set(spy.names)) == len(spy.names) == 13
    assert max(len(y) for o in spy.objectives for _, y in o.batches) <= 25
    assert max(spy.memory) <= 2**24


def test_with_all_eigenvalues_the_trace_is_exact() -> None:
    target, spy = regression(size=4), Spy()
    points = samples_curve(target, [20], 2, operator=spy.operator, seed=1, top=10)  # cut to P = 4
    for x, values, trace in zip(spy.inputs(), points[0].eigenvalues, points[0].traces, strict=True):
        assert len(values) == 4
        assert trace == pytest.approx(np.trace(x.T @ x) / 20)


def test_disjoint_blocks_share_no_sample_and_others_repeat_none() -> None:
    spy = Spy()
    samples_curve(regression(), [20], 3, operator=spy.operator, seed=2)
    rows = {tuple(row) for x in spy.inputs() for row in x}
    assert len(rows) == 60
    spy = Spy()
    samples_curve(regression(), [40], 3, operator=spy.operator, seed=2)
    for x in spy.inputs():
        assert len({tuple(row) for row in x}) == 40
    assert not np.array_equal(*(np.sort(x, 0) for x in spy.inputs()[:2]))
    assert [len(part) for part in subsets(10, 10, 4, torch.Generator())] == [10]


def test_the_same_seed_gives_the_same_curve() -> None:
    one, two, other = (samples_curve(regression(), [5, 50], 4, operator=hessian, seed=s) for s in (3, 3, 4))
    assert one == two
    assert one != other


def test_the_point_of_all_samples_is_that_of_the_objective() -> None:
    target = regression()
    matrix = torch.cat([x for x, _ in target.batches])
    exact = torch.linalg.eigvalsh(matrix.T @ matrix / 60).flip(0)
    (point,) = samples_curve(target, [60], 5, operator=hessian, seed=0)
    assert point.eigenvalues[0] == pytest.approx(exact[:5].tolist(), rel=1e-5)


def test_lambda_max_falls_with_the_number_of_samples() -> None:
    small, large = samples_curve(regression(4000, batch_size=4000), [20, 400], 10, operator=hessian, seed=0, top=1)
    assert np.mean(small.eigenvalues) > np.mean(large.eigenvalues) + 0.2
    assert np.mean(large.traces) == pytest.approx(6, rel=0.1)


def test_what_has_not_converged_is_nan() -> None:
    """A Hessian of size 400 with a dense bulk: its 60 largest eigenvalues take more than 100 products."""
    target = regression(800, 400, 800)
    (point,) = samples_curve(target, [800], 1, operator=hessian, seed=0, top=60)
    found = np.array(point.eigenvalues[0])
    assert np.isnan(found).any()
    ((x, _),) = target.batches
    exact = torch.linalg.eigvalsh(x.T @ x / 800).flip(0).numpy()[:60]
    assert (np.isnan(found) | (np.abs(found - exact) <= 1e-3 * exact[0])).all()


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        ([0, 5], {}, "from at least 1 to at most 60"),
        ([5, 61], {}, "at most 60"),
        ([5, 5], {}, "must increase"),
        ([9, 5], {}, "must increase"),
        ([5], {"resamples": 0}, "at least 1"),
        ([5], {"top": 0}, "at least 1"),
        ([5], {"trace_probes": 0}, "at least 1"),
    ],
)
def test_bad_numbers_are_refused(counts: list[int], changes: dict[str, int], message: str) -> None:
    settings: dict[str, Any] = {"resamples": 2, "operator": hessian, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message):
        samples_curve(regression(), counts, **settings)
    assert samples_curve(regression(), [], 2, operator=hessian, seed=0) == ()
