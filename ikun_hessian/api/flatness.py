"""The result of `flatness`: metrics with their errors and the loss that each describes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessian_tools.results.flatness import FlatnessResult, Metric
from hessian_tools.results.text import headline, with_error
from ikun_hessian.api.report import Report, latex

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Flatness(Report):
    """The result of `flatness`: `r["ggn trace"].value`.

    Attributes:
        result: All numbers and the conditions under which they were measured, as they are saved.
    """

    result: FlatnessResult

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """All metrics by name: value, stderr, ci95 and data_stderr."""
        return self.result.metrics

    def __getitem__(self, name: str) -> Metric:
        return self.result.metrics[name]

    def __repr__(self) -> str:
        first, *lines = repr(self.result).splitlines()
        return "\n".join([first.replace("FlatnessResult", "Flatness", 1), *lines])

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each metric."""
        return [
            {
                "metric": name, "value": m.value, "stderr": m.stderr, "low": m.ci95[0], "high": m.ci95[1],
                "data_stderr": m.data_stderr, "main": name in self.result.main, "valid": m.valid, "meaning": m.meaning,
                "note": m.note,
            }
            for name, m in self.result.metrics.items()
        ]  # fmt: skip

    def plot(self) -> Figure:
        """Return a figure of the main metrics."""
        from hessian_tools.plots.flatness import flatness_figure

        return flatness_figure(self.result)

    def save(self, stem: str | Path) -> list[Path]:
        """Write STEM.flatness.json, .png and .pdf, and return their paths."""
        from hessian_tools.io.json import save_result
        from hessian_tools.plots.style import save_figure

        name = Path(f"{str(stem).removesuffix('.json').removesuffix('.flatness')}.flatness")
        name.parent.mkdir(parents=True, exist_ok=True)
        save_result(self.result, Path(f"{name}.json"))
        return [Path(f"{name}.json"), *save_figure(self.plot(), name)]

    def cite(self) -> str:
        """Return one sentence for a paper and one row of a LaTeX table with the main metrics, on two lines."""
        r, name = self.result, Path(str(self.result.checkpoint.get("path") or "")).stem
        name = name or str(r.network.get("model", ""))
        found = [f"{key} {with_error(m.value, m).replace(' +- ', ' ± ')}" for key, m in r.main.items()]
        text = (
            f"Flatness of the {r.data.get('loss', '')} loss of {name} on {r.data['samples']:,} samples: "
            f"{', '.join(found)}; ± is one standard error over the samples, ikun-hessian "
            f"{r.versions.get('ikun-hessian', '')}".rstrip()
        )
        cells = [f"${with_error(m.value, m)}$".replace(" +- ", r" \pm ") for m in r.main.values()]
        return f"{text}.\n{' & '.join([latex(name), *cells])} \\\\"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        rows = [(name, with_error(m.value, m), m.valid, m.meaning) for name, m in self.result.main.items()]
        return ("metric", "value", "describes", "meaning"), rows

    def _notes(self) -> Sequence[str]:
        r = self.result
        accuracy = "" if math.isnan(r.accuracy) else f", accuracy {r.accuracy:.1%}"
        return [
            headline(r).replace("FlatnessResult", "Flatness", 1) + accuracy,
            "+-: one standard error over the data.",
        ]
