"""Tests of parallel batches: results in order, one torch thread each, and the number of threads restored."""

import threading

import pytest
import torch
from torch import nn

from hessian_tools.engine.linearized import Linearized
from hessian_tools.objective import make_objective
from hessian_tools.operators.curvature import CurvatureOperator, ggn, hessian
from hessian_tools.runtime.threads import in_threads
from ikun.losses import LOSSES
from ikun.networks import Network, Spec


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_parallel_threads(two_threads: None) -> None:
    together = threading.Barrier(2, timeout=20)  # passes only if two run at once

    def work(i: int) -> tuple[int, int]:
        together.wait()
        return i, torch.get_num_threads()

    assert list(in_threads(work, range(6))) == [(i, 1) for i in range(6)]
    assert torch.get_num_threads() == 2


def test_one_thread_runs_in_the_caller() -> None:
    assert torch.get_num_threads() == 1
    assert set(in_threads(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}


def test_fewer_items_than_threads_run_in_the_caller_on_all_threads(two_threads: None) -> None:
    found = list(in_threads(lambda _: (threading.get_ident(), torch.get_num_threads()), [0]))
    assert found == [(threading.get_ident(), 2)]


def test_an_error_arrives_and_threads_are_put_back(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 // i, [3, 2, 0, 1]))
    assert torch.get_num_threads() == 2


def test_few_results_are_held_at_a_time(two_threads: None) -> None:
    started: list[int] = []
    results = in_threads(lambda i: started.append(i) or i, range(100))
    next(results)
    assert len(started) <= 3
    assert list(results) == list(range(1, 100))


def test_products_are_the_same_bits_with_any_number_of_threads(two_threads: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    data = torch.randn(37, 1, 6, 6), torch.randint(0, 3, (37,))
    for memory in (2**30, 0):
        op = hessian(make_objective(model, nn.functional.cross_entropy, data, batch_size=8), memory)
        v = torch.randn(op.shape[0], 2)
        several = op @ v
        assert op._threads
        torch.set_num_threads(1)
        single = hessian(op.objective, memory) @ v
        torch.set_num_threads(2)
        assert torch.equal(several, single)


@pytest.mark.parametrize("make", [hessian, ggn])
def test_the_columns_of_a_block_are_those_of_single_products(two_threads: None, make) -> None:
    torch.manual_seed(0)
    net = Network(Spec(input_shape=(1, 8, 8), channels=4)).eval()
    data = torch.rand(9, 1, 8, 8), torch.arange(9)
    op = make(make_objective(net, LOSSES["mse"], data, dtype=torch.float64))
    v = torch.randn(op.shape[0], 5, dtype=torch.float64)
    block = op @ v
    for i in range(5):
        torch.testing.assert_close(block[:, i], op @ v[:, i], rtol=1e-12, atol=1e-14)
    forms = op.batch_forms(v)[0][0]
    torch.testing.assert_close(forms[0], v.T @ block, rtol=1e-10, atol=1e-12)


def test_the_columns_of_a_block_run_side_by_side_where_there_are_few_batches(two_threads: None) -> None:
    together = threading.Barrier(2, timeout=20)  # passes only if two run at once
    objective = make_objective(nn.Linear(2, 1), nn.functional.mse_loss, (torch.ones(4, 2), torch.ones(4, 1)))
    op = CurvatureOperator(objective, lambda *_: Linearized(lambda v: together.wait() * 0 + v, 1))
    v = torch.randn(3, 4)
    assert torch.equal(op @ v, v)


def test_a_model_that_only_autograd_knows_runs_batch_by_batch(two_threads: None) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert threading.current_thread() is threading.main_thread()
            return x * self.w.sin()

    objective = make_objective(
        Counting(), lambda out, y: (out - y).square().mean(), (torch.ones(6, 2), torch.ones(6, 2))
    )
    assert torch.isfinite(hessian(objective.rebatched(2), 0) @ torch.ones(2)).all()
