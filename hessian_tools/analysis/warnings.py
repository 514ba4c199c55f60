"""Warnings about a spectrum. Each follows from a measured number."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hessian_tools.results.spectrum import Spectrum, SpectrumResult


def warnings_of(result: SpectrumResult) -> tuple[str, ...]:
    """Return warnings about conclusions that the numbers do not support.

    Args:
        result: The result of a spectrum analysis.

    Returns:
        The warnings, in full sentences.
    """
    return tuple(_warnings(result))


def _warnings(result: SpectrumResult) -> Iterator[str]:
    name, spectrum = result.main
    pairs = (*spectrum.eigenvalues, *spectrum.smallest_eigenvalues)
    if all(p.value == 0 for p in pairs):
        yield f"The {name} is zero: no surrogate gradient reaches these weights. A layer may be far from its threshold."
        return
    for kind, s in result.spectra.items():
        if text := _missed(s):
            yield (
                f"{text}. Eigenvalues of the {kind} were missed. Repeat the analysis with another seed, or with a "
                "larger top or smallest."
            )
        if kind in ("ggn", "fisher") and s.search and s.search.smallest < -1e-5 * max(abs(p.value) for p in pairs):
            yield (
                f"The {kind} has negative eigenvalues (down to {s.search.smallest:.2g}), so the loss is not convex in "
                "the outputs. Results that assume a positive semidefinite operator do not hold."
            )
        if lost := sum(not p.converged for p in (*s.eigenvalues, *s.smallest_eigenvalues)):
            yield f"{lost} eigenvalue(s) of the {kind} did not converge. They are only accurate to their residual."
    top = spectrum.eigenvalues[0]
    if math.isnan(top.data_stderr):
        yield "A single sample gives no standard error from the data. Use more samples before you draw conclusions."
    elif top.data_stderr > 0.1 * abs(top.value):
        samples = result.data.get("samples")
        counted = f" ({samples:,} samples)" if isinstance(samples, int) else ""
        yield (
            f"lambda_max has a {percent_of(top.data_stderr, top.value)} standard error from the data{counted}. Use "
            "more samples before ranking networks by it."
        )
    damping = result.settings.get("damping")
    for kind, s in result.spectra.items():
        if damping and s.density is not None and s.effective_dimension is None:
            low = min(p.value for p in (*s.eigenvalues, *s.smallest_eigenvalues))
            yield (
                f"No effective dimension and log det of the {kind}: A + z I may not be positive definite at z = "
                f"{damping:g} (lambda_min is {low:.3g}). Use a larger damping, above |lambda_min|."
            )
    negative = [p for p in pairs if p.value < -p.residual]
    if name == "hessian" and negative and is_spiking(result):
        yield (
            f"Negative eigenvalues (magnitude up to {percent_of(min(p.value for p in negative), top.value)} of "
            "lambda_max) belong to the surrogate's 2-jet. They are not evidence for saddle directions of the spiking "
            "loss."
        )
    drop = result.gradient_norm**2 / (2 * top.value) if top.value > 0 else math.inf
    if drop > 0.01 * result.loss:
        yield (
            f"The gradient is not small (||g||^2 / (2 lambda_max) is {percent_of(drop, result.loss)} of the loss). "
            "These weights are not a stationary point of the surrogate loss in evaluation mode."
        )
    slopes = [v for k, v in result.sensitivity.items() if k.startswith("slope") and math.isfinite(v)]
    if slopes and top.value > 0 and (max(slopes) > 1.5 * top.value or min(slopes) < top.value / 1.5):
        yield (
            f"lambda_max ranges from {min(slopes):.3g} to {max(slopes):.3g} when the slope of the surrogate is halved "
            "or doubled. Compare networks only under one common surrogate."
        )
    if str(result.network.get("surrogate", "")).startswith("rect"):
        yield "The rect surrogate has f'' = 0, so the Hessian lacks every term that contains f''."
    for layer, values in result.activity.items():
        if isinstance(values, dict) and values.get("dead", 0) >= 0.5:
            yield f"{values['dead']:.0%} of the neurons of {layer} never fire on these samples."
    if result.training.get("failures"):
        yield "Training reported: " + "; ".join(str(f) for f in result.training["failures"]) + "."


def is_spiking(result: SpectrumResult) -> bool:
    """Return whether the network spikes: False for a network of another library without a known surrogate."""
    return bool("library" not in result.network or result.network.get("surrogate"))


def _missed(s: Spectrum) -> str | None:
    """Describe a value beyond the reported ones that another start found, if there is one above round-off."""
    pairs = (*s.eigenvalues, *s.smallest_eigenvalues)
    if s.search is None or not all(p.converged for p in pairs):
        return None
    slack = 1e-3 * max(abs(p.value) for p in pairs)
    last = min(p.value for p in s.eigenvalues)
    low = max((p.value for p in s.smallest_eigenvalues), default=-math.inf)
    if s.search.largest > last + slack:
        return f"An independent start found {s.search.largest:.4g}, above a reported value"
    if s.search.smallest < low - slack:
        return f"An independent start found {s.search.smallest:.4g}, below a reported value"
    return None


def percent_of(part: float, whole: float) -> str:
    """Return |part / whole| as a percentage, or "-" if `whole` is zero."""
    return f"{abs(part / whole):.0%}" if whole else "-"
