"""The scans of spiking neurons on the pretend device: by numba, or by Triton's interpreter, in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pretend_device.places import fault, off, place, put, state, tag_of, tensors_in
from pretend_device.streams import touch

SCANS = ("value", "tangent", "adjoint", "adjoint_tangent")
KERNELS = ("_value", "_tangent", "_adjoint", "_adjoint_tangent")


def _checked(what: str, tensors: list[Tensor]) -> int:
    """Refuse tensors that a kernel on the current device cannot read. Returns the device."""
    found = {place(t) for t in tensors}
    if found != {state.current}:
        raise fault(f"{what} runs on cuda:{state.current} and gets tensors on {sorted(map(str, found))}")
    state.counts[what] += 1
    return state.current


def _queue(what: str, tensors: list[Tensor]) -> None:
    touch([], [tag for t in tensors if (tag := tag_of(t)) is not None], what)  # any may be written


# ---------------------------------------------------------------- numba
def by_numba() -> SimpleNamespace:
    """Return the four scans with the interface of `ikun.kernels.triton_kernels`, which run numba's kernels."""
    from ikun.kernels import dispatch

    return SimpleNamespace(**{name: _numba_scan(name, getattr(dispatch, name).__wrapped__) for name in SCANS})


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) and value.dim() == 0 else value


def _inputs(arguments: tuple[Any, ...]) -> list[Tensor]:
    given = [
        [getattr(a, f.name) for f in fields(a)] if is_dataclass(a) and not isinstance(a, type) else a for a in arguments
    ]
    return tensors_in(given)


def _numba_scan(name: str, scan: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        inputs = _inputs(arguments)
        tensor = isinstance(arguments[0], Tensor)
        with torch.cuda.device(arguments[0].device if tensor else arguments[0].f1.device):
            here = _checked(name, inputs)
            _queue(name, inputs)

        def compute() -> list[Any]:
            with off():
                first, *rest = arguments
                if not tensor:
                    first = replace(first, decay=_number(first.decay), gain=_number(first.gain))
                rest = [
                    tuple(map(_number, a)) if isinstance(a, tuple) and name == "value" else _number(a) for a in rest
                ]
                found = scan(first, *rest)
                found = list(found) if isinstance(found, tuple) else [found]
                if not tensor and first.u is not None and len(found) == 2:  # a sum, which Triton leaves on the device
                    found[1] = torch.as_tensor(found[1], dtype=torch.float64)
                return found

        outs = compute()
        made = [put(t, here) for t in outs if isinstance(t, Tensor)]
        _queue(name, made)
        if state.capture is not None:

            def again() -> None:
                for out, new in zip(outs, compute(), strict=True):
                    if isinstance(out, Tensor):
                        out.copy_(new)

            state.capture.launched(again, made)
        return outs[0] if name == "tangent" else tuple(outs)

    return run


# ---------------------------------------------------------------- Triton's interpreter
class Interpreted:
    """A Triton kernel that is interpreted on the tensors' memory in the CPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.fn = kernel, kernel.fn

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            tensors = tensors_in(arguments)
            _checked(self.fn.__name__, tensors)
            if any(not t.is_contiguous() for t in tensors):
                raise fault(f"{self.fn.__name__} reads a tensor as if it were contiguous")

            def run() -> None:
                with off():
                    self.kernel[grid](*arguments, **options)

            _queue(self.fn.__name__, tensors)
            run()
            if state.capture is not None:
                state.capture.launched(run)

        return launch


def replaced(interpret: bool) -> list[tuple[Any, str, Any]]:
    """Return (module, name, replacement) of what runs the scans.

    Args:
        interpret: Whether Triton's interpreter runs them, instead of numba.
    """
    from ikun.kernels import dispatch

    if not interpret:
        scans = by_numba()
        return [(dispatch, "_triton_scans", lambda: scans)]
    from ikun.kernels import triton_kernels

    kernels = [(triton_kernels, name, Interpreted(getattr(triton_kernels, name))) for name in KERNELS]
    return [*kernels, (triton_kernels, "NEURONS", 2**14), (triton_kernels, "PROGRAMS", 1)]  # it is slow per block
