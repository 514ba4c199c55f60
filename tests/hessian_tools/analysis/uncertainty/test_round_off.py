"""The round-off of float32 products is not underestimated, however few samples the memory allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from objectives import spiking_objective

from hessian_tools.analysis.uncertainty.round_off import relative_round_off, round_off_samples
from hessian_tools.engine.product import kept_bytes
from hessian_tools.objective import Objective
from hessian_tools.operators.curvature import hessian


def objective(dtype: torch.dtype) -> Objective:
    return spiking_objective(samples=60, loss="ce", batch_size=None, input_shape=(1, 4, 5), hidden=(30,), dtype=dtype)


@pytest.mark.parametrize("samples", [60, 7, 1, 0])
def test_as_many_samples_as_memory_allows_are_compared(samples: int) -> None:
    o = objective(torch.float32)
    found = kept_bytes(o)
    assert found is not None
    once, each = found
    limited = replace(o, batch_memory=2 * 6 * (once + each * (samples + 0.5)))
    assert round_off_samples(limited) == max(1, samples)
    v = torch.linalg.qr(torch.randn(o.size, 3, dtype=torch.float64))[0]
    exact = hessian(objective(torch.float64)) @ v
    error = ((hessian(o) @ v.float()).double() - exact).norm(dim=0) / exact.norm(dim=0).max()
    assert all(float(e) <= told for e, told in zip(error, relative_round_off(limited, hessian, v), strict=True))
