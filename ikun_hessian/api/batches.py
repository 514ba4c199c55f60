"""The largest eigenvalue as a histogram over mini-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessian_tools.results.batch_eigenvalues import BatchEigenvaluesResult
from hessian_tools.results.text import headline
from ikun_hessian.api.analyses import Loss, opened_job, split_options
from ikun_hessian.api.report import Report, latex

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def lambda_max_histogram(
    model: Any,
    data: Any = None,
    loss: Loss | None = None,
    *,
    timesteps: int | None = None,
    samples: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
    **options: Any,
) -> BatchHistogram:
    """Compute the largest eigenvalue on each of many mini-batches of the samples, at the same weights.

    Args:
        model: See `analyze`, as for `data`, `loss`, `timesteps`, `samples` and `progress`.
        data: Samples; None for those of a checkpoint.
        loss: Name of a loss, or a function.
        timesteps: Number of time steps.
        samples: Number of samples; None for all.
        batch_size: Number of samples in a mini-batch.
        progress: Whether to show a progress bar.
        options: Fields of `hessian_tools.BatchSettings`, such as operator="hessian" and batches=20, and of `Opening`.

    Returns:
        The eigenvalues, for example `r.values`, and their histogram, `r.plot()`.

    Raises:
        ValueError: If the network, the samples or an option cannot be used.
        TypeError: If an option does not exist.
    """
    from hessian_tools.analysis.batch_eigenvalues import BatchSettings, batch_eigenvalues
    from ikun_hessian.jobs.progress_bar import Bar

    chosen, opening = split_options(BatchSettings, {**options, "batch_size": batch_size}, timesteps, samples)
    with opened_job(model, data, loss, opening) as (job, memory), Bar(shown=progress) as bar:
        settings = BatchSettings(memory=memory, **chosen)
        found = batch_eigenvalues(job.objective, settings, provenance=job.provenance, progress=bar.update)
        return BatchHistogram(found)


@dataclass(frozen=True, eq=False, repr=False)
class BatchHistogram(Report):
    """The result of `lambda_max_histogram`.

    Attributes:
        result: All numbers and the conditions under which they were measured, as they are saved.
    """

    result: BatchEigenvaluesResult

    @property
    def values(self) -> Any:
        """Largest eigenvalue on each mini-batch, a NumPy array [batches]."""
        import numpy as np

        return np.array(self.result.values)

    def __repr__(self) -> str:
        return repr(self.result).replace("BatchEigenvaluesResult", "BatchHistogram", 1)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each mini-batch."""
        r = self.result
        columns = zip(r.values, r.residuals, r.converged, strict=True)
        return [{"batch": i, "lambda_max": v, "residual": e, "converged": c} for i, (v, e, c) in enumerate(columns)]

    def plot(self) -> Figure:
        """Return the histogram."""
        from hessian_tools.plots.batch_eigenvalues import batch_figure

        return batch_figure(self.result)

    def save(self, stem: str | Path) -> list[Path]:
        """Write STEM.batches.json, .png and .pdf, and return their paths."""
        from hessian_tools.io.json import save_result
        from hessian_tools.plots.style import save_figure

        name = Path(f"{str(stem).removesuffix('.json').removesuffix('.batches')}.batches")
        name.parent.mkdir(parents=True, exist_ok=True)
        save_result(self.result, Path(f"{name}.json"))
        return [Path(f"{name}.json"), *save_figure(self.plot(), name)]

    def cite(self) -> str:
        """Return one sentence for a paper and one row of a LaTeX table, on two lines."""
        r = self.result
        operator, size = r.settings["operator"], r.settings["batch_size"]
        name = Path(str(r.checkpoint.get("path") or "")).stem or str(r.network.get("model", ""))
        text = (
            f"The largest eigenvalue of the {operator} of the {r.data.get('loss', '')} loss of {name} on "
            f"{len(r.values)} mini-batches of {size} samples is {r.mean:.3g} on average with a standard deviation of "
            f"{r.deviation:.2g}, and {r.whole:.3g} on all {r.data['samples']:,} samples together, ikun-hessian "
            f"{r.versions.get('ikun-hessian', '')}".rstrip()
        )
        numbers = f"${r.mean:.3g} \\pm {r.deviation:.2g}$ & ${r.whole:.3g}$"
        return f"{text}.\n{latex(name)} & {operator} & {size} & {numbers} \\\\"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        r = self.result
        row = [f"{v:.3g}" for v in (r.mean, r.deviation, min(r.values), max(r.values), r.whole)]
        return ("mean", "standard deviation", "smallest", "largest", "all together"), [row]

    def _notes(self) -> Sequence[str]:
        r = self.result
        first = headline(r).replace("BatchEigenvaluesResult", "BatchHistogram", 1)
        note = f"lambda_max of the {r.settings['operator']} on {len(r.values)} batches of {r.settings['batch_size']}."
        return [first, note]
