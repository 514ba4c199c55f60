"""Streams and events of the pretend device. Vector clocks tell whether one stream waits for another."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

from pretend_device.places import Tag, fault, number_of, state, wait


class Stream:
    """A queue of work on a device."""

    made: ClassVar[weakref.WeakSet[Stream]] = weakref.WeakSet()
    count = 0
    done: ClassVar[Counter[int]] = Counter()  # what is known to be done when a stream is made

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        Stream.count += 1
        index = state.current if device is None else number_of(device)
        self.id, self.device = Stream.count, torch.device("cuda", index)
        self.clock = Counter(Stream.done)  # what work of each stream is known to be done
        Stream.made.add(self)

    def wait_stream(self, other: Stream) -> None:
        """Let later work of this stream run after the work that `other` has now."""
        self.wait_clock(other.clock)

    def wait_clock(self, clock: Counter[int]) -> None:
        self.clock = self.clock | clock

    def synchronize(self) -> None:
        wait("Stream.synchronize")
        for stream in list(Stream.made):
            stream.wait_stream(self)


class Event:
    """A point in the work of a stream."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at, self.clock = 0.0, Counter[int]()

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()
        self.clock = Counter((stream or current_stream()).clock)

    def synchronize(self) -> None:
        wait("Event.synchronize")
        for stream in list(Stream.made):
            stream.wait_clock(self.clock)

    def elapsed_time(self, other: Event) -> float:
        return max(1e-3, 1e3 * (other.at - self.at))


_default: dict[int, Stream] = {}
_current: dict[int, Stream] = {}


def default_stream(device: Any = None) -> Stream:
    """Return the default stream of a device."""
    index = state.current if device is None else number_of(device)
    assert index is not None
    if index not in _default:
        _default[index] = Stream(index)
    return _default[index]


def current_stream(device: Any = None) -> Stream:
    """Return the current stream of a device."""
    index = state.current if device is None else number_of(device)
    assert index is not None
    return _current.get(index) or default_stream(index)


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Make a stream and its device current."""
    if chosen is None:
        yield
        return
    index = chosen.device.index
    before = _current.get(index), state.current
    _current[index], state.current = chosen, index
    try:
        yield
    finally:
        if before[0] is None:
            del _current[index]
        else:
            _current[index] = before[0]
        state.current = before[1]


def synchronize(device: Any = None) -> None:
    """Wait for all work."""
    wait("synchronize")
    settle()


def settle() -> None:
    """Let every stream know of all work."""
    for each in list(Stream.made):
        Stream.done = Stream.done | each.clock
    for each in list(Stream.made):
        each.wait_clock(Stream.done)


def touch(read: Iterable[Tag], written: Iterable[Tag], what: str) -> None:
    """Queue an operation on the current stream, and refuse it if another stream may still work on its memory."""
    for index in {tag.index for tag in (*read, *written)}:
        here = current_stream(index)
        here.clock[here.id] += 1
        now = here.clock[here.id]
        for tag in read:
            _ordered(here, tag.writes, f"{what} reads what another stream may still be writing")
            tag.reads[here.id] = now
        for tag in written:
            _ordered(here, tag.writes, f"{what} writes what another stream may still be writing")
            _ordered(here, tag.reads, f"{what} writes what another stream may still be reading")
            tag.writes, tag.reads = {here.id: now}, {}


def _ordered(here: Stream, times: dict[int, int], message: str) -> None:
    if any(stream != here.id and here.clock[stream] < at for stream, at in times.items()):
        raise fault(f"race: {message}")
