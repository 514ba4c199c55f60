"""Summarize a result for a terminal: at most 12 lines of 80 columns, with the answers first."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from hessian_tools.analysis.ranking import ranking
from hessian_tools.analysis.warnings import is_spiking, main_warnings
from hessian_tools.results.provenance import Analysed
from hessian_tools.results.spectrum import Eigenvalue, LossRise, SpectrumResult, Trace
from ikun_hessian.reports.text import SCREEN_WIDTH, shortened

MOST_LINES = 12
LABEL = 14  # columns of the names on the left
MOST_WARNINGS, MOST_OPERATORS = 2, 4
OPERATORS = {"hessian": "Hessian", "ggn": "GGN", "fisher": "Fisher"}  # as printed


def spectrum_summary(result: SpectrumResult, files: str = "", terminal: bool = True) -> str:
    """Summarize a spectrum: what was opened, how curved it is, and what may be concluded.

    Args:
        result: The result of a spectrum analysis.
        files: Names of the written files; "" for none.
        terminal: Whether to name the option --full of the command line.

    Returns:
        At most 12 lines of at most 80 columns.
    """
    lines = [*opened_lines(result), *_curvature(result)]
    if result.loss_rise is not None:
        lines += entry("spiking loss" if is_spiking(result) else "loss", _rise(result.loss, result.loss_rise))
    lines += entry("ranking", ranking(result))
    note = f"+-: standard error from the data; {more(len(result.warnings), terminal)}"
    return closed(lines, main_warnings(result), files, note)


def opened_lines(r: Analysed) -> list[str]:
    """Return two lines: the network, and its data with loss and accuracy."""
    n, d = r.network, r.data
    parts = (
        str(n.get("model", "")),
        f"{r.num_parameters:,} weights",
        f"T = {n['timesteps']}" if n.get("timesteps") else "",
        f"surrogate {n['surrogate']}" if n.get("surrogate") else "",
    )
    said = ", ".join(part for part in parts if part)
    path = str(r.checkpoint.get("path", ""))
    room = SCREEN_WIDTH - LABEL - len(said) - 2
    samples = f"{d['samples']:,} samples" if "samples" in d else ""
    name = " ".join(str(part) for part in (d.get("name"), d.get("split")) if part)
    kind = f" ({d['loss']})" if d.get("loss") else ""
    accuracy: float = getattr(r, "accuracy", math.nan)
    share = "" if math.isnan(accuracy) else f", accuracy {accuracy:.1%}"
    measured = f"{', '.join(part for part in (name, samples) if part)}; loss{kind} {r.loss:.4g}{share}"
    return [
        one_line_entry("opened", f"{shortened(path, max(room, 20))}: {said}" if path else said),
        one_line_entry("data", measured),
    ]


def _curvature(r: SpectrumResult) -> list[str]:
    """Return the table of lambda_max and trace."""
    whose = "of the surrogate loss" if is_spiking(r) else ""
    lines = [f"{'curvature':<{LABEL}}{'lambda_max':<26}{'trace':<17}{whose:>23}".rstrip()]
    for kind, s in list(r.spectra.items())[:MOST_OPERATORS]:
        top = _cell(s.eigenvalues[0].value, s.eigenvalues[0])
        trace = "-" if s.trace is None else _cell(s.trace.estimate, s.trace)
        lines.append(f"{OPERATORS.get(kind, kind):<{LABEL}}{top:<26}{trace}".rstrip())
    return lines


def _cell(value: float, number: Eigenvalue | Trace) -> str:
    """Format a value with its standard error from the data."""
    if not math.isnan(number.data_stderr_least):
        return f"{value:.3g} +- {number.data_stderr_least:.2g} or more"
    return f"{value:.3g}" if math.isnan(number.data_stderr) else f"{value:.3g} +- {number.data_stderr:.2g}"


def _rise(loss: float, rise: LossRise) -> str:
    """Say how much the loss itself rises under weight noise."""
    least = not math.isnan(rise.data_stderr_least)
    errors = [e for e in (rise.stderr, rise.data_stderr_least if least else rise.data_stderr) if not math.isnan(e)]
    error = f" +- {math.hypot(*errors):.2g}{' or more' if least else ''}" if errors else ""
    change = f"rises by {rise.estimate:.3g}" if rise.estimate >= 0 else f"falls by {-rise.estimate:.3g}"
    share = f" ({rise.estimate / loss:+.0%})" if 0 < loss and abs(rise.estimate) < 100 * loss else ""
    return f"{change}{error}{share} under {rise.radius:.0%} weight noise"


# --- layout, for the summaries of all commands
def more(warnings: int, terminal: bool) -> str:
    """Say how many warnings there are, and in a terminal which option shows them and the tables."""
    counted = f"{warnings} warning{'' if warnings == 1 else 's'}"
    if not terminal:
        return counted
    return f"--full: tables, {counted}" if warnings else "--full: tables"


def entry(name: str, text: str) -> list[str]:
    """Return the lines of a named entry, wrapped."""
    indent = " " * LABEL
    return textwrap.wrap(
        text, SCREEN_WIDTH, initial_indent=f"{name:<{LABEL}}", subsequent_indent=indent, break_on_hyphens=False
    )


def one_line_entry(name: str, text: str) -> str:
    """Return a named entry in one line. What does not fit is cut off at the end."""
    line = f"{name:<{LABEL}}{text}"
    return line if len(line) <= SCREEN_WIDTH else line[: SCREEN_WIDTH - 1] + "…"


def closed(lines: Sequence[str], warnings: Sequence[str], files: str, note: str) -> str:
    """Join the lines of a summary with its warnings, its files and a note.

    Args:
        lines: The lines so far.
        warnings: Warnings of one sentence each, the most important first. As many as fit are shown, at most two.
        files: Names of the written files; "" for none. Long names lose their beginning if there is no room for them.
        note: The last line.
    """
    last = entry("note", note)
    named = entry("files", files) if files else []
    if len(lines) + len(named) + len(last) > MOST_LINES:
        named = entry("files", shortened(files, SCREEN_WIDTH - LABEL))
    last = [*named, *last]
    body = list(lines)
    for text in warnings[:MOST_WARNINGS]:
        added = entry("! warning", text)
        if len(body) + len(added) + len(last) > MOST_LINES:
            break
        body += added
    return "\n".join([*body, *last])
