"""Captured graphs of the pretend device: a tape of operations, replayed into the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretend_device.places import fault, off, state, tensors_in
from pretend_device.streams import Stream, current_stream, default_stream

EMPTY = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}


class CUDAGraph:
    """What is between `capture_begin` and `capture_end`, to be run again."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._tape: list[Callable[[], None]] = []
        self._made: list[Tensor] = []
        self._stream: Stream | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._stream = current_stream()
        if self._stream is default_stream():
            raise fault("CUDA graphs must be captured on a non-default stream")
        if state.capture is not None:
            raise fault("a graph is being captured already")
        state.capture = self

    def capture_end(self) -> None:
        state.capture = None
        if current_stream() is not self._stream:
            raise fault("a capture must end on the stream on which it began")
        state.counts["captures"] += 1
        self._poison()

    def _poison(self) -> None:
        """Overwrite everything that was made. In a real capture nothing has run yet."""
        with off(), torch.no_grad():
            for t in self._made:
                if t.dtype.is_floating_point:
                    t.fill_(float("nan"))

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Tensor], writes: bool) -> None:
        """Record an operation of torch.

        Args:
            func: The operation.
            args: Its arguments.
            kwargs: Its named arguments.
            outs: The new tensors that it returned.
            writes: Whether it writes to an argument.
        """
        self._made += outs
        if func._schema.name in EMPTY:
            return

        def again() -> None:
            found = func(*args, **kwargs)
            if not writes:
                for out, new in zip(outs, tensors_in([found]), strict=True):
                    out.copy_(new)

        self._tape.append(again)

    def launched(self, run: Callable[[], None], made: Sequence[Tensor] = ()) -> None:
        """Record the launch of a kernel, which writes to the tensors in `made` and to nothing else that is new."""
        self._made += made
        self._tape.append(run)

    def replay(self) -> None:
        if state.capture is not None:
            raise fault("a graph is replayed while another is being captured")
        state.counts["replays"] += 1
        with off(), torch.no_grad():
            for step in self._tape:
                step()

    def reset(self) -> None:
        self._tape, self._made = [], []
