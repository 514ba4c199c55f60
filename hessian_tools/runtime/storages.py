"""Measure the memory that tensors hold, without keeping them alive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Records the storages of tensors: of those that are created in its context, and of those that are added."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(tree_leaves(out))
        return out

    def add(self, values: Iterable[Any]) -> None:
        """Record the storages of the tensors among some values."""
        for t in values:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def alive(self, but: Iterable[Tensor]) -> int:
        """Return the bytes of the storages that still exist, except those of some tensors."""
        others = {t.untyped_storage()._cdata for t in but}
        return sum(size for key, (ref, size) in self._found.items() if not ref.expired() and key not in others)
