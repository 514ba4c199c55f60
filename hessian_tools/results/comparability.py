"""Check that results were measured under the same conditions, so that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hessian_tools.io.json import ResultError
from hessian_tools.results.provenance import Analysed
from hessian_tools.results.spectrum import SpectrumResult
from hessian_tools.results.text import brief

# Conditions that must agree before curvatures are compared: field of the result, key in that field, name for the user.
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
    ("network", "valid", "valid steps of padded sequences"),
)


def method_of(result: SpectrumResult) -> str:
    """Return the method that found the eigenvalues: "lanczos", "power" or "pyhessian"."""
    if result.settings.get("backend", "own") == "pyhessian":
        return "pyhessian"
    return str(result.settings.get("method", "lanczos"))


def labelled(found: list[SpectrumResult]) -> list[tuple[str, SpectrumResult]]:
    """Give every result the shortest label that identifies it.

    The label is the initializer if it is known and different for every result, and the file name of the checkpoint
    otherwise. Results of one checkpoint that were found by different methods also get the name of the method. Labels
    that are still ambiguous are numbered.

    Args:
        found: The results.

    Returns:
        Pairs (label, result), in the order of `found`.
    """
    inits = [str(r.training.get("init", "")) for r in found]
    stems = [PurePath(str(r.checkpoint.get("path", "result"))).stem for r in found]
    for bare in (inits, stems):
        names = _with_methods(bare, found)
        if all(bare) and len(set(names)) == len(names):
            return list(zip(names, found, strict=True))
    return [(f"{i} {name}", r) for i, (name, r) in enumerate(zip(stems, found, strict=True), 1)]


def _with_methods(names: list[str], found: list[SpectrumResult]) -> list[str]:
    """Append the method to a name that results of one checkpoint share, if their methods differ."""
    labels = []
    for name, result in zip(names, found, strict=True):
        same = [r for n, r in zip(names, found, strict=True) if n == name]
        methods, checkpoints = {method_of(r) for r in same}, {r.checkpoint.get("sha256") for r in same}
        labels.append(f"{name} {method_of(result)}" if len(methods) > 1 and len(checkpoints) == 1 else name)
    return labels


def common_operators(labelled: list[tuple[str, SpectrumResult]]) -> list[str]:
    """Return the operators that every result contains, in the order of the first result."""
    first, *others = (r.spectra for _, r in labelled)
    return [name for name in first if all(name in spectra for spectra in others)]


def by_method(labelled: list[tuple[str, SpectrumResult]]) -> list[tuple[SpectrumResult, SpectrumResult]]:
    """Pair the results of one checkpoint that were found by different methods.

    Args:
        labelled: Pairs (label, result).

    Returns:
        Pairs of results. The first of each pair is by the most reliable method that the checkpoint has: Lanczos, then
            power iteration, then PyHessian.
    """
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
    """A condition in which results differ.

    Attributes:
        key: Key of the condition.
        meaning: Name of the condition for the user.
        values: Value of every result, in order.
    """

    key: str
    meaning: str
    values: tuple[Any, ...]

    __repr__ = brief


def differing(found: Sequence[Analysed], conditions: Sequence[tuple[str, str, str]] = CONDITIONS) -> list[Unlike]:
    """Return the conditions in which results differ.

    Args:
        found: The results.
        conditions: Conditions to check, each as (field of the result, key in that field, name for the user).

    Returns:
        One entry for each condition in which the results differ, in the order of `conditions`.
    """
    columns = [(key, meaning, tuple(getattr(r, part).get(key) for r in found)) for part, key, meaning in conditions]
    return [Unlike(*column) for column in columns if any(value != column[2][0] for value in column[2])]


def comparable(labelled: list[tuple[str, SpectrumResult]]) -> None:
    """Check that results can be compared.

    The results must be measured under the same conditions and on the same set of parameters, and must share at least
    one operator. An operator that is missing in one of the results is left out of the comparison.

    Args:
        labelled: Pairs (label, result).

    Raises:
        ResultError: If there are fewer than two results, if a condition differs (the message names it and both values),
            or if no operator is in all results.
    """
    if len(labelled) < 2:
        raise ResultError("a comparison needs at least two results")
    labels, found = [label for label, _ in labelled], [r for _, r in labelled]
    sizes = Unlike("parameters", "set of parameters", tuple(sorted(r.parameters) for r in found))
    for difference in (*differing(found), sizes):
        refuse_unlike(labels, difference)
    if not common_operators(labelled):
        had = "; ".join(f"{label} has {', '.join(r.spectra)}" for label, r in labelled)
        raise ResultError(
            f"not comparable: no operator is in all results ({had}). Compute one operator for all of them."
        )


def refuse_unlike(
    labels: Sequence[str], difference: Unlike, remedy: str = "compute both spectra with the same settings"
) -> None:
    """Raise an error if a condition differs between results.

    Args:
        labels: Label of every result.
        difference: The condition and its value for every result.
        remedy: What the user can do about it. It ends the message.

    Raises:
        ResultError: If a value differs from the first one. The message names the condition, both values and both
            labels.
    """
    for label, value in zip(labels, difference.values, strict=True):
        if value != difference.values[0]:
            raise ResultError(
                f"not comparable: {difference.meaning} differs, {_show(difference.values[0])} for {labels[0]} but "
                f"{_show(value)} for {label}: {remedy}"
            )


def _show(value: Any) -> str:
    """Shorten a long value, such as a hash."""
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
