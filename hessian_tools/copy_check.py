"""Check that a copy of a model computes with its own parameters, and not with those of the model that was copied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hessian_tools.io.errors import ObjectiveError


def check_copy(original: nn.Module, copied: nn.Module, forward: Callable[[], object]) -> None:
    """Run a copy once, and check that it does not use the parameters of the original.

    Args:
        original: The model that was copied.
        copied: Its copy.
        forward: Runs the copy on a few inputs. Its random numbers are not taken from the global stream, and its errors
            are left to those who use the copy.

    Raises:
        ObjectiveError: If a parameter of the original takes part.
    """
    devices = {p.device for p in copied.parameters() if p.device.type == "cuda"}
    found = _Foreign(original, copied)
    with torch.enable_grad(), torch.random.fork_rng(devices), contextlib.suppress(Exception), found:
        forward()
    if found.used is not None:
        raise ObjectiveError(
            f"the copy that is analysed still computes with '{found.used}' of the given network, so that no derivative "
            "reaches it: a function or hook holds that module in a way that cannot be copied. Let it use its "
            "arguments, or make it a method"
        )


class _Foreign(TorchDispatchMode):
    """Note the name of a parameter of the original that an operation uses."""

    def __init__(self, original: nn.Module, copied: nn.Module) -> None:
        super().__init__()
        own = {_place(p) for p in copied.parameters()}
        own.add(None)
        self.names = {_place(p): name for name, p in original.named_parameters() if _place(p) not in own}
        self.used: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self.used = self.used or self.names.get(_place(t))
        return func(*args, **(kwargs or {}))


def _place(t: Tensor) -> tuple[torch.device, int] | None:
    """Return where the data of a tensor is stored; None if it has no data of its own."""
    try:
        place = t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors and those of torch.func
        return None
    return (t.device, place) if place else None
