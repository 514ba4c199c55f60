"""Accuracy under disturbed inputs and under disturbed weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hessian_tools.linalg.trace import estimate
from hessian_tools.objective import Objective
from hessian_tools.perturbation import accuracy, noise, noise_scales, outputs_at
from hessian_tools.results.robustness import Accuracy


@dataclass(frozen=True)
class RobustnessSettings:
    """Settings of a robustness analysis.

    Attributes:
        corruptions: Kinds of corrupted inputs. Each is measured at all severities.
        severities: Severities of the corruptions, from 1 to 5.
        noise: Standard deviations of the weight noise, relative to the root mean square of each filter.
        draws: Number of noise samples, in antithetic pairs: an even number, at least 4.
        seed: Random seed.
    """

    corruptions: tuple[str, ...] = ("gaussian_noise", "blur", "contrast", "occlusion")
    severities: tuple[int, ...] = (1, 3, 5)
    noise: tuple[float, ...] = (0.1, 0.2, 0.4)
    draws: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0 < scale < math.inf for scale in self.noise):
            raise ValueError(f"noise must be positive numbers, not {self.noise}")
        if self.draws < 4 or self.draws % 2:
            raise ValueError(f"draws must be even and at least 4 (they form antithetic pairs), not {self.draws}")


def noisy_accuracy(objective: Objective, scale: float, draws: int, seed: int) -> Accuracy:
    """Compute the mean accuracy under Gaussian weight noise.

    Checkpoints with the same number of parameters get the same noise.

    Args:
        objective: The network, its data and its weights.
        scale: Standard deviation of the noise, relative to the root mean square of each filter.
        draws: Number of noise samples, in antithetic pairs: an even number, at least 4.
        seed: Random seed.

    Returns:
        Mean accuracy, with its standard error over the pairs.
    """
    weights, sizes = objective.weights(), noise_scales(objective)
    points = outputs_at(objective, lambda i: weights + scale * sizes * noise(objective, seed, i), range(draws))
    found = torch.tensor([accuracy(objective, outputs) for outputs in points], dtype=torch.float64)
    pairs = estimate(found.view(-1, 2).mean(1))
    return Accuracy(pairs.estimate, pairs.stderr)
