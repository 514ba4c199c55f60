"""What a person reads of a landscape: one screen of text, 80 columns wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

from hessian_tools.results.landscape import RANDOM_RANGE, SHARP_RANGE, LandscapeResult, Line, Plane
from ikun_hessian.reports.header import SCREEN_WIDTH, opened


def landscape_lines(result: LandscapeResult) -> list[str]:
    """The whole screen."""
    parts = [opened(result), _state(result), _table(result), _cautions(result)]
    cost = f"{result.products} products, {result.evaluations:,} losses on all samples, {result.seconds:.1f} s"
    return [line for part in parts if part for line in (*part, "")] + [f"cost        {cost}"]


def _field(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, SCREEN_WIDTH, initial_indent=f"{name:<12}", subsequent_indent=" " * 12)


def _state(r: LandscapeResult) -> list[str]:
    share = "" if math.isnan(r.accuracy) else f", accuracy {r.accuracy:.2%}"
    soft = "" if math.isnan(r.relaxed_loss) else f"; {r.relaxed_loss:.6g} of the relaxed network"
    symmetry = "" if math.isnan(r.symmetry_error) else f"; symmetry error {r.symmetry_error:.1e}"
    lines = _field("loss", f"{r.loss:.6g}{share}{soft}")
    lines += _field("weights", f"norm |w| = {r.weight_norm:.4g}; gradient norm {r.gradient_norm:.4g}{symmetry}")
    second = 'L" = (L(e) - 2 L(0) + L(-e)) / e^2 of the true loss and of the relaxed network, e = step |w|'
    return lines + _field("lines", f"w + t v, |v| = 1, |t| <= range |w|; {second}")


def _table(r: LandscapeResult) -> list[str]:
    columns = ("slope", "v'Hv", "v'Gv", 'true L"', "relaxed")
    head = f"{'direction':<9}{'range':>6}{'step':>6}" + "".join(f"{name:>9}" for name in columns)
    lines = [f"{head}  {'rises':<6} least"]
    for line in r.lines:
        seconds = (line.second_difference(losses) for losses in (line.loss, line.relaxed_loss))
        cells = (line.slope, line.hessian, line.ggn, *seconds)
        numbers = "".join(f"{'-' if math.isnan(x) else f'{x:.2g}':>9}" for x in cells)
        x = np.array(line.distances) / r.weight_norm
        least = f"{x[np.nanargmin(line.loss)]:.2g}" if np.isfinite(line.loss).any() else "-"
        step = line.around(line.loss)[0] / r.weight_norm
        lines.append(f"{line.name:<9}{x[-1]:>6.2g}{step:>6.2g}{numbers}  {rises(line):<6} {least}")
    lines.append("rises: the sides on which the true loss is higher at e; least: where it is least")
    if len({line.name.startswith("random") for line in r.lines}) > 1 and r.settings.get("range") is None:
        far = f"{RANDOM_RANGE:g} in random directions (--range: one for all)"
        lines.append(f"range: {SHARP_RANGE:g} where it is steep, {far}")
    if any(line.accuracy for line in r.lines):
        text = "; ".join(f"{line.name} {' and '.join(f'{a:.1%}' for a in _accuracies(line))}" for line in r.lines)
        lines += _field("accuracy", f"at -e and e: {text}")
    for plane in r.planes:
        places = [_least(plane, surface, r.weight_norm) for surface in (plane.loss, plane.relaxed_loss) if surface]
        lines += _field("plane", f"{','.join(plane.directions)}: least at {'; relaxed at '.join(places)}")
    return lines


def rises(line: Line) -> str:
    """The sides on which the true loss at the step is above that at the weights: both, +, - or no."""
    _, below, here, above = line.around(line.loss)
    return {(True, True): "both", (True, False): "-", (False, True): "+"}.get((below > here, above > here), "no")


def _accuracies(line: Line) -> tuple[float, float]:
    _, below, _, above = line.around(line.accuracy)
    return below, above


def _least(plane: Plane, surface: Sequence[Sequence[float]], norm: float) -> str:
    z = np.array(surface)
    if not np.isfinite(z).any():
        return "no place: nowhere finite"
    row, column = np.unravel_index(int(np.nanargmin(z)), z.shape)
    x, y = (plane.distances[i] / norm for i in (column, row))
    return f"({x:.2g}, {y:.2g})"


def _cautions(r: LandscapeResult) -> list[str]:
    wrapped = (
        textwrap.wrap(text, SCREEN_WIDTH, initial_indent="! ", subsequent_indent="  ") for text in landscape_cautions(r)
    )
    return [line for lines in wrapped for line in lines]


def landscape_cautions(r: LandscapeResult) -> Iterator[str]:
    """What could not be had and why, and what not to conclude, in plain words."""
    for name, why in r.refused.items():
        yield f"No {name}: {why}."
    if wrong := [line.name for line in r.lines if not line.converged]:
        yield f"Not converged: {', '.join(wrong)}. What is drawn is near the eigenvector at best."
    if r.network.get("surrogate"):
        yield (
            'The true loss is piecewise constant: it has no derivative but 0, and true L" depends on the step. '
            "v'Hv and v'Gv are derivatives of the surrogate."
        )
    if math.isfinite(r.relaxed_loss):
        yield "The relaxed network is another one: compare the shape of its loss, not its height."
    curved = [x.name for x in r.lines if x.hessian < 0 and not x.name.startswith("random") and rises(x) == "both"]
    if curved:
        names = " and ".join(curved)
        yield f"Along {names} v'Hv < 0, yet the true loss is higher on both sides: no way down for the spikes."
