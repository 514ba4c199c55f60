"""Replace the functions of torch.cuda, so that torch has two CUDA devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pretend_device import graphs, modes, streams, tracing
from pretend_device.places import DEVICES, MEMORY, number_of, place, put_storage, state

ABSENT = object()
_device, _clone = Tensor.device, torch.storage._StorageBase.clone


class Generator(torch.Generator):
    """A generator of random numbers, also on CUDA."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, device="cpu")
        made.number = number_of(device)
        if made.number is not None:
            state.generators.add(made._cdata)
        return made

    def __del__(self) -> None:
        if getattr(self, "number", None) is not None:
            state.generators.discard(self._cdata)

    @property
    def device(self) -> torch.device:
        number = getattr(self, "number", None)
        return torch.device("cpu") if number is None else torch.device("cuda", number)


class use_device:  # noqa: N801  torch.cuda.device
    """Make a device current."""

    def __init__(self, device: Any) -> None:
        self.index = None if device is None else number_of(device)

    def __enter__(self) -> None:
        self.before = state.current
        state.current = state.current if self.index is None else self.index

    def __exit__(self, *error: object) -> None:
        state.current = self.before


def _index(device: Any = None) -> int:
    number = state.current if device is None else number_of(device)
    if number is None:
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return number


def _set_device(device: Any) -> None:
    state.current = _index(device)


def _reset_peak(device: Any = None) -> None:
    state.peak[_index(device)] = state.live[_index(device)]


def _properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(name="Pretend", major=9, minor=0, multi_processor_count=2, total_memory=MEMORY)


def _device_of(t: Tensor) -> use_device:
    return use_device(place(t))


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "device_count": lambda: DEVICES,
    "current_device": lambda: state.current,
    "set_device": _set_device,
    "device": use_device,
    "device_of": _device_of,
    "get_device_name": lambda device=None: "Pretend",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": _properties,
    "is_current_stream_capturing": lambda: state.capture is not None,
    "Stream": streams.Stream,
    "Event": streams.Event,
    "stream": streams.stream,
    "current_stream": streams.current_stream,
    "default_stream": streams.default_stream,
    "synchronize": streams.synchronize,
    "CUDAGraph": graphs.CUDAGraph,
    "graph_pool_handle": object,
    "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (MEMORY - state.live[_index(device)], MEMORY),
    "memory_allocated": lambda device=None: state.live[_index(device)],
    "memory_reserved": lambda device=None: state.live[_index(device)],
    "max_memory_allocated": lambda device=None: state.peak[_index(device)],
    "reset_peak_memory_stats": _reset_peak,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda new, device=None: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "set_sync_debug_mode": lambda mode: setattr(state, "sync_debug", mode),
}


def _shown(t: Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        device = _device.__get__(t)
    here = None if state.hidden or device.type != "cpu" else place(t)
    return device if here is None else torch.device("cuda", here)


def _cloned(storage: Any) -> Any:
    made, tag = _clone(storage), getattr(storage, "pretended", None)
    if tag is not None:
        put_storage(made, tag.index)
    return made


def _to_device(storage: Any, device: Any = None, non_blocking: bool = False) -> Any:
    made = _clone(storage)
    put_storage(made, _index(device))
    return made


def _location(storage: Any) -> str | None:
    plain = storage if isinstance(storage, torch.UntypedStorage) else storage.untyped()
    tag = getattr(plain, "pretended", None)
    return None if tag is None or state.hidden else f"cuda:{tag.index}"


def _restored(storage: Any, location: str) -> Any:
    return _to_device(storage, location) if location.startswith("cuda") else None


def _replacements(front: modes.Front) -> list[tuple[Any, str, Any]]:
    base = torch.storage._StorageBase
    return [
        *((torch.cuda, name, value) for name, value in CUDA.items()),
        *tracing.REPLACED,
        (Tensor, "device", property(_shown)),
        (Tensor, "is_cuda", property(lambda t: t.device.type == "cuda")),
        (Tensor, "is_cpu", property(lambda t: t.device.type == "cpu")),
        (Tensor, "get_device", lambda t: -1 if t.device.type == "cpu" else t.device.index),
        (base, "clone", _cloned),
        (base, "cuda", _to_device),
        (torch.nn.Module, "cuda", lambda module, device=None: module.to(torch.device("cuda", _index(device)))),
        (torch, "Generator", Generator),
        (torch.autograd, "_engine_run_backward", modes.in_backward(front, torch.autograd._engine_run_backward)),
    ]


@contextlib.contextmanager
def pretend_device() -> Iterator[None]:
    """Pretend that torch has CUDA devices."""
    front = modes.Front()
    before = []
    for where, name, value in _replacements(front):
        before.append((where, name, where.__dict__.get(name, ABSENT)))
        setattr(where, name, value)
    torch.serialization.register_package(5, _location, _restored)
    try:
        with front, modes.Back(front):
            yield
    finally:
        for where, name, value in reversed(before):
            if value is ABSENT:
                delattr(where, name)
            else:
                setattr(where, name, value)
        registry = torch.serialization._package_registry
        registry[:] = [entry for entry in registry if entry[1] is not _location]
