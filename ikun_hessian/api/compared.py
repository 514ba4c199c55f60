"""Compare results of `analyze`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessian_tools.analysis.ranking import told_apart
from hessian_tools.io.json import ResultError
from hessian_tools.results.comparability import common_operators, comparable
from hessian_tools.results.spectrum import SpectrumResult
from hessian_tools.results.text import with_error
from ikun_hessian.api.files import load
from ikun_hessian.api.report import Report, latex
from ikun_hessian.api.spectrum import Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Given = Analysis | str | Path


def compare(results: Mapping[str, Given] | Iterable[Given]) -> Compared:
    """Compare spectra of several networks that were measured on the same samples in the same way.

    Args:
        results: Results of `analyze`, or paths of their files: a dict with a label for each, or a list.

    Returns:
        The comparison.

    Raises:
        ResultError: If there are fewer than two results, or if they were measured under different conditions. The
            message names the condition.
    """
    named = results if isinstance(results, Mapping) else dict(enumerate(results, 1))
    found: list[tuple[str, SpectrumResult]] = []
    for label, given in named.items():
        report = load(given) if isinstance(given, str | Path) else given
        if not isinstance(report, Analysis):
            raise ResultError(f"{label}: only results of analyze can be compared, not a {type(report).__name__}")
        found.append((label if isinstance(label, str) else report.name or "result", report.result))
    labels = [label for label, _ in found]
    if len(set(labels)) < len(labels):
        found = [(f"{i} {label}", result) for i, (label, result) in enumerate(found, 1)]
    comparable(found)
    return Compared(tuple(found))


@dataclass(frozen=True, eq=False, repr=False)
class Compared(Report):
    """A comparison of spectra (see `compare`).

    Attributes:
        results: Pairs (label, result).
    """

    results: tuple[tuple[str, SpectrumResult], ...]

    @property
    def operators(self) -> list[str]:
        """The operators that all results have."""
        return common_operators(list(self.results))

    def __repr__(self) -> str:
        lines = [f"Compared on {self.results[0][1].data['samples']:,} samples: {len(self.results)} results"]
        width = max(len(label) for label, _ in self.results)
        for operator in self.operators:
            lines += [f"  {operator}"]
            lines += [
                f"    {label:<{width}}  lambda_max {top} (scale-free {r.spectra[operator].scale_free_lambda_max:.3g}), "
                f"trace {trace}"
                for (label, top, trace), (_, r) in zip(self._of(operator), self.results, strict=True)
            ]
        found = told_apart(self.results)
        lines += [f"  told apart by {text}" for text in found.told]
        lines += [f"  not told apart by {', '.join(found.close)}"] if found.close else []
        lines += [f"  error known only from below: {', '.join(found.unknown)}"] if found.unknown else []
        lines += ["  errors are over the samples, not over training seeds"]
        return "\n".join(lines)

    def _of(self, operator: str) -> list[tuple[str, str, str]]:
        """Return label, lambda_max and trace of every result."""
        rows = []
        for label, r in self.results:
            s = r.spectra[operator]
            trace = with_error(s.trace.estimate, s.trace) if s.trace else "-"
            rows.append((label, with_error(s.eigenvalues[0].value, s.eigenvalues[0]), trace))
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each result and operator."""
        return [
            {
                "label": label, "operator": name, "loss": r.loss, "accuracy": r.accuracy, "lambda_max": top.value,
                "lambda_max_stderr": top.data_stderr, "trace": t.estimate if t else None,
                "trace_stderr": t.data_stderr if t else None,
            }
            for name in self.operators
            for label, r in self.results
            for top, t in [(r.spectra[name].eigenvalues[0], r.spectra[name].trace)]
        ]  # fmt: skip

    def plot(self) -> Figure:
        """Return the figure of |eigenvalue| against rank, one panel for each operator."""
        from hessian_tools.plots.spectrum import rank_figure

        return rank_figure(list(self.results))

    def save(self, stem: str | Path) -> list[Path]:
        """Write STEM.csv, STEM.png and STEM.pdf, and return their paths."""
        from hessian_tools.io.files import write_table
        from hessian_tools.plots.style import save_figure

        Path(stem).parent.mkdir(parents=True, exist_ok=True)
        write_table(self.rows(), Path(f"{stem}.csv"))
        return [Path(f"{stem}.csv"), *save_figure(self.plot(), stem)]

    def cite(self) -> str:
        """Return one sentence for a paper, and the rows of a LaTeX table, one line each."""
        data = self.results[0][1].data
        rows = [
            " & ".join([latex(label), latex(name), *(f"${text}$".replace(" +- ", r" \pm ") for text in numbers)])
            for name in self.operators
            for label, *numbers in self._of(name)
        ]
        text = (
            f"Largest eigenvalue and trace of the {data.get('loss', '')} loss on the same {data['samples']:,} samples; "
            "± is one standard error over the samples."
        )
        return "\n".join([text, *(f"{row} \\\\" for row in rows)])

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        rows = [(name, *row) for name in self.operators for row in self._of(name)]
        return ("operator", "network", "lambda_max", "trace"), rows

    def _notes(self) -> Sequence[str]:
        return [repr(self).splitlines()[0], "+-: one standard error over the samples, not over training seeds."]
