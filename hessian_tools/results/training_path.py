"""Result of a path of training: snapshots of one run in a plane, and the loss over that plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hessian_tools.results.text import brief, headline

TRAINING_PATH_SCHEMA = "ikun-hessian/trajectory/1"
NAN = float("nan")


@dataclass(frozen=True)
class Snapshot:
    """One snapshot of a run, and its place in the plane.

    Attributes:
        name: Name, such as that of its file.
        sha256: SHA-256 of its file; "" if unknown.
        epoch: Epoch after which it was saved; None if unknown.
        position: Coordinates (s, t) of its orthogonal projection onto the plane.
        off_plane: Distance of its weights from the plane.
        loss: True loss of the snapshot itself.
        accuracy: Accuracy of the snapshot itself; NaN if the targets are not class labels.
        projected_loss: True loss at the projection.
    """

    name: str
    sha256: str
    epoch: int | None
    position: tuple[float, float]
    off_plane: float
    loss: float
    accuracy: float
    projected_loss: float

    __repr__ = brief


@dataclass(frozen=True)
class TrainingPath:
    """The path of one training run in a plane through the last snapshot, at w + s u + t v for unit vectors u and v.

    Attributes:
        schema: Name and version of the file format.
        checkpoint: Source of the last snapshot's weights w, such as path and SHA-256.
        data: Data set, split, number of samples and loss.
        network: Network and its surrogate.
        training: Settings and outcome of the training.
        settings: Settings of the analysis.
        num_parameters: Number P of parameters.
        parameters: Number of elements of each parameter tensor, by name.
        weight_norm: Norm ||w||, the unit in which distances are drawn.
        loss: True loss at w.
        accuracy: Accuracy at w; NaN if the targets are not class labels.
        dtype: Data type of the weights.
        device: Device of the computation.
        seed: Random seed.
        directions: Names of u and v: "pc1" and "pc2" for principal components.
        explained: Shares of the snapshots' variance (sum of squared distances from their mean) along u and v.
        cosine: Cosine of the chosen directions, before v was made orthogonal to u. It is 0 for principal components.
        first: Grid of s.
        second: Grid of t.
        plane_loss: True loss; `plane_loss[i][j]` is the loss at s = first[j] and t = second[i].
        relaxed_loss: Loss of the relaxed network in the same form; empty if there is no relaxed network.
        snapshots: The snapshots in the order of training. The last one is w, at (0, 0).
        refused: Reason why there is no relaxed network, by name.
        evaluations: Number of evaluations of a loss on all samples.
        seconds: Run time in seconds.
        versions: Versions of the libraries used.
    """

    schema: str
    checkpoint: dict[str, Any]
    data: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    settings: dict[str, Any]
    num_parameters: int
    parameters: dict[str, int]
    weight_norm: float
    loss: float
    accuracy: float
    dtype: str
    device: str
    seed: int
    directions: tuple[str, str]
    explained: tuple[float, float]
    cosine: float
    first: tuple[float, ...]
    second: tuple[float, ...]
    plane_loss: tuple[tuple[float, ...], ...]
    relaxed_loss: tuple[tuple[float, ...], ...]
    snapshots: tuple[Snapshot, ...]
    refused: dict[str, str]
    evaluations: int
    seconds: float
    versions: dict[str, str]

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in zip(self.directions, self.explained, strict=True))
        return f"{headline(self)}\n  {len(self.snapshots)} snapshots; variance along {shares}"
