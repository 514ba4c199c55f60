"""The command `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from ikun_hessian.options import json_option
from ikun_hessian.screen import dumps


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Folder for the figure [here]."
)
@click.option("--tag", help="Part of the figure's name.")
@json_option
def compare(paths: tuple[Path, ...], out: Path, tag: str | None, as_json: bool) -> None:
    """Several saved spectra side by side: a table and the eigenvalue-against-rank figure.

    PATH is NAME.spectrum.json, a checkpoint that has one beside it, or a folder of them. Refuses to compare what was
    not measured alike, and says which condition differs.
    """
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
    stem = out / ".".join(["compare", *([tag] if tag else []), "eigenvalues"])
    written = save_figure(rank_figure(results), stem)
    if as_json:
        click.echo(dumps({label: to_json(r) for label, r in results}))
        return
    click.echo("\n".join(compare_lines(results)))
    click.echo(f"files       {stem}.{{{','.join(f.suffix[1:] for f in written)}}}")
