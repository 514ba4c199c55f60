"""Tensors without values that are on the pretend device, so that networks are traced as on CUDA.

torch aborts in a backward pass of fake tensors on CUDA if it was built without CUDA. Fake tensors are therefore on the
CPU for torch, and are tagged like others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from pretend_device.modes import handled, resolved
from pretend_device.places import hidden, place, put, state

_fake, _proxy = FakeTensorMode.__torch_dispatch__, ProxyTorchDispatchMode.__torch_dispatch__
_snapshot = proxy_tensor.snapshot_fake
_convert, _device = FakeTensorConverter.from_real_tensor, FakeTensor.device


def fake_dispatch(self: FakeTensorMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """FakeTensorMode.__torch_dispatch__"""
    kwargs = dict(kwargs or {})
    if state.hidden or func.namespace == "prim" or "meta" in str(kwargs.get("device")):
        return _fake(self, func, types, args, kwargs)

    def run(given: dict[str, Any]) -> Any:
        with hidden():
            return _fake(self, func, types, args, given)

    return handled(func, args, kwargs, run, real=False)


def proxy_dispatch(self: ProxyTorchDispatchMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """ProxyTorchDispatchMode.__torch_dispatch__: the graph contains the device that CUDA would have."""
    kwargs = dict(kwargs or {})
    if not state.hidden:
        resolved(kwargs)
    return _proxy(self, func, types, args, kwargs)


def from_real_tensor(self: FakeTensorConverter, mode: FakeTensorMode, t: Any, *args: Any, **kwargs: Any) -> Any:
    """FakeTensorConverter.from_real_tensor"""
    here = None if state.hidden else place(t)
    with hidden():
        found = _convert(self, mode, t, *args, **kwargs)
    return found if here is None else put(found, here)


def fake_device(t: FakeTensor) -> torch.device:
    """FakeTensor.device"""
    here = None if state.hidden else place(t)
    return _device.fget(t) if here is None else torch.device("cuda", here)


def snapshot(*args: Any, **kwargs: Any) -> Any:
    """torch.fx.experimental.proxy_tensor.snapshot_fake, which makes a fake tensor on the device of another."""
    with hidden():
        return _snapshot(*args, **kwargs)


REPLACED = [
    (proxy_tensor, "snapshot_fake", snapshot),
    (FakeTensorMode, "__torch_dispatch__", fake_dispatch),
    (ProxyTorchDispatchMode, "__torch_dispatch__", proxy_dispatch),
    (FakeTensorConverter, "from_real_tensor", from_real_tensor),
    (FakeTensor, "device", property(fake_device)),
]
