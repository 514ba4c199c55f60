"""CUDA support: products in full precision, and captured into CUDA graphs so that one launch replays them."""

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
    """Presents torch.set_float32_matmul_precision as an attribute."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


def _settings() -> list[tuple[Any, str, Any]]:
    """Return (object, attribute, value that disables TF32) for every setting, in the order to set them.

    From PyTorch 2.9, `fp32_precision` decides for each operation, and "none" defers to the more general setting. The
    two older settings also change it and must not contradict it, so they come first.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = [(_Matmul(), "precision", "highest"), (cudnn, "allow_tf32", False)]
    newer = [matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)]
    return older + [(a, "fp32_precision", "ieee") for a in newer if hasattr(a, "fp32_precision")]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable TF32 on CUDA, in matrix products and convolutions, and restore the settings of the process afterwards.

    TF32 has a 10-bit mantissa. It would change eigenvalues by about 1e-3 and break the symmetry of a product.
    """
    if device.type != "cuda":
        yield
        return
    before = []
    for where, name, _ in _settings():
        with contextlib.suppress(RuntimeError):  # an older setting contradicts fp32_precision, which takes precedence
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
    """Return the side stream of a device."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Queue work on a separate CUDA stream, after all work queued before and before all work queued later.

    A graph capture needs such a stream. Backward passes run on the stream of their forward pass, so the computation to
    be captured must also be built here. On other devices this does nothing.
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
    """Input and output [P] of all graphs of one kind, and their memory pool.

    The graphs share it because they never run at the same time.
    """

    v: Tensor
    out: Tensor
    pool: Any


_workspaces: WeakValueDictionary[tuple[Any, ...], _Workspace] = WeakValueDictionary()  # a pool is freed with its graphs
_state = {"failed": False}


def _cached(device: torch.device) -> int:
    """Return how many bytes torch holds that no tensor uses."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Captured:
    """A function product(v [P]) that is captured into a CUDA graph at its second call and replayed from then on.

    The first call warms up: kernels are compiled and algorithms are chosen. If the capture fails because the product
    synchronizes with the device, this and all later products of the process run without a graph. It warns once. A
    product is not captured if less memory is free than its first call took.

    Args:
        product: The function.
        nbytes: Memory that the product holds.
    """

    def __init__(self, product: _Product, nbytes: int) -> None:
        self.product, self.nbytes = product, nbytes
        self._calls = self._peak = 0
        self._graph: Any = None
        self._workspace: _Workspace | None = None

    def __call__(self, v: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 1:
            return self._warm_up(v)
        if self._calls == 2 and not _state["failed"]:
            self._capture(v)
        if self._graph is None or self._workspace is None:
            return self._eager(v)
        self._workspace.v.copy_(v)
        self._graph.replay()
        return self._workspace.out.clone()

    def _eager(self, v: Tensor) -> Tensor:
        with side_stream(v.device):
            return self.product(v.contiguous())  # in the same order of memory as in a graph, for the same bits

    def _warm_up(self, v: Tensor) -> Tensor:
        """Run the product, and note how much memory it takes."""
        before = torch.cuda.memory_allocated(v.device)
        torch.cuda.reset_peak_memory_stats(v.device)
        found = self._eager(v)
        self._peak = torch.cuda.max_memory_allocated(v.device) - before
        return found

    def _capture(self, v: Tensor) -> None:
        """Capture the product, or warn if that fails."""
        if torch.cuda.mem_get_info(v.device)[0] + _cached(v.device) < self._peak:
            return
        key = v.device, v.dtype, len(v)
        workspace = _workspaces.get(key)
        try:
            torch.cuda.synchronize(v.device)
            if workspace is None:
                torch.cuda.empty_cache()  # the pool cannot use memory cached by other work
                workspace = _Workspace(torch.empty_like(v), torch.empty_like(v), torch.cuda.graph_pool_handle())
            graph = torch.cuda.CUDAGraph()
            with side_stream(v.device):
                graph.capture_begin(pool=workspace.pool, capture_error_mode="thread_local")
                try:
                    workspace.out.copy_(self.product(workspace.v))
                finally:
                    graph.capture_end()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"CUDA graph capture failed ({reason}): products run without a graph, which is slower"
            warnings.warn(message, stacklevel=2)
            _state["failed"] = True
            torch.cuda.empty_cache()
            return
        self._graph, self._workspace, _workspaces[key] = graph, workspace, workspace
