"""The result of `analyze`: eigenvalues and traces as arrays with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hessian_tools.results.operator_spectrum import Eigenvalue, Spectrum
from hessian_tools.results.spectrum import SpectrumResult
from hessian_tools.results.text import headline, with_error
from ikun_hessian.api.report import Report, latex

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[np.float64]]
NAMES = {
    "hessian": "surrogate Hessian",
    "ggn": "generalized Gauss-Newton matrix (GGN)",
    "fisher": "empirical Fisher matrix",
    "relaxed": "Hessian of the relaxed network",
    "smoothed": "noise-matched operator",
}


@dataclass(frozen=True, eq=False)
class Curvature:
    """Eigenvalues and trace of one operator.

    Attributes:
        eigenvalues: Largest eigenvalues [k], in descending order.
        stderr: Their standard errors over the data [k]: for other samples of the same number. NaN where only a lower
            limit is known.
        stderr_least: That lower limit [k]; NaN elsewhere.
        residual: ||A v - value v|| [k]. An eigenvalue for these samples lies within the residual.
        converged: Whether the residual meets the tolerance [k].
        smallest: Smallest eigenvalues [m], in ascending order.
        smallest_stderr: Their standard errors over the data [m].
        smallest_residual: Their residuals [m].
        trace: The trace.
        trace_stderr: Its standard error over the data; NaN where only a lower limit is known.
        trace_stderr_probes: Its standard error over the random probes of Hutchinson's estimator.
        trace_ci95: Its 95% confidence interval over the probes.
        spectrum: The whole result for this operator, with the density.
    """

    eigenvalues: Array
    stderr: Array
    stderr_least: Array
    residual: Array
    converged: np.ndarray[Any, np.dtype[np.bool_]]
    smallest: Array
    smallest_stderr: Array
    smallest_residual: Array
    trace: float
    trace_stderr: float
    trace_stderr_probes: float
    trace_ci95: tuple[float, float]
    spectrum: Spectrum

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])

    def __repr__(self) -> str:
        s = self.spectrum
        parts = [f"lambda_max {with_error(e.value, e)}" for e in s.eigenvalues[:1]]
        parts += [f"trace {with_error(s.trace.estimate, s.trace)}"] if s.trace else []
        return f"Curvature({', '.join(parts)}; {len(self.eigenvalues)} + {len(self.smallest)} eigenvalues)"


def curvature(spectrum: Spectrum) -> Curvature:
    """Return the numbers of a spectrum as arrays."""
    top, low, t = spectrum.eigenvalues, spectrum.smallest_eigenvalues, spectrum.trace
    return Curvature(
        _column(top, "value"),
        _column(top, "data_stderr"),
        _column(top, "data_stderr_least"),
        _column(top, "residual"),
        np.array([e.converged for e in top], dtype=bool),
        _column(low, "value"),
        _column(low, "data_stderr"),
        _column(low, "residual"),
        math.nan if t is None else t.estimate,
        math.nan if t is None else t.data_stderr,
        math.nan if t is None else t.stderr,
        (math.nan, math.nan) if t is None else t.ci95,
        spectrum,
    )


def _column(pairs: Sequence[Eigenvalue], name: str) -> Array:
    return np.array([getattr(e, name) for e in pairs], dtype=np.float64)


@dataclass(frozen=True, eq=False, repr=False)
class Analysis(Report):
    """The result of `analyze`.

    The operators are attributes: `r.hessian.eigenvalues`, `r.ggn.trace` (see `Curvature`).

    Attributes:
        result: All numbers and the conditions under which they were measured, as they are saved.
    """

    result: SpectrumResult

    @property
    def operators(self) -> dict[str, Curvature]:
        """The operators by name, in the order in which they were measured."""
        return {name: curvature(spectrum) for name, spectrum in self.result.spectra.items()}

    def __getattr__(self, name: str) -> Curvature:
        spectra = self.__dict__["result"].spectra if "result" in self.__dict__ else {}
        if name in spectra:
            return curvature(spectra[name])
        known = f"; measured: {', '.join(spectra)}" if name in NAMES else ""
        raise AttributeError(f"'Analysis' object has no attribute '{name}'{known}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.result.spectra]

    @property
    def loss(self) -> float:
        """The loss at the weights."""
        return self.result.loss

    @property
    def accuracy(self) -> float:
        """The accuracy at the weights; NaN if the targets are not class labels."""
        return self.result.accuracy

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that follow from the numbers, one sentence each."""
        return self.result.warnings

    def __repr__(self) -> str:
        first, *lines = repr(self.result).splitlines()
        return "\n".join([first.replace("SpectrumResult", "Analysis", 1), *lines])

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each eigenvalue and each trace. The rank of a trace is None."""
        rows: list[dict[str, Any]] = []
        for name, s in self.result.spectra.items():
            size = self.result.num_parameters
            ranked = list(enumerate(s.eigenvalues, 1))
            ranked += [(size - i, e) for i, e in enumerate(s.smallest_eigenvalues)]
            for rank, e in ranked:
                rows.append({
                    "operator": name, "quantity": "eigenvalue", "rank": rank, "value": e.value,
                    "stderr": e.data_stderr, "stderr_least": e.data_stderr_least, "residual": e.residual,
                    "converged": e.converged,
                })  # fmt: skip
            if (t := s.trace) is not None:
                rows.append({
                    "operator": name, "quantity": "trace", "rank": None, "value": t.estimate,
                    "stderr": t.data_stderr, "stderr_least": t.data_stderr_least, "residual": math.nan,
                    "converged": True,
                })  # fmt: skip
        return rows

    def plot(self) -> Figure:
        """Return the figure of the spectrum, two columns wide."""
        from hessian_tools.plots.spectrum import spectrum_figure

        return spectrum_figure(self.result)

    def save(self, stem: str | Path) -> list[Path]:
        """Write STEM.spectrum.json, .npz, .png and .pdf.

        Args:
            stem: Path without the ending.

        Returns:
            Paths of the files. `ikun_hessian.load` and the command line read the first.
        """
        from ikun_hessian.jobs.analyses.spectrum import write_spectrum

        name = Path(f"{str(stem).removesuffix('.json').removesuffix('.spectrum')}.spectrum")
        name.parent.mkdir(parents=True, exist_ok=True)
        return [Path(f"{name}.{ending}") for ending in write_spectrum(self.result, name)]

    def cite(self) -> str:
        """Return one sentence for a paper and one row of a LaTeX table, on two lines.

        The columns of the row are network, surrogate, T, loss, samples, and for each operator lambda_max and trace.
        """
        r, name = self.result, self.name
        found = [
            f"{_pm(s.eigenvalues[0].value, s.eigenvalues[0])} for the {NAMES.get(key, key)}"
            + (f" (trace {_pm(s.trace.estimate, s.trace)})" if s.trace else "")
            for key, s in r.spectra.items()
        ]
        residual = max(e.residual for s in r.spectra.values() for e in s.eigenvalues)
        spiking = f", T = {r.network['timesteps']}" if r.network.get("timesteps") else ""
        spiking += f", surrogate {r.network['surrogate']}" if r.network.get("surrogate") else ""
        text = (
            f"The largest eigenvalue of the {r.data.get('loss', '')} loss of {name}{spiking} on "
            f"{r.data['samples']:,} samples is {' and '.join(found)}; ± is one standard error over the samples, "
            f"Lanczos residuals are at most {residual:.1g}, {r.dtype}, ikun-hessian "
            f"{r.versions.get('ikun-hessian', '')}".rstrip()
        )
        cells = [name, r.network.get("surrogate") or "--", r.network.get("timesteps") or "--"]
        row = [latex(str(c)) for c in (*cells, r.data.get("loss") or "--", f"{r.data['samples']:,}")]
        for s in r.spectra.values():
            row += [f"${_pm(s.eigenvalues[0].value, s.eigenvalues[0], True)}$"]
            row += [f"${_pm(s.trace.estimate, s.trace, True)}$" if s.trace else "--"]
        return f"{text}.\n{' & '.join(row)} \\\\"

    @property
    def name(self) -> str:
        """Name of the checkpoint, or of the network if it was in memory."""
        return Path(str(self.result.checkpoint.get("path") or "")).stem or str(self.result.network.get("model", ""))

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        head = ("operator", "lambda_max", "residual", "lambda_min", "trace")
        rows = []
        for name, s in self.result.spectra.items():
            top = s.eigenvalues[0]
            low = [with_error(e.value, e) for e in s.smallest_eigenvalues[:1]] or ["-"]
            trace = with_error(s.trace.estimate, s.trace) if s.trace else "-"
            rows.append([name, with_error(top.value, top), f"{top.residual:.1g}", *low, trace])
        return head, rows

    def _notes(self) -> Sequence[str]:
        accuracy = "" if math.isnan(self.accuracy) else f", accuracy {self.accuracy:.1%}"
        errors = "+-: one standard error over the samples; (> x): at least x, because a few samples carry it."
        return [headline(self.result).replace("SpectrumResult", "Analysis", 1) + accuracy, errors, *self.warnings]


def _pm(value: float, e: Any, tex: bool = False) -> str:
    """Format a value and its error for a paper."""
    sign, text = (r" \pm ", with_error(value, e)) if tex else (" ± ", with_error(value, e))
    return text.replace(" +- ", sign)
