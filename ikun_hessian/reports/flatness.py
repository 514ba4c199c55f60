"""What a person reads of flatness: one checkpoint's two tables, the operators' calibration, several side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from hessian_tools.analysis.flatness.paired_differences import Difference, differences, incomparable, unlike
from hessian_tools.results.calibration import CalibrationResult
from hessian_tools.results.flatness import MATCHED, SURROGATE, FlatnessResult, Metric
from ikun_hessian.reports.header import SCREEN_WIDTH, opened

COLUMNS = f"{'':<27}{'value':>11}  {'95% interval':<21}{'data se':>8}{'cost':>11}"
COLUMN, PER_BLOCK = 17, 3  # of a comparison: width, checkpoints in one block
LEGEND = (
    "95% interval: of lambda_max and lambda_1/lambda_5 by the residual, of traces and their kin over probes, of the "
    "spiking loss over draws of noise. data se: standard error for other samples of the same kind. ascent: along "
    "surrogate gradients, search: by forward passes alone. cost: p products with the operator, g gradients, f forward "
    "passes, over all samples, on top of the rows above."
)
RANKS, SIZE = 0.7, (0.7, 1.4)  # a calibration's verdict: least rank correlation (interval), true / predicted


def flatness_lines(result: FlatnessResult, calibration: CalibrationResult | None = None) -> list[str]:
    """The whole screen. calibration: of this very checkpoint, if there is one."""
    parts = (
        [*opened(result), ""],
        [*_state(result), ""],
        [*_main(result), ""],
        [*verdict_lines(calibration), ""],
        [*_others(result), ""],
        [*textwrap.wrap(LEGEND, SCREEN_WIDTH), ""],
        [*(line for text in flatness_cautions(result) for line in _caution(text)), ""],
        _field("cost", _cost(result)),
    )
    return [line for part in parts if part != [""] for line in part]


def _field(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, SCREEN_WIDTH, initial_indent=f"{name:<12}", subsequent_indent=" " * 12, break_on_hyphens=False
    )


def _caution(text: str) -> list[str]:
    return textwrap.wrap(text, SCREEN_WIDTH, initial_indent="! ", subsequent_indent="  ")


def _state(r: FlatnessResult) -> list[str]:
    share = "" if math.isnan(r.accuracy) else f", accuracy {r.accuracy:.2%}"
    lines = _field("loss", f"{r.loss:.6g}{share}; gradient norm {r.gradient_norm:.4g}")
    layers = ", ".join(f"{name} {norm:.3g}" for name, norm in r.weight_norms.items())
    return lines + _field("weights", f"norm {_norm(r):.4g}: {layers}")


def _norm(r: FlatnessResult) -> float:
    return math.sqrt(sum(norm**2 for norm in r.weight_norms.values()))


def _main(r: FlatnessResult) -> list[str]:
    """The first table, in groups by what the numbers may be said of."""
    lines = ["FLATNESS: WHAT A CLAIM CAN REST ON", COLUMNS]
    for i, (heading, rows) in enumerate(_groups(r)):
        lines += ["", *textwrap.wrap(f"{heading}:", SCREEN_WIDTH)][i == 0 :]
        for name, metric in rows.items():
            lines += _row(name, metric, metric.meaning)
    return lines


def _groups(r: FlatnessResult) -> Iterator[tuple[str, dict[str, Metric]]]:
    matched = {name: m for name, m in r.main.items() if m.valid == MATCHED}
    for op in dict.fromkeys(" ".join(name.split()[:2]) for name in matched):  # smoothed S
        own = {name.removeprefix(f"{op} "): m for name, m in matched.items() if name.startswith(f"{op} ")}
        yield f"operator smoothed: the spiking loss under noise of {op.split()[1]} of each filter's rms, estimated", own
    surrogate = {name: m for name, m in r.main.items() if m.valid == SURROGATE}
    yield "the surrogate's curvature", {name: m for name, m in surrogate.items() if "scaled" not in name}
    yield (
        "the same, scaled: in units of each filter's norm, invariant to rescaling",
        {name: m for name, m in surrogate.items() if "scaled" in name},
    )
    rest = {name: m for name, m in r.main.items() if m.valid not in (SURROGATE, MATCHED)}
    yield f"the spiking loss itself, mean over {r.settings['draws']} draws of noise, no surrogate", rest


def _others(r: FlatnessResult) -> list[str]:
    lines = ["THE REST", COLUMNS]
    for name, metric in r.others.items():
        lines += _row(_title(name), metric, f"{metric.valid}; {metric.meaning}")
    return lines


def _title(name: str) -> str:
    return name.replace("relative flatness", "rel. flatness")


def _row(name: str, m: Metric, text: str) -> list[str]:
    """The numbers, and below them what they mean or why they are missing."""
    cost = " ".join(f"{n} {kind}" for n, kind in ((m.products, "p"), (m.gradients, "g"), (m.forwards, "f")) if n)
    line = (
        f"{_short(name, 27):<27}{_value(m.value):>11}  {_ends(m.ci95):<21}{_error(m.data_stderr):>8}{cost or '-':>11}"
    )
    if "ascent" in m.parts and math.isfinite(m.value):
        found = ", ".join(f"{kind} {_value(m.parts[kind], 3)}" for kind in ("ascent", "search"))
        text = text.replace("; ", f"; {found}; ", 1)
    if m.note:
        text = f"{text}; {m.note}" if text else m.note
    return [line, *textwrap.wrap(text, SCREEN_WIDTH, initial_indent="    ", subsequent_indent="    ")]


def _value(x: float, digits: int = 5) -> str:
    return f"{x:.{digits}g}" if math.isfinite(x) else "-"


def _error(x: float) -> str:
    return _value(x, 3 if 100 <= x < 1000 else 2)


def _ends(ci95: tuple[float, float]) -> str:
    """As many digits as tell the ends apart; +- the half width where the ends agree to three digits."""
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


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


def flatness_cautions(r: FlatnessResult) -> Iterator[str]:
    """What not to conclude, each from a measured number."""
    rates = [v.get("firing_rate") for v in r.activity.values() if isinstance(v, dict)]
    if rates and not any(rates):
        yield "The network never spikes on these samples: its loss does not depend on the weights around here."
    elif any(rate == 0 for rate in rates):
        silent = [name for name, v in r.activity.items() if isinstance(v, dict) and v.get("firing_rate") == 0]
        yield f"{', '.join(silent)} never fires on these samples."
    means = [m for m in r.metrics.values() if m.pairs]
    if means and all(len(set(m.pairs)) == 1 for m in means):
        yield "The noise changes no sample's loss: nothing about flatness can be said at these radii."
    top = r.main["ggn lambda_max"]
    if math.isfinite(top.data_stderr) and top.data_stderr > 0.1 * abs(top.value) > 0:
        yield (
            f"The GGN's lambda_max is known to {top.data_stderr / abs(top.value):.0%} only: {r.data['samples']} "
            "samples are few for this network."
        )
    trace = r.main["hessian trace"]
    if trace.value < 0:
        yield (
            "The surrogate Hessian's trace is negative: that comes from the surrogate's f'' and the reset, and is no "
            "curvature of the spiking loss."
        )
    if r.data.get("loss") == "ce":
        yield "Cross-entropy with large logits shrinks all curvature: compare at a matched loss."


def _cost(r: FlatnessResult) -> str:
    every = r.metrics.values()
    counts = [sum(getattr(m, kind) for m in every) for kind in ("products", "gradients", "forwards")]
    return f"{counts[0]} products, {counts[1]} gradients, {counts[2]:,} forward passes, {r.seconds:.1f} s"


# --- calibration
def verdict_lines(calibration: CalibrationResult | None) -> list[str]:
    """What the checkpoint's own calibration says of the operators; how to get one where there is none."""
    if calibration is None:
        return _field("calibrated", "no: --calibrate measures which operator predicts this network's loss")
    c = calibration.calibration
    scales, count = _range([s.scale for s in c.scales]), len(c.kinds)
    lines = _field("calibrated", f"against the spiking loss under noise {scales}, along {count} directions:")
    lines += [f"{'':<22}{'rank correlation':<18}{'true / predicted':<18}predicts"]
    for op in ("smoothed", "ggn", "hessian"):
        if found := [s.agreement[op] for s in c.scales if op in s.agreement]:
            order = all(a.ci95[0] >= RANKS for a in found)
            size = all(SIZE[0] <= a.ratio <= SIZE[1] for a in found)
            verdict = "order and size" if order and size else "order, not size" if order else "neither"
            rank, ratio = _range([a.correlation for a in found]), _range([a.ratio for a in found])
            lines.append(f"{'':<12}{op:<10}{rank:<18}{ratio:<18}{verdict}")
    return lines


