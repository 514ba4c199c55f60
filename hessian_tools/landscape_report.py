"""What a person reads of a landscape: one screen of text, 80 columns wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

from hessian_tools.landscape import LandscapeResult, Line, Plane
from hessian_tools.report import WIDTH, opened


def landscape_lines(result: LandscapeResult) -> list[str]:
    """The whole screen."""
    parts = [opened(result), _state(result), _table(result), _planes(result), _cautions(result)]
    cost = f"{result.products} products, {result.evaluations:,} losses on all samples, {result.seconds:.1f} s"
    return [line for part in parts if part for line in (*part, "")] + [f"cost        {cost}"]


def _field(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name:<12}", subsequent_indent=" " * 12)


def _state(r: LandscapeResult) -> list[str]:
    share = "" if math.isnan(r.accuracy) else f", accuracy {r.accuracy:.2%}"
    soft = "" if math.isnan(r.relaxed_loss) else f"; {r.relaxed_loss:.6g} of the relaxed network"
    symmetry = "" if math.isnan(r.symmetry_error) else f"; symmetry error of the hessian {r.symmetry_error:.1e}"
    lines = _field("loss", f"{r.loss:.6g}{share}{soft}")
    lines += _field("weights", f"norm |w| = {r.weight_norm:.4g}; gradient norm {r.gradient_norm:.4g}{symmetry}")
    text = 'w + t v, |v| = 1, for t / |w| up to range; true" and relaxed" are second differences '
    return lines + _field("lines", text + "(L(e) - 2 L(0) + L(-e)) / e^2 of the losses at e / |w| = step")


def _table(r: LandscapeResult) -> list[str]:
    head = f"{'direction':<9}{'range':>6}{'step':>6}{'slope':>9}{"v'Hv":>9}{"v'Gv":>9}"
    lines = [head + f"{'true"':>9}{'relaxed"':>9}  {'rises':<6} least"]
    for line in r.lines:
        e, _, _, _ = line.around(line.loss)
        cells = (line.slope, line.hessian, line.ggn, line.second_difference(line.loss))
        cells += (line.second_difference(line.relaxed_loss),)
        numbers = "".join(f"{'-' if math.isnan(x) else f'{x:.2g}':>9}" for x in cells)
        x = np.array(line.distances) / r.weight_norm
        least = f"{x[np.nanargmin(line.loss)]:.2g}" if np.isfinite(line.loss).any() else "-"
        lines.append(f"{line.name:<9}{x[-1]:>6.2g}{e / r.weight_norm:>6.2g}{numbers}  {rises(line):<6} {least}")
    lines += textwrap.wrap(
        "rises: on which sides the true loss is higher at e than at w; least: where on the line it is least.", WIDTH
    )
    if any(line.accuracy for line in r.lines):
        text = "; ".join(f"{line.name} {' and '.join(f'{a:.1%}' for a in _ends(line))}" for line in r.lines)
        lines += _field("accuracy", f"at -e and e: {text}")
    return lines


def rises(line: Line) -> str:
    """On which sides the true loss at the step is above that at the weights: both, -, + or no."""
    _, below, here, above = line.around(line.loss)
    return {(True, True): "both", (True, False): "- only", (False, True): "+ only"}.get(
        (below > here, above > here), "no"
    )


def _ends(line: Line) -> tuple[float, float]:
    _, below, _, above = line.around(line.accuracy)
    return below, above


def _planes(r: LandscapeResult) -> list[str]:
    lines = []
    for plane in r.planes:
        text = ", ".join(
            _least(name, plane, surface, r.weight_norm)
            for name, surface in (("true loss", plane.loss), ("relaxed", plane.relaxed_loss))
            if surface
        )
        lines += _field("plane", f"{','.join(plane.directions)}: least {text}")
    return lines


def _least(name: str, plane: Plane, surface: Sequence[Sequence[float]], norm: float) -> str:
    z = np.array(surface)
    if not np.isfinite(z).any():
        return f"{name} nowhere finite"
    row, column = np.unravel_index(int(np.nanargmin(z)), z.shape)
    x, y = (plane.distances[i] / norm for i in (column, row))
    return f"{name} {z[row, column]:.4g} at ({x:.2g}, {y:.2g})"


def _cautions(r: LandscapeResult) -> list[str]:
    return [
        line for text in cautions(r) for line in textwrap.wrap(text, WIDTH, initial_indent="! ", subsequent_indent="  ")
    ]


def cautions(r: LandscapeResult) -> Iterator[str]:
    """What not to conclude, in plain words, and what could not be drawn."""
    for name, why in r.refused.items():
        yield f"No {name}: {why}."
    if wrong := [line.name for line in r.lines if not line.converged]:
        yield f"Not converged: {', '.join(wrong)}; what is drawn is near the eigenvector at best."
    if r.network.get("surrogate"):
        yield (
            'The true loss is piecewise constant: its slope is 0 almost everywhere, true" depends on the step and is '
            "no derivative. v'Hv and v'Gv are derivatives of the surrogate, not of it."
        )
        if math.isfinite(r.relaxed_loss):
            yield (
                "The relaxed network is another network (the surrogate's primitive in place of every spike): compare "
                "shapes, not heights."
            )
    for line in r.lines:
        if line.hessian < 0 and not line.name.startswith("random") and rises(line) == "both":
            yield (
                f"Along {line.name} v'Hv is negative, yet the true loss rises on both sides: no way down, and no saddle, "
                "for these weights."
            )
