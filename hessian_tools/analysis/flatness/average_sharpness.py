"""Average-case flatness: how much the true loss increases under weight noise, measured by forward passes.

The noise is radius * D z with z standard normal. The kind of noise determines the diagonal D [P] (see `NOISE_KINDS`). z
depends only on the seed and on P, so checkpoints of one network get the same noise. The surrogate is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

from hessian_tools.analysis.flatness.settings import DRAWS, LPF_SIGMA, RADIUS
from hessian_tools.analysis.uncertainty.sampling_error import samples_concentration
from hessian_tools.evaluation import differentiable
from hessian_tools.linalg import trace
from hessian_tools.objective import Objective
from hessian_tools.perturbation import (
    accuracy,
    filter_norms,
    mean_loss,
    noise,
    noise_scales,
    outputs_at,
    sample_losses,
    targets,
)

PassProgress = Callable[[int, int], None]  # (forward passes over all samples done, upper limit of the total)
START, BOTTOM, TOP = -6, -24, 4  # log2 of the first, smallest and largest noise scale tried for PAC-Bayes sigma
HALVINGS = 5  # bisections of a cell of that grid


def _isotropic(objective: Objective) -> Tensor:
    """The root mean square of all weights, for every weight [P]."""
    w = objective.weights()
    return torch.full_like(w, float(w.norm()) / len(w) ** 0.5)


NOISE_KINDS: dict[str, Callable[[Objective], Tensor]] = {
    "isotropic": _isotropic,  # root mean square of all weights
    "filter": noise_scales,  # root mean square of the filter (Li et al. 2018)
    "elementwise": lambda objective: objective.weights().abs(),  # magnitude of the weight (Kwon et al. 2021)
    "filter_norm": filter_norms,  # norm of the filter (Bisla et al. 2022)
}


@dataclass(frozen=True)
class NoiseEstimate:
    """A mean over noise draws with its errors.

    Attributes:
        value: The mean.
        stderr: Standard error over the draws. An antithetic pair counts as one observation.
        ci95: 95% confidence interval over the draws, for means that may be skewed (see
            `hessian_tools.linalg.mean_interval`). NaN for fewer than 20 draws (10 antithetic pairs).
        data_stderr: Standard error for other samples from the same distribution; NaN for a single sample.
        draws: Number of draws.
        concentration: Largest share of one group of samples in the variance over the data. Pass it to
            `sampling_error.withheld` before `data_stderr` is reported.
    """

    value: float
    stderr: float
    ci95: tuple[float, float]
    data_stderr: float
    draws: int
    concentration: float = math.nan


@dataclass(frozen=True)
class PacBayes:
    """PAC-Bayes flatness: the noise that costs a given part of the accuracy.

    If no noise up to s = 16 costs that much, `sigma` is inf and `sharpness` is 0. If any noise does, however small,
    `sigma` is 0 and `sharpness` is inf. Both are NaN if the targets are not class labels. (In a saved result, inf and
    NaN are both null; the 0 tells them apart.)

    Attributes:
        drop: The drop of the accuracy.
        sigma: Noise scale s that costs it.
        sharpness: 1 / s^2.
    """

    drop: float
    sigma: NoiseEstimate
    sharpness: NoiseEstimate


def draw_losses(
    objective: Objective,
    radius: float = RADIUS,
    *,
    kind: str,
    draws: int = DRAWS,
    seed: int = 0,
    progress: PassProgress | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of every sample under weight noise.

    Args:
        objective: The true loss, its data and its weights w.
        radius: Noise scale.
        kind: Kind of noise, a key of `NOISE_KINDS`.
        draws: Number of noise samples, in antithetic pairs: an even number, at least 4.
        seed: Random seed.
        progress: Callback with the forward passes done and the upper limit of their total.

    Returns:
        Losses [draws, N] at w + radius * D z, one row per draw, and losses [N] at w, both float64. Rows 2i and 2i + 1
        are an antithetic pair (z and -z).

    Raises:
        ValueError: If the kind is unknown, the radius is not positive, `draws` is odd or below 4, all weights are zero,
            or a weight or the loss at the weights is not finite.
    """
    if not 0 < radius < math.inf:
        raise ValueError(f"the noise scale must be a positive number, not {radius}")
    w, scales = _noise(objective, kind, draws)
    at = sample_losses(objective, outputs_at_weights(objective)).cpu()
    rows = torch.empty(draws, len(at), dtype=at.dtype)
    points = outputs_at(objective, lambda i: w + radius * scales * noise(objective, seed, i), range(draws))
    for i, outputs in enumerate(points):
        rows[i] = sample_losses(objective, outputs)
        if progress is not None:
            progress(i + 1, draws)
    return rows, at


def over_draws(values: Tensor) -> NoiseEstimate:
    """Average over draws and samples.

    Args:
        values: Values [draws, N]. Rows 2i and 2i + 1 are an antithetic pair.

    Returns:
        The mean with its errors over the draws and over the data.
    """
    draws, samples = values.shape
    pairs = trace.estimate(values.mean(1).unflatten(0, (-1, 2)).mean(1))
    means = values.mean(0)
    data = float(means.std()) / samples**0.5 if samples > 1 else math.nan
    return NoiseEstimate(pairs.estimate, pairs.stderr, pairs.ci95, data, draws, samples_concentration(means))


