"""Loss functions of the firing rates and the labels, averaged over samples."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
