"""Warnings about a result of `true_hessian`. Each follows from a measured number."""

from __future__ import annotations

import math

from hessian_tools.analysis.true_hessian.settings import LEAST_OBSERVATIONS, PASSES
from hessian_tools.results.true_hessian import TrueHessianResult

CONCENTRATED = 0.3  # share of one observation in a variance, from which the interval can be too short


def true_hessian_warnings(r: TrueHessianResult) -> list[str]:
    """Return warnings about conclusions that the numbers of a result do not support, in full sentences."""
    found = []
    asked = int(r.settings["top"]), int(r.settings["smallest"])
    if r.search is None and not r.eigenvalues:
        found.append(
            f"No eigenvalues: {r.num_parameters:,} weights are too many for {r.settings['draws']:,} draws; name "
            "another operator too, such as ggn. The eigenvalues in the span of its eigenvectors need few draws."
        )
    elif r.search is None:
        found.append(
            f"The eigenvectors were not searched: the noise of {r.settings['draws']:,} draws of {r.num_parameters:,} "
            f"weights would hide them. The eigenvalues are those in the span of the given directions, and the "
            "Hessian can have larger ones outside it."
        )
    elif r.eigenvalues and r.search.threshold > 0.7 * max(r.eigenvalues[0].form.value, 0.0):
        found.append(
            f"The draws are too few to find the eigenvectors: an eigenvalue below {r.search.threshold:.2g} cannot be "
            "found, so that larger ones than those measured may exist. Use more draws, a larger noise, or name another "
            "operator too, such as ggn."
        )
    means = {"trace": r.trace, "largest eigenvalue": r.eigenvalues[0].form} if r.eigenvalues else {"trace": r.trace}
    for name, mean in means.items():
        if mean.concentration > CONCENTRATED:
            found.append(
                f"A few draws decide: one of {mean.observations} carries {mean.concentration:.0%} of the variance of "
                f"the {name}, and its interval can be too short. Use more draws, or a larger noise."
            )
        elif mean.stderr == 0:
            found.append(f"No draw changed the {name}: use more draws, or a larger noise.")
    measured = len(r.eigenvalues), len(r.smallest_eigenvalues)
    wanted = min(asked[0], r.num_parameters), min(asked[1], max(0, r.num_parameters - asked[0]))
    if r.eigenvalues and sum(measured) < sum(wanted):
        needed = math.ceil(sum(wanted) * PASSES * LEAST_OBSERVATIONS / 0.3)
        more = "" if r.search is None else f" About {needed:,} draws are needed for all of them."
        found.append(f"{sum(measured)} of {sum(wanted)} eigenvalues were measured.{more}")
    if r.fixed:
        found.append(
            f"{r.fixed:,} weights are zero, as is their whole filter. They get no noise, and are not in the Hessian."
        )
    return found
