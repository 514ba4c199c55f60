"""The command `compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ikun_hessian.options import json_option
from ikun_hessian.screen import dumps

if TYPE_CHECKING:
    from hessian_tools.comparison import Comparison


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--by", help="Condition compared, of training, network or data [default: init].")
@click.option("--reference", help="Level that the others are compared with [default: kaiming, else the first].")
@click.option("--accuracy", type=float, help="Test accuracy for the epochs to get there [default: 0.9].")
@click.option("--margin", type=float, help="Ratios from 1 / margin to margin count as alike [default: 1.25].")
@click.option(
    "--moment",
    "moments",
    multiple=True,
    metavar="KEY",
    help="end, loss0.02, epoch0005, ...; repeatable [default: the end and every matched loss].",
)
@click.option("--where", multiple=True, metavar="KEY=VALUE", help="Only runs of this condition; repeatable.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Folder for tables, figure [here]."
)
@click.option("--tag", help="Part of the names of table and figure.")
@json_option
def compare(
    paths: tuple[Path, ...],
    by: str | None,
    reference: str | None,
    accuracy: float | None,
    margin: float | None,
    moments: tuple[str, ...],
    where: tuple[str, ...],
    out: Path,
    tag: str | None,
    as_json: bool,
) -> None:
    """Training runs of several seeds, or single spectra, side by side.

    PATH is a folder of runs (a study), a checkpoint, or a result beside one. Runs of several seeds: the levels of a
    condition (initializers) against a reference, paired by seed and all else, with intervals over seeds, exact p-values
    and equivalence. Leaves compare.csv and compare.md. One seed a level: a table of the spectra and the
    eigenvalue-against-rank figure. Refuses to compare what was not measured alike, and says which condition differs.
    """
    from hessian_tools.comparison import ACCURACY, MARGIN, compare_runs
    from hessian_tools.comparison_pairs import chosen_runs, several_seeds
    from hessian_tools.runs import gather

    stem = out / ".".join(["compare", *([tag] if tag else [])])
    runs = gather(paths, report=lambda text: click.echo(f"! {text}", err=True))
    runs = chosen_runs(runs, where)
    asked = any(option is not None for option in (by, reference, accuracy, margin)) or moments or where
    if not asked and not several_seeds(runs, "init"):
        _spectra(paths, stem, as_json)
        return
    found = compare_runs(
        runs,
        by or "init",
        reference=reference,
        accuracy=ACCURACY if accuracy is None else accuracy,
        margin=MARGIN if margin is None else margin,
        moments=moments,
    )
    _write(found, stem)
    if as_json:
        click.echo(dumps(dataclasses.asdict(found)))
        return
    from hessian_tools.comparison_report import comparison_lines

    click.echo("\n".join(comparison_lines(found)))
    click.echo(f"files       {stem}.{{csv,md}}")


def _write(found: Comparison, stem: Path) -> None:
    from hessian_tools.comparison_report import comparison_rows, legend, markdown_lines
    from hessian_tools.results import write_atomically, write_table

    write_table(comparison_rows(found), Path(f"{stem}.csv"))
    text = "\n".join([*markdown_lines(found), legend(found), ""])
    write_atomically(Path(f"{stem}.md"), lambda file: file.write(text.encode()))


def _spectra(paths: Sequence[Path], stem: Path, as_json: bool) -> None:
    """One seed a level: the spectra themselves, a table and a figure."""
    from hessian_tools.compare import comparable, labelled
    from hessian_tools.figures import rank_figure, save_figure
    from hessian_tools.report import compare_lines
    from hessian_tools.results import ResultError, load_spectrum, to_json

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.spectrum.json"))
            if not inside:
                raise ResultError(f"{path}: no *.spectrum.json in this folder: run `ikun-hessian spectrum` first")
            files += inside
        else:
            files.append(path.with_suffix(".spectrum.json") if path.suffix == ".pt" else path)
    results = labelled([load_spectrum(f) for f in files])
    comparable(results)
    written = save_figure(rank_figure(results), f"{stem}.eigenvalues")
    if as_json:
        click.echo(dumps({label: to_json(r) for label, r in results}))
        return
    click.echo("\n".join(compare_lines(results)))
    click.echo(f"files       {stem}.eigenvalues.{{{','.join(f.suffix[1:] for f in written)}}}")
