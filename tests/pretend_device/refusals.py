"""The pretend device refuses what CUDA refuses. Run by tests/test_pretend_device.py, on the pretend device only."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pretend_device.places import DeviceFaultError, state

CUDA = torch.device("cuda", 0)


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises((DeviceFaultError, RuntimeError), match=message):
        yield
    state.faults.clear()


def test_tensors_that_are_made_from_others_are_on_their_device() -> None:
    x = torch.randn(3, 4, device="cuda", requires_grad=True)
    (slope,) = torch.autograd.grad((x @ x.T).sum(), x, create_graph=True)
    made = [x.T, x + 1, x[0], x.new_zeros(2), x.new_tensor([1.0]), torch.zeros_like(x), slope, x.detach().clone()]
    assert all(
        t.device == CUDA and t.is_cuda for t in [*made, *torch.func.vmap(torch.sin)(x), copy.deepcopy(x.detach())]
    )
    assert x.to("cuda") is x
    assert not x.cpu().is_cuda
    assert torch.zeros(2, device="cuda:1").device.index == 1
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.load(file).is_cuda
    file.seek(0)
    assert not torch.load(file, map_location="cpu").is_cuda


def test_memory_is_counted_until_the_last_view_is_gone() -> None:
    before = torch.cuda.memory_allocated()
    view = torch.zeros(1000, device="cuda")[:3]
    assert torch.cuda.memory_allocated() == before + 4000
    del view
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: x @ torch.ones(3),
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.ones(3)[x.long()],
        lambda x: x + torch.ones(3, device="cuda:1"),
        lambda x: torch.nn.Linear(3, 2)(x),
    ],
)
def test_tensors_of_different_devices_do_not_meet(mix: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(3, device="cuda")
    with refused("same device"):
        mix(x)
    assert (x * torch.tensor(2.0)).is_cuda  # numbers on the CPU are allowed
    assert x[torch.tensor([0, 2])].is_cuda  # and indices


def test_cpu_tensors_and_generators_are_not_taken_for_those_of_the_device() -> None:
    x = torch.ones(3, device="cuda")
    with refused("convert cuda:0"):
        x.numpy()
    assert torch.randn(3, device="cuda", generator=torch.Generator("cuda")).is_cuda
    with refused("generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with refused("generator"):
        torch.rand_like(x).normal_(generator=torch.Generator())
    with pytest.raises(RuntimeError, match="invalid device"):
        torch.zeros(1, device="cuda:7")


def captured(work: Callable[[Tensor], Tensor], side: bool = True) -> tuple[Tensor, Tensor, torch.cuda.CUDAGraph]:
    x = torch.ones(3, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream() if side else None):  # type: ignore[arg-type]
        graph.capture_begin()
        try:
            out = work(x)
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return x, out, graph


def test_a_graph_has_no_values_until_it_is_replayed_and_reads_its_inputs_again() -> None:
    x, out, graph = captured(lambda x: (2 * x).view(1, 3).cumsum(1))
    assert out.isnan().all()
    graph.replay()
    assert out.tolist() == [[2, 4, 6]]
    x.fill_(3)
    graph.replay()
    assert out.tolist() == [[6, 12, 18]]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda x: x * x.sum().item(), "capturing"),
        (lambda x: x[x > 0], "capturing"),
        (lambda x: x * torch.tensor(2.0, device="cuda"), "capturing"),
        (lambda x: x.cpu(), "capturing"),
        (lambda x: x * (torch.ones(()) + 1), "runs on the CPU"),
        (lambda x: x.tolist(), "capturing"),
    ],
)
def test_a_capture_does_not_wait_for_the_device(work: Callable[[Tensor], Tensor], message: str) -> None:
    with refused(message):
        captured(work)


def test_a_capture_needs_a_stream_of_its_own() -> None:
    with refused("non-default stream"):
        captured(torch.sin, side=False)
    state.capture = None


def test_streams_that_do_not_wait_race() -> None:
    x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
    with refused("race"), torch.cuda.stream(side):
        x.add_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
    with refused("race"):
        x.sum()
    torch.cuda.synchronize()
    x.sum()


def test_python_in_a_backward_pass_is_watched() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * x

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * torch.ones(3)

    x = torch.ones(3, device="cuda", requires_grad=True)
    with refused("same device"):
        Square.apply(x).sum().backward()  # type: ignore[no-untyped-call]


def test_a_traced_graph_has_the_device_in_it() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.ones(3, 3, device="cuda", requires_grad=True)

    def slope(x: Tensor) -> Tensor:
        y = torch.nn.functional.pad(x, (1, 1)).sum() + torch.zeros(3, device=x.device).sum()
        return torch.autograd.grad(y, x)[0]

    graph = make_fx(slope, tracing_mode="fake")(x)
    assert "cpu" not in graph.code
    assert graph(x).device == CUDA
    with refused("same device"):
        make_fx(lambda x: x + torch.ones(3), tracing_mode="fake")(x)
