"""Short texts of results, for `repr` and for tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sized
from pathlib import PurePath
from typing import Any, Protocol

from hessian_tools.results.provenance import Analysed

LONGEST = 40  # characters of a string in a `repr`
MOST = 3  # entries of a container that are shown


class WithDataError(Protocol):
    """A number whose standard error over the data is known, or only a lower limit of it."""

    @property
    def data_stderr(self) -> float: ...
    @property
    def data_stderr_least(self) -> float: ...


def with_error(value: float, e: WithDataError) -> str:
    """Format a value and its standard error over the data, if known, or the lower limit of that."""
    if not math.isnan(e.data_stderr_least):
        return f"{value:.3g} (> {rounded(e.data_stderr_least, 1)})"
    return f"{value:.3g}" if math.isnan(e.data_stderr) else f"{value:.3g} +- {rounded(e.data_stderr, 1)}"


def rounded(x: float, digits: int) -> str:
    """Format a number with up to six significant digits, without an exponent below a million: 10, not 1e+01."""
    return f"{float(f'{x:.{digits}g}'):g}"


def brief(value: Any) -> str:
    """Return a `repr` of a dataclass that does not grow with its contents. It is meant to be a class's `__repr__`.

    Containers of more than three entries are counted, and results inside results are named only.
    """
    shown = [f"{f.name}={_short(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.repr]
    return f"{type(value).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST else value[: LONGEST - 1] + "…")
    if isinstance(value, int) or value is None:
        return repr(value)
    if isinstance(value, tuple) and len(value) <= MOST and all(isinstance(v, int | float) for v in value):
        return f"({', '.join(map(_short, value))})"
    if isinstance(value, Sized) and not len(value):
        return "{}" if isinstance(value, dict) else "()"
    if isinstance(value, Sized):
        return f"<{len(value)} {'entries' if len(value) > 1 else 'entry'}>"
    return f"<{type(value).__name__}>"


def headline(result: Analysed) -> str:
    """Return one line that says what was analysed: class, network, samples, loss and number of parameters."""
    name = PurePath(str(result.checkpoint.get("path") or "")).name or str(result.network.get("model") or "")
    samples, loss = result.data.get("samples"), result.data.get("loss")
    parts = [f"{samples:,} samples"] if samples else []
    parts += [f"loss {result.loss:.4g}{f' ({loss})' if loss else ''}", f"P = {result.num_parameters:,}"]
    return f"{type(result).__name__}{f' of {name}' if name else ''}: {', '.join(parts)}"
