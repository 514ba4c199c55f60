"""Tests of the CUDA settings that can be checked without a device; tests/test_gpu.py tests the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hessian_tools.objective import make_objective
from hessian_tools.operators import curvature as operators
from hessian_tools.runtime import cuda
from hessian_tools.runtime.cuda import Captured, full_precision
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
DEVICE = torch.device("cuda")


def tf32() -> list[Any]:
    """All that is set, or why it cannot be read."""
    b, found = torch.backends, []
    readers: list[Callable[[], Any]] = [
        lambda: b.cuda.matmul.allow_tf32,
        lambda: b.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    if NEW:
        readers += [lambda a=a: a.fp32_precision for a in (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b)]  # type: ignore[misc]
    for read in readers:
        try:
            found.append(read())
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    if NEW:
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


CHOICES = [
    "pass",
    "b.cuda.matmul.allow_tf32 = True",
    "b.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('medium')",
    *(["b.fp32_precision = 'tf32'", "b.cuda.matmul.fp32_precision = 'tf32'"] if NEW else []),
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.usefixtures("as_before")
def test_no_tf32_whatever_was_chosen_and_the_choice_is_back_afterwards(choice: str) -> None:
    exec(choice, {"torch": torch, "b": torch.backends})
    before = tf32()
    with contextlib.suppress(KeyError), full_precision(DEVICE):
        inside = tf32()
        raise KeyError
    assert tf32() == before
    assert inside[:3] == [False, False, "highest"] or (inside[:2] == [False, False] and "fp32" in choice)
    assert inside[3:6] == ["ieee"] * 3 * NEW
    with full_precision(torch.device("cpu")):
        assert tf32() == before


# ---------------------------------------------------------------- graphs
class Graph:
    """Run the captured function again."""

    pools: ClassVar[list[object]] = []
    owner: Captured

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        Graph.pools.append(pool)

    def capture_end(self) -> None:
        self.mine = Graph.owner

    def replay(self) -> None:
        workspace = self.mine._workspace
        assert workspace is not None
        workspace.out.copy_(self.mine.product(workspace.v))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_state", {"failed": False})
    monkeypatch.setattr(Graph, "pools", [])
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    for name, size in (("memory_allocated", 10), ("memory_reserved", 10), ("max_memory_allocated", 1010)):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)


@pytest.mark.usefixtures("device")
def test_graphs_of_one_size_share_their_memory_and_not_their_results() -> None:
    products = [Captured(lambda v, a=a: a * v, 8) for a in (2.0, 3.0)]  # type: ignore[misc]
    vs = torch.randn(4, 5)
    kept = []
    for Graph.owner in products:
        for v in vs:
            kept.append(Graph.owner(v))
    expected = torch.cat([2 * vs, 3 * vs])
    assert torch.equal(torch.stack(kept), expected)
    assert len(Graph.pools) == 2
    assert len(set(Graph.pools)) == 1
    assert products[0]._workspace is products[1]._workspace
    key = vs.device, vs.dtype, 5
    assert key in cuda._workspaces
    del products, Graph.owner
    gc.collect()  # the graph here and its product know each other
    assert key not in cuda._workspaces


@pytest.mark.usefixtures("device")
def test_a_product_that_cannot_be_captured_runs_as_it_is_after_one_warning() -> None:
    def waits(v: Tensor) -> Tensor:
        if len(Graph.pools) == 1:
            Graph.pools.append("failed")
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return 2 * v

    v = torch.randn(3)
    product = Graph.owner = Captured(waits, 8)
    assert torch.equal(product(v), 2 * v)
    with pytest.warns(UserWarning, match=r"^CUDA graph capture failed \(operation not .* capturing\): products run"):
        assert torch.equal(product(v), 2 * v)
    Graph.pools.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(product(v), 2 * v)
        other = Captured(waits, 8)
        assert torch.equal(other(v), 2 * v)
        assert torch.equal(other(v), 2 * v)
    assert Graph.pools == []  # no other capture is tried
    assert not cuda._workspaces


@pytest.mark.usefixtures("device")
def test_a_product_is_not_captured_if_its_memory_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (999, 2000))
    product, v = Captured(lambda v: 2 * v, 8), torch.randn(3)
    assert all(torch.equal(product(v), 2 * v) for _ in range(3))
    assert Graph.pools == []


@pytest.mark.usefixtures("device")
def test_every_call_gets_a_contiguous_vector() -> None:
    seen: list[Tensor] = []

    def run(v: Tensor) -> Tensor:
        seen.append(v)
        return v.clone()

    product = Graph.owner = Captured(run, 8)
    column = torch.arange(12.0).reshape(4, 3)[:, 1]
    assert all(torch.equal(product(column), column) for _ in range(3))
    assert all(v.is_contiguous() for v in seen)


def test_a_graph_is_made_where_its_work_fits_beside_the_kept_primals() -> None:
    net = Network(Spec(model="mlp", input_shape=(1, 2, 2), hidden=(3,), classes=2, norm="none"))
    objective = make_objective(net, LOSSES["mse"], (torch.rand(4, 1, 2, 2), torch.arange(4) % 2))
    product = operators.linearize_hessian(objective, objective.batches[0])
    size = product.nbytes  # type: ignore[attr-defined]
    for room, graph, used in ((2.5, True, 2), (1.5, False, 1)):
        op = operators.hessian(objective, room * size)
        op.device, op._used = DEVICE, size
        assert isinstance(op._captured(product, size), Captured) == graph
        assert op._used == used * size
        assert isinstance(op._captured(product, size), Captured) == graph  # the next: the same work again
        assert op._used == used * size
    unknown = dataclasses.replace(product, parallel=False)
    assert op._captured(unknown, size) is unknown
    op.device = torch.device("cpu")
    assert op._captured(product, size) is product
