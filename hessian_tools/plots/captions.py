"""Compose the legends and captions of the figures of spectra. A caption includes the provenance of the result."""

from __future__ import annotations

import math
from functools import partial
from pathlib import PurePath

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hessian_tools.plots.curves import Array, SymlogAxis, ValueAxis, densities_of
from hessian_tools.plots.line_panels import LIMIT_DASHES
from hessian_tools.plots.spectrum_panels import has_data_error, is_lower_limit, marks
from hessian_tools.plots.style import Colour, Look, operator_name, printable
from hessian_tools.results.operator_spectrum import Spectrum
from hessian_tools.results.provenance import Analysed
from hessian_tools.results.spectrum import SamplePoint, SpectrumResult
from hessian_tools.results.trajectory import RANKS, axis_of


def provenance(result: Analysed) -> str:
    """Describe the network, the data, the precision, the seed and the number of parameters P of a result."""
    data, network = result.data, result.network
    model = [printable(network[key], 30) for key in ("model", "name", "architecture") if network.get(key)][:1]
    model += [f"surrogate {printable(network['surrogate'], 30)}"] if network.get("surrogate") else []
    model += [f"{printable(network['reset'], 30)} reset"] if network.get("reset") else []
    source = [printable(data[key], 40) for key in ("name", "split") if data.get(key)]
    source += [f"{data['samples']} samples"] if data.get("samples") else []
    parts = [", ".join(found) for found in (model, source) if found]
    parts += [f"{printable(result.dtype, 20)}, seed\u00a0{result.seed}", f"P\u00a0=\u00a0{result.num_parameters}"]
    return "; ".join(parts)


def caption(result: Analysed) -> str:
    """Describe in one sentence what was analysed: checkpoint, provenance and loss."""
    named = f"Checkpoint {_checkpoint(result)}; " if result.checkpoint.get("path") else ""
    loss = f"; loss\u00a0{result.loss:.4g}" if math.isfinite(result.loss) else ""
    return f"{named}{provenance(result)}{loss}."


def _checkpoint(result: Analysed) -> str:
    """Return the file name of the checkpoint and the start of its hash."""
    digest = result.checkpoint.get("sha256")
    name = printable(PurePath(str(result.checkpoint["path"])).name, 60)
    return f"{name} (sha256\u00a0{str(digest)[:8]})" if digest else name


def spectrum_caption(result: SpectrumResult, axis: SymlogAxis) -> str:
    """Compose the caption of the figure of a spectrum.

    Args:
        result: The result drawn.
        axis: The eigenvalue axis of the density.

    Returns:
        The provenance of the result and how to read the panels.
    """
    text = caption(result)
    if densities_of(result):
        sigma, unit = f"{axis.sigma:.2g}", f"{axis.linthresh:.2g}"
        text += f" (a) Nodes are broadened by σ\u00a0=\u00a0{sigma} in asinh(λ\u00a0/\u00a0{unit}), or by their "
        text += "spacing if that is wider. (a, b) Lines and bands: mean and range over probes."
    pairs = [e for s in result.spectra.values() for e in (*s.eigenvalues, *s.smallest_eigenvalues)]
    if any(has_data_error(e) for e in pairs):
        text += (
            f" ({'c' if densities_of(result) else 'a'}) Bars (if longer than the marker): standard error over the data."
        )
        if any(is_lower_limit(e) for e in pairs):
            text = text[:-1] + "; dotted: a lower limit of it."
    return text


