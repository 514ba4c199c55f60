"""Losses: means over samples of the network's outputs and the labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mean_square(rates: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples and classes of (rate - one-hot)^2; rates [N, K], labels [N]."""
    # not F.mse_loss: forward-over-reverse through it fails in PyTorch 2.13
    return (rates - F.one_hot(labels, rates.shape[1]).to(rates.dtype)).square().mean()


def cross_entropy(rates: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the rates [N, K] taken as logits, mean over samples (SpikingJelly's convention)."""
    return F.cross_entropy(rates, labels)


LOSSES = {"mse": mean_square, "ce": cross_entropy}
