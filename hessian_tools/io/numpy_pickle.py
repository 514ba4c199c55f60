"""The NumPy arrays in a pickle, as data: their bytes, type and shape, without NumPy's code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hessian_tools.io.inert_pickle import Foreign

_DTYPES = {
    **{"b1": torch.bool, "u1": torch.uint8, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64},
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128},
}
_NATIVE = ("|", "=", "<" if sys.byteorder == "little" else ">")


class Array:
    """An array whose state is set after it is made. `content` is None for an array that torch has no type for."""

    __slots__ = ("content",)

    def __init__(self) -> None:
        self.content: Content | None = None


class Kind:
    """A dtype. `dtype` is None if torch has none for it, or for numbers in the byte order of another machine."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any) -> None:
        self.dtype = _DTYPES.get(name.lstrip("<>=|")) if type(name) is str else None


class Latin:
    """Bytes that the pickle holds as a text of the characters 0 to 255."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


@dataclass(frozen=True)
class Content:
    """What an array consists of.

    Attributes:
        raw: The bytes, or a text of the characters 0 to 255. Arrays can share it.
        dtype: The type of the elements.
        shape: The shape.
        column_major: Whether the first index runs fastest.
    """

    raw: bytes | str
    dtype: torch.dtype
    shape: tuple[int, ...]
    column_major: bool

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides in elements."""
        found, step = [], 1
        for n in self.shape if self.column_major else reversed(self.shape):
            found.append(step)
            step *= max(n, 1)
        return tuple(found if self.column_major else reversed(found))


def _content(raw: Any, kind: Any, shape: Any, column_major: Any) -> Content | None:
    if type(raw) is Latin:
        raw = raw.text
    if type(raw) is Foreign and raw.name == "builtins.bytes":  # no bytes
        raw = b""
    if type(kind) is not Kind or kind.dtype is None or type(raw) not in (bytes, str) or type(shape) is not tuple:
        return None
    if any(type(n) is not int or n < 0 for n in shape):
        return None
    return Content(raw, kind.dtype, shape, column_major is True)


def _array(*_: Any) -> Array:
    return Array()


def _from_buffer(raw: Any = None, kind: Any = None, shape: Any = None, order: Any = "C") -> Any:
    made = Array()
    made.content = _content(raw, kind, shape, order == "F")
    return made


def _encoded(text: Any = None, encoding: Any = None) -> Any:
    return Latin(text) if type(text) is str and encoding == "latin1" else Foreign("_codecs.encode")


def _kind(name: Any = None, *_: Any) -> Kind:
    return Kind(name)


CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encoded,
    "numpy.dtype": _kind,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}


def set_state(target: Array | Kind, state: Any) -> None:
    """Set the state of an array or a dtype. A state of another form leaves it without content."""
    if type(target) is Kind:
        if type(state) is not tuple or len(state) < 5 or state[1] not in _NATIVE or state[3] is not None:
            target.dtype = None
    elif type(target) is Array and type(state) is tuple and len(state) == 5:
        _, shape, kind, column_major, raw = state
        target.content = _content(raw, kind, shape, column_major)
