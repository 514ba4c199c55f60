"""Interpret the pickle of a .pt file: the few names that torch.save uses for tensors, and NumPy arrays, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hessian_tools.io import numpy_pickle
from hessian_tools.io.inert_pickle import ArchiveError, CodeError, Foreign, InertUnpickler, as_key

MOST_ELEMENTS = 2**62  # of a tensor, which can be larger than its storage if its strides are 0
DAMAGED = "damaged, or not a .pt file"
_STORAGES = {  # the storage classes and their dtypes
    **{
        f"torch.{name}Storage": dtype
        for name, dtype in {
            "Byte": torch.uint8,
            "Char": torch.int8,
            "Bool": torch.bool,
            "Short": torch.int16,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
            "Int": torch.int32,
            "Float": torch.float32,
            "Long": torch.int64,
            "Double": torch.float64,
            "ComplexFloat": torch.complex64,
            "ComplexDouble": torch.complex128,
            "Untyped": torch.uint8,
        }.items()
    },
    "torch.storage.UntypedStorage": torch.uint8,
}
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class Storage:
    """Bytes outside the pickle: `count` elements."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class View:
    """A tensor that was not read yet: the elements of a storage that it consists of."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class TorchUnpickler(InertUnpickler):
    """Recognizes the few names that torch.save uses for tensors. Everything else is refused or becomes `Foreign`."""

    def __init__(self, data: bytes, place: int, foreign: bool) -> None:
        super().__init__(data, place)
        self.foreign = foreign
        self.storages: dict[str, Storage] = {}

    def find(self, name: str) -> Any:
        if name in _DTYPES:
            return _DTYPES[name]
        known = name in _CALLS or name in _STORAGES or (self.foreign and name in numpy_pickle.CALLS)
        return Foreign(name) if known else self.unknown(name)

    def unknown(self, name: str) -> Foreign:
        made = Foreign(name.replace("__builtin__.", "builtins."))
        if not self.foreign:
            raise CodeError(f"it contains objects that need code to load ({made.name})")
        return made

    def call(self, function: Foreign, arguments: tuple[Any, ...]) -> Any:
        known = _CALLS.get(function.name) or (numpy_pickle.CALLS.get(function.name) if self.foreign else None)
        return known(*arguments) if known else self.unknown(function.name)

    def set_state(self, target: Any, state: Any) -> None:
        if type(target) in (numpy_pickle.Array, numpy_pickle.Kind):
            numpy_pickle.set_state(target, state)
        else:
            super().set_state(target, state)

    def persistent(self, key: Any) -> Any:
        if key[0] == "module" and len(key) == 4 and type(key[1]) is Foreign:  # a class with its source code
            return key[1]
        kind, cls, name, _, count, *view = key
        if kind != "storage" or type(cls) is not Foreign or type(name) is not str or type(count) is not int:
            raise ArchiveError(DAMAGED)
        if cls.name not in _STORAGES:
            return self.unknown(cls.name)
        made = Storage(name, _STORAGES[cls.name], count)
        if view not in ([], [None]) or count < 0 or self.storages.setdefault(name, made).dtype != made.dtype:
            raise ArchiveError("a tensor shares a part of its data with others: save clones of the tensors")
        return made


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any = False, _hooks: Any = None, metadata: Any = None
) -> Any:
    """Return the tensor of these arguments of `torch._utils._rebuild_tensor_v2`."""
    if type(storage) is Foreign:  # quantized, for example
        return Foreign(storage.name)
    if metadata:
        raise ArchiveError("it contains a tensor whose conjugation or negation is pending: save a clone of it")
    return view_of(storage, offset, size, stride, storage.dtype)


def _tensor_of(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    """Return the tensor of these arguments of `torch._utils._rebuild_tensor_v3`, whose storage has no dtype."""
    if storage.dtype is not torch.uint8 or not isinstance(dtype, torch.dtype) or metadata:
        raise ArchiveError(DAMAGED)
    return view_of(storage, offset, size, stride, dtype)


def view_of(storage: Storage, offset: Any, size: Any, stride: Any, dtype: torch.dtype) -> View:
    """Return a tensor. Raises if it is not inside its storage."""
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > 64:
        raise ArchiveError(DAMAGED)
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ArchiveError(DAMAGED)
    elements, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        elements *= n
        last += (n - 1) * step
    count = storage.count * storage.dtype.itemsize // dtype.itemsize
    if (elements and last >= count) or elements > MOST_ELEMENTS:
        raise ArchiveError("damaged: a tensor is larger than its storage")
    return View(storage, offset if elements else 0, size, stride, dtype)


def _parameter(data: Any, *_: Any) -> Any:
    if type(data) not in (View, Foreign):
        raise ArchiveError(DAMAGED)
    return data


def _typed(function: Any, _cls: Any, arguments: Any, _state: Any) -> Any:
    """Return a tensor with attributes, without the attributes."""
    return _CALLS[function.name](*arguments) if function.name in _REBUILD else Foreign(function.name)


def _dict(*arguments: Any) -> dict[Any, Any]:
    """Return a dict of the arguments of OrderedDict, which can be a list of pairs in files from Python 2."""
    pairs = arguments[0] if arguments else []
    return {as_key(key): value for key, value in pairs}


def _size(values: Any = ()) -> tuple[int, ...]:
    if any(type(n) is not int for n in values):
        raise ArchiveError(DAMAGED)
    return tuple(values)


def _device(*words: Any) -> str:
    if any(type(word) not in (str, int) for word in words):
        raise ArchiveError(DAMAGED)
    return ":".join(map(str, words))


_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_CALLS: dict[str, Callable[..., Any]] = {
    **_REBUILD,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda _factory=None: {},
    "torch.Size": _size,
    "torch.device": _device,
}
