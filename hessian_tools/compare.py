"""Which results may stand beside one another."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from hessian_tools.results import ResultError, SpectrumResult

# What must agree before two curvatures may be compared: part of the result, key, what the user knows it as.
CONDITIONS = (
    ("data", "name", "data set"),
    ("data", "split", "split"),
    ("data", "samples", "number of samples"),
    ("data", "sha256", "samples"),
    ("data", "loss", "loss"),
    ("network", "timesteps", "timesteps T"),
    ("network", "coding", "input coding"),
    ("network", "reset", "reset"),
    ("network", "detach_reset", "detached reset"),
    ("network", "surrogate", "surrogate of the analysis"),
    ("network", "norm", "normalization"),
    ("network", "ties", "pooling tie rule"),
)


def labelled(found: list[SpectrumResult]) -> list[tuple[str, SpectrumResult]]:
    """Each result with the shortest name that tells it apart: its initializer, else its checkpoint's file name."""
    inits = [str(r.training.get("init", "")) for r in found]
    if all(inits) and len(set(inits)) == len(inits):
        return list(zip(inits, found, strict=True))
    names = [PurePath(str(r.checkpoint.get("path", "result"))).stem for r in found]
    unique = len(set(names)) == len(names)
    return [(name if unique else f"{i} {name}", r) for i, (name, r) in enumerate(zip(names, found, strict=True), 1)]


def comparable(labelled: list[tuple[str, SpectrumResult]]) -> None:
    """Raises ResultError, naming the condition and both values, unless all results were measured alike."""
    if len(labelled) < 2:
        raise ResultError("a comparison needs at least two results")
    first_label, first = labelled[0]
    for label, other in labelled[1:]:
        for part, key, meaning in CONDITIONS:
            here, there = getattr(first, part).get(key), getattr(other, part).get(key)
            _agree(meaning, first_label, here, label, there)
        _agree("operators", first_label, list(first.spectra), label, list(other.spectra))
        _agree("set of parameters", first_label, sorted(first.parameters), label, sorted(other.parameters))


def _agree(meaning: str, first: str, here: Any, other: str, there: Any) -> None:
    if here != there:
        raise ResultError(
            f"not comparable: {meaning} differs, {_show(here)} for {first} but {_show(there)} for {other}: "
            "run spectrum on both with the same settings"
        )


def _show(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
