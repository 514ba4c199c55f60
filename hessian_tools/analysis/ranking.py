"""Whether networks may be ranked by the numbers of a spectrum, given their errors from the data."""

from __future__ import annotations

import math

from hessian_tools.analysis.warnings import learned_nothing
from hessian_tools.results.spectrum import Eigenvalue, SpectrumResult, Trace

PRECISE = 0.1  # relative standard error up to which networks may be ranked
NAMES = {"ggn": "GGN", "hessian": "Hessian", "fisher": "Fisher matrix"}


def ranking(result: SpectrumResult) -> str:
    """Say in one sentence whether networks may be ranked by the numbers of this result.

    Two networks with the same relative error e can be told apart if they differ by more than 2 sqrt(2) e, which is
    twice the standard error of their difference. The errors are taken as independent. On common samples they usually
    are correlated, and a smaller difference may suffice.

    Args:
        result: The result of a spectrum analysis.
    """
    classes = result.network.get("classes") or result.data.get("classes")
    if learned_nothing(result.accuracy, result.loss, classes, result.activity):
        return "no: the network has not learned its task."
    for kind, s in result.spectra.items():
        if not s.eigenvalues[0].converged:
            return f"no: lambda_max of the {NAMES.get(kind, kind)} did not converge."
    tops = {kind: relative_error(s.eigenvalues[0]) for kind, s in result.spectra.items()}
    traces = {kind: relative_error(s.trace) for kind, s in result.spectra.items() if s.trace is not None}
    if all(math.isnan(error) for error, _ in tops.values()):
        return "no: a single sample gives no error from the data. Use more samples."
    good = {f"lambda_max of the {NAMES.get(kind, kind)}": e for kind, (e, least) in tops.items() if _precise(e, least)}
    good |= {f"the {NAMES.get(kind, kind)} trace": e for kind, (e, least) in traces.items() if _precise(e, least)}
    worst, (error, least) = max(tops.items(), key=lambda item: (item[1][1], item[1][0]))
    if all(_precise(error, least) for error, least in tops.values()):
        return f"by lambda_max, if two networks differ by more than {_resolved(error)}, and over several seeds."
    size = "unknown" if not math.isfinite(error) else f"{'at least ' if least else ''}{error:.0%}"
    text = f"not by lambda_max of the {NAMES.get(worst, worst)} (data error {size})"
    if not good:
        return f"{text}: use more samples."
    best = min(good, key=lambda name: good[name])
    return f"{text}; by {best}, if two networks differ by more than {_resolved(good[best])}."


def relative_error(number: Eigenvalue | Trace) -> tuple[float, bool]:
    """Return the standard error relative to the value, and whether it is only a lower limit.

    The error is that from the data; for a trace also that over the probes. It is infinite if the value is zero.
    """
    least = not math.isnan(number.data_stderr_least)
    error = number.data_stderr_least if least else number.data_stderr
    value = number.value if isinstance(number, Eigenvalue) else number.estimate
    if isinstance(number, Trace):
        error = math.hypot(error, 0.0 if math.isnan(number.stderr) else number.stderr)
    return (abs(error / value) if value else math.inf), least


def _precise(error: float, least: bool) -> bool:
    """Return whether an error is known and small."""
    return error <= PRECISE and not least


def _resolved(error: float) -> str:
    """Return the smallest relative difference of two networks that is twice its own standard error."""
    return f"{2 * math.sqrt(2) * error:.0%}"
