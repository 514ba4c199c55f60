"""Losses that are not means over samples are refused by their values and by their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.checks import ObjectiveError
from hessian_tools.loss_check import check_loss
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian

Y = torch.arange(24) % 3
OUTPUTS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([0.1, 1.0, 5.0])
CE = F.cross_entropy


def weighted(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y, WEIGHTS.to(o))


HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "offset of a million": lambda o, y: weighted(o, y) + 1e6,
    "offset of a trillion": lambda o, y: weighted(o, y) + 1e12,
    "negative offset": lambda o, y: weighted(o, y) - 1e9,
    "beside a large mean": lambda o, y: weighted(o, y) + 1e9 * o[:, 0].mean(),
    "beside a loss of another output": lambda o, y: (
        1e-8 * CE(o[:, :2], y.clamp_max(1), WEIGHTS[:2].to(o)) + o[:, 2].square().mean()
    ),
    "logarithm of the value": lambda o, y: CE(o, y).log() + 1e6,
    "only the derivative is no mean": lambda o, y: CE(o, y) * len(y) - (CE(o, y) * (len(y) - 1)).detach(),
    "tiny": lambda o, y: 1e-12 * weighted(o, y),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_losses_whose_values_hide_that_they_are_no_means_are_refused(name: str) -> None:
    with pytest.raises(ObjectiveError, match="not a mean over samples"):
        check_loss(HIDDEN[name], OUTPUTS, Y)


MEANS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "offset": (lambda o, y: CE(o, y) + 1e6, Y),
    "negative": (lambda o, y: -CE(o, y), Y),
    "scales that differ": (lambda o, y: CE(o[:, :2], y.clamp_max(1)) * 1e-8 + o[:, 2].square().mean(), Y),
    "computed in float32": (lambda o, y: CE(o.float(), y), Y),
    "complex targets": (
        lambda o, y: (o - y.real).square().mean() + (o * y.imag).mean(),
        torch.randn(24, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)),
    ),
    "boolean targets": (lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.to(o)), Y > 0),
    "absolute value": (lambda o, y: (o[:, 0] - y).abs().mean(), Y),
    "linear": (lambda o, y: (o[:, 0] * y).mean(), Y),
    "one large target": (lambda o, y: (o[:, 0] - y).square().mean(), torch.cat([torch.randn(23), torch.tensor([1e6])])),
    "all targets equal": (CE, torch.zeros(24, dtype=torch.long)),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_pass(name: str, dtype: torch.dtype) -> None:
    loss, y = MEANS[name]
    check_loss(loss, OUTPUTS.to(dtype), y)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: torch.tensor(1.0, requires_grad=True),
        lambda o, y: torch.tensor(1.0),
        lambda o, y: CE(o.detach(), y),
        lambda o, y: CE(o.detach().requires_grad_(), y),
    ],
)
def test_losses_that_do_not_depend_on_the_outputs_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ObjectiveError, match="does not depend on the outputs"):
        check_loss(loss, OUTPUTS, Y)


def penalty(model: nn.Module) -> Tensor:
    return 0.05 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


@pytest.mark.parametrize("captured", ["original", "own weight"])
def test_a_penalty_in_the_loss_is_refused_and_a_constant_is_not(captured: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    other = model if captured == "original" else nn.Linear(2, 2)
    data = torch.randn(24, 5), Y
    with pytest.raises(ObjectiveError, match="without the regularizer"):
        make_objective(model, lambda o, y: CE(o, y) + penalty(other), data)
    constant = make_objective(model, lambda o, y: CE(o, y) + penalty(other).detach(), data, dtype=torch.float64)
    plain = make_objective(model, CE, data, dtype=torch.float64)
    torch.testing.assert_close(dense(hessian(constant)), dense(hessian(plain)))


def test_large_outputs_are_tried_on_few_samples() -> None:
    """Outputs of one sample of 2^18 numbers: the loss sees at most 32 MiB of them in float64."""
    seen: list[int] = []

    def loss(o: Tensor, y: Tensor) -> Tensor:
        seen.append(o.numel())
        return (o.flatten(1).mean(1) - y).square().mean()

    check_loss(loss, torch.randn(2, 2**9, 2**9), torch.randn(800))
    assert max(seen) * 8 <= 2**25
    with pytest.raises(ObjectiveError, match="not a mean"):
        check_loss(lambda o, y: loss(o, y) * len(y), torch.randn(2, 2**9, 2**9), torch.randn(800))
