"""Products and gradients of other libraries' networks, and of plain torch, on a CUDA device against the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from engine_networks import NETWORKS, objective_of
from sampled import sampled
from torch import Tensor

from benchmarks.network_cases import make_case
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.curvature import OPERATORS
from hessian_tools.runtime import cuda
from hessian_tools.runtime.cuda import Captured
from ikun.adapters import adapt
from ikun.kernels import dispatch
from ikun.losses import LOSSES
from ikun.smoothed_operator import smoothed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LIBRARIES = {
    "csnn-spikingjelly": "spikingjelly",
    "csnn-snntorch": "snntorch",
    "recurrent-snntorch": "snntorch",
    "recurrent-by-hand": "torch",
}


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels and graphs run, not what replaces them with a warning."""
    monkeypatch.setattr(cuda, "_state", {"failed": False})
    monkeypatch.setattr(dispatch, "_state", {"broken": False, "triton broken": False})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Triton|CUDA graph|numba")
        yield


def adapted(name: str, device: str) -> Objective:
    """The objective of a network of a library, in two batches."""
    case = make_case(name, small=True)
    assert case.options is not None
    found = adapt(case.net, case.x, **case.options)
    y = torch.arange(len(case.x)) % case.classes
    data = case.x, y
    return make_objective(
        found.model, LOSSES["ce"], data, batch_size=2, dtype=torch.float64, device=device, reset=found.reset
    )


def agree(here: Objective, there: Objective, name: str) -> None:
    """Products are the CPU's when they warm up, are captured, and are replayed."""
    on_cpu, on_device = (OPERATORS[name](objective, 2**30) for objective in (here, there))
    vs = torch.randn(here.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = on_cpu @ vs
    found: list[Tensor] = [on_device @ vs[:, i].to("cuda") for i in range(3)]
    assert on_device.path == on_cpu.path, on_device.reason
    assert all(f.is_cuda for f in found)
    torch.testing.assert_close(torch.stack(found, 1).cpu(), expected, rtol=1e-9, atol=1e-12 * float(expected.norm()))
    if on_device.path == "traced" and expected.any():
        assert all(isinstance(kept, Captured) and kept._graph is not None for kept in on_device._kept.values())


@pytest.mark.parametrize("network", list(LIBRARIES))
def test_products_of_a_library_are_those_of_the_cpu(network: str) -> None:
    pytest.importorskip(LIBRARIES[network])
    here, there = adapted(network, "cpu"), adapted(network, "cuda")
    for name in OPERATORS:
        agree(here, there, name)


@pytest.mark.parametrize("network", ["csnn-spikingjelly", "recurrent-snntorch"])
def test_the_smoothed_operator_of_a_library_is_that_of_the_cpu(network: str) -> None:
    pytest.importorskip(LIBRARIES[network])
    here, there = (smoothed(adapted(network, device), 2**30, draws=4) for device in ("cpu", "cuda"))
    v = torch.randn(here.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = here @ v
    for _ in range(3):
        torch.testing.assert_close((there @ v.to("cuda")).cpu(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("network", sampled(NETWORKS, 12))
def test_products_of_a_torch_network_are_those_of_the_cpu(network: str) -> None:
    here, params = objective_of(NETWORKS[network]), NETWORKS[network].params
    there = make_objective(here.model, here.loss, list(here.batches), params=params, device="cuda", check=False)
    agree(here, there, "hessian")
