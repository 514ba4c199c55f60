"""What the study of generalization keeps of one network: a small result, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "ikun-hessian/generalization/1"
ENDING = ".generalization.json"
MATCHED, END = "matched", "end"  # the first epoch at the threshold of the training loss, and the last epoch
MOMENTS = {MATCHED: "at matched training loss", END: "at the end of training"}


@dataclass(frozen=True)
class Moment:
    """A network at one epoch.

    Attributes:
        epoch: The epoch, from 1.
        train_loss: Loss on all training samples, in evaluation mode.
        train_accuracy: Accuracy on them.
        test_loss: Loss on all test samples.
        test_accuracy: Accuracy on them.
        measures: Value of every measure by name (see `measures`); NaN if it does not exist. The smoothed loss's own
            curvature is only measured at MATCHED.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    measures: dict[str, float]


@dataclass(frozen=True)
class NetworkResult:
    """One network of the study.

    Attributes:
        schema: Name and version of the file format.
        name: Name of the network.
        environment: Name of its environment.
        axes: Its value on every axis of the grid, as text.
        seed: Its seed.
        diverged: Whether a weight or the training loss became NaN or infinite. Such a network has no moments.
        epochs: Number of epochs.
        test_samples: Number of test samples.
        num_parameters: Number of weights.
        moments: The network at MATCHED, if it reached the threshold, and at END.
        seconds: Run time in seconds, by part: "training", "measuring".
        settings: Settings of the measures.
        data_sha256: Hashes of the training and the test samples.
        versions: Versions of the libraries used.
    """

    schema: str
    name: str
    environment: str
    axes: dict[str, str]
    seed: int
    diverged: bool
    epochs: int
    test_samples: int
    num_parameters: int
    moments: dict[str, Moment]
    seconds: dict[str, float]
    settings: dict[str, Any]
    data_sha256: dict[str, str]
    versions: dict[str, str]


def load_network(path: Path) -> NetworkResult:
    """Read the result of one network. Raise ResultError if the file cannot be used."""
    from hessian_tools.io.json import load_result

    return load_result(path, NetworkResult, SCHEMA)
