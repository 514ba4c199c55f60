"""Loss functions of the firing rates, or of the outputs over time, and the labels, averaged over samples."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_square(rates: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over samples and classes of (rate - target)^2, for rates [N, ...].

    Targets are labels [N], which are converted to one-hot, or floating-point numbers of the shape of the rates.
    """
    if labels.is_floating_point():
        if labels.shape != rates.shape:
            raise ValueError(f"targets {list(labels.shape)} do not have the shape of the outputs {list(rates.shape)}")
        return (rates - labels).square().mean()
    # F.mse_loss is not used because forward-over-reverse differentiation of it fails in PyTorch 2.13
    return (rates - F.one_hot(labels, rates.shape[1]).to(rates.dtype)).square().mean()


def cross_entropy(rates: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over samples, for rates [N, K] and labels [N].

    The rates are used as logits, as in SpikingJelly's examples.
    """
    return F.cross_entropy(rates, labels)


LOSSES = {"mse": mean_square, "ce": cross_entropy}


def tet(weight: float = 0.05, mean: float = 1.0) -> Loss:
    """Return the loss of temporal efficient training, for outputs over time [N, T, K] and labels [N].

    The loss is (1 - weight) times the mean over the steps of the cross-entropy of that step's outputs, plus weight
    times the mean of (output - mean)^2 over steps and classes. Source: Deng et al., Temporal Efficient Training of
    Spiking Neural Network via Gradient Re-weighting, ICLR 2022.

    Args:
        weight: Weight of the square error, from 0 to 1.
        mean: The value that the outputs are drawn to. The authors use the threshold.

    Raises:
        ValueError: If the weight is not from 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the square error must be from 0 to 1, but it is {weight}")

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        if outputs.dim() != 3:
            raise ValueError(f"outputs over time [N, T, K] are needed, not {list(outputs.shape)}")
        every = labels[:, None].expand(outputs.shape[:2])  # each step has the label of its sample
        entropy = F.cross_entropy(outputs.flatten(0, 1), every.flatten())
        return (1 - weight) * entropy + weight * (outputs - mean).square().mean()

    return loss


def time_first(loss: Loss) -> Loss:
    """Return a loss of outputs [N, T, ...] from one that is written for outputs [T, N, ...], such as snnTorch's.

    It can be used as a decorator. Targets are passed on as they are. A loss of shape [1] becomes a scalar.

    Args:
        loss: The function loss(outputs [T, N, ...], targets). It must be a mean over samples.
    """

    @functools.wraps(loss)
    def swapped(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.dim() < 3:
            raise ValueError(f"outputs over time [N, T, ...] are needed, not {list(outputs.shape)}")
        value = loss(outputs.transpose(0, 1), targets)
        return value.reshape(()) if isinstance(value, Tensor) and value.shape == (1,) else value

    return swapped