def trajectory_caption(ordered: list[SpectrumResult], axes: list[ValueAxis | None], limit: float, limited: bool) -> str:
    """Compose the caption of the figure of a training run.

    Args:
        ordered: Results of the snapshots in the order of their epochs.
        axes: Value axes of panels (a) and (b), None for an empty panel.
        limit: Stability limit of SGD, NaN if it is unknown.
        limited: Whether the limit is drawn.

    Returns:
        The provenance of the run and how to read the panels.
    """
    training = ordered[0].training
    trained = [printable(training[key], 20) for key in ("init", "optimizer") if training.get(key)]
    trained += [f"lr\u00a0{training['lr']:g}"] if isinstance(training.get("lr"), int | float) else []
    schedule = printable(training.get("schedule") or "none", 20)
    trained += [f"{schedule} schedule"] if schedule != "none" else []
    trained += [
        f"{word}\u00a0{printable(training[key], 12)}"
        for key, word in (("batch_size", "batch"), ("seed", "seed"))
        if key in training
    ]
    text = f"{len(ordered)} snapshots of one run"
    text += f" ({', '.join(trained)})" if trained else ""
    axis, positions = axis_of(ordered)
    text += f", epochs {positions[0]} to {positions[-1]}" if axis == "epoch" else ", in the order given"
    text += f", last checkpoint {_checkpoint(ordered[-1])}; " if ordered[-1].checkpoint.get("path") else "; "
    text += f"{provenance(ordered[0])}.{_errors('Bars', [s for r in ordered for s in r.spectra.values()])}"
    text += _linear_parts(axes)
    if math.isfinite(limit):
        initial = f" (initial, {schedule} schedule)" if schedule != "none" else ""
        rate = f"2(1\u00a0+\u00a0β)/η\u00a0=\u00a0{limit:.4g} for momentum β\u00a0=\u00a0"
        rate += f"{training.get('momentum', 0.9):g}, learning rate η\u00a0=\u00a0{training['lr']:g}{initial}"
        line = "Dashed line" if limited else "Not drawn because it is too far away"
        text += f" {line}: {rate}. SGD is unstable if the curvature of its training-mode mini-batch loss exceeds "
        text += "this limit. The figure shows the curvature in evaluation mode, on all samples."
    return text


def samples_caption(
    result: SpectrumResult,
    curve: list[SamplePoint],
    ranks: list[list[Array]],
    largest: float,
    axes: list[ValueAxis | None],
) -> str:
    """Compose the caption of the figure of curvature against the number of samples.

    Args:
        result: The result drawn.
        curve: Points of the curve in ascending number of samples.
        ranks: For each rank and point, the eigenvalues of the subsets.
        largest: Largest eigenvalue on all samples, NaN if it is unknown.
        axes: Value axes of panels (a) and (b), None for an empty panel.

    Returns:
        The finding at the smallest number of samples, the provenance and how to read the panels.
    """
    text = ""
    if ranks and len(ranks[0][0]) and largest > 0:
        ratios = ranks[0][0] / largest
        few = f"{curve[0].samples}\u00a0sample{'s' if curve[0].samples > 1 else ''}"
        spread = f" ({ratios.min():.2g} to {ratios.max():.2g} in {len(ratios)} subsets)" if len(ratios) > 1 else ""
        text = f"On {few}, λ₁ is {np.median(ratios):.2g} times its value on all samples{spread}. "
    text += caption(result)
    return text + _errors("Grey band", [result.main[1]]) + _linear_parts(axes)


def _errors(mark: str, spectra: list[Spectrum]) -> str:
    """Describe the source of the standard errors in (a), the outermost eigenvalues, and (b), the trace."""
    ends = any(has_data_error(e) for s in spectra for e in (*s.eigenvalues[:1], *s.smallest_eigenvalues[:1]))
    traces = [s.trace for s in spectra if s.trace is not None]
    known = {
        "data": any(math.isfinite(t.data_stderr) for t in traces),
        "probes": any(math.isfinite(t.stderr) for t in traces),
    }
    texts = ["over the data in (a)"] if ends else []
    texts += [f"over {' and '.join(k for k in known if known[k])} in (b)"] if any(known.values()) else []
    return f" {mark}: one standard error, {', '.join(texts)}." if texts else ""


def _linear_parts(axes: list[ValueAxis | None]) -> str:
    """Describe where the symlog axes of panels (a) and (b) are linear."""
    parts = [
        f"±{axis.linthresh:.2g} in ({letter})"
        for letter, axis in zip("ab", axes, strict=True)
        if axis is not None and axis.kind == "symlog"
    ]
    return f" The vertical axis is linear within {' and '.join(parts)}." if parts else ""


