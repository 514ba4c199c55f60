"""Tests of captured products, with a stand-in for CUDA's memory and graphs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hessian_tools.runtime import cuda
from hessian_tools.runtime.cuda import Captured


class Card:
    """What `Captured` asks of torch.cuda. The peak of a product is `needs`."""

    def __init__(self, free: int, needs: int = 100) -> None:
        self.free, self.needs, self.graphs = free, needs, 0

    def use(self, monkeypatch: pytest.MonkeyPatch) -> Card:
        names = {
            "memory_allocated": lambda device: 10,
            "memory_reserved": lambda device: 10,
            "max_memory_allocated": lambda device: 10 + self.needs,
            "reset_peak_memory_stats": lambda device: None,
            "mem_get_info": lambda device: (self.free, 1000),
            "synchronize": lambda device: None,
            "empty_cache": lambda: None,
            "graph_pool_handle": lambda: 0,
            "CUDAGraph": self.graph,
        }
        for name, stand_in in names.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(cuda, "_state", {"failed": False})
        return self

    def graph(self) -> Any:
        self.graphs += 1
        raise RuntimeError("operation not permitted when stream is capturing")


def test_after_a_failed_capture_no_other_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(free=1000).use(monkeypatch)
    products = [Captured(lambda v: 2 * v, 0) for _ in range(3)]
    v = torch.ones(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for product in products:
                assert torch.equal(product(v), 2 * v)
    assert card.graphs == 1
    assert [str(w.message).split(":")[0] for w in caught] == [
        "CUDA graph capture failed (operation not permitted when stream is capturing)"
    ]


def test_a_product_is_not_captured_if_its_memory_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(free=99).use(monkeypatch)
    product = Captured(lambda v: 2 * v, 0)
    v = torch.ones(4)
    assert all(torch.equal(product(v), 2 * v) for _ in range(3))
    assert card.graphs == 0


def test_every_call_gets_a_contiguous_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(free=0).use(monkeypatch)
    seen: list[Tensor] = []

    def run(v: Tensor) -> Tensor:
        seen.append(v)
        return v.clone()

    product = Captured(run, 0)
    column = torch.arange(12.0).reshape(4, 3)[:, 1]
    assert all(torch.equal(product(column), column) for _ in range(2))
    assert all(v.is_contiguous() for v in seen)
