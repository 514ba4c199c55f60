"""Made-up studies with everything that figures can show, and access to the parts of figures and comparisons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import figure_tools
import numpy as np
import run_tools

from hessian_tools.results.operator_spectrum import Spectrum
from hessian_tools.results.spectrum import SamplePoint, SpectrumResult
from ikun_hessian.experiments.comparison.result import Comparison, Row
from ikun_hessian.experiments.figures.chart import Mark, Panel
from ikun_hessian.experiments.runs import TrainingRun
from ikun_hessian.reports.comparison import settings_lines

TEN = ("ikun", "ikun_v1", "ikun_v2", "xavier", "kaiming", "lecun", "normal", "orthogonal", "lsuv", "fluctuation")
MOMENTS = ("", "loss0.02", "epoch0004", "epoch0008")


def full_run(init: str, seed: int, place: int = 0, **changes: Any) -> TrainingRun:
    """A run with 10 largest and 5 smallest eigenvalues; for the final weights also blocks and a curve over samples."""
    rng = np.random.default_rng([seed, place])
    kinds = {"moments": MOMENTS, "tags": ("one-image",), "speed": 1.2 + 0.25 * place, **changes}
    run = run_tools.make_run(init, seed, curvature=math.exp(0.4 * math.sin(3 * place)), **kinds)
    start = {
        **(run.start or {}),
        "layers": [_grown(layer, i, place) for i, layer in enumerate((run.start or {})["layers"])],
    }
    spectra = {key: _longer(result, not key, rng) for key, result in run.spectra.items()}
    return dataclasses.replace(run, start=start, spectra=spectra)


def _grown(layer: dict[str, Any], depth: int, place: int) -> dict[str, Any]:
    forward, backward = (0.5 + 0.2 * place) ** depth, (1.5 - 0.1 * place) ** -depth
    grown = {"current_variance": layer["current_variance"] * forward, "weight_variance": 0.02 * (1 + place)}
    return {**layer, **grown, "gradient_square": layer["gradient_square"] * backward}


def _longer(result: SpectrumResult, final: bool, rng: np.random.Generator) -> SpectrumResult:
    top = result.main[1].eigenvalues[0].value

    def falling(size: float, lows: int) -> Spectrum:
        tops = sorted((size * (i + 1) ** -0.8 * math.exp(0.05 * rng.normal()) for i in range(10)), reverse=True)
        return figure_tools.ends(tops, [-0.6 * size * (i + 1) ** -0.5 for i in range(lows)], 3 * size)

    spectra = {
        name: dataclasses.replace(
            falling(s.eigenvalues[0].value, 5 if name == "hessian" else 0),
            scale_free_lambda_max=s.scale_free_lambda_max,
            density=figure_tools.spectrum(top / 8).density,
        )
        for name, s in result.spectra.items()
    }
    if not final:
        return dataclasses.replace(result, spectra=spectra)
    blocks = {name: falling(top * 0.5**i, 5 if i < 2 else 1) for i, name in enumerate(run_tools.LAYERS)}
    curve = tuple(
        SamplePoint(
            n,
            n * 4 <= 1437,
            tuple((top * (1 + 20 / n) * math.exp(rng.normal() / math.sqrt(n)),) for _ in range(4)),
            tuple(5 * top * math.exp(rng.normal() / math.sqrt(n)) for _ in range(4)),
        )
        for n in (1, 4, 16, 64, 256, 1024)
    )
    return dataclasses.replace(result, spectra=spectra, blocks=blocks, samples_curve=curve)


def full_study(
    inits: Sequence[str] = ("ikun", "kaiming", "xavier"), seeds: int = 6, **changes: Any
) -> list[TrainingRun]:
    """A run for every initializer and seed; that of the last initializer with seed 3 diverges."""
    return [
        full_run(init, seed, place, diverged=(init, seed) == (inits[-1], 3), **changes)
        for place, init in enumerate(inits)
        for seed in range(seeds)
    ]


def gain_study(seeds: int = 3) -> list[TrainingRun]:
    """Runs of two surrogates and gains from 1/16 to 16, slower the farther from 1, and of kaiming."""
    runs = []
    for surrogate in ("atan:2", "triangle:1"):
        part: dict[str, Any] = {"network": {"surrogate": surrogate}}
        for power in range(-4, 5):
            runs += [
                run_tools.make_run("ikun", s, speed=1.5 * (1 + 0.3 * power**2), training={"gain": 2.0**power}, **part)
                for s in range(seeds)
            ]
        runs += [run_tools.make_run("kaiming", s, **part) for s in range(seeds)]
    return [dataclasses.replace(run, name=f"{run.name}-{i}") for i, run in enumerate(runs)]


def panel(panels: Sequence[Panel], row: str, column: str = "") -> Panel:
    (found,) = [p for p in panels if (p.row, p.column) == (row, column)]
    return found


def marks(found: Panel, kind: str, level: str = "kaiming") -> list[Mark]:
    return [m for m in found.marks if (m.kind, m.level) == (kind, level)]


def row(c: Comparison, measure: str, level: str, moment: str = "") -> Row:
    (one,) = [r for r in c.rows if (r.measure, r.level, r.moment) == (measure, level, moment)]
    return one


def text(c: Comparison) -> str:
    """The screen of a comparison in one line."""
    return " ".join(" ".join(settings_lines({"": c})).split())


def changed(run: TrainingRun, **parts: dict[str, Any]) -> TrainingRun:
    """The run with parts of all of its spectra changed."""
    spectra: dict[str, SpectrumResult] = {}
    for key, r in run.spectra.items():
        spectra[key] = dataclasses.replace(r, **{name: {**getattr(r, name), **new} for name, new in parts.items()})
    return dataclasses.replace(run, spectra=spectra)