def _operator_lines(styles: dict[str, Look]) -> list[Line2D | Patch]:
    """Return a legend entry for each operator."""
    return [
        Line2D([], [], color=colour, linestyle=dashes, label=operator_name(name))
        for name, (colour, dashes) in styles.items()
    ]


def trajectory_legend(
    ordered: list[SpectrumResult], ends: dict[str, Look], styles: dict[str, Look], limited: bool
) -> list[Line2D | Patch]:
    """Compose the legend of the figure of a training run.

    Args:
        ordered: Results of the snapshots in the order of their epochs.
        ends: Looks of the operators whose eigenvalues are drawn.
        styles: Looks of all operators.
        limited: Whether the stability limit is drawn.

    Returns:
        The legend entries.
    """
    spectra = [r.spectra[name] for r in ordered for name in ends]
    count = min(RANKS, max(len(s.eigenvalues) for s in spectra))
    drawn = [e for s in spectra for e in (*s.eigenvalues[:1], *s.smallest_eigenvalues[:1])]
    mark = partial(Line2D, [], [], color="0.2", markersize=3.2, markeredgewidth=0.7)
    handles = [*_operator_lines(styles), mark(marker="o", label="largest, λ₁")]
    if count > 1:
        handles.append(Line2D([], [], color="0.2", linewidth=0.6, label=_ranks_below(count)))
    if any(s.smallest_eigenvalues for s in spectra):
        handles.append(mark(marker="v", label="smallest"))
    if not all(e.converged for e in drawn):
        handles.append(mark(marker="o", markerfacecolor="white", linestyle="none", label="not converged"))
    if limited:
        text = "2(1 + β)/η, for training-mode mini-batches"
        handles.append(Line2D([], [], color="0.2", linestyle=LIMIT_DASHES, linewidth=0.9, label=text))
    return handles


def _ranks_below(count: int) -> str:
    """Return the label of the eigenvalues of rank 2 to `count`, at most 5."""
    return "λ₂" if count == 2 else f"λ₂ to λ{'₁₂₃₄₅'[count - 1]}"


def samples_legend(
    curve: list[SamplePoint], ranks: int, samples: int, colours: tuple[Colour, Colour]
) -> list[Line2D | Patch]:
    """Compose the legend of the figure of curvature against the number of samples.

    Args:
        curve: Points of the curve.
        ranks: Number of eigenvalues drawn for each subset.
        samples: Number of all samples, 0 if it is unknown.
        colours: Colour of the largest eigenvalue and colour of the others.

    Returns:
        The legend entries.
    """
    dot = partial(Line2D, [], [], color=colours[0], marker="o", markersize=2.8, linestyle="none", markeredgewidth=0.6)
    handles: list[Line2D | Patch] = [Line2D([], [], color=colours[0], linewidth=1.6, label="median: λ₁, trace")]
    if ranks > 1:
        handles.append(Line2D([], [], color=colours[1], linewidth=0.7, label=_ranks_below(ranks)))
    if any(point.disjoint for point in curve):
        handles.append(dot(label="one subset"))
    if not all(point.disjoint for point in curve):
        handles.append(dot(markerfacecolor="white", label="subset that shares samples with another"))
    everything = f"all {samples} samples" if samples else "all samples"
    return [*handles, Line2D([], [], color="0.2", linestyle=LIMIT_DASHES, linewidth=0.9, label=everything)]


def spectrum_legend(result: SpectrumResult, styles: dict[str, Look]) -> list[Line2D | Patch]:
    """Compose the legend of the figure of a spectrum, shared by all panels."""
    handles = _operator_lines(styles)
    densities = list(densities_of(result).values())
    if densities:
        if any(d.atoms for d in densities):
            handles.append(
                Line2D([], [], color="0.2", marker="|", markersize=6, linestyle="none", label="deflated eigenvalue")
            )
        handles.append(Patch(facecolor="0.9", label="floor: one eigenvalue (1/P)"))
    return [*handles, *marks(list(result.spectra.values()))]
