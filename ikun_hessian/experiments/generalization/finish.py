"""Write the tables and the figure of the study of generalization, and return what the screen shows at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hessian_tools.io.files import write_atomically, write_table
from hessian_tools.io.json import MissingError, ResultError
from hessian_tools.io.text import markdown as escaped
from ikun_hessian.experiments.generalization import report
from ikun_hessian.experiments.generalization.result import NetworkResult, load_network
from ikun_hessian.experiments.generalization.summary import summarize


def network_results(paths: Sequence[Path], warn: Callable[[str], None]) -> list[NetworkResult]:
    """Read the results that exist. Files that cannot be used are skipped, with a warning."""
    found = []
    for path in paths:
        try:
            found.append(load_network(path))
        except MissingError:
            continue
        except ResultError as error:
            warn(f"! {error} (skipped)")
    return found


def finish(paths: Sequence[Path], title: str, threshold: float, folder: Path, warn: Callable[[str], None]) -> list[str]:
    """Write FOLDER/tables.md, measures.csv, networks.csv and figures/generalization.{png,pdf}.

    Args:
        paths: The results of all networks of the study; those that are missing are left out.
        title: Title of the study.
        threshold: The training loss at which networks are matched.
        folder: Folder of the study.
        warn: Called with a line about every file that cannot be used.

    Returns:
        At most 12 lines of at most 80 columns, the primary result first.
    """
    from hessian_tools.plots.style import save_figure
    from ikun_hessian.experiments.generalization.figure import figure_of

    results = network_results(paths, warn)
    if not results:
        return ["! no tables or figures: no network has a usable result"]
    summary = summarize(results, len(paths), threshold)
    text = report.summary_page(summary, escaped(title))
    write_atomically(folder / "tables.md", lambda file: file.write(text.encode()))
    write_table(list(report.measure_rows(summary)), folder / "measures.csv")
    write_table(list(report.network_rows(results)), folder / "networks.csv")
    save_figure(figure_of(summary), folder / "figures" / "generalization")
    return [*report.screen(summary), f"files       {folder}/{{tables.md,measures.csv,networks.csv,figures}}"]
