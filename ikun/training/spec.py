"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ikun.initializers.names import INITIALIZERS, LAWS
from ikun.losses import LOSSES

LEAST_SCALE = 1e-12  # of alpha and gain, factors on the variance of float32 weights
MOST_SNAPSHOTS = 100_000
MOST_RATE = 1e30  # of the steps of float32 weights
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("cosine", "step", "none")
FORWARDS = ("spiking", "relaxed")


@dataclass(frozen=True)
class TrainingSpec:
    """The settings of a training run.

    Attributes:
        init: Name of the initializer.
        alpha: Parameter alpha of the initializers ikun and tdbn.
        law: One of LAWS: how the initializers ikun and firing obtain the distribution of the membrane potential.
        gain: Factor on the variance of the initializer's weights.
        loss: Name of the loss.
        optimizer: One of OPTIMIZERS.
        lr: Learning rate at the start.
        schedule: One of SCHEDULES. "cosine" decays the learning rate to 0, "step" multiplies it by 0.1 after each third
            of the epochs, and "none" keeps it constant.
        weight_decay: Weight decay of the optimizer.
        momentum: Momentum of sgd.
        epochs: Number of epochs.
        batch_size: Number of samples per batch.
        seed: Seed of all random numbers of the run.
        patience: Stop after this number of epochs without a better held-out loss, and keep the best weights. 0: never
            stop early.
        snapshots: Number of checkpoints to write during training, at equal intervals.
        save_at_loss: Write a checkpoint of the first epoch whose training loss is at most each of these values.
        sam: Radius rho of sharpness-aware minimization; 0 for plain training (see `ikun.training.update`).
        asam: Whether to use adaptive sharpness-aware minimization, whose radius is `sam`.
        sam_forward: One of FORWARDS: whether the gradients of training are those of the spiking or of the relaxed
            network. With "relaxed" this holds also without SAM, the logged training loss is that of the relaxed
            network, and all other losses and accuracies are those of the spiking network.
        relaxed_accuracy: Whether to log loss and accuracy of the relaxed network on the test samples too.

    Raises:
        ValueError: If a setting is not valid.
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
    sam: float = 0.0
    asam: bool = False
    sam_forward: str = "spiking"
    relaxed_accuracy: bool = False

    @property
    def needs_relaxed(self) -> bool:
        """Whether the run uses the relaxed network, which not every surrogate has."""
        return self.sam_forward == "relaxed" or self.relaxed_accuracy

    def __post_init__(self) -> None:
        choices = (("init", INITIALIZERS), ("law", LAWS), ("loss", tuple(LOSSES)))
        for name, allowed in (*choices, ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("sam_forward", FORWARDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not '{getattr(self, name)}'")
        if not (all(0 < x < math.inf for x in (self.lr, self.alpha, self.gain)) and self.weight_decay >= 0):
            raise ValueError("lr, alpha and gain must be positive, and weight_decay must not be negative")
        if max(self.lr, self.weight_decay) > MOST_RATE:
            raise ValueError(f"lr and weight_decay must be at most {MOST_RATE:g}: the weights would be infinite")
        for name in ("alpha", "gain"):
            if not LEAST_SCALE <= getattr(self, name) <= 1 / LEAST_SCALE:
                raise ValueError(
                    f"{name} must be from {LEAST_SCALE:g} to {1 / LEAST_SCALE:g}, not {getattr(self, name):g}: the "
                    "weights would be zero or infinite"
                )
        if not 0 <= self.sam <= MOST_RATE:
            raise ValueError(f"sam, a radius, must be from 0 to {MOST_RATE:g}, not {self.sam:g}")
        if self.asam and not self.sam:
            raise ValueError("asam needs a radius: set sam, for example to 0.5")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}")
        if self.epochs < 0 or self.batch_size < 1 or min(self.seed, self.patience, self.snapshots) < 0:
            raise ValueError("epochs, seed, patience and snapshots must be at least 0, and batch_size at least 1")
        if self.seed >= 2**63 or self.snapshots > MOST_SNAPSHOTS:
            raise ValueError(f"seed must be below 2^63, and snapshots at most {MOST_SNAPSHOTS:,}")
        if not all(loss > 0 and math.isfinite(loss) for loss in self.save_at_loss):
            raise ValueError(f"save_at_loss must be positive numbers, not {self.save_at_loss}")
        if len({f"{loss:g}" for loss in self.save_at_loss}) < len(self.save_at_loss):
            raise ValueError(f"save_at_loss has the same number twice (to six digits): {self.save_at_loss}")
