"""How much worse the true loss gets where the weights are disturbed: flatness by forward passes alone.

The noise is radius * D z, z standard normal, D [P] by kind (see KINDS). z depends on the seed and P alone, so that
checkpoints of one network meet the same noise. The surrogate enters critical_sharpness alone, as a direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from hessian_tools.analysis.flatness.settings import DRAWS, LPF_SIGMA, RADIUS
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

PassProgress = Callable[[int, int], None]  # (forward passes over all samples done, of at most so many)
START, BOTTOM, TOP = -6, -24, 4  # log2 of the noise scales searched for PAC-Bayes sigma: first, least, largest
HALVINGS = 5  # of a cell of that grid
FIRST_STEP = 2.0**-7  # norm of the first step over that of the weights
SHRINK, GROW, CUTS = 16, 11, 4  # of that step: halvings and doublings at most, then bisections


def _isotropic(objective: Objective) -> Tensor:
    w = objective.weights()
    return torch.full_like(w, float(w.norm()) / len(w) ** 0.5)


NOISE_KINDS: dict[str, Callable[[Objective], Tensor]] = {
    "isotropic": _isotropic,  # all weights by the root mean square of all
    "filter": noise_scales,  # by that of their filter (Li et al. 2018)
    "elementwise": lambda objective: objective.weights().abs(),  # by their own size (Kwon et al. 2021)
    "filter_norm": filter_norms,  # by the norm of their filter (Bisla et al. 2022)
}


@dataclass(frozen=True)
class NoiseEstimate:
    """stderr and ci95 (Student's t) are those of the noise, an antithetic pair of draws being one observation;
    data_stderr is the standard error for other samples of the same kind, NaN for a single sample."""

    value: float
    stderr: float
    ci95: tuple[float, float]
    data_stderr: float
    draws: int


@dataclass(frozen=True)
class PacBayes:
    """sigma: the noise scale s that costs `drop` of the accuracy; sharpness: 1 / s^2.

    Never that much, up to s = 16: sigma inf, sharpness 0. At any noise, however small: 0 and inf. No classes: both NaN.
    (In a saved result inf, like NaN, is null: the 0 tells which.)
    """

    drop: float
    sigma: NoiseEstimate
    sharpness: NoiseEstimate


@dataclass(frozen=True)
class CriticalSharpness:
    """value: 2 / step, which lies within `bounds`. step: the smallest found that makes the loss larger.

    No step does: step inf, value 0. Every step does: 0 and inf. No gradient: NaN. passes: forward passes made.
    """

    value: float
    step: float
    bounds: tuple[float, float]
    passes: int


def draw_losses(
    objective: Objective,
    radius: float = RADIUS,
    *,
    kind: str,
    draws: int = DRAWS,
    seed: int = 0,
    progress: PassProgress | None = None,
) -> tuple[Tensor, Tensor]:
    """Every sample's loss [draws, N] at w + radius * D z, one row a draw, and [N] at the weights w; float64.

    Rows 2i and 2i + 1 are an antithetic pair: z and -z. Metrics are means of these (see over_draws). Raises ValueError
    for an unknown kind, a radius that is not positive, an odd number of draws or fewer than 4 (two pairs), weights that
    are all zero, and weights or a loss that are not finite.
    """
    if not 0 < radius < math.inf:
        raise ValueError(f"the noise must be a positive number, not {radius}")
    w, scales = _noise(objective, kind, draws)
    at = sample_losses(objective, _at_weights(objective)).cpu()
    rows = torch.empty(draws, len(at), dtype=at.dtype)
    points = outputs_at(objective, lambda i: w + radius * scales * noise(objective, seed, i), range(draws))
    for i, outputs in enumerate(points):
        rows[i] = sample_losses(objective, outputs)
        if progress is not None:
            progress(i + 1, draws)
    return rows, at


def over_draws(values: Tensor) -> NoiseEstimate:
    """The mean of values [draws, N], rows 2i and 2i + 1 an antithetic pair, with its two errors."""
    draws, samples = values.shape
    pairs = trace.estimate(values.mean(1).unflatten(0, (-1, 2)).mean(1))
    data = float(values.mean(0).std()) / samples**0.5 if samples > 1 else math.nan
    return NoiseEstimate(pairs.estimate, pairs.stderr, pairs.ci95, data, draws)


def average_sharpness(
    objective: Objective,
    radius: float = RADIUS,
    *,
    kind: str,
    draws: int = DRAWS,
    seed: int = 0,
    progress: PassProgress | None = None,
) -> NoiseEstimate:
    """E L(w + radius * D z) - L(w): (radius^2 / 2) tr(D H D) where the loss is smooth.

    With kind elementwise the adaptive average sharpness of Andriushchenko et al. 2023 (section 3, c = |w|).
    isotropic, filter and elementwise spread noise of one expected squared norm, radius^2 ||w||^2, in three ways: the
    default disturbs the weights by 10% in each, whatever their norm. Errors as draw_losses.
    """
    losses, at = draw_losses(objective, radius, kind=kind, draws=draws, seed=seed, progress=progress)
    return over_draws(losses - at)


def smoothed_loss(
    objective: Objective,
    sigma: float = LPF_SIGMA,
    *,
    kind: str = "filter_norm",
    draws: int = DRAWS,
    seed: int = 0,
    progress: PassProgress | None = None,
) -> NoiseEstimate:
    """LPF: (L * K)(w) = E L(w + sigma * D z), the loss smoothed by a Gaussian kernel K = N(0, sigma^2 D^2).

    Bisla, Wang & Choromanska, "Low-Pass Filtering SGD", AISTATS 2022 (arXiv 2201.08025). Their code
    (devansh20la/LPF-SGD, sharpness_v_generalization) takes sigma = 0.01 and 100 draws after it has divided every filter
    by its norm: noise in units of the filter's norm, so the default kind. (It counts a bias in with that norm; here a
    bias has its own.) Errors as draw_losses.
    """
    return over_draws(draw_losses(objective, sigma, kind=kind, draws=draws, seed=seed, progress=progress)[0])


def pac_bayes_sigma(
    objective: Objective,
    drop: float = 0.1,
    *,
    kind: str = "filter",
    draws: int = DRAWS,
    seed: int = 0,
    progress: PassProgress | None = None,
) -> PacBayes:
    """The largest s at which noise s * D z (standard deviation s D) costs at most `drop` of the accuracy on average.

    Jiang et al., "Fantastic generalization measures", ICLR 2020 (arXiv 1912.02178), PAC-Bayes flatness 1 / s^2. Their
    s is the noise itself, of one size for all weights: s ||w|| / sqrt(P) of kind isotropic; their magnitude-aware one
    is kind elementwise. (A well-known code hands s^2 to the generator as the standard deviation.)

    The draws are the same at every s, so the mean drop is one function of s, if not always a monotone one: s is the
    smallest at which it passes `drop`, found on a grid of factor 2 from 2^-6 (or below, where that is too much already)
    to 16, then by bisection of log s to 2%, linear in between. Intervals are where the bounds of the mean drop pass:
    ci95 by the draws, data_stderr by one standard error of the data. About 11 * draws forward passes.
    Raises ValueError for a drop that is not between 0 and 1, otherwise as draw_losses.
    """
    if not 0 < drop < 1:
        raise ValueError(f"the drop of accuracy must lie between 0 and 1, not {drop}")
    w, scales = _noise(objective, kind, draws)
    at, y = _at_weights(objective), targets(objective)
    if math.isnan(accuracy(objective, at)):
        nothing = NoiseEstimate(math.nan, math.nan, (math.nan, math.nan), math.nan, draws)
        return PacBayes(drop, nothing, nothing)
    right = (at.argmax(1) == y).double()
    curve: dict[float, NoiseEstimate] = {}  # the mean drop, by log2 s

    def evaluate(k: float, most: int) -> NoiseEstimate:
        """The mean drop at s = 2^k, after which at most so many others are needed."""
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
        """log2 of the smallest s at which of(drop) exceeds the drop: -inf for all, inf for none."""
        left: tuple[float, float] | None = None
        for k in sorted(curve):
            value = of(curve[k])
            if value > drop:
                return -math.inf if left is None else left[0] + (k - left[0]) * (drop - left[1]) / (value - left[1])
            left = k, value
        return math.inf

    bottom = top = START
    point = evaluate(START, TOP - START + HALVINGS)
    while max(point.ci95[1], point.value + point.data_stderr) > drop and bottom > BOTTOM:
        bottom -= 1
        point = evaluate(bottom, TOP - START + HALVINGS)
    point = curve[top]
    while min(point.ci95[0], point.value - point.data_stderr) <= drop and top < TOP:
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
    draw_ends = passed(lambda p: p.ci95[1]), passed(lambda p: p.ci95[0])
    data_ends = (math.nan, math.nan)  # of a single sample
    if len(y) > 1:
        data_ends = passed(lambda p: p.value + p.data_stderr), passed(lambda p: p.value - p.data_stderr)
    quantile = float(stats.t.ppf(0.975, draws // 2 - 1))

    def estimate(power: int) -> NoiseEstimate:
        low, high = sorted(2.0 ** (power * k) for k in draw_ends)
        data_low, data_high = sorted(2.0 ** (power * k) for k in data_ends)
        return NoiseEstimate(
            2.0 ** (power * found), (high - low) / (2 * quantile), (low, high), (data_high - data_low) / 2, draws
        )

    return PacBayes(drop, estimate(1), estimate(-2))


def critical_sharpness(
    objective: Objective, gradient: Tensor, *, progress: PassProgress | None = None
) -> CriticalSharpness:
    """2 / step, step the smallest along -gradient [P] that makes the true loss larger than at the weights.

    Kalra et al., "A scalable measure of loss landscape curvature", 2026 (arXiv 2601.16979), there for smooth networks;
    on a quadratic it is g'Ag / g'g, at most lambda_max. Here the loss is the true one, the direction, the gradient that
    training follows, the surrogate's. Their line search is that of Kalra & Barkeshli 2024 (arXiv 2406.09405): doubling,
    then bisection; the first step is 1/128 of the weights' norm, halved while it is too long. A loss that is not finite
    is larger. The bisection ends at a factor of 2^(1/16): the value is known to 2.2%. Steps are searched from 2^-23
    to 16 times the weights' norm: 6 to 12 forward passes as a rule, the one at the weights among them. Raises
    ValueError for a gradient of another size, and weights, a gradient or a loss that are not finite.
    """
    if gradient.shape != (objective.size,) or not gradient.isfinite().all():
        raise ValueError(f"the gradient must be {objective.size} finite numbers, one for each weight")
    base, passes = mean_loss(objective, _at_weights(objective)), 1
    w = objective.weights().double()
    g = gradient.to(w)
    if not g.any():
        return CriticalSharpness(math.nan, math.nan, (math.nan, math.nan), passes)
    unit = FIRST_STEP * (float(w.norm()) or 1.0) / float(g.norm())

    def larger(k: float, most: int) -> bool:
        nonlocal passes
        (outputs,) = outputs_at(objective, lambda step: w - step * g, [unit * 2.0**k])
        passes += 1
        if progress is not None:
            progress(passes, passes + most)
        return not mean_loss(objective, outputs) <= base

    k = 0
    if larger(k, max(SHRINK, GROW) + CUTS):
        while k > -SHRINK and larger(k - 1, SHRINK + k - 1 + CUTS):
            k -= 1
        below, above = k - 1.0, float(k)
    else:
        while k < GROW and not larger(k + 1, GROW - k - 1 + CUTS):
            k += 1
        below, above = float(k), k + 1.0
    if below < -SHRINK:
        step, bounds = 0.0, (2 / (unit * 2.0**above), math.inf)
    elif above > GROW:
        step, bounds = math.inf, (0.0, 2 / (unit * 2.0**below))
    else:
        for left in reversed(range(CUTS)):
            middle = (below + above) / 2
            below, above = (below, middle) if larger(middle, left) else (middle, above)
        step, bounds = unit * 2.0 ** ((below + above) / 2), (2 / (unit * 2.0**above), 2 / (unit * 2.0**below))
    if progress is not None:
        progress(passes, passes)
    return CriticalSharpness(2 / step if step else math.inf, step, bounds, passes)


def _noise(objective: Objective, kind: str, draws: int) -> tuple[Tensor, Tensor]:
    """Weights [P] and D [P]; ValueError for what noise cannot be drawn with."""
    if kind not in NOISE_KINDS:
        raise ValueError(f"unknown kind of noise '{kind}': choose from {', '.join(NOISE_KINDS)}")
    if draws < 4 or draws % 2:
        raise ValueError(f"draws come in antithetic pairs, at least two for an interval: 4, 6, ..., not {draws}")
    scales = NOISE_KINDS[kind](objective)
    if not scales.any():
        raise ValueError("all weights are zero: noise relative to them is none")
    return objective.weights(), scales


def _at_weights(objective: Objective) -> Tensor:
    """The outputs [N, ...] at the weights; ValueError if those or the loss are not finite."""
    w = objective.weights()
    if not w.isfinite().all():
        raise ValueError("the weights have NaN or infinite entries: there is no loss to disturb")
    (outputs,) = outputs_at(objective, lambda _: w, [0])
    if not math.isfinite(loss := mean_loss(objective, outputs)):
        raise ValueError(f"the loss at the weights is {loss} already: there is none to disturb")
    return outputs
