"""Warnings that a spectrum earns, each from a measured number."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hessian_tools.results.spectrum import Spectrum, SpectrumResult


def warnings_of(result: SpectrumResult) -> tuple[str, ...]:
    """What not to conclude, each from a measured number."""
    return tuple(_warnings(result))


def _warnings(result: SpectrumResult) -> Iterator[str]:
    name, spectrum = result.main
    pairs = (*spectrum.eigenvalues, *spectrum.smallest_eigenvalues)
    if all(p.value == 0 for p in pairs):
        yield f"The {name} is zero: no surrogate gradient reaches these weights. Is a layer far from its threshold?"
        return
    for kind, s in result.spectra.items():
        if text := _missed(s):
            yield f"{text} of the {kind}: run again with another --seed, or with a larger --top or --smallest."
        if kind in ("ggn", "fisher") and s.search and s.search.smallest < -1e-5 * max(abs(p.value) for p in pairs):
            yield (
                f"The {kind} has negative eigenvalues (down to {s.search.smallest:.2g}), so the loss is not convex in "
                "the outputs: nothing that rests on a positive semidefinite operator holds."
            )
        if lost := sum(not p.converged for p in (*s.eigenvalues, *s.smallest_eigenvalues)):
            yield f"{lost} eigenvalue(s) of the {kind} did not converge: trust them only to within their residual."
    top = spectrum.eigenvalues[0]
    if math.isnan(top.data_stderr):
        yield "One batch of samples alone: there is no error from the data, and no claim about the minimum either."
    elif top.data_stderr > 0.1 * abs(top.value):
        yield (
            f"lambda_max is known to {_ratio(top.data_stderr, top.value)} only: {result.data.get('samples')} samples "
            "are few for this network; a ranking by it needs more."
        )
    damping = result.settings.get("damping")
    for kind, s in result.spectra.items():
        if damping and s.density is not None and s.effective_dimension is None:
            low = min(p.value for p in (*s.eigenvalues, *s.smallest_eigenvalues))
            yield (
                f"No effective dimension and log det of the {kind}: A + z I is not sure to be positive definite at z = "
                f"{damping:g} (lambda_min {low:.3g}): give a --damping above that in size."
            )
    negative = [p for p in pairs if p.value < -p.residual]
    if name == "hessian" and negative and _spiking(result):
        yield (
            f"Negative eigenvalues (down to {_ratio(min(p.value for p in negative), top.value)} of lambda_max) belong "
            "to the surrogate's 2-jet. Do not read them as saddle directions of the spiking loss."
        )
    drop = result.gradient_norm**2 / (2 * top.value) if top.value > 0 else math.inf
    if drop > 0.01 * result.loss:
        yield (
            f"The gradient is not small (||g||^2 / (2 lambda_max) is {_ratio(drop, result.loss)} of the loss): these "
            "weights are not at a stationary point of the evaluation-mode surrogate loss."
        )
    slopes = [v for k, v in result.sensitivity.items() if k.startswith("slope") and math.isfinite(v)]
    if slopes and top.value > 0 and (max(slopes) > 1.5 * top.value or min(slopes) < top.value / 1.5):
        yield (
            f"lambda_max goes from {min(slopes):.3g} to {max(slopes):.3g} as the surrogate's slope goes x 1/2, x 2: "
            "compare only under one common surrogate (--surrogate)."
        )
    if str(result.network.get("surrogate", "")).startswith("rect"):
        yield "The rect surrogate has f'' = 0: every term of the Hessian that needs it is absent."
    for layer, values in result.activity.items():
        if isinstance(values, dict) and values.get("dead", 0) >= 0.5:
            yield f"{values['dead']:.0%} of the neurons of {layer} never fire on these samples."
    if result.training.get("failures"):
        yield "Training reported: " + "; ".join(str(f) for f in result.training["failures"]) + "."


def _spiking(result: SpectrumResult) -> bool:
    """Not so for a network of another library in which no surrogate was found."""
    return bool("library" not in result.network or result.network.get("surrogate"))


def _missed(s: Spectrum) -> str | None:
    """Whether another start found something beyond the pairs that are printed, by more than round-off."""
    pairs = (*s.eigenvalues, *s.smallest_eigenvalues)
    if s.search is None or not all(p.converged for p in pairs):
        return None
    slack = 1e-3 * max(abs(p.value) for p in pairs)
    last = min(p.value for p in s.eigenvalues)
    low = max((p.value for p in s.smallest_eigenvalues), default=-math.inf)
    if s.search.largest > last + slack:
        return f"An independent start found {s.search.largest:.4g}, above a printed value: there are missed eigenvalues"
    if s.search.smallest < low - slack:
        return (
            f"An independent start found {s.search.smallest:.4g}, below a printed value: there are missed eigenvalues"
        )
    return None


def _ratio(part: float, whole: float) -> str:
    return f"{abs(part / whole):.0%}" if whole else "-"
