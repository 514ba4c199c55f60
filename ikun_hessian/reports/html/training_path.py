"""The section of paths of training: snapshots in a plane, on the loss over that plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hessian_tools.plots.curves import ValueAxis
from hessian_tools.results.training_path import TrainingPath
from ikun_hessian.reports.html.chart import SvgChart, chosen_axis, panels
from ikun_hessian.reports.html.elements import Html, details, html, html_table, listed, number, percent, tag
from ikun_hessian.reports.html.landscape import direction_title
from ikun_hessian.reports.html.provenance import provenance_list
from ikun_hessian.reports.training_path import path_cautions

SHADES = 9  # colours of the style sheet for the loss: .s0 to .s8


def training_path_section(found: Sequence[tuple[str, TrainingPath]]) -> Html:
    """Return the figures and tables of several paths."""
    note = (
        "Snapshots of one run, projected onto the plane through the last one; coordinates in units of ‖w‖ of that one. "
        "Colours show the true loss in the plane, darker is lower; the orange point is the first snapshot, the red one "
        "the last. The principal components of a random walk show an arc too, so the shape of a path by itself says "
        "little."
    )
    parts = [tag("p", note, class_="note"), panels(*(_plane(name, r) for name, r in found))]
    for name, r in found:
        body = [listed(path_cautions(r), "warnings"), _table(r), details("Provenance", provenance_list(r))]
        parts += [details(name, *body, opened=len(found) == 1)]
    return html(*parts)


def _plane(name: str, r: TrainingPath) -> Html:
    """Return the panel of one path: cells of the loss, and the path on them."""
    unit = r.weight_norm
    x, y = ([t / unit for t in grid] for grid in (r.first, r.second))
    half = [(axis[-1] - axis[0]) / (len(axis) - 1) / 2 for axis in (x, y)]
    labels = [f"{_short(d)} ({percent(share)})" for d, share in zip(r.directions, r.explained, strict=True)]
    known = [v for row in r.plane_loss for v in row if math.isfinite(v)]
    title = f"{name}: loss {number(min(known), 3)} to {number(max(known), 3)}" if known else f"{name}: no finite loss"
    chart = SvgChart(title, _limits(x, half[0]), _limits(y, half[1]), labels[0], labels[1])
    losses = [v for row in r.plane_loss for v in row]
    scale = chosen_axis(losses)
    for down, row in zip(y, r.plane_loss, strict=True):
        for across, loss in zip(x, row, strict=True):
            chart.cell(across, down, half[0], half[1], _shade(loss, losses, scale))
    at = [(s.position[0] / unit, s.position[1] / unit) for s in r.snapshots]
    chart.line([a for a, _ in at], [b for _, b in at], 0, "path")
    for k, (s, (a, b)) in enumerate(zip(r.snapshots, at, strict=True)):
        when = s.name if s.epoch is None else f"{s.name}, epoch {s.epoch}"
        says = f"{when}\nloss {number(s.loss)}, in the plane {number(s.projected_loss)}"
        says += f"\ndistance from the plane {number(s.off_plane / unit, 2)} ‖w‖"
        chart.point(a, b, 0, says, "snapshot" + (" first" if k == 0 else " last" if k == len(at) - 1 else ""))
    return chart.svg()


def _short(direction: str) -> str:
    return (
        direction_title(direction)
        .replace("principal component", "PC")
        .replace("most negative eigenvector", "most negative")
    )


def _limits(grid: Sequence[float], half: float) -> ValueAxis:
    return ValueAxis("linear", grid[0] - half, grid[-1] + half)


def _shade(loss: float, losses: Sequence[float], scale: ValueAxis) -> int | None:
    """Return the number of the colour of a loss, None if it is not finite."""
    finite = [v for v in losses if math.isfinite(v)]
    if not math.isfinite(loss):
        return None
    f = math.log if scale.kind == "log" else float
    low, high = f(min(finite)), f(max(finite))
    return 0 if high <= low else min(SHADES - 1, int((f(loss) - low) / (high - low) * SHADES))


def _table(r: TrainingPath) -> Html:
    """Return the table of the snapshots."""
    unit = r.weight_norm
    head = ("snapshot", "epoch", "s", "t", "distance from the plane", "loss", "accuracy", "loss in the plane")
    rows = [
        (
            s.name,
            "–" if s.epoch is None else str(s.epoch),
            *(number(v / unit, 2) for v in s.position),
            number(s.off_plane / unit, 2),
            number(s.loss),
            percent(s.accuracy),
            number(s.projected_loss),
        )
        for s in r.snapshots
    ]
    note = (
        "s, t: coordinates in the plane. loss: true loss of the snapshot itself. loss in the plane: true loss at its "
        "projection, with the BatchNorm statistics of the last snapshot."
    )
    return html(html_table(head, rows, wide=True), tag("p", note, class_="note"))
