"""Settings of a spectrum analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hessian_tools.io.errors import check_scale
from hessian_tools.linalg.trace import LEAST_ACCURACY, LEAST_PROBES

CURVATURES = ("hessian", "ggn", "fisher")  # keys of operators.curvature.OPERATORS, without its imports
DAMPING = 0.01  # of effective dimension and log determinant, relative to lambda_max, if none is given
TOL = 1e-4  # smallest tolerance of the eigenpairs if none is given
STEPS, PROBES = 60, 4  # defaults of the density if no accuracy is given


@dataclass(frozen=True)
class SpectrumSettings:
    """Settings of `spectrum`. Every field is stored with the result.

    Attributes:
        operators: Operators: "hessian", "ggn", "fisher", "relaxed" and "smoothed". The first is the main one.
        top: Number of largest eigenvalues.
        smallest: Number of smallest eigenvalues.
        magnitude: Number of eigenvalues of largest magnitude. If it is not 0, it replaces `top` and `smallest`.
        scaled: Number of largest eigenvalues with the weights in units of their filter norms.
        method: "lanczos" or "power" (power iteration).
        backend: "own" or "pyhessian".
        density: Whether to compute the spectral density.
        accuracy: Wasserstein accuracy of the density, relative to the range of the spectrum. It determines the steps
            and the probes that are not given.
        steps: Lanczos steps of the density. If neither this nor an accuracy is given: at most 60, until twice as many
            move the density by at most 0.3% of its range.
        probes: Number of probes of the density. If neither this nor an accuracy is given: 4, or 2 for more than about
            400,000 parameters (see `hessian_tools.linalg.spectral_density.default_probes`).
        trace_probes: Largest number of probes of the trace. Fewer are made if their error is below 0.3 of that from
            the data.
        exact: Whether to compute all eigenvalues of the GGN from its Gram matrix, instead of probes. It needs few
            samples: at most 8192 samples times outputs. None: where it takes less time (see
            `hessian_tools.analysis.operator_spectrum.exact_ggn.is_cheaper`), unless steps, probes or an accuracy are
            given.
        damping: Damping z of effective dimension and log determinant. With None it is 1% of lambda_max, for GGN and
            Fisher only.
        noise: Scale of the weight noise of operator `smoothed`, relative to each filter's root mean square.
        tol: Tolerance of the eigenpairs: residual relative to the norm of the operator. None: a tenth of the
            eigenvalue's standard error over the data, but from 1e-4 to 1e-2 (see
            `hessian_tools.analysis.uncertainty.tolerance`). It is 1e-4 with a method other than lanczos, and if
            `vectors` are kept.
        seed: Random seed.
        memory: Memory in GiB for stored primals, the Lanczos basis and eigenvectors.
        max_products: Largest number of products for the eigenpairs of one operator.
        time: Seconds that the analysis may take, or None. Parts are left out as needed (see
            `hessian_tools.analysis.planning.time_budget`), and a warning names them.
        per_layer: Whether to compute the spectrum of each layer's diagonal block too.
        diagonal: Whether to compute the diagonal of every operator too.
        diagonal_probes: Number of probes of a diagonal that is not computed exactly.
        per_step: Whether to compute the trace of the GGN of the loss at every time step too.
        vectors: Whether to keep the eigenvectors.
        samples_curve: Sample counts at which to measure the spectrum as a function of the number of samples.
        resamples: Number of subsets for each of these counts.
        draws: Number of weight perturbations for the sharpness of the loss itself, in antithetic pairs: an even number,
            at least 4, or 0 to leave it out.
    """

    operators: tuple[str, ...] = ("hessian", "ggn")
    top: int = 10
    smallest: int = 5
    magnitude: int = 0
    scaled: int = 1
    method: str = "lanczos"
    backend: str = "own"
    density: bool = True
    accuracy: float | None = None
    steps: int | None = None
    probes: int | None = None
    trace_probes: int = 32
    exact: bool | None = None
    damping: float | None = None
    noise: float = 0.1
    tol: float | None = None
    seed: int = 0
    memory: float = 4.0
    max_products: int = 1000
    time: float | None = None
    per_layer: bool = False
    vectors: bool = False
    diagonal: bool = False
    diagonal_probes: int = 64
    per_step: bool = False
    samples_curve: tuple[int, ...] = ()
    resamples: int = 5
    draws: int = 8

    @property
    def tightest(self) -> float:
        """The tolerance of the eigenpairs, or the smallest one that may follow from the error over the data."""
        return self.tol or TOL

    def __post_init__(self) -> None:
        if any(name.startswith(("fd", "finite")) for name in self.operators):
            raise ValueError(
                "finite differences of the surrogate gradient are not a Hessian: they keep the spikes fixed, and the "
                "matrix is not symmetric. Use hessian (the surrogate's 2-jet) or relaxed."
            )
        if "true" in self.operators:
            raise ValueError(
                "operator true has an analysis of its own, from forward passes: hessian_tools.true_hessian, "
                "ikun_hessian.true_hessian, or the command spectrum"
            )
        if unknown := set(self.operators) - {*CURVATURES, "relaxed", "smoothed"}:
            raise ValueError(
                f"unknown operator {', '.join(sorted(unknown))}: choose from {', '.join(CURVATURES)}, relaxed, "
                "smoothed, true"
            )
        if not self.operators:
            raise ValueError("no operator chosen")
        least = {"top": 1, "smallest": 0, "magnitude": 0, "scaled": 1, "steps": 1, "probes": 1, "resamples": 1}
        for name, bound in {
            **least,
            "trace_probes": LEAST_PROBES,
            "diagonal_probes": LEAST_PROBES,
            "max_products": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound}, not {value}")
        if self.tol is not None and not 0 < self.tol < 1:
            raise ValueError(f"tol must lie between 0 and 1, not {self.tol}")
        if self.accuracy is not None and not LEAST_ACCURACY <= self.accuracy < 1:
            raise ValueError(f"accuracy must lie between {LEAST_ACCURACY:g} and 1, not {self.accuracy}")
        if self.draws and (self.draws < 4 or self.draws % 2):
            raise ValueError(f"draws must be even and at least 4 (they form antithetic pairs), or 0, not {self.draws}")
        check_scale("noise", self.noise)
        if self.time is not None and not 0 < self.time < math.inf:
            raise ValueError(f"time must be a positive number of seconds, not {self.time}")
        if self.damping is not None and not 0 < self.damping < math.inf:
            raise ValueError(f"damping must be a positive number, not {self.damping}")
        if self.magnitude and self.method == "power":
            raise ValueError("method power already finds eigenvalues by magnitude: set top instead of magnitude")
        if self.method not in ("lanczos", "power") or self.backend not in ("own", "pyhessian"):
            raise ValueError("method must be lanczos or power, and backend own or pyhessian")
        if self.exact and ("ggn" not in self.operators or self.method == "power"):
            raise ValueError("exact is for operator ggn with method lanczos")
        if self.backend == "pyhessian" and (self.method != "power" or self.operators != ("hessian",)):
            raise ValueError("backend pyhessian works only with method power and operator hessian")
