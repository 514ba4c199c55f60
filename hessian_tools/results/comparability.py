"""Which results may stand beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hessian_tools.io.json import ResultError
from hessian_tools.results.provenance import Analysed
from hessian_tools.results.spectrum import SpectrumResult

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
    ("network", "output", "output that is read"),
    ("network", "readout", "readout over time"),
)


def method_of(result: SpectrumResult) -> str:
    """What found the eigenvalues: lanczos, power or pyhessian."""
    if result.settings.get("backend", "own") == "pyhessian":
        return "pyhessian"
    return str(result.settings.get("method", "lanczos"))


def labelled(found: list[SpectrumResult]) -> list[tuple[str, SpectrumResult]]:
    """Each result with the shortest name that tells it apart: its initializer, else its checkpoint's file name.

    Results of one checkpoint by several methods get the method's name besides.
    """
    inits = [str(r.training.get("init", "")) for r in found]
    stems = [PurePath(str(r.checkpoint.get("path", "result"))).stem for r in found]
    for bare in (inits, stems):
        names = _with_methods(bare, found)
        if all(bare) and len(set(names)) == len(names):
            return list(zip(names, found, strict=True))
    return [(f"{i} {name}", r) for i, (name, r) in enumerate(zip(stems, found, strict=True), 1)]


def _with_methods(names: list[str], found: list[SpectrumResult]) -> list[str]:
    """The method added to the names that results of one checkpoint by different methods have in common."""
    labels = []
    for name, result in zip(names, found, strict=True):
        same = [r for n, r in zip(names, found, strict=True) if n == name]
        methods, checkpoints = {method_of(r) for r in same}, {r.checkpoint.get("sha256") for r in same}
        labels.append(f"{name} {method_of(result)}" if len(methods) > 1 and len(checkpoints) == 1 else name)
    return labels


def common_operators(labelled: list[tuple[str, SpectrumResult]]) -> list[str]:
    """The operators that all results have, in the order of the first."""
    first, *others = (r.spectra for _, r in labelled)
    return [name for name in first if all(name in spectra for spectra in others)]


def by_method(labelled: list[tuple[str, SpectrumResult]]) -> list[tuple[SpectrumResult, SpectrumResult]]:
    """Pairs of results of one checkpoint by two methods, the more trustworthy first: Lanczos, then power iteration."""
    order = {"lanczos": 0, "power": 1}
    checkpoints: dict[str, list[SpectrumResult]] = {}
    for _, r in labelled:
        if "sha256" in r.checkpoint:
            checkpoints.setdefault(str(r.checkpoint["sha256"]), []).append(r)
    pairs = []
    for results in checkpoints.values():
        best, *others = sorted(results, key=lambda r: order.get(method_of(r), 2))
        pairs += [(best, other) for other in others if method_of(other) != method_of(best)]
    return pairs


@dataclass(frozen=True)
class Unlike:
    """A condition in which results were not measured alike. values: of each result, in order."""

    key: str
    meaning: str
    values: tuple[Any, ...]


def differing(found: Sequence[Analysed], conditions: Sequence[tuple[str, str, str]] = CONDITIONS) -> list[Unlike]:
    """The conditions in which results differ that must agree before they are compared, the first of them first."""
    columns = [(key, meaning, tuple(getattr(r, part).get(key) for r in found)) for part, key, meaning in conditions]
    return [Unlike(*column) for column in columns if any(value != column[2][0] for value in column[2])]


def comparable(labelled: list[tuple[str, SpectrumResult]]) -> None:
    """Raises ResultError, naming the condition and both values, unless all results were measured alike.

    They need one operator in common; what is not in all of them is left out of a comparison.
    """
    if len(labelled) < 2:
        raise ResultError("a comparison needs at least two results")
    labels, found = [label for label, _ in labelled], [r for _, r in labelled]
    sizes = Unlike("parameters", "set of parameters", tuple(sorted(r.parameters) for r in found))
    for difference in (*differing(found), sizes):
        refuse_unlike(labels, difference)
    if not common_operators(labelled):
        had = "; ".join(f"{label} has {', '.join(r.spectra)}" for label, r in labelled)
        raise ResultError(f"not comparable: no operator is in all results ({had}): run spectrum with one --operator")


def refuse_unlike(
    labels: Sequence[str], difference: Unlike, remedy: str = "run spectrum on both with the same settings"
) -> None:
    """Raises ResultError naming the condition and the first result that differs from the first in it, if one does."""
    for label, value in zip(labels, difference.values, strict=True):
        if value != difference.values[0]:
            raise ResultError(
                f"not comparable: {difference.meaning} differs, {_show(difference.values[0])} for {labels[0]} but "
                f"{_show(value)} for {label}: {remedy}"
            )


def _show(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
