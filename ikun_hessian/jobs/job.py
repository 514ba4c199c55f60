"""The input of an analysis: an opened checkpoint with its samples, or a network described by options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError

if TYPE_CHECKING:
    from hessian_tools.objective import Objective

OPENING = ("samples", "split", "batch_size", "params", "surrogate", "dtype")  # of these, what a number depends on


@dataclass(frozen=True)
class Own:
    """A network of the user's own, as the options of `own_options` say; None: not given."""

    model: str | None = None
    data: str | None = None
    loss: str | None = None
    library: str | None = None
    timesteps: int | None = None
    sequences: bool = False
    time_first: bool | None = None
    output: str | None = None
    readout: str | None = None
    replace_surrogate: str | None = None
    reset: str | None = None
    dt: float | None = None

    def meant(self, path: Path) -> bool:
        """Whether the checkpoint is of such a network. Raises UsageError for its options without it."""
        if self.model is not None or path.suffix == ".nir":
            return True
        given = [f.name.replace("_", "-") for f in fields(self) if getattr(self, f.name) != f.default]
        if given:
            option = "time-first and --batch-first" if given[0] == "time-first" else given[0]
            raise UsageError(f"--{option}: for networks of your own: give --model module:function too")
        return False


@dataclasses.dataclass(frozen=True)
class Job:
    """A checkpoint opened for analysis.

    objective: its loss on the samples asked for. another(steeper=1.0, **changes): the same objective with the surrogate
    so many times steeper and the network's Spec changed so (of a network of the user's own, surrogate alone can be).
    variants: changes, by name, of what is convention in a spiking network's derivative. threshold: of its neurons;
    None where its surrogate cannot be another. provenance: of what was analysed, as in JSON.
    """

    path: Path
    objective: Objective
    another: Callable[..., Objective]
    variants: dict[str, dict[str, Any]]
    threshold: float | None
    provenance: dict[str, Any]


def measured_on(objective: Objective) -> dict[str, Any]:
    """What the numbers depend on beside settings and provenance; part of the key of an interrupted run."""
    return {
        "dtype": str(objective.dtype),
        "device": str(objective.device),
        "batches": objective.sizes,
        "segmented": objective.segmented,
        "parameters": {name: p.numel() for name, p in objective.parameters.items()},
    }
