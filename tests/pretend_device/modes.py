"""The two modes of torch that watch every call: Front sees functions, Back sees operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from pretend_device import places, streams
from pretend_device.places import ambient, fault, number_of, place, put, state, tag_of, tensors_in, wait

aten = torch.ops.aten
READS = {Tensor.untyped_storage, Tensor.data_ptr, Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
HOST = {Tensor.numpy, Tensor.__array__}  # need a tensor on the CPU
COPIES = {Tensor.tolist}  # copy to the host without an operation of torch
FROM_HOST = {"tensor", "as_tensor", "asarray", "new_tensor", "from_numpy", "sparse_coo_tensor"}

# Operations that accept tensors of different devices, that accept no number on the CPU either, and that wait.
CROSSING = {"copy_", "_to_copy", "copy", "set_", "clone", "detach", "alias", "_copy_from", "lift_fresh"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
STRICT = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "cat", "stack", "gather", "scatter", "scatter_",
    "scatter_add", "scatter_add_", "index_select", "convolution", "convolution_backward", "native_batch_norm",
    "index_add", "index_add_", "embedding", "nll_loss_forward", "nll_loss_backward", "searchsorted", "linear", "take",
}  # fmt: skip
WAITING = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim",
    "_linalg_eigh", "linalg_eigh", "linalg_qr", "bincount", "allclose", "repeat_interleave",
}  # fmt: skip


# ---------------------------------------------------------------- functions
class Front(TorchFunctionMode):
    """Move tensors, copy values from the host, and say on which device torch's own code makes tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if state.hidden or func in READS or name in ("__get__", "__set__", "_parse_to"):
            return func(*args, **kwargs)
        if func in MOVES:
            return _moved(func, args, kwargs)
        if func in HOST and place(args[0]) is not None:
            raise fault("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if func in COPIES and place(args[0]) is not None:
            wait(name)
        found = tensors_in((*args, *kwargs.values()))
        here = next((p for p in map(place, found) if p is not None), None)
        asked = kwargs.get("device")
        if name in FROM_HOST and not isinstance(func, torch._ops.OpOverload):
            return _from_host(func, name, args, kwargs, here)
        number = number_of(asked)
        if number is not None:
            kwargs["device"] = torch.device("cuda", number)
        if isinstance(func, torch._ops.OpOverload) and number is None:
            made_on = state.ambient if here is None or asked is not None else here  # as said by the caller
        else:
            made_on = here if asked is None else "cpu" if number is None else number
        with ambient(made_on):
            return func(*args, **kwargs)


def _from_host(func: Any, name: str, args: Any, kwargs: dict[str, Any], here: int | None) -> Any:
    """Return a tensor with values from the host, such as torch.tensor(..., device=...)."""
    asked = kwargs.pop("device", None)
    given = args[0] if args else kwargs.get("data")
    if name in ("as_tensor", "asarray") and isinstance(given, Tensor):
        options = {"dtype": kwargs.get("dtype"), "device": asked}
        return _moved(Tensor.to, (given,), {k: v for k, v in options.items() if v is not None})
    number = number_of(asked)
    if asked is None and name == "new_tensor":
        number = here
    if number is not None:
        wait(f"values from the host by {name}")
    with ambient("cpu"):
        made = func(*args, **kwargs)
    if number is None:
        return made
    return put(made.clone() if place(made) is None and isinstance(given, Tensor) else made, number)


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what Tensor.to, Tensor.cpu and Tensor.cuda return."""
    t, rest = args[0], list(args[1:])
    kwargs = {name: value for name, value in kwargs.items() if name != "non_blocking"}
    device, dtype, other = kwargs.pop("device", None), kwargs.pop("dtype", None), kwargs.pop("other", None)
    if func is Tensor.cuda:
        device, rest = state.current if device is None and not rest else (device or rest[0]), []
    elif func is Tensor.cpu:
        device = "cpu"
    for value in rest:
        if isinstance(value, Tensor):
            other = value
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device) or (type(value) is int and device is None):
            device = value
    here = place(t)
    if other is not None:
        target, dtype = place(other), other.dtype
    elif device is None:
        target = here
    elif isinstance(device, str | torch.device) and torch.device(device).type == "meta":
        return func(*args, **kwargs)
    else:
        target = number_of(device)
    if target == here:
        with ambient(here):
            return Tensor.to(t, dtype or t.dtype, **kwargs)
    to = torch.device("cpu") if target is None else torch.device("cuda", target)
    with ambient("cpu" if target is None else target):
        return aten._to_copy.default(t, dtype=dtype, device=to)


# ---------------------------------------------------------------- operations
class Back(TorchDispatchMode):
    """Refuse operations that CUDA refuses, and put their results where CUDA has them."""

    def __init__(self, front: Front) -> None:
        super().__init__()
        self.front = front

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if state.hidden or any(isinstance(t, FakeTensor) or t.is_meta for t in tensors_in((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if (own := OPDEFS.get(func._schema.name)) is not None:
            with self, self.front:  # its operations are seen one by one
                out = own._init_fn(*args, **kwargs)
            alike({place(t) for t in tensors_in([*args, *kwargs.values(), out])}, func)
            return out
        return handled(func, args, kwargs, lambda given: func(*args, **given), real=True)


def alike(found: set[int | None], func: Any) -> None:
    """Refuse an operator of our own with arguments or results on different devices."""
    if len(found) > 1:
        raise fault(f"{func} has arguments or results on different devices: {found}")


def resolved(kwargs: dict[str, Any]) -> int | str | None:
    """Return on which device an operation makes tensors: a number, "cpu", or None if it does not say.

    `device` becomes what Python would have written: C++ has its own view of a tensor's device, which is the CPU.
    """
    asked = kwargs.get("device")
    if asked is None:
        return None
    number = number_of(asked)
    if number is None and torch.device(asked).type == "cpu" and isinstance(state.ambient, int):
        number = state.ambient
        kwargs["device"] = torch.device("cuda", number)
    return "cpu" if number is None else number


def handled(func: Any, args: Any, kwargs: dict[str, Any], run: Callable[[dict[str, Any]], Any], real: bool) -> Any:
    """Run an operation as on the pretend device.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Its named arguments.
        run: Runs it with other named arguments.
        real: Whether tensors have values, so that streams and graphs matter.
    """
    name = func._schema.name.split("::")[-1]
    asked = resolved(kwargs)
    if isinstance(asked, int):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = tensors_in((*args, *kwargs.values()))
    storages = [places.storage_of(t) for t in found]
    spots = [None if (tag := getattr(s, "pretended", None)) is None else tag.index for s in storages]
    on = [p for p in spots if p is not None]
    if on or isinstance(asked, int):
        _refuse_generators(func, (*args, *kwargs.values()))
    if on and not (name == "_to_copy" and asked is not None):
        _refuse_mixture(func, name, args, found, spots)
    crosses = name == "_to_copy" and asked is not None and [None if asked == "cpu" else asked] != spots
    crosses |= name == "copy_" and spots[0] != spots[1]
    if real and (crosses or (on and _waits(name, args))):
        wait("copies to or from the device" if crosses else name)
    if real and state.capture is not None and found and not on and name not in ("detach", "alias"):
        raise fault(f"{name} runs on the CPU while a graph is captured, and would not run in its replay")
    out = run(kwargs)
    outs = tensors_in([out])
    if isinstance(asked, int):
        target: int | None = asked
    else:
        target = None if asked == "cpu" or not on else on[0]
    if name == "copy_":
        target = None
    if name == "_to_copy" and asked == "cpu" and on:
        return out
    known = {s._cdata for s in storages if s is not None}
    fresh = [t for t in outs if places.key_of(t) not in known]
    if target is not None:
        for t in fresh:
            put(t, target)
    writes = tensors_in([args[i] if i < len(args) else kwargs.get(n) for i, n in _written(func)])
    if real and (on or target is not None) and (fresh or writes or not outs):  # else it is a view
        written = [tag for t in (*writes, *fresh) if (tag := tag_of(t)) is not None]
        read = [tag for s in storages if (tag := getattr(s, "pretended", None)) is not None and tag not in written]
        streams.touch(read, written, name)
        if state.capture is not None:
            state.capture.note(func, args, kwargs, fresh, bool(writes))
    return out


@cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Return place and name of the arguments to which an operation writes."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _refuse_generators(func: Any, arguments: Sequence[Any]) -> None:
    for a in arguments:
        if isinstance(a, torch._C.Generator) and a._cdata not in state.generators:
            raise fault(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")


def _waits(name: str, args: Any) -> bool:
    """Return whether an operation waits for the device: its result is on the host, or its size depends on values."""
    if name in INDEXED:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in WAITING


def _refuse_mixture(func: Any, name: str, args: Any, found: list[Tensor], spots: list[int | None]) -> None:
    """Refuse tensors of different devices where CUDA does."""
    if name in CROSSING or len(set(spots)) == 1:
        return
    shapes = ", ".join(
        f"{list(t.shape)} on {'cpu' if p is None else f'cuda:{p}'}" for t, p in zip(found, spots, strict=True)
    )
    refusal = f"Expected all tensors to be on the same device: {func} of {shapes}"
    if name in INDEXED:
        here = place(args[0])
        values = [t for t in args[2:3] if isinstance(t, Tensor)]
        strange = [i for i in args[1] if i is not None and place(i) not in (None, here)]
        strange += [t for t in values if place(t) != here and not (t.dim() == 0 and place(t) is None)]
        if strange:
            raise fault(refusal)
        return
    numbers = all(p is not None or t.dim() == 0 for t, p in zip(found, spots, strict=True))
    several = len({p for p in spots if p is not None}) > 1
    first = func._schema.arguments[0]
    in_place = first.alias_info is not None and first.alias_info.is_write and spots[0] is None
    if name in STRICT or not numbers or several or in_place:
        raise fault(refusal)


def in_backward(front: Front, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return autograd's engine such that Front watches Python code in backward passes too."""

    def watched(tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        given = tensors_in([tensors, *args])
        here = next((p for p in map(place, given) if p is not None), None)
        with ExitStack() as stack:
            if front not in _get_current_function_mode_stack() and not state.hidden:
                stack.enter_context(front)
            stack.enter_context(ambient(here))
            return run(tensors, *args, **kwargs)

    return watched
