"""On which device a tensor is: a tag on its storage."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

DEVICES = 2  # cuda:0 and cuda:1
MEMORY = 80 * 2**30  # bytes of each


class DeviceFaultError(RuntimeError):
    """Something that CUDA refuses, or that would give wrong numbers there."""


@dataclass
class State:
    """The state of the pretend devices.

    Attributes:
        hidden: How many callers want devices as they are, without pretending.
        ambient: Device of tensors that torch's own code makes now: a number, None for the CPU by default, or "cpu" if
            the call asks for it.
        current: The current device.
        capture: The graph that is being captured.
        faults: Errors that were raised. A test fails if any is left, because some code takes another way after errors.
        counts: Number of captures, replays, launches of each kernel, and copies to and from the device.
        live: Bytes in use per device.
        peak: Their maximum.
        sync_debug: "error" if waiting for the device is an error.
        generators: Addresses of the random generators that are on a device.
    """

    hidden: int = 0
    ambient: int | str | None = None
    current: int = 0
    capture: Any = None
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    live: Counter[int] = field(default_factory=Counter)
    peak: Counter[int] = field(default_factory=Counter)
    sync_debug: str = "default"
    generators: set[int] = field(default_factory=set)


state = State()


def fault(message: str) -> DeviceFaultError:
    """Note and return an error."""
    state.faults.append(message)
    return DeviceFaultError(message)


class Tag:
    """The device of a storage, and the work that is queued on it.

    Attributes:
        index: Number of the device.
        writes: Time of the last write, by stream.
        reads: Times of the reads since, by stream.
    """

    def __init__(self, index: int, nbytes: int) -> None:
        self.index, self.nbytes = index, nbytes
        self.writes: dict[int, int] = {}
        self.reads: dict[int, int] = {}
        state.live[index] += nbytes
        state.peak[index] = max(state.peak[index], state.live[index])

    def __del__(self) -> None:
        state.live[self.index] -= self.nbytes


def storage_of(t: Tensor) -> Any:
    """Return the storage of a tensor, of that inside the wrappers of torch.func; None if it has none."""
    with torch._C.DisableTorchFunction():
        while torch._C._functorch.is_functorch_wrapped_tensor(t):
            t = torch._C._functorch.get_unwrapped(t)
        if torch._is_functional_tensor(t):
            t = torch._from_functional_tensor(t)
        try:
            return t.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return None


def key_of(t: Tensor) -> int:
    """Return a number that tensors share if they share a storage."""
    storage = storage_of(t)
    return id(t) if storage is None else storage._cdata


def tag_of(t: Tensor) -> Tag | None:
    """Return the tag of a tensor, or None if it is on the CPU."""
    return getattr(storage_of(t), "pretended", None)


def place(t: Tensor) -> int | None:
    """Return the number of the device that a tensor is on, or None for the CPU."""
    tag = tag_of(t)
    return None if tag is None else tag.index


def put(t: Tensor, index: int) -> Tensor:
    """Put a tensor on a device, with its memory."""
    put_storage(storage_of(t), index, 0 if isinstance(t, FakeTensor) else None)
    return t


def put_storage(storage: Any, index: int, nbytes: int | None = None) -> None:
    """Put a storage on a device. It stays where it is if it is on one."""
    if storage is not None and getattr(storage, "pretended", None) is None:
        storage.pretended = Tag(index, storage.nbytes() if nbytes is None else nbytes)


def number_of(device: Any) -> int | None:
    """Return the number of a CUDA device, given as torch.device, text or number; None for another device."""
    if isinstance(device, int) and not isinstance(device, bool):
        return device
    if not isinstance(device, str | torch.device):
        return None
    device = torch.device(device)
    if device.type != "cuda":
        return None
    number = state.current if device.index is None else device.index
    if number >= DEVICES:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return number


def tensors_in(things: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments of an operation, which may be in lists."""
    found = []
    for thing in things:
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, list | tuple):
            found += tensors_in(thing)
    return found


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Show devices as they are."""
    state.hidden += 1
    try:
        yield
    finally:
        state.hidden -= 1


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Show devices as they are, and watch nothing."""
    with hidden(), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@contextlib.contextmanager
def ambient(value: int | str | None) -> Iterator[None]:
    """Set the device of tensors that torch's own code makes."""
    before, state.ambient = state.ambient, value
    try:
        yield
    finally:
        state.ambient = before


def wait(what: str) -> None:
    """Note that the host waits for the device, or refuse it where CUDA does."""
    state.counts[what] += 1
    if state.capture is not None:
        raise fault(f"operation not permitted when stream is capturing ({what})")
    if state.sync_debug == "error":
        raise fault(f"called a synchronizing CUDA operation ({what})")
