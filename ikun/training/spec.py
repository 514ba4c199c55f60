"""How a network is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ikun.initializers.names import INITIALIZERS, LAWS
from ikun.losses import LOSSES

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("cosine", "step", "none")


@dataclass(frozen=True)
class TrainingSpec:
    """How to train. gain: factor on the variance of the initializer's weights. momentum: of sgd. patience: stop after
    so many epochs without a better held-out loss and keep the best (0: never). step schedule: lr x 0.1 after each third
    of the epochs. snapshots: so many checkpoints on the way. save_at_loss: one more for each of these, of the first
    epoch whose training loss is no larger.
    """

    init: str = "ikun"
    alpha: float = 1.0
    law: str = "empirical"
    gain: float = 1.0
    loss: str = "mse"
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "cosine"
    weight_decay: float = 0.0
    momentum: float = 0.9
    epochs: int = 20
    batch_size: int = 128
    seed: int = 42
    patience: int = 0
    snapshots: int = 0
    save_at_loss: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        choices = (("init", INITIALIZERS), ("law", LAWS), ("loss", tuple(LOSSES)))
        for name, allowed in (*choices, ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not '{getattr(self, name)}'")
        if not (all(0 < x < math.inf for x in (self.lr, self.alpha, self.gain)) and self.weight_decay >= 0):
            raise ValueError("lr, alpha and gain must be positive, weight_decay not negative")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")
        if self.epochs < 0 or self.batch_size < 1 or min(self.seed, self.patience, self.snapshots) < 0:
            raise ValueError("epochs, seed, patience and snapshots must not be negative, batch_size at least 1")
        if not all(loss > 0 and math.isfinite(loss) for loss in self.save_at_loss):
            raise ValueError(f"save_at_loss must be positive numbers, not {self.save_at_loss}")
        if len({f"{loss:g}" for loss in self.save_at_loss}) < len(self.save_at_loss):
            raise ValueError(f"save_at_loss has a number twice: {self.save_at_loss}")
