"""Reduce an analysis until it fits a given time, and say what was left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hessian_tools.analysis.settings import SpectrumSettings

MARGIN = 1.5  # an estimate is good to this factor
LEAST_PRODUCTS = 30  # for eigenpairs, however short the time is


@dataclass(frozen=True)
class Fitted:
    """What fits.

    Attributes:
        settings: The reduced settings.
        variants: Whether lambda_max is computed for other slopes and ties.
        cuts: What was left out or made smaller, in words.
    """

    settings: SpectrumSettings
    variants: bool
    cuts: tuple[str, ...] = ()


def _fewer_probes(f: Fitted) -> Fitted:
    steps, probes = min(f.settings.steps or 16, 16), min(f.settings.probes or 2, 2)
    return replace(f, settings=replace(f.settings, steps=steps, probes=probes, accuracy=None))


def _without_extras(f: Fitted) -> Fitted:
    extras = {"per_layer": False, "per_step": False, "diagonal": False, "samples_curve": (), "scaled": 1}
    return replace(f, settings=replace(f.settings, **extras))  # type: ignore[arg-type]


def _fewer_pairs(f: Fitted) -> Fitted:
    s = f.settings
    fewer = {"top": min(s.top, 3), "smallest": min(s.smallest, 1), "magnitude": min(s.magnitude, 3)}
    return replace(f, settings=replace(s, **fewer))  # type: ignore[arg-type]


def _first_operator(f: Fitted) -> Fitted:
    operators = f.settings.operators[:1]
    return replace(f, settings=replace(f.settings, operators=operators, exact=f.settings.exact and "ggn" in operators))


# In this order: first what changes the numbers least.
CUTS: tuple[tuple[str, Callable[[Fitted], Fitted]], ...] = (
    ("layers, steps, diagonals and subsets of the data", _without_extras),
    ("lambda_max for other slopes and ties", lambda f: replace(f, variants=False)),
    ("more than 2 probes and 16 steps of a density", _fewer_probes),
    (
        "more than 10 probes of a trace",
        lambda f: replace(f, settings=replace(f.settings, trace_probes=min(f.settings.trace_probes, 10))),
    ),
    ("all densities", lambda f: replace(f, settings=replace(f.settings, density=False))),
    ("more than 3 largest eigenvalues and 1 smallest", _fewer_pairs),
    ("operators but the first", _first_operator),
    (
        "more than 4 draws of weight noise",
        lambda f: replace(f, settings=replace(f.settings, draws=min(f.settings.draws, 4))),
    ),
)


def fit(settings: SpectrumSettings, limit: float, seconds: Callable[[SpectrumSettings, bool], float]) -> Fitted:
    """Leave out parts of an analysis, one after the other, until the rest fits.

    Args:
        settings: What is asked for.
        limit: The time in seconds.
        seconds: Estimate of the time for settings, with or without variants.

    Returns:
        What fits. If nothing more can be left out, the products for eigenpairs are limited.
    """
    found = Fitted(settings, True)
    for name, cut in CUTS:
        if MARGIN * seconds(found.settings, found.variants) <= limit:
            return found
        smaller = cut(found)
        if seconds(smaller.settings, smaller.variants) < seconds(found.settings, found.variants):
            found = replace(smaller, cuts=(*found.cuts, name))
    needed = MARGIN * seconds(found.settings, found.variants)
    if needed > limit:
        most = max(LEAST_PRODUCTS, int(found.settings.max_products * limit / needed / 10))
        if most < found.settings.max_products:
            limited = replace(found.settings, max_products=most)
            found = replace(found, settings=limited, cuts=(*found.cuts, f"more than {most} products for eigenvalues"))
    return found
