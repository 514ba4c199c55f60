"""The summary: the main numbers of every network with their errors, and whether the networks can be ranked by them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from hessian_tools.analysis.ranking import NetworkNumber, ascending
from hessian_tools.io.json import ResultError
from hessian_tools.results.comparability import comparable
from hessian_tools.results.flatness import TRUE, FlatnessResult, Metric
from hessian_tools.results.landscape import LandscapeResult
from hessian_tools.results.operator_spectrum import Eigenvalue, Trace
from hessian_tools.results.spectrum import SpectrumResult
from ikun_hessian.reports.flatness import flatness_cautions
from ikun_hessian.reports.html.elements import Html, html, html_table, listed, number, percent, tag, value_with_error
from ikun_hessian.reports.html.sources import MeasuredNetwork
from ikun_hessian.reports.html.spectrum import operator_title
from ikun_hessian.reports.landscape import landscape_cautions

MOST = 12  # networks whose warnings the summary counts one by one


def summary(
    networks: Sequence[MeasuredNetwork], landscapes: dict[str, LandscapeResult], left_out: Sequence[str]
) -> Html:
    """Return the summary of all results.

    Args:
        networks: All networks with a spectrum or a flatness result.
        landscapes: Landscapes by name.
        left_out: Files that are not shown, with reasons.
    """
    spectra = [(n.name, s) for n in networks if (s := n.run.spectra.get(n.key))]
    flats = [(n.name, f) for n in networks if (f := n.run.flatness.get(n.key))]
    parts: list[Html] = []
    if networks:
        operators = list(dict.fromkeys(op for _, s in spectra for op in s.spectra if op in ("ggn", "hessian")))
        operators.sort()  # the GGN first
        head = ["network", "loss", "accuracy"]
        head += [f"{operator_title(op)} {what}" for op in operators for what in ("λ max", "trace")]
        sharp = next((name for _, f in flats for name, m in f.main.items() if m.valid == TRUE), "")
        radii = sorted({s.loss_rise.radius for _, s in spectra if s.loss_rise})
        head += [f"loss itself: {sharp}"] if sharp else ["loss itself: rise under noise"] if radii else []
        parts += [html_table(head, [_row(n, operators, sharp, bool(radii)) for n in networks], label="Summary")]
        parts += [tag("p", _meaning(operators, flats, sharp, radii), class_="note")]
    sentences = [*_ranking(spectra), *_warned(spectra, flats, landscapes)]
    parts += [listed(sentences, "verdict")]
    if left_out:
        parts += [tag("h3", "Not shown"), listed(left_out, "warnings")]
    return html(*parts)


def _row(network: MeasuredNetwork, operators: Sequence[str], sharp: str, rises: bool) -> list[str]:
    """Return the cells of one network."""
    spectrum, flat = network.run.spectra.get(network.key), network.run.flatness.get(network.key)
    first: SpectrumResult | FlatnessResult | None = spectrum or flat
    assert first is not None  # a network has results
    cells = [network.name, number(first.loss), percent(first.accuracy)]
    for op in operators:
        s = spectrum.spectra.get(op) if spectrum else None
        cells += [_value(s.eigenvalues[0] if s else None), _value(s.trace if s else None)]
    if sharp:
        m = flat.main.get(sharp, Metric()) if flat else Metric()
        cells += [value_with_error(m.value, m.data_stderr, m.data_stderr_least)]
    elif rises:
        rise = spectrum.loss_rise if spectrum else None
        cells += [value_with_error(rise.estimate, rise.data_stderr, rise.data_stderr_least) if rise else "–"]
    return cells


def _value(found: Eigenvalue | Trace | None) -> str:
    if found is None:
        return "–"
    value = found.value if isinstance(found, Eigenvalue) else found.estimate
    return value_with_error(value, found.data_stderr, found.data_stderr_least)


def _meaning(
    operators: Sequence[str], flats: Sequence[tuple[str, FlatnessResult]], sharp: str, radii: Sequence[float]
) -> str:
    """Return what the columns mean."""
    texts = ["loss, accuracy: on the samples analysed."] if operators or flats else []
    if operators:
        texts += [
            "λ max: largest curvature along any direction of the weights; trace: sum of all curvatures. GGN: "
            "generalized Gauss–Newton matrix of the surrogate loss; Hessian: its full second derivative."
        ]
    if sharp:
        meaning = next(f.main[sharp].meaning for _, f in flats if sharp in f.main)
        texts += [f"{sharp}: {meaning}; measured on the spiking loss itself, without a surrogate."]
    elif radii:
        noise = " or ".join(f"{radius:.0%}" for radius in radii)
        texts += [
            f"rise under noise: mean rise of the loss itself, without a surrogate, if each weight is disturbed by "
            f"{noise} of its magnitude."
        ]
    texts += ["±: one standard error over the data; it does not include the variation between training seeds."]
    return " ".join(texts)


def _ranking(spectra: Sequence[tuple[str, SpectrumResult]]) -> Iterator[str]:
    """Say whether the networks can be ordered by lambda_max and by the trace."""
    if len(spectra) < 2:
        return
    try:
        comparable(list(spectra))
    except ResultError as error:
        yield f"Do not compare the numbers of these networks: {str(error).removeprefix('not comparable: ')}."
        return
    common = [op for op in ("ggn", "hessian") if all(op in r.spectra for _, r in spectra)]
    for op, (what, name) in itertools.product(common[:1], (("λ max", "lambda_max"), ("trace", "trace"))):
        if found := ascending(spectra, op, name):
            yield _order(f"{operator_title(op)} {what}", found)
    yield "Training seeds vary too: rank initializers or methods by several seeds, not by one network each."


def _order(title: str, found: Sequence[NetworkNumber]) -> str:
    """Say which neighbours in an order differ by more than their errors."""
    text, close = found[0].label, 0
    for low, high in itertools.pairwise(found):
        sure = low.is_below(high)
        close += not sure
        text += f" {'<' if sure else '≈'} {high.label}"
    if not close:
        return f"{title}: {text}. All neighbours differ by more than two standard errors."
    which = "These two networks" if len(found) == 2 else f"Neighbours joined by ≈ ({close} of {len(found) - 1} pairs)"
    return f"{title}: {text}. {which} cannot be told apart with these samples."


def _warned(
    spectra: Sequence[tuple[str, SpectrumResult]],
    flats: Sequence[tuple[str, FlatnessResult]],
    landscapes: dict[str, LandscapeResult],
) -> Iterator[str]:
    """Say how many warnings the sections hold."""
    counts = {f"spectrum of {name}": len(r.warnings) for name, r in spectra}
    counts |= {f"flatness of {name}": len(list(flatness_cautions(r))) for name, r in flats}
    counts |= {f"landscape of {name}": len(list(landscape_cautions(r))) for name, r in landscapes.items()}
    some = {name: count for name, count in counts.items() if count}
    if some:
        shown = ", ".join(f"{name} ({count})" for name, count in list(some.items())[:MOST])
        more = f" and {len(some) - MOST} more" if len(some) > MOST else ""
        yield f"Read the warnings before you conclude anything: {shown}{more}."
