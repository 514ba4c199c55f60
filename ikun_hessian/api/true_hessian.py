"""The result of `true_hessian`: the Hessian of the smoothed loss itself, from forward passes only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessian_tools.results.true_hessian import DrawMean, TrueHessianResult, shown
from ikun_hessian.api.report import Report, latex

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class TrueHessian(Report):
    """The result of `true_hessian`: `r.trace.value`, `r.result.eigenvalues[0].form.ci95`.

    Attributes:
        result: All numbers and the conditions under which they were measured, as they are saved.
    """

    result: TrueHessianResult

    @property
    def trace(self) -> DrawMean:
        """The trace, unbiased."""
        return self.result.trace

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that follow from the numbers."""
        return self.result.warnings

    def __repr__(self) -> str:
        first, *lines = repr(self.result).splitlines()
        return "\n".join([first.replace("TrueHessianResult", "TrueHessian", 1), *lines])

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each eigenvalue, each given direction and the trace. The rank of the trace is None."""
        r = self.result
        found: list[tuple[str, int | None, float, DrawMean]] = [
            *(("true", i, math.nan, e.form) for i, e in enumerate(r.eigenvalues, 1)),
            *(("true", r.num_parameters - i, math.nan, e.form) for i, e in enumerate(r.smallest_eigenvalues)),
            *((d.operator, d.rank, d.predicted, d.form) for d in r.directions),
            ("true", None, math.nan, r.trace),
        ]
        return [
            {
                "eigenvector of": name, "quantity": "trace" if rank is None else "curvature", "rank": rank,
                "value": mean.value, "stderr": mean.stderr, "low": mean.ci95[0], "high": mean.ci95[1],
                "predicted": predicted,
            }
            for name, rank, predicted, mean in found
        ]  # fmt: skip

    def plot(self) -> Figure:
        """Return a figure of the curvatures with their intervals."""
        from hessian_tools.plots.true_hessian import true_hessian_figure

        return true_hessian_figure(self.result)

    def save(self, stem: str | Path) -> list[Path]:
        """Write STEM.true.json, .png and .pdf, and return their paths."""
        from ikun_hessian.jobs.analyses.true_hessian import write_true_hessian

        name = Path(f"{str(stem).removesuffix('.json').removesuffix('.true')}.true")
        name.parent.mkdir(parents=True, exist_ok=True)
        return [Path(f"{name}.{ending}") for ending in write_true_hessian(self.result, name)]

    def cite(self) -> str:
        """Return one sentence for a paper and one row of a LaTeX table (noise, lambda_max, trace), on two lines."""
        r = self.result
        name = Path(str(r.checkpoint.get("path") or "")).stem or str(r.network.get("model", ""))
        top = [f"a curvature of {_pm(e.form, ' ± ')} along its estimated first eigenvector" for e in r.eigenvalues[:1]]
        values = " and ".join([*top, f"a trace of {_pm(r.trace, ' ± ')}"])
        text = (
            f"The {r.data.get('loss', '')} loss of {name} on {r.data['samples']:,} samples, smoothed by weight noise "
            f"of {r.noise:g} filter RMS, has {values}, in units of the filter RMS, from {sum(r.passes.values()):,} "
            f"forward passes; ± is one standard error over the draws, "
            f"ikun-hessian {r.versions.get('ikun-hessian', '')}".rstrip()
        )
        sign = r" \pm "
        cells = [f"${_pm(m, sign)}$" for m in (*(e.form for e in r.eigenvalues[:1]), r.trace)]
        cells = [*(["--"] if not r.eigenvalues else []), *cells]
        return f"{text}.\n{' & '.join([latex(name), f'{r.noise:g}', *cells])} \\\\"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        rows = []
        for row in self.rows():
            interval = f"{row['low']:.3g} to {row['high']:.3g}" if math.isfinite(row["low"]) else "-"
            rank = "trace" if row["rank"] is None else str(row["rank"])
            predicted = f"{row['predicted']:.3g}" if math.isfinite(row["predicted"]) else "-"
            rows.append(
                [row["eigenvector of"], rank, predicted, f"{row['value']:.3g} +- {row['stderr']:.1g}", interval]
            )
        return ("eigenvector of", "rank", "its eigenvalue", "true curvature", "95% interval"), rows

    def _notes(self) -> Sequence[str]:
        first, *_ = repr(self).splitlines()
        return [
            f"{first}, noise {self.result.noise:g}",
            "+-: one standard error over the draws. Weights in units of each filter's root mean square.",
            *self.warnings,
        ]


def _pm(mean: DrawMean, sign: str) -> str:
    return shown(mean).replace(" +- ", sign)
