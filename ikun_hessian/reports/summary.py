"""Summarize a result for a terminal: at most 12 lines of 80 columns, with the answers first."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from hessian_tools.analysis.ranking import ranking
from hessian_tools.analysis.warnings import is_spiking, main_warnings
from hessian_tools.results.calibration import CalibrationResult
from hessian_tools.results.flatness import FlatnessResult, Metric
from hessian_tools.results.landscape import LandscapeResult
from hessian_tools.results.provenance import Analysed
from hessian_tools.results.spectrum import LossRise, SpectrumResult
from hessian_tools.results.text import WithDataError, rounded
from ikun_hessian.reports.flatness import flatness_cautions
from ikun_hessian.reports.header import read_from
from ikun_hessian.reports.landscape import landscape_cautions, rises
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
    note = f"+-: standard error (data); {more(len(result.warnings), terminal)}"
    return closed(lines, main_warnings(result), files, note)


def flatness_summary(
    result: FlatnessResult,
    files: str = "",
    terminal: bool = True,
    calibration: CalibrationResult | None = None,
    refusal: str = "",
) -> str:
    """Summarize the flatness of a checkpoint.

    Args:
        result: The result of a flatness analysis.
        files: Names of the written files; "" for none.
        terminal: Whether to name the option --full of the command line.
        calibration: The calibration of the same checkpoint, if there is one.
        refusal: Why a calibration was not possible.

    Returns:
        At most 12 lines of at most 80 columns.
    """
    lines = [*opened_lines(result), _table_head(bool(result.network.get("surrogate")))]
    for kind in ("hessian", "ggn"):
        cells = [_metric(result.main[f"{kind} {what}"]) for what in ("lambda_max", "trace")]
        lines.append(f"{OPERATORS[kind]:<{LABEL}}{cells[0]:<26}{cells[1]}".rstrip())
    m = result.main.get("adaptive average sharpness")
    if m is not None and math.isfinite(m.value):
        draws, radius = int(result.settings["draws"]), float(result.settings["radius"])
        rise = LossRise(m.value, m.stderr, m.data_stderr, radius, draws, m.data_stderr_least)
        lines += entry("spiking loss" if result.network.get("surrogate") else "loss", _rise(result.loss, rise))
    lines += entry("ranking", ranking(result))
    if calibration is not None:
        lines.append(one_line_entry("calibrated", _calibrated(calibration)))
    elif refusal:
        lines.append(one_line_entry("calibrated", f"no: {refusal}"))
    cautions = list(flatness_cautions(result))
    note = f"+-: standard error (data); {more(len(cautions), terminal)}"
    return closed(lines, [_first_sentence(text) for text in cautions], files, note)


def landscape_summary(result: LandscapeResult, files: str = "", terminal: bool = True) -> str:
    """Summarize a landscape: in which directions the loss rises, and where the quadratic models hold.

    Args:
        result: The result of a landscape analysis.
        files: Names of the written files; "" for none.
        terminal: Whether to name the option --full of the command line.

    Returns:
        At most 12 lines of at most 80 columns.
    """
    lines = opened_lines(result)
    sides: dict[str, list[str]] = {}
    for line in result.lines:
        sides.setdefault(rises(line), []).append(line.name)
    told = {"both": "on both sides along", "+": "on one side along", "-": "on one side along", "no": "on no side along"}
    parts = [f"{told[side]} {', '.join(names)}" for side, names in sides.items()]
    true = "spiking loss" if result.network.get("surrogate") else "loss"
    lines += entry(true, f"rises {'; '.join(parts)}")[:3]
    against = [x.name for x in result.lines if x.hessian < 0 and rises(x) == "both"]
    if against:
        lines += entry("surrogate", f"curves down where the {true} rises: {', '.join(against)}")[:2]
    cautions = list(landscape_cautions(result))
    return closed(lines, [_first_sentence(text) for text in cautions], files, more(len(cautions), terminal))


def brief_line(result: SpectrumResult | FlatnessResult | LandscapeResult) -> str:
    """Return one line about a result, for --brief: file, loss, accuracy, and lambda_max of the operators."""
    accuracy = "" if math.isnan(result.accuracy) else f" accuracy {result.accuracy:.1%}"
    parts = [f"{result.checkpoint.get('path', '-')}: loss {result.loss:.4g}{accuracy}"]
    if isinstance(result, SpectrumResult):
        tops = {kind: s.eigenvalues[0] for kind, s in result.spectra.items()}
        parts += [f"{OPERATORS.get(kind, kind)} {_cell(e.value, e)}" for kind, e in tops.items()]
    elif isinstance(result, FlatnessResult):
        parts += [f"{OPERATORS[kind]} {_metric(result.main[f'{kind} lambda_max'])}" for kind in ("hessian", "ggn")]
    else:
        rising = sum(rises(line) == "both" for line in result.lines)
        parts.append(f"rises on both sides along {rising} of {len(result.lines)} directions")
    return "; ".join(parts)


def _calibrated(c: CalibrationResult) -> str:
    """Return which operator predicts the loss under noise, with its rank correlations."""
    parts = []
    for op in ("smoothed", "ggn", "hessian"):
        if found := [s.agreement[op].correlation for s in c.calibration.scales if op in s.agreement]:
            parts.append(f"{OPERATORS.get(op, op)} {min(found):.2f}")
    return f"smallest rank correlation with the true loss: {', '.join(parts)}"


def _metric(m: Metric) -> str:
    """Format a metric with its error from the data."""
    return _cell(m.value, m) if math.isfinite(m.value) else "-"


def _first_sentence(text: str) -> str:
    """Return the first sentence of a warning."""
    return text.partition(". ")[0].rstrip(".") + "."


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
    kind = f" ({d['loss']}{read_from(n)})" if d.get("loss") else ""
    accuracy: float = getattr(r, "accuracy", math.nan)
    share = "" if math.isnan(accuracy) else f", accuracy {accuracy:.1%}"
    measured = f"{', '.join(part for part in (name, samples) if part)}; loss{kind} {r.loss:.4g}{share}"
    return [
        one_line_entry("opened", f"{shortened(path, max(room, 20))}: {said}" if path else said),
        *entry("data", measured)[:2],
    ]


def _curvature(r: SpectrumResult) -> list[str]:
    """Return the table of lambda_max and trace."""
    lines = [_table_head(is_spiking(r))]
    for kind, s in list(r.spectra.items())[:MOST_OPERATORS]:
        top = _cell(s.eigenvalues[0].value, s.eigenvalues[0])
        trace = "-" if s.trace is None else _cell(s.trace.estimate, s.trace)
        lines.append(f"{OPERATORS.get(kind, kind):<{LABEL}}{top:<26}{trace}".rstrip())
    return lines


def _table_head(spiking: bool) -> str:
    """Return the head of the table of lambda_max and trace."""
    whose = "of the surrogate loss" if spiking else ""
    return f"{'curvature':<{LABEL}}{'lambda_max':<26}{'trace':<17}{whose:>23}".rstrip()


def _cell(value: float, number: WithDataError) -> str:
    """Format a value with its standard error from the data."""
    if not math.isnan(number.data_stderr_least):
        return f"{value:.3g} +- {rounded(number.data_stderr_least, 2)} or more"
    return f"{value:.3g}" if math.isnan(number.data_stderr) else f"{value:.3g} +- {rounded(number.data_stderr, 2)}"


def _rise(loss: float, rise: LossRise) -> str:
    """Say how much the loss itself rises under weight noise."""
    least = not math.isnan(rise.data_stderr_least)
    errors = [e for e in (rise.stderr, rise.data_stderr_least if least else rise.data_stderr) if not math.isnan(e)]
    error = f" +- {rounded(math.hypot(*errors), 2)}{' or more' if least else ''}" if errors else ""
    change = f"rises by {rise.estimate:.3g}" if rise.estimate >= 0 else f"falls by {-rise.estimate:.3g}"
    share = f" ({rise.estimate / loss:+.0%})" if 0 < loss and abs(rise.estimate) < 100 * loss else ""
    return f"{change}{error}{share} under {rise.radius:.0%} weight noise"


# --- layout, for the summaries of all commands
def more(warnings: int, terminal: bool) -> str:
    """Say how many warnings there are, and in a terminal which option shows them and the tables."""
    counted = f"{warnings} warning{'' if warnings == 1 else 's'}"
    if not terminal:
        return counted
    return f"--resume --full: tables, {counted}" if warnings else "--resume --full: tables"


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
        warnings: Warnings of one sentence each, the most important first. As many as fit are shown, at most two. The
            first one is cut if it does not fit.
        files: Names of the written files; "" for none. Long names lose their beginning if there is no room for them.
        note: The last line.
    """
    last = entry("note", note)
    named = entry("files", files) if files else []
    if len(lines) + len(named) + len(last) > MOST_LINES:
        named = entry("files", shortened(files, SCREEN_WIDTH - LABEL))
    last = [*named, *last]
    body = list(lines)
    for i, text in enumerate(warnings[:MOST_WARNINGS]):
        added, room = entry("! warning", text), MOST_LINES - len(body) - len(last)
        if len(added) > room:
            if i == 0 and room > 0:
                body += [*added[: room - 1], added[room - 1][: SCREEN_WIDTH - 1] + "…"]
            break
        body += added
    return "\n".join([*body, *last])
