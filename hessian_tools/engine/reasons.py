"""Say in plain words why a network cannot be traced."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

# The frames of these folders are not the user's code.
_INSIDE = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
_STANDARD = sysconfig.get_path("stdlib") + "/"
_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")
# Parts of torch's messages, and what they mean.
_MEANINGS = (
    ("data pointer", "the forward pass reads the memory of a tensor outside of torch's operations"),
    (".numpy() is not supported", "the forward pass uses NumPy"),
    ("dynamo-optimized", "the forward pass calls a function compiled by torch.compile"),
    ("fake impl", "the forward pass uses an operation without a fake kernel (torch.library.register_fake)"),
    ("Expected a proper Tensor but got None", "an operation cannot be replayed, such as oneDNN's LSTM in float32"),
    ("mutate a non-functional tensor", "the forward pass changes a tensor in place that is not a buffer of the model"),
)


class UntraceableError(Exception):
    """The network cannot be traced. The message is one line that says why."""


def reason_of(error: Exception) -> str:
    """Return in one line why tracing raised an error, with the line of the user's code if it is known."""
    text = str(error)
    if isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException):
        meaning = "the forward pass branches on the value of a tensor, or uses it as a Python number"
    elif isinstance(error, DynamicOutputShapeException):
        meaning = "the shape of a tensor depends on the values of another one"
    elif isinstance(error, UnsupportedOperatorException):
        meaning = f"the operation {error.func} has no fake kernel (torch.library.register_fake)"
    elif found := _DERIVATIVE.search(text):
        meaning = f"torch has no second derivative of {found[1]}"
    else:
        known = (words for part, words in _MEANINGS if part in text)
        meaning = next(known, f"{type(error).__name__}: {text.strip().partition(chr(10))[0]}")
    place = _place(error)
    return f"{meaning} ({place})" if place else meaning


def _place(error: Exception) -> str | None:
    """Return FILE:LINE of the innermost frame outside of torch and this package."""
    frames = list(traceback.extract_tb(error.__traceback__))
    called = [frame.name for frame in frames]
    if "__torch_function__" in called:  # the mode in which the network is traced
        frames = frames[: called.index("__torch_function__")]
    for frame in reversed(frames):
        name = frame.filename
        standard = name.startswith(_STANDARD) and "-packages/" not in name
        if not standard and not name.startswith((*_INSIDE, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return None
