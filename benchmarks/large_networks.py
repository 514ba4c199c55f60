"""Networks of 11 million parameters and their samples, for `--model` and `--data` of the command (see large.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
IMAGES = 256


def sew_resnet18() -> nn.Module:
    """Return SpikingJelly's SEW ResNet18, all steps at once (`--timesteps 4`)."""
    from network_cases import make_case

    return make_case("sew-resnet18-multi", small=False).net


def ms_resnet18() -> nn.Module:
    """Return SpikingJelly's MS-ResNet18, which runs over its four steps by itself."""
    from network_cases import make_case

    return make_case("ms-resnet18", small=False).net


def samples() -> tuple[Tensor, Tensor]:
    """Return the first digits of scikit-learn, as images [256, 3, 32, 32], and their labels [256]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:IMAGES] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return F.interpolate(x, scale_factor=4, mode="bilinear").repeat(1, 3, 1, 1), torch.tensor(labels[:IMAGES])
