"""The section of training: loss, accuracy and curvature against the epoch, and how each run was trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hessian_tools.plots.curves import ValueAxis
from ikun_hessian.experiments.grouping import epoch_at, number_or_nan
from ikun_hessian.experiments.runs import TrainingRun
from ikun_hessian.reports.html.chart import COLOURS, SvgChart, chosen_axis, legend, panels
from ikun_hessian.reports.html.elements import Html, html, html_table, number, percent, tag, value_with_error
from ikun_hessian.reports.html.spectrum import operator_title

SETTINGS = ("init", "optimizer", "lr", "batch_size", "weight_decay", "seed")


def training_section(runs: Sequence[TrainingRun]) -> Html:
    """Return curves and a table of the training runs."""
    logged = [run for run in runs if run.log]
    shown = logged[:COLOURS]
    parts: list[Html] = []
    if shown:
        entries = [(run.name, i, "") for i, run in enumerate(shown)]
        tested = any("test_loss" in line for run in shown for line in run.log)
        parts += [legend([*entries, *([("dashed: test set", 0, "dash")] if tested else [])])]
        charts = [
            _curves("Loss", "loss", ("loss", "test_loss"), shown, number),
            _curves("Accuracy", "accuracy", ("accuracy", "test_accuracy"), shown, percent),
        ]
        parts += [panels(*charts, *_curvatures(shown))]
        if len(logged) > len(shown):
            note = f"The figures show the first {len(shown)} of {len(logged)} runs."
            parts += [tag("p", note, class_="note")]
    rows = [_row(run) for run in runs]
    parts += [
        html_table(("run", *(name.replace("_", " ") for name in SETTINGS), "epochs", "train", "test", "problems"), rows)
    ]
    note = "train, test: loss and accuracy of the epoch whose weights were kept, in training mode for the training set."
    return html(*parts, tag("p", note, class_="note"))


def _curves(
    title: str, label: str, keys: tuple[str, str], runs: Sequence[TrainingRun], show: Callable[[float], str]
) -> Html:
    """Return a panel of one quantity of the training and test set against the epoch."""
    values = [number_or_nan(line.get(key)) for run in runs for line in run.log for key in keys]
    y = ValueAxis("linear", 0.0, 1.0) if label == "accuracy" else chosen_axis(values)
    x = chosen_axis([0, *(line["epoch"] for run in runs for line in run.log)], kind="linear")
    chart = SvgChart(title, x, y, "epoch", label)
    for i, run in enumerate(runs):
        epochs = [line["epoch"] for line in run.log]
        for key, style in zip(keys, ("", "dash"), strict=True):
            chart.line(epochs, [number_or_nan(line.get(key)) for line in run.log], i, style)
        for line in run.log:
            first, second = (number_or_nan(line.get(key)) for key in keys)
            says = f"{run.name}, epoch {line['epoch']}\ntrain {show(first)}"
            says += "" if math.isnan(second) else f"\ntest {show(second)}"
            chart.point(line["epoch"], first, i, says, "small")
    return chart.svg()


def _curvatures(runs: Sequence[TrainingRun]) -> list[Html]:
    """Return a panel of lambda_max against the epoch for each operator that was measured at two epochs or more."""
    series: dict[str, list[tuple[int, str, int, float, float, float]]] = {}
    for i, run in enumerate(runs):
        for key, result in run.spectra.items():
            epoch = epoch_at(run, key)
            for op, s in result.spectra.items() if epoch is not None else ():
                top = s.eigenvalues[0]
                entry = (i, run.name, epoch or 0, top.value, top.data_stderr, top.data_stderr_least)
                series.setdefault(op, []).append(entry)
    charts = []
    for op, entries in series.items():
        if len({epoch for _, _, epoch, *_ in entries}) < 2:
            continue
        x = chosen_axis([0, *(entry[2] for entry in entries)], kind="linear")
        y = chosen_axis([entry[3] for entry in entries], [entry[4] for entry in entries])
        chart = SvgChart(f"{operator_title(op)}: λ max during training", x, y, "epoch", "λ max")
        for i in sorted({entry[0] for entry in entries}):
            own = sorted({entry[2:]: entry for entry in entries if entry[0] == i}.values(), key=lambda e: e[2])
            chart.line([e[2] for e in own], [e[3] for e in own], i)
            for _, name, epoch, value, error, least in own:
                if math.isfinite(error):
                    chart.bar(epoch, value - error, value + error, i)
                chart.point(epoch, value, i, f"{name}, epoch {epoch}\nλ max {value_with_error(value, error, least)}")
        charts.append(chart.svg())
    return charts


def _row(run: TrainingRun) -> tuple[str, ...]:
    """Return the row of one run."""
    last: Mapping[str, Any] = {}
    if run.log:
        last = next((line for line in run.log if line["epoch"] == run.best_epoch), run.log[-1])
    cells = [run.training.get(key, "–") for key in SETTINGS]
    settings = [f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells]
    epochs = "–" if run.epochs_run is None else str(run.epochs_run)
    train, test = (
        f"{number(number_or_nan(last.get(f'{part}loss')), 3)}, {percent(number_or_nan(last.get(f'{part}accuracy')))}"
        for part in ("", "test_")
    )
    problems = "; ".join((*run.failures, *(() if run.finished else ("not finished",)))) or "none"
    return (run.name, *settings, epochs, train, test, problems)
