"""The result of `landscape`: the loss along lines and planes through the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessian_tools.results.landscape import LandscapeResult, Line, Plane
from hessian_tools.results.text import headline
from ikun_hessian.api.report import Report, latex

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Landscape(Report):
    """The result of `landscape`: `r.lines["top1"].loss`.

    Attributes:
        result: All numbers and the conditions under which they were measured, as they are saved.
    """

    result: LandscapeResult

    @property
    def lines(self) -> dict[str, Line]:
        """The lines by the name of their direction."""
        return {line.name: line for line in self.result.lines}

    @property
    def planes(self) -> dict[tuple[str, str], Plane]:
        """The planes by the names of their directions."""
        return {plane.directions: plane for plane in self.result.planes}

    def __repr__(self) -> str:
        first, *lines = repr(self.result).splitlines()
        return "\n".join([first.replace("LandscapeResult", "Landscape", 1), *lines])

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each point of each line."""
        return [
            {"direction": line.name, "distance": t, "loss": loss, **({"relaxed_loss": r[i]} if r else {})}
            for line in self.result.lines
            for r in [line.relaxed_loss]
            for i, (t, loss) in enumerate(zip(line.distances, line.loss, strict=True))
        ]

    def plot(self) -> Figure:
        """Return the figure of all lines and planes."""
        from hessian_tools.plots.landscape import landscape_figure

        return landscape_figure(self.result)

    def save(self, stem: str | Path) -> list[Path]:
        """Write STEM.landscape.json, .png and .pdf, and return their paths."""
        from ikun_hessian.jobs.analyses.landscape import write_landscape

        name = Path(f"{str(stem).removesuffix('.json').removesuffix('.landscape')}.landscape")
        name.parent.mkdir(parents=True, exist_ok=True)
        write_landscape(self.result, name)
        return [Path(f"{name}.{ending}") for ending in ("json", "png", "pdf")]

    def cite(self) -> str:
        """Return one sentence for a paper and one row of a LaTeX table, on two lines.

        The row holds v'Hv for each line, the curvature that the surrogate Hessian predicts there.
        """
        r, name = self.result, Path(str(self.result.checkpoint.get("path") or "")).stem
        name = name or str(r.network.get("model", ""))
        text = (
            f"The {r.data.get('loss', '')} loss of {name} on {r.data['samples']:,} samples was evaluated along "
            f"{', '.join(self.lines)} (random directions are filter-normalized, Li et al. 2018), ikun-hessian "
            f"{r.versions.get('ikun-hessian', '')}".rstrip()
        )
        cells = [f"${line.hessian:.3g}$" for line in r.lines]
        return f"{text}.\n{' & '.join([latex(name), *cells])} \\\\"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        head = ("direction", "v'Hv", "v'Gv", "L'' of the loss")
        rows = [
            (line.name, f"{line.hessian:.3g}", f"{line.ggn:.3g}", f"{line.second_difference(line.loss):.3g}")
            for line in self.result.lines
        ]
        return head, rows

    def _notes(self) -> Sequence[str]:
        refused = [f"Not computed: {name}: {why}" for name, why in self.result.refused.items()]
        note = "L'': second difference of the true loss over a fifth of the range; H: surrogate Hessian, G: GGN."
        return [headline(self.result).replace("LandscapeResult", "Landscape", 1), note, *refused]
