"""Print a landscape for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from hessian_tools.results.landscape import RANDOM_RANGE, SHARP_RANGE, LandscapeResult, Line, Plane
from ikun_hessian.reports.header import opened
from ikun_hessian.reports.text import field, paragraph, warning


def landscape_lines(result: LandscapeResult) -> list[str]:
    """Return the lines that `landscape` prints for a result."""
    warnings = [line for text in landscape_cautions(result) for line in warning(text)]
    parts = [opened(result), _state(result), _table(result), warnings]
    cost = f"{result.products} products, {result.evaluations:,} losses on all samples, {result.seconds:.1f} s"
    return [line for part in parts if part for line in (*part, "")] + [f"cost        {cost}"]


def _state(r: LandscapeResult) -> list[str]:
    """Return the loss, the norms, and how the lines are defined."""
    share = "" if math.isnan(r.accuracy) else f", accuracy {r.accuracy:.2%}"
    soft = "" if math.isnan(r.relaxed_loss) else f"; relaxed network: {r.relaxed_loss:.6g}"
    symmetry = "" if math.isnan(r.symmetry_error) else f"; symmetry error {r.symmetry_error:.1e}"
    lines = field("loss", f"{r.loss:.6g}{share}{soft}")
    return lines + field("weights", f"norm |w| = {r.weight_norm:.4g}; gradient norm {r.gradient_norm:.4g}{symmetry}")


def _table(r: LandscapeResult) -> list[str]:
    """Return the table of the lines, its legend, and the planes."""
    columns = ("slope", "v'Hv", "v'Gv", 'true L"', "relaxed")
    head = f"{'direction':<9}{'range':>6}{'step':>6}" + "".join(f"{name:>9}" for name in columns)
    lines = [f"{head}  {'rises':<5} lowest"]
    for line in r.lines:
        seconds = (line.second_difference(losses) for losses in (line.loss, line.relaxed_loss))
        cells = (line.slope, line.hessian, line.ggn, *seconds)
        numbers = "".join(f"{'-' if math.isnan(x) else f'{x:.2g}':>9}" for x in cells)
        x = np.array(line.distances) / r.weight_norm
        least = f"{x[np.nanargmin(line.loss)]:.2g}" if np.isfinite(line.loss).any() else "-"
        step = line.around(line.loss)[0] / r.weight_norm
        lines.append(f"{line.name:<9}{x[-1]:>6.2g}{step:>6.2g}{numbers}  {rises(line):<5} {least}")
    lines += paragraph(
        'Lines: w + t v, |v| = 1. range: largest |t| / |w|. step: e / |w|. H: Hessian. G: GGN. true L", relaxed: '
        "(L(e) - 2 L(0) + L(-e)) / e^2 of the true loss and of the relaxed network's loss. rises: sides on which the "
        "true loss is higher at e. lowest: t / |w| at its minimum."
    )
    if len({line.name.startswith("random") for line in r.lines}) > 1 and r.settings.get("range") is None:
        lines += paragraph(
            f"range: {RANDOM_RANGE:g} in random directions, {SHARP_RANGE:g} in the others (--range sets one for all)"
        )
    if any(line.accuracy for line in r.lines):
        text = "; ".join(f"{line.name} {' and '.join(f'{a:.1%}' for a in _accuracies(line))}" for line in r.lines)
        lines += field("accuracy", f"at -e and e: {text}")
    for plane in r.planes:
        places = [_least(plane, surface, r.weight_norm) for surface in (plane.loss, plane.relaxed_loss) if surface]
        lines += field("plane", f"{','.join(plane.directions)}: minimum at {'; relaxed at '.join(places)}")
    return lines


def rises(line: Line) -> str:
    """Return the sides on which the true loss at the step is above that at the weights: both, +, - or no."""
    _, below, here, above = line.around(line.loss)
    return {(True, True): "both", (True, False): "-", (False, True): "+"}.get((below > here, above > here), "no")


def _accuracies(line: Line) -> tuple[float, float]:
    """Return the accuracy at the two ends of the step."""
    _, below, _, above = line.around(line.accuracy)
    return below, above


def _least(plane: Plane, surface: Sequence[Sequence[float]], norm: float) -> str:
    """Return the position of the smallest loss of a plane."""
    z = np.array(surface)
    if not np.isfinite(z).any():
        return "no point (not finite anywhere)"
    row, column = np.unravel_index(int(np.nanargmin(z)), z.shape)
    x, y = (plane.distances[i] / norm for i in (column, row))
    return f"({x:.2g}, {y:.2g})"


def landscape_cautions(r: LandscapeResult) -> Iterator[str]:
    """Yield warnings: what could not be computed and why, and which conclusions do not hold."""
    for name, why in r.refused.items():
        yield f"No {name}: {why}."
    if wrong := [line.name for line in r.lines if not line.converged]:
        yield f"Not converged: {', '.join(wrong)}. These directions only approximate the eigenvectors."
    if r.network.get("surrogate"):
        yield (
            'The true loss is piecewise constant: its derivative is 0 almost everywhere, so true L" depends on the '
            "step. v'Hv and v'Gv are derivatives of the surrogate."
        )
    if math.isfinite(r.relaxed_loss):
        yield "The relaxed network is a different network: compare the shape of its loss, not the value."
    curved = [x.name for x in r.lines if x.hessian < 0 and not x.name.startswith("random") and rises(x) == "both"]
    if curved:
        names = " and ".join(curved)
        yield f"Along {names}, v'Hv < 0 but the true loss is higher on both sides: the spiking loss does not decrease."
