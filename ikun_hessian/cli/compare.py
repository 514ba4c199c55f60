"""The command `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ikun_hessian.cli.options import json_option
from ikun_hessian.cli.screen import dumps
from ikun_hessian.experiments.selection import parse_condition, parse_conditions, study_defaults

if TYPE_CHECKING:
    from ikun_hessian.experiments.comparison import Comparison


SHOWN = 3  # reasons of settings, where nothing can be compared


@click.command("compare")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--by", help="Condition compared: an option of train [default: that of the study in PATH, else init].")
@click.option("--reference", help="Level that the others are compared with [default: kaiming, else the first].")
@click.option(
    "--accuracy", type=float, help="Test accuracy for the epochs to get there [default: the study's, else 0.9]."
)
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
def compare_command(
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
    condition (initializers) against a reference, paired by seed, with intervals over seeds, exact p-values and
    equivalence; apart in every setting of what else was varied. Leaves compare.csv and compare.md. One seed a level: a
    table of the spectra and the eigenvalue-against-rank figure. Refuses to compare what was not measured alike, and
    says which condition differs. In --json null is not known, "inf" and "-inf" worse than any number (never).
    """
    from hessian_tools.io.json import ResultError
    from ikun_hessian.experiments.comparison import ACCURACY, MARGIN, compare_settings
    from ikun_hessian.experiments.pairing import chosen_runs, several_seeds
    from ikun_hessian.experiments.runs import gather

    if tag and Path(tag).name != tag:
        raise click.UsageError(f"--tag {tag}: give a part of a file's name, without a folder (--out)")
    stem = out / ".".join(["compare", *([tag] if tag else [])])
    runs = gather(paths, report=lambda text: click.echo(f"! {text}", err=True))
    runs = chosen_runs(runs, parse_conditions(where))
    asked = any(option is not None for option in (by, reference, accuracy, margin)) or moments or where
    usual = study_defaults(paths)
    by = parse_condition(by) if by is not None else usual[0] or "init"
    accuracy = accuracy if accuracy is not None else usual[1] or ACCURACY
    if not asked and not several_seeds(runs, by) and (files := _spectrum_files(paths)):
        _spectra(files, stem, as_json)
        return
    margin = MARGIN if margin is None else margin
    found = compare_settings(runs, by, reference=reference, accuracy=accuracy, margin=margin, moments=moments)
    refused = [f"{name}: {why}" if name else why for name, why in found.items() if isinstance(why, str)]
    if len(refused) == len(found):
        more = f"; and {len(refused) - SHOWN} settings more" if len(refused) > SHOWN else ""
        raise ResultError("; ".join(refused[:SHOWN]) + more)
    _write(found, stem)
    if as_json:
        from ikun_hessian.reports.comparison import settings_json

        click.echo(dumps(settings_json(found)))
        return
    from ikun_hessian.reports.comparison import settings_lines

    click.echo("\n".join(settings_lines(found)))
    click.echo(f"files       {stem}.{{csv,md}}")


def _write(found: Mapping[str, Comparison | str], stem: Path) -> None:
    from hessian_tools.io.files import write_atomically, write_table
    from ikun_hessian.reports.comparison import settings_markdown, settings_rows

    write_table(settings_rows(found), Path(f"{stem}.csv"))
    text = settings_markdown(found)
    write_atomically(Path(f"{stem}.md"), lambda file: file.write(text.encode()))


def _spectrum_files(paths: Sequence[Path]) -> list[Path]:
    """The spectra in the folders themselves, and those named or beside the named checkpoints."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(path.glob("*.spectrum.json"))
        else:
            files.append(path.with_suffix(".spectrum.json") if path.suffix == ".pt" else path)
    return files


def _spectra(files: Sequence[Path], stem: Path, as_json: bool) -> None:
    """One seed a level: the spectra themselves, a table and a figure."""
    from hessian_tools.plots.spectrum import rank_figure
    from hessian_tools.plots.style import save_figure
    from hessian_tools.results.comparability import comparable, labelled
    from hessian_tools.results.spectrum import load_spectrum, to_json
    from ikun_hessian.reports.spectrum import compare_lines

    results = labelled([load_spectrum(f) for f in files])
    comparable(results)
    written = save_figure(rank_figure(results), f"{stem}.eigenvalues")
    if as_json:
        click.echo(dumps({label: to_json(r) for label, r in results}))
        return
    click.echo("\n".join(compare_lines(results)))
    click.echo(f"files       {stem}.eigenvalues.{{{','.join(f.suffix[1:] for f in written)}}}")
