"""Whether networks may be ranked by the numbers of a spectrum, given their errors from the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hessian_tools.analysis.warnings import learned_nothing
from hessian_tools.results.comparability import common_operators
from hessian_tools.results.flatness import FlatnessResult, Metric
from hessian_tools.results.operator_spectrum import Eigenvalue, Trace
from hessian_tools.results.spectrum import SpectrumResult

APART = 2.0  # standard errors of a difference above which two numbers are called different
PRECISE = 0.1  # relative standard error up to which networks may be ranked
NAMES = {"ggn": "GGN", "hessian": "Hessian", "fisher": "Fisher matrix"}


@dataclass(frozen=True)
class Known:
    """How well a number is known.

    Attributes:
        error: Standard error relative to the value. It is infinite if the value is zero, and NaN if it is unknown.
        least: Whether the error is only a lower limit.
    """

    error: float
    least: bool

    @property
    def precise(self) -> bool:
        """Whether the error is known and small."""
        return self.error <= PRECISE and not self.least

    def __str__(self) -> str:
        return f"{'at least ' if self.least else ''}{self.error:.0%}" if math.isfinite(self.error) else "unknown"


def ranking(result: SpectrumResult | FlatnessResult) -> str:
    """Say in one sentence whether networks may be ranked by the numbers of this result.

    Two networks with the same relative error e can be told apart if they differ by more than 2 sqrt(2) e, which is
    twice the standard error of their difference. The errors are taken as independent. On common samples they usually
    are correlated, and a smaller difference may suffice.

    Args:
        result: The result of an analysis.
    """
    classes = result.network.get("classes") or result.data.get("classes")
    if learned_nothing(result.accuracy, result.loss, classes, result.activity):
        return "no: the network has not learned its task."
    if isinstance(result, SpectrumResult):
        for kind, s in result.spectra.items():
            if not s.eigenvalues[0].converged:
                return f"no: lambda_max of the {NAMES.get(kind, kind)} did not converge."
        tops = {kind: _known(s.eigenvalues[0].value, s.eigenvalues[0]) for kind, s in result.spectra.items()}
        traces = {kind: _known(s.trace.estimate, s.trace) for kind, s in result.spectra.items() if s.trace is not None}
    else:
        tops, traces = (
            {kind: _known(m.value, m) for kind in ("ggn", "hessian") if (m := result.main.get(f"{kind} {what}"))}
            for what in ("lambda_max", "trace")
        )
    return _verdict(tops, traces)


@dataclass(frozen=True)
class Apart:
    """What tells the lowest of several networks from the highest, number by number.

    Attributes:
        told: One sentence for each number that does.
        close: Names of the numbers whose difference is at most twice its standard error.
        unknown: Names of the numbers whose error is unknown or known only from below.
    """

    told: tuple[str, ...]
    close: tuple[str, ...]
    unknown: tuple[str, ...]


def told_apart(labelled: Sequence[tuple[str, SpectrumResult]]) -> Apart:
    """Say which numbers tell the lowest of several networks from the highest.

    They do if the two differ by more than twice the standard error of the difference, with the errors taken as
    independent.

    Args:
        labelled: Labels and results on the same samples.
    """
    told, close, unknown = list[str](), list[str](), list[str]()
    for kind in common_operators(list(labelled)):
        for name in ("lambda_max", "trace"):
            numbers = ascending(labelled, kind, name)
            if len(numbers) < 2:
                continue
            low, *_, high = numbers
            title = f"{NAMES.get(kind, kind)} {name}"
            if low.is_below(high):
                by = f"{1 - low.value / high.value:.0%} below" if low.value > 0 else "below"
                error = math.hypot(low.error, high.error)
                far = f"{(high.value - low.value) / error:.1f} standard errors" if error else "exact"
                told.append(f"{title}: {low.label} is {by} {high.label} ({far})")
            else:
                (close if low.is_close_to(high) else unknown).append(title)
    return Apart(tuple(told), tuple(close), tuple(unknown))


@dataclass(frozen=True)
class NetworkNumber:
    """A number of one of several networks.

    Attributes:
        label: The network.
        value: The number.
        error: Its standard error; a lower limit, or NaN, if it is not known.
        known: Whether the error is known.
    """

    label: str
    value: float
    error: float
    known: bool

    def is_close_to(self, other: NetworkNumber) -> bool:
        """Return whether two numbers differ by at most `APART` standard errors, also if these are lower limits."""
        return abs(other.value - self.value) <= APART * math.hypot(self.error, other.error)

    def is_below(self, other: NetworkNumber) -> bool:
        """Return whether the other number is larger by more than `APART` standard errors, which are known."""
        return self.known and other.known and self.value < other.value and not self.is_close_to(other)


def ascending(labelled: Sequence[tuple[str, SpectrumResult]], kind: str, name: str) -> list[NetworkNumber]:
    """Return a number of every network, the lowest first; an empty list if a network does not have it.

    Args:
        labelled: Labels and results.
        kind: Name of the operator.
        name: "lambda_max" or "trace".
    """
    numbers = [_number(label, r, kind, name) for label, r in labelled]
    return sorted((n for n in numbers if n), key=lambda n: n.value) if all(numbers) else []


def _number(label: str, result: SpectrumResult, kind: str, name: str) -> NetworkNumber | None:
    spectrum = result.spectra[kind]
    number = spectrum.eigenvalues[0] if name == "lambda_max" else spectrum.trace
    if number is None:
        return None
    value = number.value if isinstance(number, Eigenvalue) else number.estimate
    if isinstance(number, Eigenvalue) and not number.converged:
        return NetworkNumber(label, value, math.nan, False)
    known = _known(value, number)
    return NetworkNumber(label, value, abs(known.error * value), math.isfinite(known.error) and not known.least)


def _verdict(tops: Mapping[str, Known], traces: Mapping[str, Known]) -> str:
    """Say by which numbers networks may be ranked, given how well those of each operator are known."""
    if all(math.isnan(top.error) for top in tops.values()):
        return "no: a single sample gives no error from the data. Use more samples."
    worst = max(tops, key=lambda kind: (math.isnan(tops[kind].error), tops[kind].least, tops[kind].error))
    if all(top.precise for top in tops.values()):
        return f"by lambda_max, if two networks differ by more than {_resolved(tops[worst])}, and over several seeds."
    good = {f"lambda_max of the {NAMES.get(kind, kind)}": top for kind, top in tops.items() if top.precise}
    good |= {f"the {NAMES.get(kind, kind)} trace": trace for kind, trace in traces.items() if trace.precise}
    text = f"not by lambda_max of the {NAMES.get(worst, worst)} (data error {tops[worst]})"
    if not good:
        return f"{text}: use more samples, if there are more."
    best = min(good, key=lambda name: good[name].error)
    return f"{text}; by {best}, if two networks differ by more than {_resolved(good[best])}."


def _known(value: float, number: Eigenvalue | Trace | Metric) -> Known:
    """Return how well a number is known: its error from the data; for a trace also that over the probes."""
    least = not math.isnan(number.data_stderr_least)
    error = number.data_stderr_least if least else number.data_stderr
    probes = number.stderr if not isinstance(number, Eigenvalue) else 0.0
    error = math.hypot(error, 0.0 if math.isnan(probes) else probes)
    return Known(abs(error / value) if value else math.inf, least)


def _resolved(known: Known) -> str:
    """Return the smallest relative difference of two networks that is twice its own standard error."""
    return f"{2 * math.sqrt(2) * known.error:.0%}"
