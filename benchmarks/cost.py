"""What one product costs against width, samples, T and probes: python benchmarks/cost.py [Fashion-MNIST folder].

Around the reference job (CSNN of width 16 with batch norm, T = 4, 64 images of 28 x 28, two threads) one number varies
at a time. Writes docs/cost.csv, then docs/cost.png and .pdf from it; with --draw only the figure, from the table that
is there. Upper row: in eager gradients of the plain torch network (2-jet) in the same round; lower row: milliseconds.
Medians over the rounds, bars from least to largest. `Function`: the gradient of the same network as spiking libraries
write it (rounds.Conventional). The whole set of samples is one batch cut for two threads, as the operators do it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rounds import ROOT, Candidates, Conventional, eager_gradient, images, measure, ratios, reference_job, report
from torch import Tensor

from hessian_tools.io.files import write_table
from hessian_tools.objective import Objective
from hessian_tools.operators.curvature import CurvatureOperator, ggn, hessian

UNIT = "eager gradient"
SWEEPS: dict[str, tuple[int, ...]] = {
    "channels": (4, 8, 16, 32, 64),
    "samples": (16, 32, 64, 128, 256, 512),
    "timesteps": (1, 2, 4, 8, 16, 32),
    "probes": (1, 2, 4, 8, 16),
}
LABELS = {
    "channels": "parameters",
    "samples": "samples",
    "timesteps": "time steps T",
    "probes": "probes in a block",
}
NAMES = {
    "eager gradient": "eager gradient (unit)",
    "eager gradient (Function)": "eager gradient, surrogate as a Function",
    "recomputed": "Hessian product, primal recomputed",
    "kept": "Hessian product, primal kept",
    "ggn": "GGN product, primal kept",
}
BATCH = 64


def objectives(batch: tuple[Tensor, Tensor], sweep: str) -> Iterator[tuple[int, Objective, int]]:
    """(number shown on the axis, objective, probes) along a sweep."""
    x, y = batch
    for value in SWEEPS[sweep]:
        changes: dict[str, Any] = {sweep: value} if sweep in ("channels", "timesteps") else {}
        count = value if sweep == "samples" else 64
        size = min(BATCH, max(1, count // 2))  # at least a batch for each thread
        objective = reference_job((x[:count], y[:count]), batch_size=size, **changes)
        yield objective.size if sweep == "channels" else value, objective, value if sweep == "probes" else 1


def candidates(objective: Objective, probes: int) -> Candidates:
    block = torch.randn(objective.size, probes, generator=torch.Generator().manual_seed(0))
    operators: dict[str, CurvatureOperator] = {
        "recomputed": hessian(objective, 0),
        "kept": hessian(objective, 2**34),
        "ggn": ggn(objective, 2**34),
    }

    def product(operator: CurvatureOperator) -> Callable[[], object]:
        return lambda: operator @ block

    whole = objective.rebatched(min(objective.samples, BATCH))  # plain torch spreads every operation over the threads
    gradients = {
        UNIT: eager_gradient(whole),
        "eager gradient (Function)": eager_gradient(whole, Conventional(objective.model)),
    }
    return {**gradients, **{name: product(operator) for name, operator in operators.items()}}


def rows(batch: tuple[Tensor, Tensor], rounds: int) -> Iterator[dict[str, Any]]:
    for sweep in SWEEPS:
        for value, objective, probes in objectives(batch, sweep):
            print(f"{LABELS[sweep]} {value}", flush=True)
            runs = candidates(objective, probes)
            per = {name: probes if "gradient" not in name else 1 for name in runs}
            times = measure(runs, rounds)
            report(times, UNIT, {name: float(n) for name, n in per.items()})
            for name, seconds in times.items():
                each = [1e3 * s / per[name] for s in seconds]
                shares = ratios(times, name, UNIT, per[name])
                yield {
                    "sweep": sweep,
                    "value": value,
                    "candidate": name,
                    "rounds": rounds,
                    **summary("ms", each),
                    **summary("gradients", shares),
                }


def summary(name: str, values: list[float]) -> dict[str, str]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {f"{name}_{key}": f"{value:.4g}" for key, value in found.items()}


def draw(table: Path, out: Path) -> list[Path]:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    from hessian_tools.plots.style import (
        WIDTH,
        add_caption,
        add_legend,
        layout,
        looks,
        save_figure,
        set_title,
        settled,
        styled,
    )

    with table.open(newline="") as file:
        found = list(csv.DictReader(file))
    with styled():
        figure = Figure(figsize=(WIDTH, 4.0), layout=layout())
        panels = figure.subplots(2, len(SWEEPS), sharex="col", sharey="row")
        marks = dict(zip(NAMES, zip(looks(len(NAMES)), "oDs^v", strict=True), strict=True))
        for j, (sweep, letter) in enumerate(zip(SWEEPS, "abcd", strict=True)):
            for i, unit in enumerate(("gradients", "ms")):
                ax = panels[i][j]
                for name, ((colour, dashes), mark) in marks.items():
                    points = [r for r in found if r["sweep"] == sweep and r["candidate"] == name]
                    x = [int(r["value"]) for r in points]
                    y, low, high = ([float(r[f"{unit}_{k}"]) for r in points] for k in ("median", "min", "max"))
                    bars = [[m - a for m, a in zip(y, low, strict=True)], [b - m for m, b in zip(y, high, strict=True)]]
                    ax.errorbar(x, y, bars, color=colour, linestyle=dashes, marker=mark, capsize=1.5, elinewidth=0.7)
                ax.set_xscale("log")
                ax.set_yscale("log")
                ax.grid(True, which="major", color="0.92", linewidth=0.5)
                ax.set_axisbelow(True)
            values = sorted({int(r["value"]) for r in found if r["sweep"] == sweep})
            shown = values[::2] if sweep in ("channels", "samples", "timesteps") else values
            lower = panels[1][j]
            lower.xaxis.set_major_locator(FixedLocator(shown))
            lower.xaxis.set_minor_locator(NullLocator())
            lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            lower.set_xlabel(LABELS[sweep])
            set_title(panels[0][j], letter, LABELS[sweep])
        upper = panels[0][0]
        upper.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1.0, 2.0]))
        upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        upper.yaxis.set_minor_formatter(NullFormatter())
        upper.set_ylabel("cost / eager gradient")
        panels[1][0].set_ylabel("milliseconds")
        panels[1][0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        handles = [
            Line2D([], [], color=colour, linestyle=dashes, marker=mark, label=NAMES[name])
            for name, ((colour, dashes), mark) in marks.items()
        ]
        add_legend(figure, handles)
        rounds = max(int(r["rounds"]) for r in found)
        text = (
            "CSNN of width 16 with batch norm, T = 4, 64 images of 28 x 28, one probe, two CPU threads, float32; one "
            f"number varies at a time. Medians of {rounds} rounds, bars: least to largest. Costs of a product are for "
            "one vector; the unit is one gradient of the plain torch network in the same round."
        )
        add_caption(figure, text)
        return save_figure(settled(figure), out)


def short(value: float) -> str:
    """64, 57k, 3.2M."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= size and not (suffix == "k" and value < 1e4):
            scaled = value / size
            return f"{scaled:.1f}{suffix}" if scaled < 10 else f"{scaled:.0f}{suffix}"
    return f"{value:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files; without it, padded digits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "cost")
    parser.add_argument("--draw", action="store_true", help="the figure alone, from OUT.csv")
    options = parser.parse_args()
    table = options.out.with_suffix(".csv")
    if not options.draw:
        torch.set_num_threads(2)
        largest = max(SWEEPS["samples"])
        found = list(rows(images(options.folder, largest), options.rounds))
        write_table(found, table)
        print(table)
    for path in draw(table, options.out):
        print(path)


if __name__ == "__main__":
    main()