@differentiable
def average_sharpness(
    objective: Objective,
    radius: float = RADIUS,
    *,
    kind: str,
    draws: int = DRAWS,
    seed: int = 0,
    progress: PassProgress | None = None,
) -> NoiseEstimate:
    """Compute the average sharpness E L(w + radius * D z) - L(w).

    If the loss is smooth, this is (radius^2 / 2) tr(D H D) to leading order. With kind "elementwise" it is the adaptive
    average sharpness of Andriushchenko et al. 2023 (section 3, with c = |w|). Noise of the kinds "isotropic", "filter"
    and "elementwise" has the same expected squared norm, radius^2 ||w||^2. So with the default radius it disturbs the
    weights by 10%, whatever their norm.

    Args:
        objective: The true loss, its data and its weights.
        radius: Noise scale.
        kind: Kind of noise, a key of `NOISE_KINDS`.
        draws: Number of noise samples, in antithetic pairs: an even number, at least 4.
        seed: Random seed.
        progress: Callback with the forward passes done and the upper limit of their total.

    Returns:
        The average sharpness with its errors.

    Raises:
        ValueError: As in `draw_losses`.
    """
    losses, at = draw_losses(objective, radius, kind=kind, draws=draws, seed=seed, progress=progress)
    return over_draws(losses - at)


@differentiable
def smoothed_loss(
    objective: Objective,
    sigma: float = LPF_SIGMA,
    *,
    kind: str = "filter_norm",
    draws: int = DRAWS,
    seed: int = 0,
    progress: PassProgress | None = None,
) -> NoiseEstimate:
    """Compute the smoothed loss of LPF: E L(w + sigma * D z), the loss convolved with the Gaussian N(0, sigma^2 D^2).

    Source: Bisla, Wang & Choromanska, "Low-Pass Filtering SGD", AISTATS 2022 (arXiv 2201.08025). Their code
    (devansh20la/LPF-SGD, sharpness_v_generalization) uses sigma = 0.01 and 100 draws after dividing every filter by its
    norm. The noise is thus in units of the filter norm, which is the default kind here. (In their code, the norm of a
    filter includes its bias. Here a bias has its own norm.)

    Args:
        objective: The true loss, its data and its weights.
        sigma: Noise scale.
        kind: Kind of noise, a key of `NOISE_KINDS`.
        draws: Number of noise samples, in antithetic pairs: an even number, at least 4.
        seed: Random seed.
        progress: Callback with the forward passes done and the upper limit of their total.

    Returns:
        The smoothed loss with its errors.

    Raises:
        ValueError: As in `draw_losses`.
    """
    return over_draws(draw_losses(objective, sigma, kind=kind, draws=draws, seed=seed, progress=progress)[0])


