"""Where a result comes from: checkpoint, data, network, training, settings and versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hessian_tools.results.provenance import Analysed
from ikun_hessian.reports.html.elements import Html, html, tag

LONGEST = 300  # characters of a value


def provenance_list(r: Analysed) -> Html:
    """Return the provenance of a result as a list of terms."""
    rest = {
        "parameters": f"{r.num_parameters:,}",
        "computed in": f"{r.dtype} on {r.device.replace('cpu', 'CPU')}",
        "seed": str(r.seed),
    }
    seconds = getattr(r, "seconds", None)
    rest |= {} if seconds is None else {"time": f"{seconds:.1f} s"}
    groups: dict[str, Mapping[str, Any]] = {
        "checkpoint": r.checkpoint,
        "data": r.data,
        "network": r.network,
        "training": r.training,
        "analysis": {**r.settings, **rest},
        "versions": getattr(r, "versions", {}),
    }
    return tag("dl", [_entry(name, values) for name, values in groups.items() if values], class_="provenance")


def _entry(name: str, values: Mapping[str, Any]) -> Html:
    texts = (
        f"{key.replace('_', ' ')} {_shown(value)}" for key, value in values.items() if value not in (None, "", [], {})
    )
    return html(tag("dt", name), tag("dd", "; ".join(texts)))


def _shown(value: Any) -> str:
    """Return a setting as short text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        text = ", ".join(_shown(v) for v in value)
    elif isinstance(value, dict):
        text = ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    else:
        text = str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
