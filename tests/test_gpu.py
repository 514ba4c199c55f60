"""Tests of CUDA against the CPU. Run with pytest -m gpu where there is a device."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from neuron_passes import same, value
from torch import Tensor, nn

import cli
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.curvature import OPERATORS, CurvatureOperator
from hessian_tools.runtime import cuda
from hessian_tools.runtime.cuda import Captured
from ikun.checkpoint import load_checkpoint
from ikun.kernels import dispatch
from ikun.layers import MaxPool
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.neurons import NEURONS, RESETS, Dynamics, Neuron
from ikun.surrogates import Surrogate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "digits-csnn-ikun.pt"


@pytest.mark.parametrize("name", list(OPERATORS))
def test_products_agree_with_the_cpu(name: str) -> None:
    checkpoint = load_checkpoint(CHECKPOINT)
    data = checkpoint.data.load()
    x, y = data.images[:64], data.labels[:64]
    here, there = (
        OPERATORS[name](
            make_objective(checkpoint.build(), LOSSES["mse"], (x, y), dtype=torch.float64, device=device), 2**30
        )
        for device in ("cpu", "cuda")
    )
    v = torch.randn(here.shape[0], 2, dtype=torch.float64)
    torch.testing.assert_close((there @ v).cpu(), here @ v, rtol=1e-9, atol=1e-12)


def test_spectrum_and_training_run_on_the_device(tmp_path: Path) -> None:
    out = tmp_path / "x.pt"
    quick = ["--top", "3", "--smallest", "2", "--steps", "8", "--samples", "128"]
    assert cli.run(["train", "--epochs", "2", "--channels", "4", "--device", "cuda", "--out", str(out)]) == 0
    for device in ("cpu", "cuda"):
        assert cli.run(["spectrum", str(out), *quick, "--device", device, "--tag", device]) == 0
    top = [
        json.loads((tmp_path / f"x.{d}.spectrum.json").read_text())["spectra"]["hessian"]["eigenvalues"][0]["value"]
        for d in ("cpu", "cuda")
    ]
    assert top[1] == pytest.approx(top[0], rel=1e-3)


def pair(dtype: torch.dtype = torch.float64, device: str = "cuda", **fields: object) -> Objective:
    """Two batches of a CSNN in which all layers fire; the same numbers on every device."""
    torch.manual_seed(0)
    small = {"input_shape": (1, 9, 10), "channels": 3, "classes": 4, "timesteps": 3, "threshold": 0.6, "v_reset": -0.1}
    net = Network(Spec(**{**small, **fields})).double()  # type: ignore[arg-type]
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.weight.data.mul_(2).add_(2 / m.weight[0].numel())
    x, y = torch.rand(20, 1, 9, 10, dtype=torch.float64), torch.arange(20) % 4
    return make_objective(net, LOSSES["ce"], [(x[:12], y[:12]), (x[12:], y[12:])], dtype=dtype, device=device)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels and graphs, not what stands in for them with a warning."""
    monkeypatch.setattr(cuda, "_state", {"failed": False})
    monkeypatch.setattr(dispatch, "_state", {"broken": False, "triton broken": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    assert not any(dispatch._state.values())
    assert not cuda._state["failed"]


# --- kernels (see also ikun/kernels/test_triton_kernels.py)
@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", NEURONS)
def test_spikes_are_those_of_plain_torch_to_the_bit(
    kind: str, reset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    dynamics = Dynamics(Surrogate.parse("atan:2"), threshold=0.7, v_reset=-0.3, reset=reset)
    neuron = Neuron(kind, dynamics, tau=1.7).to("cuda", dtype)
    for shape in ((4, 61, 33, 28, 28), (5, 7, 3, 7, 9), (1, 3, 5, 14, 14)):
        x = (8 * torch.randn(shape, device="cuda", dtype=dtype)).round() / 8 + 0.3
        for pool in (None, MaxPool("first"), MaxPool("last")):
            with torch.no_grad():
                found = value(neuron, 4 if shape[0] == 1 else shape[0], pool, x)
                with monkeypatch.context() as patch:
                    patch.setattr(dispatch, "usable", lambda like: False)
                    expected = value(neuron, 4 if shape[0] == 1 else shape[0], pool, x)
            assert 0 < found[0].mean() < 1
            assert all(same(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("neuron", NEURONS)
def test_a_training_gradient_is_the_cpus(neuron: str) -> None:
    pytest.importorskip("triton")
    gradients = []
    for device in ("cpu", "cuda"):
        objective = pair(device=device, neuron=neuron)
        (x, y), net = objective.batches[0], objective.model
        loss = LOSSES["ce"](net(x), y)
        gradients.append([g.cpu() for g in torch.autograd.grad(loss, list(net.parameters()))])
    for found, expected in zip(*gradients, strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_and_graphs_run_on_the_device_of_their_tensors_and_not_on_the_current_one() -> None:
    pytest.importorskip("triton")
    here, there = (OPERATORS["ggn"](pair(device=device, neuron="lif"), 2**30) for device in ("cpu", "cuda:1"))
    v = torch.randn(here.shape[0], dtype=torch.float64)
    expected = here @ v
    for _ in range(3):
        torch.testing.assert_close((there @ v.to("cuda:1")).cpu(), expected, rtol=1e-9, atol=1e-12)
    graphs_of(there)
    assert torch.cuda.current_device() == 0


# ---------------------------------------------------------------- graphs
def graphs_of(op: CurvatureOperator) -> list[Captured]:
    assert op._kept
    for product in op._kept.values():
        assert isinstance(product, Captured)
        assert product._graph is not None
    return list(op._kept.values())  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("fields", [{"neuron": "lif"}, {"neuron": "plif", "reset": "soft"}, {"norm": "none"}])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_replayed_products_are_the_cpus(name: str, fields: dict[str, object]) -> None:
    pytest.importorskip("triton")
    here, there = (OPERATORS[name](pair(device=device, **fields), 2**30) for device in ("cpu", "cuda"))
    vs = torch.randn(here.shape[0], 6, dtype=torch.float64)
    expected = here @ vs
    found: list[Tensor] = [there @ vs[:, i] for i in range(6)]  # warm up, capture, replay
    torch.testing.assert_close(torch.stack(found, 1).cpu(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((there @ vs).cpu(), expected, rtol=1e-9, atol=1e-12)
    assert len({id(graph._workspace) for graph in graphs_of(there)}) == 1


@pytest.mark.usefixtures("no_fallback")
def test_a_product_does_not_wait_for_the_device() -> None:
    pytest.importorskip("triton")
    op = OPERATORS["hessian"](pair(neuron="plif"), 2**30)
    v = torch.randn(op.shape[0], dtype=torch.float64, device="cuda")
    op @ v  # compiles
    (product, *_) = op._kept.values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        product.product(v)  # type: ignore[attr-defined]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_fallback")
def test_memory_is_given_back_with_the_operator_and_does_not_grow_with_its_products() -> None:
    pytest.importorskip("triton")
    objective = pair(channels=32)
    v = torch.randn(objective.size, dtype=torch.float64, device="cuda")
    held = []
    for _ in range(3):
        op = OPERATORS["hessian"](objective, 2**30)
        for _ in range(3):
            op @ v
        graphs_of(op)
        held.append(torch.cuda.memory_allocated())
        for _ in range(20):
            op @ v
        assert torch.cuda.memory_allocated() == held[-1]
        del op
        gc.collect()
    assert held[2] == held[1]


@pytest.mark.usefixtures("no_fallback")
def test_without_room_for_a_graph_the_products_are_the_same() -> None:
    objective = pair(neuron="lif")
    v = torch.randn(objective.size, 3, dtype=torch.float64, device="cuda")
    roomy, tight = OPERATORS["hessian"](objective, 2**30), OPERATORS["hessian"](objective, 0)
    for _ in range(2):
        torch.testing.assert_close(tight @ v, roomy @ v, rtol=1e-10, atol=1e-13)
    assert not tight._kept


def test_no_tf32_in_a_product_whatever_the_process_has_chosen() -> None:
    exact, single = OPERATORS["hessian"](pair(channels=32)), OPERATORS["hessian"](pair(torch.float32, channels=32))
    v = torch.randn(exact.shape[0], dtype=torch.float64, device="cuda")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        found = [(single @ v).double() for _ in range(3)]
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    expected = exact @ v
    assert all((f - expected).norm() < 1e-4 * expected.norm() for f in found)