@differentiable
def pac_bayes_sigma(
    objective: Objective,
    drop: float = 0.1,
    *,
    kind: str = "filter",
    draws: int = DRAWS,
    seed: int = 0,
    progress: PassProgress | None = None,
) -> PacBayes:
    """Find the largest s at which noise s * D z costs at most `drop` of the accuracy, on average.

    Source: Jiang et al., "Fantastic generalization measures", ICLR 2020 (arXiv 1912.02178), whose PAC-Bayes flatness is
    1 / s^2. Their noise has one standard deviation for all weights, which is s ||w|| / sqrt(P) with kind "isotropic".
    Their magnitude-aware variant is kind "elementwise". (A well-known implementation passes s^2 to the generator as the
    standard deviation.)

    The draws are the same at every s, so the mean drop is a function of s, although not always a monotone one. The
    result is the smallest s at which it exceeds `drop`. A grid of factor 2 from 2^-6 to 16 is searched first (with
    smaller values if 2^-6 costs too much already). Then log s is bisected to 2%, with linear interpolation at the end.
    An interval holds the s at which the bounds of the mean drop cross `drop`: for `ci95` the bounds over the draws, for
    `stderr` Student's t bounds, for `data_stderr` one standard error over the data. This takes about 11 * draws forward
    passes.

    Args:
        objective: The network, its data and its weights.
        drop: Drop of the accuracy, between 0 and 1.
        kind: Kind of noise, a key of `NOISE_KINDS`.
        draws: Number of noise samples, in antithetic pairs: an even number, at least 4.
        seed: Random seed.
        progress: Callback with the forward passes done and the upper limit of their total.

    Returns:
        s and 1 / s^2 with their errors.

    Raises:
        ValueError: If `drop` is not between 0 and 1, and as in `draw_losses`.
    """
    if not 0 < drop < 1:
        raise ValueError(f"the drop of accuracy must lie between 0 and 1, not {drop}")
    w, scales = _noise(objective, kind, draws)
    at, y = outputs_at_weights(objective), targets(objective)
    if math.isnan(accuracy(objective, at)):
        nothing = NoiseEstimate(math.nan, math.nan, (math.nan, math.nan), math.nan, draws)
        return PacBayes(drop, nothing, nothing)
    right = (at.argmax(1) == y).double()
    curve: dict[float, NoiseEstimate] = {}  # mean drop of the accuracy, by log2 s

    def evaluate(k: float, most: int) -> NoiseEstimate:
        """Compute the mean drop at s = 2^k. `most` is the largest number of evaluations still to come."""
        rows = torch.empty(draws, len(y), dtype=torch.float64)
        points = outputs_at(objective, lambda i: w + 2.0**k * scales * noise(objective, seed, i), range(draws))
        before = len(curve) * draws
        for i, outputs in enumerate(points):
            rows[i] = right - (outputs.argmax(1) == y).double()
            if progress is not None:
                progress(before + i + 1, before + (1 + most) * draws)
        curve[k] = over_draws(rows)
        return curve[k]

    def passed(of: Callable[[NoiseEstimate], float]) -> float:
        """Return log2 of the smallest s at which of(drop) exceeds the drop: -inf if all do, inf if none does."""
        left: tuple[float, float] | None = None
        for k in sorted(curve):
            value = of(curve[k])
            if value > drop:
                return -math.inf if left is None else left[0] + (k - left[0]) * (drop - left[1]) / (value - left[1])
            left = k, value
        return math.inf

    bottom = top = START
    point = evaluate(START, TOP - START + HALVINGS)
    quantile = float(special.stdtrit(draws // 2 - 1, 0.975))

    def ends(p: NoiseEstimate) -> list[float]:
        """Return all known bounds of the mean drop."""
        half = quantile * p.stderr
        both = (*p.ci95, p.value - half, p.value + half, p.value - p.data_stderr, p.value + p.data_stderr)
        return [end for end in both if not math.isnan(end)]

    while max(ends(point)) > drop and bottom > BOTTOM:
        bottom -= 1
        point = evaluate(bottom, TOP - START + HALVINGS)
    point = curve[top]
    while min(ends(point)) <= drop and top < TOP:
        top += 1
        point = evaluate(top, TOP - top + HALVINGS)
    above = next((k for k in sorted(curve) if curve[k].value > drop), None)
    if above is not None and above > bottom:
        below = above - 1
        for left in reversed(range(HALVINGS)):
            middle = (below + above) / 2
            if evaluate(middle, left).value > drop:
                above = middle
            else:
                below = middle
    if progress is not None:
        progress(len(curve) * draws, len(curve) * draws)

    found = passed(lambda p: p.value)
    draw_ends = (math.nan, math.nan)  # undefined for few draws
    if not math.isnan(point.ci95[0]):
        draw_ends = passed(lambda p: p.ci95[1]), passed(lambda p: p.ci95[0])
    student = passed(lambda p: p.value + quantile * p.stderr), passed(lambda p: p.value - quantile * p.stderr)
    data_ends = (math.nan, math.nan)  # undefined for a single sample
    if len(y) > 1:
        data_ends = passed(lambda p: p.value + p.data_stderr), passed(lambda p: p.value - p.data_stderr)

    nearest = min(curve.values(), key=lambda p: abs(p.value - drop))

    def estimate(power: int) -> NoiseEstimate:
        low, high = sorted(2.0 ** (power * k) for k in draw_ends)
        first, last = sorted(2.0 ** (power * k) for k in student)
        data_low, data_high = sorted(2.0 ** (power * k) for k in data_ends)
        stderr, data = (last - first) / (2 * quantile), (data_high - data_low) / 2
        return NoiseEstimate(2.0 ** (power * found), stderr, (low, high), data, draws, nearest.concentration)

    return PacBayes(drop, estimate(1), estimate(-2))


def _noise(objective: Objective, kind: str, draws: int) -> tuple[Tensor, Tensor]:
    """Return the weights [P] and D [P]. Raise ValueError if noise cannot be drawn."""
    if kind not in NOISE_KINDS:
        raise ValueError(f"unknown kind of noise '{kind}': choose from {', '.join(NOISE_KINDS)}")
    if draws < 4 or draws % 2:
        raise ValueError(f"draws must be even and at least 4 (they form antithetic pairs), not {draws}")
    scales = NOISE_KINDS[kind](objective)
    if not scales.any():
        raise ValueError("all weights are zero, so weight-relative noise is undefined")
    return objective.weights(), scales


def outputs_at_weights(objective: Objective) -> Tensor:
    """Return the outputs [N, ...] at the weights.

    Args:
        objective: The network, its data and its weights.

    Returns:
        The outputs.

    Raises:
        ValueError: If a weight or the loss is not finite.
    """
    w = objective.weights()
    if not w.isfinite().all():
        raise ValueError("the weights have NaN or infinite entries")
    (outputs,) = outputs_at(objective, lambda _: w, [0])
    if not math.isfinite(loss := mean_loss(objective, outputs)):
        raise ValueError(f"the loss at the weights is {loss}; this metric needs a finite loss")
    return outputs
