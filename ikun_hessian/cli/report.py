"""The command `report`."""

from __future__ import annotations

from pathlib import Path

import click

from ikun_hessian.cli.screen import echo


@click.command("report")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="File to write.",
)
@click.option(
    "--by", help="Condition to compare, if there are several seeds [default: that of the study in PATH, or init]."
)
@click.option("--title", default="Flatness report", show_default=True, help="Title of the page.")
def report_command(paths: tuple[Path, ...], out: Path, by: str | None, title: str) -> None:
    """Write one HTML page from saved results.

    PATH is a folder of results, a checkpoint, or a result (spectrum, flatness, landscape, training record). The page
    shows a summary, figures, every number with its meaning and error, warnings, and where the results come from. It is
    a single file and needs no network access. Results whose checkpoint has other weights now are not shown.
    """
    from hessian_tools.io.files import write_atomically
    from ikun_hessian.experiments.comparison.comparison import ACCURACY
    from ikun_hessian.experiments.comparison.pairing import require_condition
    from ikun_hessian.experiments.selection import parse_condition, study_defaults
    from ikun_hessian.reports.html.page import drawable, report_page
    from ikun_hessian.reports.html.sources import collect

    found = drawable(collect(paths))
    usual = study_defaults(paths)
    if by is not None:
        by = parse_condition(by)
        require_condition(found.runs, by, f"--by {by}")
    by = by or usual[0] or "init"
    text = report_page(found, by, ACCURACY if usual[1] is None else usual[1], title)
    write_atomically(out, lambda file: file.write(text.encode()))
    for line in found.left_out:
        echo(f"! {line}", err=True)
    echo(f"files       {out}")
