"""Made-up results for tests of figures, and checks of a drawn figure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from hessian_tools.results.operator_spectrum import Density, Eigenvalue, Spectrum, Trace
from hessian_tools.results.spectrum import SPECTRUM_SCHEMA, SpectrumResult

LAYERS = ("layers.conv1.weight", "layers.conv2.weight", "layers.fc.weight")
TOPS, SMALLS = (8.0, 4.0, 3.0), (-2.0, -1.0)  # as saved: the most negative first


def eigenvalue(value: float, **changes: Any) -> Eigenvalue:
    shares = dict(zip(LAYERS, (0.5, 0.3, 0.2), strict=True))
    return dataclasses.replace(Eigenvalue(value, 1e-6, abs(value) / 10, True, shares), **changes)


def spectrum(scale: float = 1.0, *, probes: int = 3, steps: int = 30, size: int = 500, seed: int = 0) -> Spectrum:
    """Five deflated eigenvalues and a bulk on [-0.3, 0.6] with much of its weight at 0."""
    rng = np.random.default_rng(seed)
    atoms = [scale * v for v in (*TOPS, *SMALLS)]
    nodes, weights = [], []
    for _ in range(probes):
        x = np.append(np.sort(rng.uniform(-0.3, 0.6, steps - 1)), 1e-4)
        w = np.append(rng.uniform(0.1, 1, steps - 1), 20.0)
        nodes.append((*atoms, *(scale * x).tolist()))
        weights.append((*[1 / size] * 5, *((1 - 5 / size) * w / w.sum()).tolist()))
    density = Density(tuple(nodes), tuple(weights), probes, steps, len(atoms))
    tops, smalls = (tuple(eigenvalue(scale * v) for v in values) for values in (TOPS, SMALLS))
    return Spectrum(1e-7, 100, tops, smalls, None, 1.0, 1.0, density)


def result(spectra: dict[str, Spectrum] | None = None, **changes: Any) -> SpectrumResult:
    made = SpectrumResult(
        schema=SPECTRUM_SCHEMA,
        checkpoint={"path": "/somewhere/ckpt.pt", "sha256": "0123456789abcdef"},
        data={"name": "digits", "split": "train", "samples": 1437},
        network={"model": "csnn", "surrogate": "atan:2", "reset": "hard"},
        training={},
        activity={},
        settings={},
        num_parameters=500,
        parameters=dict.fromkeys(LAYERS, 100),
        weight_norms=dict.fromkeys(LAYERS, 1.0),
        loss=0.25,
        accuracy=0.9,
        gradient_norm=0.1,
        dtype="float32",
        device="cpu",
        seed=7,
        sensitivity={},
        spectra=spectra if spectra is not None else {"hessian": spectrum(), "ggn": spectrum(0.5, seed=1)},
        blocks={},
        warnings=(),
        seconds=1.0,
        versions={},
    )
    return dataclasses.replace(made, **changes)


def line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [each for each in ax.lines if each.get_label() == label]
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def words(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]


def said(figure: Figure) -> str:
    return "\n".join(t.get_text() for t in words(figure)).replace("\u00a0", " ")


def caption_of(figure: Figure) -> str:
    return said(figure).replace("\n", " ")


def collisions(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that overlap, and texts that leave the figure."""
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    drawn = [t for ax in figure.axes for t in (*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts)]
    drawn += [t for ax in figure.axes for t in (ax.xaxis.label, ax.yaxis.label, ax.title, ax._left_title)]  # type: ignore[attr-defined]
    drawn += [t for legend in figure.legends for t in legend.get_texts()] + list(figure.texts)
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in drawn if t.get_text().strip()]
    boxes = [(text, box.padded(-0.5)) for text, box in boxes]
    pairs = [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if x.overlaps(y)]
    area = figure.bbox
    outside = [(t, "") for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > area.x1 or box.y1 > area.y1]
    return pairs + outside


def on_paper(ax: Axes) -> np.ndarray:
    """Every point of every curve, as shares of the panel."""
    curves = [each for each in ax.lines if each.get_transform() == ax.transData]
    return np.concatenate([(ax.transData - ax.transAxes).transform(each.get_xydata()) for each in curves])


def ends(tops: Sequence[float], smalls: Sequence[float], trace: float | None, **changes: Any) -> Spectrum:
    """A spectrum of these eigenvalues, largest first and most negative first, errors of 10%."""
    pairs = [tuple(eigenvalue(float(v), **changes) for v in values) for values in (tops, smalls)]
    size = abs(trace or 0.0)
    found = None if trace is None else Trace(trace, 0.03 * size, (trace - size, trace + size), 32, 0.04 * size)
    return dataclasses.replace(spectrum(), eigenvalues=pairs[0], smallest_eigenvalues=pairs[1], trace=found)


def snapshot(
    epoch: int, *, scale: float = 1.0, layers: int = 4, training: Any = None, **changes: Any
) -> SpectrumResult:
    """One of a run of 48 epochs, its curvature rising and falling, its smallest eigenvalue on the way to 0."""
    done = epoch / 48
    rise = scale * (0.9 + 6 * math.exp(-(((done - 0.15) / 0.2) ** 2)))
    tops = rise * np.array([1, 0.62, 0.5, 0.42, 0.37, 0.3, 0.25])
    small = scale * (0.06 + math.exp(-2 * done))
    trained = {"init": "kaiming", "optimizer": "sgd", "lr": 0.1, "schedule": "cosine", "batch_size": 128, "seed": 42}
    rates = {
        f"spike{i + 1}": {"firing_rate": 0.1, "dead": 0.0, "derivative_square": 0.16 / (1 + done * (i + 1))}
        for i in range(layers)
    }
    made = result(
        {
            "hessian": ends(tops, [-small, -0.6 * small], 0.5 * rise, **changes),
            "ggn": ends(1.4 * tops[:6], [], 4 * rise, **changes),
        },
        checkpoint={"path": f"/somewhere/run.epoch{epoch:04d}.pt", "sha256": f"{epoch:04d}" * 16},
        training={**trained, **(training or {}), "epochs_run": epoch},
        activity=rates,
        loss=0.09 * math.exp(-3.5 * done) + 0.002,
        accuracy=1 - 0.7 * math.exp(-5 * done),
        gradient_norm=0.1 / (1 + epoch),
    )
    return made


def run(epochs: Sequence[int], **changes: Any) -> list[SpectrumResult]:
    return [snapshot(epoch, **changes) for epoch in epochs]
