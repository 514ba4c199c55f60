"""What the study of generalization prints and writes: a screen of at most 12 lines, a table in Markdown, CSV files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ikun_hessian.experiments.comparison.statistics import Interval
from ikun_hessian.experiments.generalization.measures import CONTROL, MEASURES, PRIMARY
from ikun_hessian.experiments.generalization.result import MOMENTS, NetworkResult
from ikun_hessian.experiments.generalization.summary import ASKED, GAP, MeasureResult, Summary, verdict

SHOWN = 3  # measures on the screen besides the primary one, and controls


def screen(summary: Summary) -> list[str]:
    """Return the answer in at most 10 lines of at most 80 columns, the primary result first."""
    here = summary.networks[ASKED[0]]
    counts = (
        f"networks    {summary.measured} of {summary.planned}, {summary.diverged} diverged; "
        f"{len(here.grid.seed)} reached training loss {summary.threshold:g}"
    )
    primary = summary.primary
    if primary is None:
        return [f"primary     no answer: no network reached training loss {summary.threshold:g}", counts]
    psi, signs = primary.granulated.psi, primary.signs
    where = f" ({here.environments[signs.where[0]]}, {signs.where[1]})" if signs.cells else ""
    found = summary.results[ASKED]
    ranked = sorted((r for r in found.values() if r.granulated.axes), key=lambda r: -r.granulated.psi.value)
    others = [r for r in ranked if r.measure.group != CONTROL and r.measure.name != PRIMARY][:SHOWN]
    controls = [r for r in ranked if r.measure.group == CONTROL][:2]
    return [
        f"primary     psi {_interval(psi)} of {PRIMARY} and accuracy gap",
        f"            {verdict(psi)}",
        f"            wrong for {signs.mean.value:.0%} of the pairs, worst {signs.worst.value:.0%}{where}",
        counts,
        f"{'measure':<32}{'psi (95%)':<22}{'wrong':>8}{'worst':>8}{'CMI':>8}",
        *(_line(r) for r in [primary, *others, *controls]),
    ][:11]


def _line(result: MeasureResult) -> str:
    name = result.measure.name + (" *" if result.measure.group == CONTROL else "")
    signs, information = result.signs, result.information.value
    parts = f"{signs.mean.value:>8.2f}{signs.worst.value:>8.2f}{information.value:>8.3f}"
    return f"{name:<32}{_interval(result.granulated.psi):<22}{parts}"


def _interval(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def summary_page(summary: Summary, title: str) -> str:
    """Return all results as Markdown tables, one for every moment and target."""
    lines = [f"# {title}", "", *(line.strip() for line in screen(summary)[:4]), ""]
    lines.insert(3, "")
    for (moment, target), found in summary.results.items():
        there = summary.networks[moment]
        lines += [f"## {target.capitalize()} {MOMENTS[moment]}", ""]
        lines += [f"{len(there.grid.seed)} networks. Wrong: sign error over pairs that differ in one axis.", ""]
        axes = there.grid.axes
        titles = ["measure", "describes", "psi", *axes, "wrong", "worst", "where", *(["CMI"] if target == GAP else [])]
        lines += ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
        for m in MEASURES:
            r = found[m.name]
            taus = [f"{r.granulated.axes[a].value:.2f}" if a in r.granulated.axes else "-" for a in axes]
            where = f"{there.environments[r.signs.where[0]]}, {r.signs.where[1]}" if r.signs.cells else "-"
            cells = [m.name, m.group, _interval(r.granulated.psi), *taus, _interval(r.signs.mean)]
            cells += [_interval(r.signs.worst), where]
            cells += [_interval(r.information.value)] if target == GAP else []
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def measure_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    """Yield one row per moment, target and measure, for a CSV file."""
    for (moment, target), found in summary.results.items():
        environments = summary.networks[moment].environments
        for r in found.values():
            row: dict[str, Any] = {"moment": moment, "target": target, "measure": r.measure.name}
            row |= {"describes": r.measure.group, "networks": r.networks, "pairs": r.granulated.psi.n}
            row |= _parts("psi", r.granulated.psi)
            for axis, tau in r.granulated.axes.items():
                row |= _parts(f"tau {axis}", tau)
            row |= _parts("sign error", r.signs.mean) | _parts("worst sign error", r.signs.worst)
            number, axis = r.signs.where
            row["worst environment"], row["worst axis"] = environments[number] if number >= 0 else "", axis
            row["pairs within noise"] = r.signs.left_out
            row |= _parts("CMI", r.information.value)
            row["CMI known axes"] = " ".join(r.information.known)
            yield row


def network_rows(results: Sequence[NetworkResult]) -> Iterator[dict[str, Any]]:
    """Yield one row per network and moment, for a CSV file."""
    for r in results:
        place = {"name": r.name, "environment": r.environment, **r.axes, "seed": r.seed, "diverged": r.diverged}
        for moment, at in r.moments.items():
            numbers = {k: v for k, v in vars(at).items() if k != "measures"}
            yield {**place, "moment": moment, **numbers, **at.measures}
        if not r.moments:
            yield place


def _parts(name: str, found: Interval) -> dict[str, float]:
    return {name: found.value, f"{name} low": found.low, f"{name} high": found.high}
