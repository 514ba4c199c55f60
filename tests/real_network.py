"""Curvature matrices of a trained spiking network."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import OPERATORS
from ikun.checkpoint import load_checkpoint
from ikun.losses import LOSSES

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "digits-csnn-ikun.pt"


@functools.cache
def curvature(name: str) -> Tensor:
    """`hessian` or `ggn` of two convolutions and the readout on 64 digits: 1,960 x 1,960, float64.

    A leading block of it is the curvature in the first weights alone.
    """
    checkpoint = load_checkpoint(CHECKPOINT)
    data = checkpoint.data.load()
    objective = make_objective(
        checkpoint.build(),
        LOSSES[checkpoint.loss],
        (data.images[:64], data.labels[:64]),
        params="conv*,norm*,fc2*",
        dtype=torch.float32,
    )
    matrix = dense(OPERATORS[name](objective, 2**30)).double()
    return (matrix + matrix.T) / 2
