"""The section of loss landscapes: lines through the weights, and surfaces that can be turned."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from hessian_tools.plots.curves import ValueAxis
from hessian_tools.results.landscape import LandscapeResult, Line
from ikun_hessian.reports.html.chart import COLOURS, SvgChart, chosen_axis, legend, panels
from ikun_hessian.reports.html.elements import Html, details, html, html_table, listed, number, tag
from ikun_hessian.reports.html.provenance import provenance_list
from ikun_hessian.reports.landscape import landscape_cautions, rises

DIGITS = 5  # of the losses that the page draws
KINDS = {"loss": "true loss", "relaxed_loss": "relaxed network"}


def landscape_section(found: Sequence[tuple[str, LandscapeResult]]) -> Html:
    """Return figures and tables of several landscapes, on common scales.

    Args:
        found: Names and results.
    """
    shown = found[:COLOURS]
    entries = [(name, i, "") for i, (name, _) in enumerate(shown)]
    if any(line.relaxed_loss for _, r in shown for line in r.lines):
        entries += [("dashed: relaxed network", 0, "dash")]
    losses = chosen_axis([v for _, r in shown for line in r.lines for v in (*line.loss, *line.relaxed_loss)])
    directions = list(dict.fromkeys(line.name for _, r in shown for line in r.lines))
    note = (
        "Loss L at w + t v with ‖v‖ = 1; distances t in units of ‖w‖. The true loss of a spiking network is piecewise "
        "constant. The relaxed network replaces each spike by the integral of the surrogate; it is a different "
        "network, so compare shapes, not values."
    )
    parts = [
        tag("p", note, class_="note"),
        legend(entries),
        panels(*(_line(name, shown, losses) for name in directions)),
    ]
    if surfaces := _surfaces(shown):
        parts += [surfaces]
    for name, r in found:
        warnings = listed(landscape_cautions(r), "warnings")
        body = [warnings, _table(r), details("Provenance", provenance_list(r))]
        parts += [details(name, *body, opened=len(found) == 1)]
    return html(*parts)


def direction_title(name: str) -> str:
    """Return the title of a direction."""
    kind, rank = name.rstrip("0123456789"), name.lstrip("abcdefghijklmnopqrstuvwxyz")
    if name == "negative":
        return "most negative eigenvector"
    return {"top": f"eigenvector {rank}", "random": f"random {rank}", "pc": f"principal component {rank}"}.get(
        kind, name
    )


def _line(name: str, shown: Sequence[tuple[str, LandscapeResult]], y: ValueAxis) -> Html:
    """Return the panel of the losses along one direction."""
    lines = [(i, label, r, line) for i, (label, r) in enumerate(shown) for line in r.lines if line.name == name]
    x = chosen_axis([t / r.weight_norm for _, _, r, line in lines for t in line.distances], kind="linear")
    chart = SvgChart(direction_title(name), x, y, "distance t / ‖w‖", "loss")
    for i, label, r, line in lines:
        at = [t / r.weight_norm for t in line.distances]
        if line.relaxed_loss:
            chart.line(at, line.relaxed_loss, i, "dash")
        chart.line(at, line.loss, i)
        for k, (t, loss) in enumerate(zip(at, line.loss, strict=True)):
            says = f"{label}\nt / ‖w‖ = {number(t, 3)}\nloss {number(loss)}"
            says += f"\nrelaxed {number(line.relaxed_loss[k])}" if line.relaxed_loss else ""
            says += f"\naccuracy {line.accuracy[k]:.1%}" if line.accuracy else ""
            chart.point(t, loss, i, says, "small")
    return chart.svg()


def _surfaces(shown: Sequence[tuple[str, LandscapeResult]]) -> Html | None:
    """Return the rotatable surfaces of all planes, with their losses as JSON; None if there is no plane."""
    views: list[dict[str, Any]] = []
    for name, r in shown:
        for plane in r.planes:
            for kind, title in KINDS.items():
                losses = getattr(plane, kind)
                if losses:
                    views.append(
                        {
                            "network": name,
                            "plane": " and ".join(map(direction_title, plane.directions)),
                            "labels": [direction_title(d) for d in plane.directions],
                            "kind": title,
                            "at": [_rounded(t / r.weight_norm) for t in plane.distances],
                            "loss": [[_rounded(v) for v in row] for row in losses],
                        }
                    )
    if not views:
        return None
    data = Html(json.dumps(views, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
    hint = (
        "Drag to turn, or use the two sliders. Move the pointer over a surface to read the loss. The red cross marks "
        "the weights. All surfaces share one scale."
    )
    return html(
        tag("h4", "Surfaces"),
        tag("p", hint, class_="note screen"),
        tag("div", class_="surfaces", data_surfaces=True),
        tag("noscript", tag("p", "The surfaces need JavaScript.")),
        tag("script", data, type="application/json", id="surfaces"),
    )


def _rounded(x: float) -> float | None:
    """Return a number with a few digits, None if it is not finite."""
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None


def _table(r: LandscapeResult) -> Html:
    """Return the table of the lines."""
    head = ("direction", "range", "slope g′v", "v′Hv", "v′Gv", "true L″", "relaxed L″", "rises")
    rows = [
        (
            direction_title(line.name),
            number(line.distances[-1] / r.weight_norm, 2),
            number(line.slope, 3),
            number(line.hessian, 3),
            number(line.ggn, 3),
            number(line.second_difference(line.loss), 3),
            number(line.second_difference(line.relaxed_loss), 3),
            _sides(line),
        )
        for line in r.lines
    ]
    note = (
        "range: largest |t| / ‖w‖. v′Hv, v′Gv: curvature that the surrogate’s Hessian and GGN predict. L″: second "
        "difference (L(e) − 2 L(0) + L(−e)) / e² over a fifth of the range. rises: sides on which the true loss is "
        "higher there."
    )
    return html(html_table(head, rows, wide=True), tag("p", note, class_="note"))


def _sides(line: Line) -> str:
    return {"both": "both sides", "+": "one side (+)", "-": "one side (−)"}.get(rises(line), "no side")
