"""Tests of accuracy under disturbances, against its closed form for a linear classifier."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from hessian_tools.analysis.robustness import RobustnessSettings, noisy_accuracy
from hessian_tools.objective import make_objective
from hessian_tools.results.robustness import Accuracy


def test_accuracy_of_a_linear_classifier_under_noise_is_the_closed_form() -> None:
    """Weights m and -m of two classes with noise of standard deviation s each: x > 0 is right with probability
    Phi(2 m / (s sqrt 2)). Every filter is one weight here, of root mean square m, so that s = scale m."""
    model = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0], [-3.0]]))
    x = torch.linspace(0.1, 1, 7)[:, None]
    objective = make_objective(model, torch.nn.functional.cross_entropy, (x, torch.zeros(7, dtype=torch.int64)))
    for scale in (0.5, 1.0, 3.0):
        found = noisy_accuracy(objective, scale, 2000, seed=1)
        expected = stats.norm.cdf(math.sqrt(2) / scale)
        assert abs(found.value - expected) < 4 * found.stderr + 1e-3
        # antithetic: one of a pair is right where the other may be wrong, and both are never wrong
        q = 1 - expected
        assert found.stderr == pytest.approx(math.sqrt((q / 2 - q * q) / 1000), rel=0.15, abs=1e-3)
    assert noisy_accuracy(objective, 1.0, 20, seed=1) == noisy_accuracy(objective, 1.0, 20, seed=1)
    assert noisy_accuracy(objective, 1e-6, 4, seed=1) == Accuracy(1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 3}, "draws must be even and at least 4"),
        ({"draws": 2}, "draws must be even and at least 4"),
        ({"noise": (0.1, 0.0)}, "noise must be positive"),
        ({"noise": (math.inf,)}, "noise must be positive"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustnessSettings(**change)  # type: ignore[arg-type]
