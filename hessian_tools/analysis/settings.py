"""What an analysis computes, and with which versions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hessian_tools.linalg.trace import LEAST_PROBES

CURVATURES = ("hessian", "ggn", "fisher")  # the keys of operators.curvature.OPERATORS, which imports more
STEPS, PROBES = 60, 4  # of the density, where neither they nor an accuracy are given


@dataclass(frozen=True)
class SpectrumSettings:
    """What `spectrum` computes; every field is stored with the result.

    magnitude: so many eigenvalues of largest size instead of the top and the smallest. scaled: so many of the largest
    with weights in units of filter norm. accuracy: Wasserstein accuracy
    of the density, relative to the range; it chooses steps and probes that are not given (60 and 4 without it).
    damping: z of effective dimension and log determinant, 1% of lambda_max if None. vectors: keep the eigenvectors.
    noise: scale of the weight noise of operator `smoothed`, relative to each filter's root mean square.
    memory: GiB for kept primals, the Lanczos basis and eigenvectors. samples_curve: sample counts, each measured on
    `resamples` subsets.
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
    damping: float | None = None
    noise: float = 0.1
    tol: float = 1e-4
    seed: int = 0
    memory: float = 4.0
    max_products: int = 1000
    per_layer: bool = False
    vectors: bool = False
    samples_curve: tuple[int, ...] = ()
    resamples: int = 5

    def __post_init__(self) -> None:
        if any(name.startswith(("fd", "finite")) for name in self.operators):
            raise ValueError(
                "finite differences of the surrogate gradient are no Hessian: spikes stay frozen in them and the "
                "matrix is not symmetric; use hessian (the surrogate's 2-jet) or relaxed"
            )
        if unknown := set(self.operators) - {*CURVATURES, "relaxed", "smoothed"}:
            raise ValueError(
                f"unknown operator {', '.join(sorted(unknown))}: choose from {', '.join(CURVATURES)}, relaxed, smoothed"
            )
        if not self.operators:
            raise ValueError("no operator chosen")
        least = {"top": 1, "smallest": 0, "magnitude": 0, "scaled": 1, "steps": 1, "probes": 1, "resamples": 1}
        for name, bound in {**least, "trace_probes": LEAST_PROBES, "max_products": 1}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound}, not {value}")
        for name in ("tol", "accuracy"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {value}")
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise must be a positive number, not {self.noise}")
        if self.damping is not None and not 0 < self.damping < math.inf:
            raise ValueError(f"damping must be a positive number, not {self.damping}")
        if self.magnitude and self.method == "power":
            raise ValueError("power iteration goes by magnitude anyway: use top")
        if self.method not in ("lanczos", "power") or self.backend not in ("own", "pyhessian"):
            raise ValueError("method is lanczos or power, backend is own or pyhessian")
        if self.backend == "pyhessian" and (self.method != "power" or self.operators != ("hessian",)):
            raise ValueError("backend pyhessian is a reference for method power and operator hessian alone")