def _range(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "-"
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def calibration_lines(result: CalibrationResult) -> list[str]:
    """Which operator predicts the curvature of the true smoothed loss, a table a noise scale."""
    c = result.calibration
    kinds = len(set(c.kinds))
    lines = textwrap.wrap(
        f"CALIBRATION: v'Av of every operator against the curvature of the true spiking loss under noise, along "
        f"{len(c.kinds)} directions of {kinds} kinds",
        SCREEN_WIDTH,
    )
    for s in c.scales:
        lines += ["", f"noise {s.scale:g} of each filter's rms, which moves the outputs by {s.movement:.3g} (rms)"]
        lines += [f"{'operator':<23}{'rank correlation':<22}{'true / predicted (quartiles)':<29}.7-1.4"]
        for name, a in s.agreement.items():
            title = f"fitted: {s.fitted}" if name == "ggn, fitted" else name
            rank = f"{a.correlation:.2f} [{a.ci95[0]:.2f}, {a.ci95[1]:.2f}]"
            ratio = f"{a.ratio:.3g} ({a.quartiles[0]:.3g}, {a.quartiles[1]:.3g})"
            lines.append(f"{_short(title, 22):<23}{rank:<22}{ratio:<29}{a.within:>6.0%}")
    return lines


# --- several checkpoints
def labels(found: Sequence[FlatnessResult]) -> list[str]:
    """The shortest names that tell the results apart: their initializers, else their files', else numbers."""
    inits = [str(r.training.get("init", "")) for r in found]
    stems = [PurePath(str(r.checkpoint.get("path", ""))).stem for r in found]
    for names in (inits, stems):
        if all(names) and len(set(names)) == len(names):
            return names
    return [f"{i} {stem}" for i, stem in enumerate(stems, 1)]


def flatness_comparison_lines(found: Sequence[FlatnessResult]) -> list[str]:
    """Several results side by side, metrics as rows, and the differences to the first."""
    if why := incomparable(found):
        return _field("compared", f"no: {why}: measure all with the same options")
    names, apart = labels(found), unlike(found)
    lines = ["SIDE BY SIDE"]
    for start in range(0, len(found), PER_BLOCK):
        some = range(start, min(start + PER_BLOCK, len(found)))
        lines += [f"{'':<29}" + "".join(f"{_short(names[i], COLUMN - 1):>{COLUMN}}" for i in some)]
        lines += [*_table([found[i] for i in some], bool(apart)), ""]
    rows = {name: differences(found[0], r) for name, r in zip(names[1:], found[1:], strict=True)}
    lines += _differences(names[0], rows)
    for text in _confounds(found, apart):
        lines += _caution(text)
    return lines


def _table(found: Sequence[FlatnessResult], apart: bool) -> Iterator[str]:
    def row(name: str, cells: Sequence[str]) -> str:
        return f"{_short(name, 29):<29}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)

    yield row(f"{found[0].data.get('split', '')} loss".strip(), [f"{r.loss:.4g}" for r in found])
    yield row("accuracy", ["-" if math.isnan(r.accuracy) else f"{r.accuracy:.2%}" for r in found])
    yield row("norm of the weights", [f"{_norm(r):.4g}" for r in found])
    for name in dict.fromkeys(name for r in found for name in r.metrics):
        metrics = [r.metrics.get(name, Metric()) for r in found]
        if not (apart and metrics[0].valid == SURROGATE):
            yield row(_title(name), [_cell(m) for m in metrics])


def _cell(m: Metric) -> str:
    """The value and its standard error, of data and of draws or probes together, in as many digits as fit."""
    errors = [e for e in (m.stderr, m.data_stderr) if math.isfinite(e)]
    if not errors or not math.isfinite(m.value):
        return _value(m.value, 4)
    cells = [f"{_value(m.value, digits)} +- {math.hypot(*errors):.1g}" for digits in (3, 2, 1)]
    return next((cell for cell in cells if len(cell) < COLUMN), cells[-1])


def _differences(first: str, rows: Mapping[str, Mapping[str, Difference]]) -> list[str]:
    """Paired differences, or why there are none."""
    if not any(rows.values()):
        return [
            *textwrap.wrap("No differences under the same draws: the networks are of different sizes.", SCREEN_WIDTH),
            "",
        ]
    lines = [f"{'same draws and samples':<27}{COLUMNS[27:69]}"]
    for label, found in rows.items():
        lines.append(f"{label} less {first}:")
        for name, d in found.items():
            sure = (d.ci95[0] > 0 or d.ci95[1] < 0) and not abs(d.value) < 2 * d.data_stderr
            number = f"{_value(d.value):>11}{' *' if sure else '  '}"
            lines.append(f"{_short(name, 27):<27}{number}{_ends(d.ci95):<21}{_error(d.data_stderr):>8}")
    return [*lines, "* not 0: outside the interval, over draws, and two standard errors of the data", ""]


def _confounds(found: Sequence[FlatnessResult], apart: Sequence[str]) -> Iterator[str]:
    """What besides flatness can make the numbers differ."""
    losses, norms = [r.loss for r in found], [_norm(r) for r in found]
    if max(losses) > 1.1 * min(losses):
        yield (
            f"The losses differ ({min(losses):.3g} to {max(losses):.3g}): a lower loss alone makes the GGN smaller; "
            "compare at a matched train loss as well."
        )
    if max(norms) > 1.05 * min(norms):
        yield (
            f"The weights differ in norm ({min(norms):.3g} to {max(norms):.3g}): raw curvature goes as 1/norm^2 before "
            "a BatchNorm; read the scaled rows."
        )
    if apart:
        yield (
            f"Different {', '.join(apart)}: the surrogate's curvatures are left out above (one --surrogate for all "
            "makes them comparable if it is that alone)."
        )
    elif len({str(r.network.get("trained_surrogate")) for r in found}) > 1:
        yield "Trained with different surrogates, analysed with one."
    if any(r.parameters != found[0].parameters for r in found):
        yield "The networks differ in size."
    if len({r.main["ggn lambda_max"].value for r in found}) > 1 and found[0].settings.get("damping") is None:
        yield "log det takes 1% of each one's own lambda_max as z: give one --damping to compare it."
    yield "+- is one standard error, of data and of draws or probes, for these weights: it says nothing of other seeds."
