"""The command `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ikun_hessian.cli.click_options import options
from ikun_hessian.cli.screen import dumps, echo
from ikun_hessian.experiments.selection import parse_condition, parse_conditions, study_defaults
from ikun_hessian.jobs.options import JSON

if TYPE_CHECKING:
    from hessian_tools.results.spectrum import SpectrumResult
    from ikun_hessian.experiments.comparison.result import Comparison


SHOWN = 3  # reasons printed if nothing can be compared


@click.command("compare")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--by", help="Condition to compare: an option of train [default: that of the study in PATH, or init].")
@click.option("--reference", help="Level that the others are compared with [default: kaiming, or the first level].")
@click.option(
    "--accuracy",
    type=float,
    help="Target test accuracy, to which epochs are counted [default: the study's, or 0.9].",
)
@click.option("--margin", type=float, help="Ratios from 1 / margin to margin count as equivalent [default: 1.25].")
@click.option(
    "--moment",
    "moments",
    multiple=True,
    metavar="KEY",
    help="Moments to compare: end, loss0.02, epoch0005, ... Repeatable [default: the end and every matched loss].",
)
@click.option("--where", multiple=True, metavar="KEY=VALUE", help="Compare only runs with this condition. Repeatable.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder for the tables and the figure [default: the current folder].",
)
@click.option("--tag", help="Part of the names of the tables and the figure.")
@options(JSON)
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
    """Compare training runs of several seeds, or single spectra.

    PATH is a folder of runs (a study), a checkpoint, or a result of a checkpoint. With several seeds, the levels of a
    condition (for example initializers) are compared with a reference, paired by seed: with confidence intervals over
    seeds, exact p-values and equivalence tests. If something else was varied too, each of its settings is compared
    separately. The tables are written to compare.csv and compare.md. With one seed per level, the command prints a
    table of the spectra and plots eigenvalue against rank. Results that were measured in different ways are not
    compared; the message names the condition that differs. In --json, null means unknown, and "inf" or "-inf" means
    worse than any number (for example: never reached).
    """
    from hessian_tools.io.json import ResultError
    from ikun_hessian.experiments.comparison.comparison import ACCURACY, MARGIN, compare_settings
    from ikun_hessian.experiments.comparison.pairing import chosen_runs, several_seeds
    from ikun_hessian.experiments.runs import gather

    if tag and Path(tag).name != tag:
        raise click.UsageError(f"--tag {tag}: must be a part of a file name; use --out for a folder")
    stem = out / ".".join(["compare", *([tag] if tag else [])])
    runs = gather(paths, report=lambda text: echo(f"! {text}", err=True))
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
        more = f"; and {len(refused) - SHOWN} more settings" if len(refused) > SHOWN else ""
        raise ResultError("; ".join(refused[:SHOWN]) + more)
    _write(found, stem)
    if as_json:
        from ikun_hessian.reports.comparison_files import settings_json

        echo(dumps(settings_json(found)))
        return
    from ikun_hessian.reports.comparison import settings_lines

    echo("\n".join(settings_lines(found)))
    echo(f"files       {stem}.{{csv,md}}")


def _write(found: Mapping[str, Comparison | str], stem: Path) -> None:
    from hessian_tools.io.files import write_atomically, write_table
    from ikun_hessian.reports.comparison_files import settings_markdown, settings_rows

    write_table(settings_rows(found), Path(f"{stem}.csv"))
    text = settings_markdown(found)
    write_atomically(Path(f"{stem}.md"), lambda file: file.write(text.encode()))


def _spectrum_files(paths: Sequence[Path]) -> list[Path]:
    """Return the spectra in the given folders, the given spectra, and those of the given checkpoints."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(path.glob("*.spectrum.json"))
        else:
            files.append(path.with_suffix(".spectrum.json") if path.suffix == ".pt" else path)
    return files


def _spectra(files: Sequence[Path], stem: Path, as_json: bool) -> None:
    """Print a table of the spectra and plot them. This is the comparison if each level has one seed."""
    from hessian_tools.plots.spectrum import rank_figure
    from hessian_tools.plots.style import save_figure
    from hessian_tools.results.comparability import comparable, labelled
    from hessian_tools.results.spectrum import to_json
    from ikun_hessian.reports.spectrum import compare_lines

    results = labelled([result for file in files if (result := _fresh(file)) is not None])
    comparable(results)
    written = save_figure(rank_figure(results), f"{stem}.eigenvalues")
    if as_json:
        echo(dumps({label: to_json(r) for label, r in results}))
        return
    echo("\n".join(compare_lines(results)))
    echo(f"files       {stem}.eigenvalues.{{{','.join(f.suffix[1:] for f in written)}}}")


def _fresh(file: Path) -> SpectrumResult | None:
    """Load a spectrum, or return None if its checkpoint has other weights now, which was reported before."""
    from hessian_tools.results.spectrum import load_spectrum
    from ikun_hessian.experiments.staleness import StaleError, refuse_stale

    result = load_spectrum(file)
    try:
        refuse_stale(file, result.checkpoint)
    except StaleError:
        return None
    return result
