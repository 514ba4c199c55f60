"""Accuracy under disturbed inputs and disturbed weights, and how much of it is lost."""

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
    """corruptions: kinds of disturbed inputs, each at all of severities. noise: scales of normal weight noise, over the
    root mean square of the weight's filter. draws: of weight noise, in antithetic pairs."""

    corruptions: tuple[str, ...] = ("gaussian_noise", "blur", "contrast", "occlusion")
    severities: tuple[int, ...] = (1, 3, 5)
    noise: tuple[float, ...] = (0.1, 0.2, 0.4)
    draws: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0 < scale < math.inf for scale in self.noise):
            raise ValueError(f"noise must be positive numbers, not {self.noise}")
        if self.draws < 4 or self.draws % 2:
            raise ValueError(f"draws come in antithetic pairs, at least two: 4, 6, ..., not {self.draws}")


def noisy_accuracy(objective: Objective, scale: float, draws: int, seed: int) -> Accuracy:
    """Mean accuracy at weights + scale * (rms of the weight's filter) * normal noise, over `draws` antithetic draws.

    All checkpoints of one network meet the same noise.
    """
    weights, sizes = objective.weights(), noise_scales(objective)
    points = outputs_at(objective, lambda i: weights + scale * sizes * noise(objective, seed, i), range(draws))
    found = torch.tensor([accuracy(objective, outputs) for outputs in points], dtype=torch.float64)
    pairs = estimate(found.view(-1, 2).mean(1))
    return Accuracy(pairs.estimate, pairs.stderr)
