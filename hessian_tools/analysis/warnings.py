"""Warnings about a spectrum. Each follows from a measured number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hessian_tools.results.operator_spectrum import Spectrum
from hessian_tools.results.spectrum import SpectrumResult

CONCENTRATED = 0.3  # share of one group in a variance, as in `sampling_error.CONCENTRATED` (this module needs no torch)
# Importance of a warning: the numbers are wrong or mean nothing, they are uncertain, they are easily misread, a remark.
INVALID, UNCERTAIN, MISREAD, REMARK = range(4)
USUAL_PROBES = 4  # of a density, as in `linalg.spectral_density.MOST_DEFAULT`
CHANCE = 2.0  # an accuracy below this multiple of guessing, or nearer to guessing than to 1, counts as not learned


@dataclass(frozen=True)
class Caution:
    """A warning about conclusions that the numbers do not support.

    Attributes:
        importance: INVALID, UNCERTAIN, MISREAD or REMARK.
        text: The warning, in full sentences, with what to do.
        short: The same in one sentence, for a summary; "" if a summary says it in another way, or need not say it.
    """

    importance: int
    text: str
    short: str


def warnings_of(result: SpectrumResult) -> tuple[str, ...]:
    """Return warnings about conclusions that the numbers do not support.

    Args:
        result: The result of a spectrum analysis.

    Returns:
        The warnings, in full sentences.
    """
    return tuple(caution.text for caution in _cautions(result))


def main_warnings(result: SpectrumResult) -> list[str]:
    """Return one sentence for every warning that a summary may show, the most important first.

    Errors from the data are not among them (see `hessian_tools.analysis.ranking`).
    """
    found = [c for c in _cautions(result) if c.short]
    return [c.short for c in sorted(found, key=lambda c: c.importance)]


def learned_nothing(accuracy: float, loss: float, classes: int | None, activity: Mapping[str, Any]) -> str:
    """Return one sentence that says that a network has not learned its task, or "" if it has.

    Args:
        accuracy: Fraction of the samples classified correctly, NaN if unknown.
        loss: The loss on the same samples.
        classes: Number of classes, None if unknown.
        activity: For each layer of neurons, a mapping whose "dead" is the fraction of neurons that never fire.
    """
    dead = [v["dead"] for v in activity.values() if isinstance(v, Mapping) and "dead" in v]
    if dead and any(share >= 1 for share in dead):
        return "A whole layer of neurons never fires on these samples: the network is dead, and nothing is a minimum."
    if not math.isfinite(loss):
        return f"The loss is {loss}: the training diverged."
    if classes is not None and classes > 1 and accuracy < min(CHANCE / classes, (1 + 1 / classes) / 2):
        return (
            f"The accuracy on these samples is {accuracy:.1%}, and guessing gives {1 / classes:.1%}: the network has "
            "not learned its task. Its curvature says nothing about minima."
        )
    return ""


def _cautions(result: SpectrumResult) -> Iterator[Caution]:
    name, spectrum = result.main
    classes = result.network.get("classes") or result.data.get("classes")
    if said := learned_nothing(result.accuracy, result.loss, classes, result.activity):
        yield Caution(INVALID, said, said)
    if result.dtype in ("float16", "bfloat16"):
        yield Caution(
            INVALID,
            f"All numbers were computed in {result.dtype}, which has too few digits for second derivatives. Compute in "
            "float32 or float64.",
            f"{result.dtype} has too few digits for second derivatives: use float32 or float64.",
        )
    if spectrum.autograd:
        yield Caution(
            REMARK,
            f"The products are torch's double backward, which takes two to four times as long: {spectrum.autograd}. "
            "The numbers are the same.",
            "",
        )
    pairs = (*spectrum.eigenvalues, *spectrum.smallest_eigenvalues)
    if all(p.value == 0 for p in pairs):
        zero = f"The {name} is zero: no surrogate gradient reaches these weights."
        yield Caution(INVALID, f"{zero} A layer may be far from its threshold.", zero)
        return
    if cuts := result.settings.get("cuts"):
        limit = f"To fit {result.settings['time']:g} s,"
        said = f"{limit} {len(cuts)} part{'s' * (len(cuts) > 1)} of the analysis were left out; all warnings say which."
        yield Caution(UNCERTAIN, f"{limit} these were left out: {'; '.join(cuts)}.", said)
    for kind, s in result.spectra.items():
        yield from _of_operator(kind, s)
    yield from _of_the_probes(result)
    yield from _of_the_data(result)
    yield from _of_the_damping(result)
    yield from _of_the_weights(result)
    yield from _of_the_network(result)


def _of_operator(kind: str, s: Spectrum) -> Iterator[Caution]:
    """Yield warnings about the numerical accuracy of one operator."""
    if text := _missed(s):
        yield Caution(
            INVALID,
            f"{text}. Eigenvalues of the {kind} were missed. Repeat the analysis with another seed, or with a "
            "larger top or smallest.",
            f"Eigenvalues of the {kind} were missed: repeat with another seed or a larger top.",
        )
    size = max(abs(p.value) for p in (*s.eigenvalues, *s.smallest_eigenvalues))
    if kind in ("ggn", "fisher") and s.search and s.search.smallest < -1e-5 * size:
        negative = f"The {kind} has negative eigenvalues (down to {s.search.smallest:.2g})"
        yield Caution(
            MISREAD,
            f"{negative}, so the loss is not convex in the outputs. Results that assume a positive semidefinite "
            "operator do not hold.",
            f"{negative}: the loss is not convex in the outputs.",
        )
    if lost := sum(not p.converged for p in (*s.eigenvalues, *s.smallest_eigenvalues)):
        text = f"{lost} eigenvalue(s) of the {kind} did not converge"
        yield Caution(UNCERTAIN, f"{text}. They are only accurate to their residual.", f"{text}.")


def _of_the_probes(result: SpectrumResult) -> Iterator[Caution]:
    """Yield a remark if the densities have fewer probes than usual."""
    if result.settings.get("probes") is not None or result.settings.get("accuracy") is not None:
        return
    found = [s.density.probes for s in result.spectra.values() if s.density is not None]
    if found and 0 < max(found) < USUAL_PROBES:
        yield Caution(
            REMARK,
            f"The densities have {max(found)} probes instead of {USUAL_PROBES}, which is enough for "
            f"{result.num_parameters:,} parameters: their mean is within 1% of the range of the spectrum. Standard "
            "errors of functions of the spectrum come from as few values. Set probes for more.",
            "",
        )


def _of_the_data(result: SpectrumResult) -> Iterator[Caution]:
    """Yield warnings about the errors from the data. A summary shows them in its ranking instead."""
    _, spectrum = result.main
    top = spectrum.eigenvalues[0]
    if math.isnan(top.data_stderr) and math.isnan(top.data_stderr_least):
        text = "A single sample gives no standard error from the data. Use more samples before you draw conclusions."
        yield Caution(UNCERTAIN, text, "")
    elif top.data_stderr > 0.1 * abs(top.value):
        samples = result.data.get("samples")
        counted = f" ({samples:,} samples)" if isinstance(samples, int) else ""
        yield Caution(
            UNCERTAIN,
            f"lambda_max has a {percent_of(top.data_stderr, top.value)} standard error from the data{counted}. Use "
            "more samples before ranking networks by it.",
            "",
        )
    lowest = spectrum.smallest_eigenvalues[0] if spectrum.smallest_eigenvalues else None
    numbers = {"lambda_max": top, "lambda_min": lowest, "the trace": spectrum.trace}
    if heavy := {what: n for what, n in numbers.items() if n and n.data_concentration > CONCENTRATED}:
        carried = _listed([f"{n.data_concentration:.0%} of the variance of {what}" for what, n in heavy.items()])
        yield Caution(
            UNCERTAIN,
            f"A few samples decide: one group of them carries {carried}. Standard errors from the data with > are only "
            "lower limits, and no interval follows from them. Use more samples.",
            "",
        )


def _of_the_damping(result: SpectrumResult) -> Iterator[Caution]:
    """Yield warnings about functions of the spectrum that do not exist."""
    damping = result.settings.get("damping")
    for kind, s in result.spectra.items():
        if damping and s.density is not None and s.effective_dimension is None and s.density.probes > 1:
            low = min(p.value for p in (*s.eigenvalues, *s.smallest_eigenvalues))
            yield Caution(
                REMARK,
                f"No effective dimension and log det of the {kind}: A + z I may not be positive definite at z = "
                f"{damping:g} (lambda_min is {low:.3g}). Use a larger damping, above |lambda_min|.",
                f"No effective dimension and log det of the {kind}: use a larger damping, above {abs(low):.3g}.",
            )


def _of_the_weights(result: SpectrumResult) -> Iterator[Caution]:
    """Yield warnings about weights that are not a minimum of the surrogate loss."""
    name, spectrum = result.main
    top = spectrum.eigenvalues[0]
    pairs = (*spectrum.eigenvalues, *spectrum.smallest_eigenvalues)
    negative = [p for p in pairs if p.value < -p.residual]
    if name == "hessian" and negative and is_spiking(result):
        size = percent_of(min(p.value for p in negative), top.value)
        yield Caution(
            MISREAD,
            f"Negative eigenvalues (magnitude up to {size} of lambda_max) belong to the derivatives of the surrogate. "
            "Whether the spiking loss curves down there depends on the network: trained ones mostly curved up, "
            "untrained ones mostly down. A calibration measures it.",
            f"Negative eigenvalues (up to {size} of lambda_max) belong to the surrogate, not to the spiking loss.",
        )
    drop = result.gradient_norm**2 / (2 * top.value) if top.value > 0 else math.nan
    if top.value <= 0 < result.gradient_norm:
        yield Caution(
            MISREAD,
            f"lambda_max is not positive ({top.value:.3g}) and the gradient is not zero. These weights are not a "
            "minimum of the surrogate loss in evaluation mode.",
            "These weights are not a minimum of the surrogate loss: lambda_max is not positive.",
        )
    elif drop > 0.01 * result.loss:
        yield Caution(
            MISREAD,
            f"The gradient is not small (||g||^2 / (2 lambda_max) is {percent_of(drop, result.loss)} of the loss). "
            "These weights are not a stationary point of the surrogate loss in evaluation mode.",
            "These weights are not a minimum of the surrogate loss: its gradient is not small.",
        )


def _of_the_network(result: SpectrumResult) -> Iterator[Caution]:
    """Yield warnings about the surrogate, the neurons and the training."""
    top = result.main[1].eigenvalues[0]
    slopes = [v for k, v in result.sensitivity.items() if k.startswith("slope") and math.isfinite(v)]
    if slopes and top.value > 0 and (max(slopes) > 1.5 * top.value or min(slopes) < top.value / 1.5):
        text = (
            f"lambda_max ranges from {min(slopes):.3g} to {max(slopes):.3g} when the slope of the surrogate is halved "
            "or doubled"
        )
        yield Caution(
            MISREAD,
            f"{text}. Compare networks only under one common surrogate.",
            f"{text}: compare networks under one surrogate.",
        )
    if str(result.network.get("surrogate", "")).startswith("rect"):
        text = "The rect surrogate has f'' = 0, so the Hessian lacks every term that contains f''."
        yield Caution(MISREAD, text, text)
    for layer, values in result.activity.items():
        if isinstance(values, dict) and values.get("dead", 0) >= 0.5:
            text = f"{values['dead']:.0%} of the neurons of {layer} never fire on these samples."
            yield Caution(MISREAD, text, text)
    if result.training.get("failures"):
        text = "Training reported: " + "; ".join(str(f) for f in result.training["failures"]) + "."
        yield Caution(UNCERTAIN, text, text)


def _listed(parts: list[str]) -> str:
    """Join parts as in "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def is_spiking(result: SpectrumResult) -> bool:
    """Return whether the network is known to spike: it has a surrogate."""
    return bool(result.network.get("surrogate"))


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
