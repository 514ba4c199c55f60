"""What a CUDA device needs of its own: products in full precision, and captured, so that one launch replays them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_Product = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------- precision
class _Matmul:
    """torch.set_float32_matmul_precision as an attribute."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


def _settings() -> list[tuple[Any, str, Any]]:
    """(where, name, value without TF32), in the order in which they are to be set.

    From PyTorch 2.9 on fp32_precision decides, per operation, and follows the setting above it where it is "none". The
    older two set it as well, and have to agree with it where PyTorch looks at both: they come first.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = [(_Matmul(), "precision", "highest"), (cudnn, "allow_tf32", False)]
    newer = [matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)]
    return older + [(a, "fp32_precision", "ieee") for a in newer if hasattr(a, "fp32_precision")]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32 on CUDA, neither in matrix products nor in convolutions, whatever the process has chosen; then as before.

    Its 10 bits of mantissa would move eigenvalues by a part in a thousand, and break the symmetry of a product.
    """
    if device.type != "cuda":
        yield
        return
    before = []
    for where, name, _ in _settings():
        with contextlib.suppress(RuntimeError):  # an older one that contradicts fp32_precision: this one decided
            before.append((where, name, getattr(where, name)))
    for where, name, value in _settings():
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


# ---------------------------------------------------------------- graphs
@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work is queued on a stream of its own, behind all that was queued before, ahead of all that comes after.

    A capture needs one; and backward passes run on the stream of their forward pass, so that what is to be captured has
    to be built here. Nothing but order on other devices.
    """
    if device.type != "cuda":
        yield
        return
    side, current = _side(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


@dataclass(eq=False)
class _Workspace:
    """Input and output [P] of all graphs of one kind, and the memory they work in: they never run at the same time."""

    v: Tensor
    out: Tensor
    pool: Any


_workspaces: WeakValueDictionary[tuple[Any, ...], _Workspace] = WeakValueDictionary()  # a pool dies with its graphs
_state = {"warned": False}


class Captured:
    """product(v [P]), captured into a CUDA graph at the second call and replayed from then on.

    The first call warms up: kernels are compiled, algorithms chosen. Where the capture fails (something in the product
    waits for the device) the product runs as it is, after one warning a process.
    """

    def __init__(self, product: _Product, nbytes: int) -> None:
        self.product, self.nbytes = product, nbytes
        self._calls = 0
        self._graph: Any = None
        self._workspace: _Workspace | None = None

    def __call__(self, v: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 2:
            self._capture(v)
        if self._graph is None or self._workspace is None:
            with side_stream(v.device):
                return self.product(v)
        self._workspace.v.copy_(v)
        self._graph.replay()
        return self._workspace.out.clone()

    def _capture(self, v: Tensor) -> None:
        key = v.device, v.dtype, len(v)
        workspace = _workspaces.get(key)
        try:
            torch.cuda.synchronize(v.device)
            if workspace is None:
                torch.cuda.empty_cache()  # the pool is memory beside that of all other work
                workspace = _Workspace(torch.empty_like(v), torch.empty_like(v), torch.cuda.graph_pool_handle())
            graph = torch.cuda.CUDAGraph()
            with side_stream(v.device):
                graph.capture_begin(pool=workspace.pool, capture_error_mode="thread_local")
                try:
                    workspace.out.copy_(self.product(workspace.v))
                finally:
                    graph.capture_end()
        except Exception as error:
            if not _state["warned"]:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                warnings.warn(f"no CUDA graph of a product ({reason}): launch by launch, slower", stacklevel=2)
            _state["warned"] = True
            return
        self._graph, self._workspace, _workspaces[key] = graph, workspace, workspace
