"""Print flatness metrics for a terminal of 80 columns: of one checkpoint, its calibration, or several checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

import numpy as np

from hessian_tools.analysis.flatness.paired_differences import Difference, differences, incomparable, unlike
from hessian_tools.results.calibration import Calibration, CalibrationResult, Scale
from hessian_tools.results.flatness import MATCHED, SURROGATE, FlatnessResult, Metric
from hessian_tools.results.text import rounded
from ikun_hessian.reports.header import not_learned, opened
from ikun_hessian.reports.text import field, paragraph, shortened, warning

COLUMNS = f"{'':<27}{'value':>11} {'95% interval':<21}{'data error':>10}{'cost':>10}"
COLUMN, PER_BLOCK = 17, 3  # tables of several checkpoints: width of a column, checkpoints per block
LEGEND = (
    "95% interval: from the residual for lambda_max and lambda_1/lambda_5, over random probes for traces and functions "
    "of the spectrum, over draws of noise for the spiking loss. data error: standard error over the data; > if "
    "only a lower limit is known, because a few samples carry it. ascent: "
    "along surrogate gradients. search: with forward passes only. cost: products with the operator (p), gradients (g) "
    "and forward passes (f) over all samples, in addition to those of the rows above."
)
ONE_WIDTH = "ggn, gaussian:0.3"  # baseline of calibrations: one width for all neurons, networks and noise scales
RANKS, SIZE = 0.7, (0.7, 1.4)  # calibration: smallest good rank correlation, range of good ratios true / predicted


def flatness_lines(result: FlatnessResult, calibration: CalibrationResult | None = None) -> list[str]:
    """Return the lines that `flatness` prints for a result.

    Args:
        result: The flatness of one checkpoint.
        calibration: The calibration of the same checkpoint, if there is one.

    Returns:
        The lines.
    """
    parts = (
        not_learned(result),
        [*opened(result), ""],
        [*_state(result), ""],
        [*_main(result), ""],
        [*verdict_lines(calibration), ""],
        [*_others(result), ""],
        [*paragraph(LEGEND), ""],
        [*(line for text in flatness_cautions(result) for line in warning(text)), ""],
        field("cost", _cost(result)),
    )
    return [line for part in parts if part != [""] for line in part]


def _state(r: FlatnessResult) -> list[str]:
    """Return the loss and the norms of the gradient and the weights."""
    share = "" if math.isnan(r.accuracy) else f", accuracy {r.accuracy:.2%}"
    lines = field("loss", f"{r.loss:.6g}{share}; gradient norm {r.gradient_norm:.4g}")
    layers = ", ".join(f"{name} {norm:.3g}" for name, norm in r.weight_norms.items())
    return lines + field("weights", f"norm {_norm(r):.4g}: {layers}")


def _norm(r: FlatnessResult) -> float:
    """Return the norm of all weights."""
    return math.sqrt(sum(norm**2 for norm in r.weight_norms.values()))


def _main(r: FlatnessResult) -> list[str]:
    """Return the table of the main metrics, grouped by the loss that they describe."""
    lines = ["FLATNESS: MAIN METRICS", COLUMNS]
    for i, (heading, rows) in enumerate(_groups(r)):
        lines += ["", *paragraph(f"{heading}:")][i == 0 :]
        for name, metric in rows.items():
            lines += _row(name, metric, metric.meaning)
    return lines


def _groups(r: FlatnessResult) -> Iterator[tuple[str, dict[str, Metric]]]:
    """Yield the heading and the metrics of each group."""
    matched = {name: m for name, m in r.main.items() if m.valid == MATCHED}
    for op in dict.fromkeys(" ".join(name.split()[:2]) for name in matched):  # smoothed S
        own = {name.removeprefix(f"{op} "): m for name, m in matched.items() if name.startswith(f"{op} ")}
        noise = f"noise of {op.split()[1]} x each filter's rms"
        yield f"smoothed operator, an estimate for the spiking loss under {noise}", own
    surrogate = {name: m for name, m in r.main.items() if m.valid == SURROGATE}
    yield "curvature of the surrogate loss", {name: m for name, m in surrogate.items() if "scaled" not in name}
    yield (
        "the same with weights in units of filter norm (invariant to rescaling)",
        {name: m for name, m in surrogate.items() if "scaled" in name},
    )
    rest = {name: m for name, m in r.main.items() if m.valid not in (SURROGATE, MATCHED)}
    yield f"spiking loss itself (no surrogate), mean over {r.settings['draws']} draws of noise", rest


def _others(r: FlatnessResult) -> list[str]:
    """Return the table of the other metrics."""
    lines = ["FLATNESS: OTHER METRICS", COLUMNS]
    for name, metric in r.others.items():
        lines += _row(_title(name), metric, f"{metric.valid}; {metric.meaning}")
    return lines


def _title(name: str) -> str:
    """Return the name of a metric as printed."""
    return name.replace("relative flatness", "rel. flatness")


def _row(name: str, m: Metric, text: str) -> list[str]:
    """Return the numbers of a metric, and below them what they mean or why they are missing."""
    cost = " ".join(f"{n}{kind}" for n, kind in ((m.products, "p"), (m.gradients, "g"), (m.forwards, "f")) if n)
    line = f"{shortened(name, 27):<27}{_value(m.value):>11} {_ends(m.ci95):<21}{_data_error(m):>10}"
    line += f"{cost or '-':>10}"
    if "ascent" in m.parts and math.isfinite(m.value):
        found = ", ".join(f"{kind} {_value(m.parts[kind], 3)}" for kind in ("ascent", "search"))
        text = text.replace("; ", f"; {found}; ", 1)
    if m.note:
        text = f"{text}; {m.note}" if text else m.note
    return [line, *paragraph(text, indent=4)]


def _value(x: float, digits: int = 5) -> str:
    """Format a number, "-" if it is not finite."""
    return f"{x:.{digits}g}" if math.isfinite(x) else "-"


def _error(x: float) -> str:
    """Format a standard error."""
    return _value(x, 3 if 100 <= x < 1000 else 2)


def _data_error(m: Metric | Difference) -> str:
    """Format the standard error over the data, or its lower limit as "> x"."""
    return f"> {_error(m.data_stderr_least)}" if math.isfinite(m.data_stderr_least) else _error(m.data_stderr)


def _ends(ci95: tuple[float, float]) -> str:
    """Format an interval with enough digits to tell its ends apart, or as +- its half width if it is very narrow."""
    low, high = ci95
    if not (math.isfinite(low) or math.isfinite(high)):
        return "-"
    width = high - low
    size = max((abs(x) for x in ci95 if math.isfinite(x)), default=0.0)
    if width < 1e-3 * size:
        return f"+- {width / 2:.1e}"
    ratio = size / width if 0 < width < math.inf else 1.0
    digits = min(6, max(3, math.ceil(math.log10(ratio)) + 2))
    return f"[{_value(low, digits)}, {_value(high, digits)}]"


def flatness_cautions(r: FlatnessResult) -> Iterator[str]:
    """Yield warnings about conclusions that do not hold, each based on a measured number."""
    rates = [v.get("firing_rate") for v in r.activity.values() if isinstance(v, dict)]
    if rates and not any(rates):
        yield "The network never spikes on these samples: near these weights, its loss does not depend on the weights."
    elif any(rate == 0 for rate in rates):
        silent = [name for name, v in r.activity.items() if isinstance(v, dict) and v.get("firing_rate") == 0]
        yield f"These layers never fire on these samples: {', '.join(silent)}."
    means = [m for m in r.metrics.values() if m.pairs]
    if means and all(len(set(m.pairs)) == 1 for m in means):
        yield "The noise does not change the loss of any sample: these radii are too small to measure flatness."
    top = r.main.get("ggn lambda_max", Metric())
    if math.isfinite(top.data_stderr) and top.data_stderr > 0.1 * abs(top.value) > 0:
        yield (
            f"lambda_max of the GGN has a standard error over the data of {top.data_stderr / abs(top.value):.0%} "
            f"({r.data['samples']} samples). Use more samples before comparing networks by it."
        )
    if math.isfinite(top.data_stderr_least):
        yield (
            f"lambda_max of the GGN has a standard error over the data of at least {top.data_stderr_least:.2g}: a few "
            f"of the {r.data['samples']} samples carry it, so no interval follows from it. Use more samples."
        )
    if r.main.get("hessian trace", Metric()).value < 0:
        yield (
            "The trace of the surrogate Hessian is negative. This comes from f'' of the surrogate and from the reset; "
            "it is not a curvature of the spiking loss."
        )
    if r.data.get("loss") == "ce":
        yield "Large logits make all curvatures of the cross-entropy small: compare networks at the same loss."


def _cost(r: FlatnessResult) -> str:
    """Return the cost of all metrics."""
    every = r.metrics.values()
    counts = [sum(getattr(m, kind) for m in every) for kind in ("products", "gradients", "forwards")]
    return f"{counts[0]} products, {counts[1]} gradients, {counts[2]:,} forward passes, {r.seconds:.1f} s"


# --- calibration
def verdict_lines(calibration: CalibrationResult | None) -> list[str]:
    """Return the lines that summarize the calibration of a checkpoint, or how to compute one."""
    if calibration is None:
        return field("calibrated", "no (use --calibrate to measure which operator predicts this network's loss)")
    c = calibration.calibration
    scales, count = _range([s.scale for s in c.scales]), len(c.kinds)
    lines = field("calibrated", f"against the spiking loss under noise {scales}, along {count} directions:")
    lines += [f"{'':<22}{'rank correlation':<18}{'true / predicted':<18}predicts"]
    for op in ("smoothed", "ggn", "hessian"):
        if found := [s.agreement[op] for s in c.scales if op in s.agreement]:
            order = all(a.ci95[0] >= RANKS for a in found)
            size = all(SIZE[0] <= a.ratio <= SIZE[1] for a in found)
            verdict = "order and size" if order and size else "order, not size" if order else "neither"
            rank, ratio = _range([a.correlation for a in found]), _range([a.ratio for a in found])
            lines.append(f"{'':<12}{op:<10}{rank:<18}{ratio:<18}{verdict}")
    if lines and not any(line.endswith("order and size") for line in lines):
        lines += field(
            "", "No operator predicts order and size here. Measure the curvature along eigenvectors instead:"
        )
        lines += field("", "ikun-hessian spectrum CHECKPOINT --operator true --operator ggn --noise S")
    return lines


def _range(values: Sequence[float]) -> str:
    """Format the range of some values."""
    if not all(map(math.isfinite, values)):
        return "-"
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def calibration_lines(result: CalibrationResult) -> list[str]:
    """Return the lines that `flatness --calibrate` prints, with one table for each noise scale."""
    c = result.calibration
    kinds = len(set(c.kinds))
    lines = paragraph(
        "CALIBRATION: prediction v'Av of each operator A compared to the curvature of the true spiking loss under "
        f"noise, along {len(c.kinds)} directions v of {kinds} kinds"
    )
    for s in c.scales:
        lines += ["", f"noise {s.scale:g} x each filter's rms, which changes the outputs by {s.movement:.3g} (rms)"]
        lines += [f"{'operator':<23}{'rank correlation':<22}{'true / predicted (quartiles)':<29}{'band':>6}"]
        for name, a in s.agreement.items():
            title = f"fitted: {s.fitted}" if name == "ggn, fitted" else name
            rank = f"{a.correlation:.2f} [{a.ci95[0]:.2f}, {a.ci95[1]:.2f}]"
            ratio = f"{a.ratio:.3g} ({a.quartiles[0]:.3g}, {a.quartiles[1]:.3g})"
            lines.append(f"{shortened(title, 22):<23}{rank:<22}{ratio:<29}{a.within:>6.0%}")
        lines += _checks(c, s)
    lines += paragraph("band: share of the directions with true / predicted between 0.7 and 1.4")
    return lines + paragraph(
        "within kinds: rank correlation after the differences between kinds of directions are removed. other draws: "
        "the operator from other noise. one width: the GGN with the same Gaussian surrogate for all neurons. half of "
        "the truth: the other half of its draws in place of an operator, which limits what an operator can reach"
    )


def _checks(c: Calibration, s: Scale) -> list[str]:
    """Return lines that compare the operator smoothed with baselines, at one noise scale."""
    from hessian_tools.analysis.agreement import agreement, correlation_within_kinds

    rows = {
        "smoothed": (s.predictions.get("smoothed", ()), s.curvature),
        "smoothed, other draws": (s.redrawn, s.curvature),
        "one width": (c.predictions.get(ONE_WIDTH, ()), s.curvature),
        "half of the truth": s.halves or ((), ()),
    }
    lines = [f"{'check':<23}{'rank correlation':<22}{'within kinds':<16}true / predicted"]
    for name, (predicted, truth) in rows.items():
        if len(predicted):
            a = agreement(np.array(predicted), np.array(truth), resamples=0)
            inner = correlation_within_kinds(predicted, truth, c.kinds)
            lines.append(f"{name:<23}{a.correlation:<22.2f}{inner:<16.2f}{a.ratio:.3g}")
    return lines if len(lines) > 1 else []


# --- several checkpoints
def labels(found: Sequence[FlatnessResult]) -> list[str]:
    """Return short labels that distinguish the results: initializers, otherwise file names, otherwise numbers."""
    inits = [str(r.training.get("init", "")) for r in found]
    stems = [PurePath(str(r.checkpoint.get("path", ""))).stem for r in found]
    for names in (inits, stems):
        if all(names) and len(set(names)) == len(names):
            return names
    return [f"{i} {stem}" for i, stem in enumerate(stems, 1)]


def flatness_comparison_lines(found: Sequence[FlatnessResult]) -> list[str]:
    """Return the lines that compare several results: metrics side by side, and their differences to the first."""
    if why := incomparable(found):
        return field("compared", f"no: {why}. Measure all checkpoints with the same options")
    names, apart = labels(found), unlike(found)
    lines = [line for name, r in zip(names, found, strict=True) if (s := not_learned(r)) for line in (f"{name}:", *s)]
    lines += ["SIDE BY SIDE"]
    for start in range(0, len(found), PER_BLOCK):
        some = range(start, min(start + PER_BLOCK, len(found)))
        lines += [f"{'':<29}" + "".join(f"{shortened(names[i], COLUMN - 1):>{COLUMN}}" for i in some)]
        lines += [*_table([found[i] for i in some], bool(apart)), ""]
    rows = {name: differences(found[0], r) for name, r in zip(names[1:], found[1:], strict=True)}
    lines += _differences(names[0], rows)
    for text in _confounds(found, apart):
        lines += warning(text)
    return lines


def _table(found: Sequence[FlatnessResult], apart: bool) -> Iterator[str]:
    """Yield the rows of a table of several results, without surrogate curvatures if these are not comparable."""

    def row(name: str, cells: Sequence[str]) -> str:
        return f"{shortened(name, 29):<29}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)

    yield row(f"{found[0].data.get('split', '')} loss".strip(), [f"{r.loss:.4g}" for r in found])
    yield row("accuracy", ["-" if math.isnan(r.accuracy) else f"{r.accuracy:.2%}" for r in found])
    yield row("weight norm", [f"{_norm(r):.4g}" for r in found])
    for name in dict.fromkeys(name for r in found for name in r.metrics):
        metrics = [r.metrics.get(name, Metric()) for r in found]
        if not (apart and metrics[0].valid == SURROGATE):
            yield row(_title(name), [_cell(m) for m in metrics])


def _cell(m: Metric) -> str:
    """Format a value and its standard error over data, draws and probes, with as many digits as fit."""
    errors = [e for e in (m.stderr, m.data_stderr) if math.isfinite(e)]
    if not errors or not math.isfinite(m.value) or math.isfinite(m.data_stderr_least):
        return _value(m.value, 4)
    cells = [f"{_value(m.value, digits)} +- {rounded(math.hypot(*errors), 1)}" for digits in (3, 2, 1)]
    return next((cell for cell in cells if len(cell) < COLUMN), cells[-1])


def _sure(d: Difference) -> bool:
    """Return whether a difference is not 0, by the interval over the draws and by its error over the data."""
    outside = d.ci95[0] > 0 or d.ci95[1] < 0
    return outside and math.isnan(d.data_stderr_least) and not abs(d.value) < 2 * d.data_stderr


def told_apart_lines(found: Sequence[FlatnessResult]) -> list[str]:
    """Return a few lines that say which metrics of the spiking loss tell several networks from the first."""
    if why := incomparable(found):
        return field("compared", f"no: {why}. Measure all checkpoints with the same options")
    names, lines = labels(found), list[str]()
    for name, result in zip(names[1:], found[1:], strict=True):
        rows = differences(found[0], result)
        sure = [f"{metric} ({_value(d.value)})" for metric, d in rows.items() if _sure(d)]
        if not rows:
            text = f"{name} and {names[0]} have different sizes, so that no noise is the same"
        else:
            text = f"{name} minus {names[0]}: {', '.join(sure) or 'no metric tells them apart'}"
        lines += field("told apart", text)
    return [*lines, *field("note", "by the same draws and samples, over draws and data; not over seeds. --full: all")]


def _differences(first: str, rows: Mapping[str, Mapping[str, Difference]]) -> list[str]:
    """Return the table of paired differences, or why there are none."""
    if not any(rows.values()):
        return [
            *paragraph("No differences with the same draws of noise: the networks have different sizes."),
            "",
        ]
    lines = [f"{'same draws and samples':<27}{'value':>11}  {'95% interval':<21}{'data error':>10}"]
    for label, found in rows.items():
        lines.append(f"{label} minus {first}:")
        for name, d in found.items():
            number = f"{_value(d.value):>11}{' *' if _sure(d) else '  '}"
            lines.append(f"{shortened(name, 27):<27}{number}{_ends(d.ci95):<21}{_data_error(d):>10}")
    legend = "*: different from 0, by the interval over the draws and by two standard errors over the data"
    return [*lines, *paragraph(legend), ""]


def _confounds(found: Sequence[FlatnessResult], apart: Sequence[str]) -> Iterator[str]:
    """Yield warnings about other reasons why the numbers may differ."""
    losses, norms = [r.loss for r in found], [_norm(r) for r in found]
    if max(losses) > 1.1 * min(losses):
        yield (
            f"The losses differ ({min(losses):.3g} to {max(losses):.3g}). A lower loss by itself makes the GGN "
            "smaller: also compare the networks at the same training loss."
        )
    if max(norms) > 1.05 * min(norms):
        yield (
            f"The weights differ in norm ({min(norms):.3g} to {max(norms):.3g}). Before a BatchNorm, the unscaled "
            "curvature is proportional to 1/norm^2: use the scaled rows."
        )
    if apart:
        yield (
            f"Different {', '.join(apart)}: the curvatures of the surrogate loss are left out above. If only the "
            "surrogate differs, analyse all checkpoints with the same --surrogate."
        )
    elif len({str(r.network.get("trained_surrogate")) for r in found}) > 1:
        yield "The networks were trained with different surrogates and analysed with the same one."
    if any(r.parameters != found[0].parameters for r in found):
        yield "The networks have different sizes."
    if len({r.main["ggn lambda_max"].value for r in found}) > 1 and found[0].settings.get("damping") is None:
        yield "log det uses a damping of 1% of each network's lambda_max: set --damping to compare it."
    yield (
        "+-: one standard error over the data and over draws or probes, for these weights. It is left out where a few "
        "samples carry it. It does not include the variation between seeds."
    )
