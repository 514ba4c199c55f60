"""The command `figures`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ikun_hessian.cli.screen import echo
from ikun_hessian.experiments.selection import parse_condition, parse_conditions, study_defaults

if TYPE_CHECKING:
    from hessian_tools.results.calibration import CalibrationResult


CALIBRATION = ".calibration.json"


@click.command("figures")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, metavar="NAME", help="Draw only this figure. Repeatable [default: all].")
@click.option(
    "--by", help="Condition to compare, of training, network or data [default: that of the study in PATH, or init]."
)
@click.option("--where", multiple=True, metavar="KEY=VALUE", help="Draw only runs with this condition. Repeatable.")
@click.option(
    "--accuracy",
    type=float,
    help="Target test accuracy, to which epochs are counted [default: that of the study in PATH, or 0.9].",
)
@click.option(
    "--width",
    type=click.Choice(["1", "2"]),
    default="2",
    show_default=True,
    help="Width of the figures in columns; calibration always takes two.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("figures"),
    show_default=True,
    help="Folder for the figures.",
)
def figures_command(
    paths: tuple[Path, ...],
    only: tuple[str, ...],
    by: str | None,
    where: tuple[str, ...],
    accuracy: float | None,
    width: str,
    out: Path,
) -> None:
    """Draw publication figures of training runs, each as PNG and PDF, with a CSV of the data shown.

    PATH is a folder of runs (a study), a checkpoint, or a result of a checkpoint. The figures are: start (variances and
    firing rates at initialization), gain (epochs to reach an accuracy against the gain of the initial weights), depth
    (accuracy against the number of layers), epochs, ranks (eigenvalues), one-image (spectra of one image and of many
    samples), gap (generalization gap against sharpness), robustness (loss of accuracy against sharpness), training
    (curvature during training), layers, samples, calibration. Figures that the runs cannot fill are skipped, with the
    reason; with --only that is an error.
    """
    from ikun_hessian.experiments.comparison.comparison import ACCURACY
    from ikun_hessian.experiments.comparison.pairing import chosen_runs
    from ikun_hessian.experiments.figures.figures import draw_all
    from ikun_hessian.experiments.runs import gather

    def report(text: str) -> None:
        echo(f"! {text}", err=True)

    results = [path for path in paths if not path.name.endswith(CALIBRATION)]
    runs = chosen_runs(gather(results, report=report), parse_conditions(where)) if results else []
    usual = study_defaults(paths)
    by = parse_condition(by) if by is not None else usual[0] or "init"
    accuracy = accuracy if accuracy is not None else usual[1] or ACCURACY
    calibrations = _calibrations(paths) if "calibration" in (only or ("calibration",)) else {}
    drawn = draw_all(runs, out, only, by=by, accuracy=accuracy, width=int(width), calibrations=calibrations)
    for path in drawn.written:
        echo(path)
    if only and drawn.skipped:
        raise click.UsageError("; ".join(f"--only {name}: {why}" for name, why in drawn.skipped.items()))
    for name, why in drawn.skipped.items():
        echo(f"! skipped figure {name}: {why}", err=True)


def _calibrations(paths: Sequence[Path]) -> dict[str, CalibrationResult]:
    """Return the calibrations in the given folders, the given ones, and those of the given checkpoints, by name."""
    from hessian_tools.io.json import load_result
    from hessian_tools.results.calibration import CALIBRATION_SCHEMA, CalibrationResult
    from ikun_hessian.experiments.staleness import StaleError, refuse_stale

    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(path.rglob(f"*{CALIBRATION}"))
        elif path.name.endswith(CALIBRATION):
            found.append(path)
        elif path.suffix == ".pt" and path.with_suffix(CALIBRATION).is_file():
            found.append(path.with_suffix(CALIBRATION))
    results = {file: load_result(file, CalibrationResult, CALIBRATION_SCHEMA) for file in dict.fromkeys(found)}
    for file, result in list(results.items()):
        try:
            refuse_stale(file, result.checkpoint)
        except StaleError as error:
            if file in paths:
                raise
            echo(f"! {error} (skipped)", err=True)
            del results[file]
    return {str(file).removesuffix(CALIBRATION): result for file, result in results.items()}
