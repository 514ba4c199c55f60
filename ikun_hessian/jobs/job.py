"""Input of an analysis: an opened checkpoint with its samples, or a network described by options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError

if TYPE_CHECKING:
    from hessian_tools.objective import Objective


@dataclass(frozen=True)
class Own:
    """A network of the user's own, described by options (jobs.options.OWN). None means that the option is not given.

    Attributes:
        model: "module:function" of a function that builds the network.
        data: "module:function" of a function that returns samples.
        loss: "mse", "ce", or "module:function".
        library: Library of the network.
        timesteps: Number of steps to run the network for.
        sequences: Whether samples are sequences, with one input per step.
        time_first: Whether time is the first axis of inputs and outputs.
        output: Which element of a returned tuple to use.
        readout: How to reduce the output over time.
        valid: Entry of the inputs with the mask or the lengths of padded sequences.
        time_first_data: Whether the batches of `data` have time as the first axis.
        replace_surrogate: Surrogate for those that cannot be differentiated twice.
        reset: "module:function" that clears the state; for a .nir file: hard or soft.
        dt: Time step of a .nir file, in the unit of its time constants.
    """

    model: str | None = None
    data: str | None = None
    loss: str | None = None
    library: str | None = None
    timesteps: int | None = None
    sequences: bool = False
    time_first: bool | None = None
    output: str | None = None
    readout: str | None = None
    valid: str | None = None
    time_first_data: bool = False
    replace_surrogate: str | None = None
    reset: str | None = None
    dt: float | None = None

    def meant(self, path: Path) -> bool:
        """Return whether `path` is a checkpoint of such a network.

        Raises:
            UsageError: If it is not, and some of these options are given.
        """
        if self.model is not None or path.suffix == ".nir":
            return True
        given = [f.name.replace("_", "-") for f in fields(self) if getattr(self, f.name) != f.default]
        if given:
            option = "time-first and --batch-first" if given[0] == "time-first" else given[0]
            raise UsageError(f"--{option}: only for networks of your own: give --model module:function too")
        return False


@dataclasses.dataclass(frozen=True)
class Job:
    """A checkpoint opened for analysis.

    Attributes:
        path: The checkpoint.
        objective: The loss on the samples asked for.
        another: Function (steeper=1.0, **changes) that returns the same objective with a surrogate that is `steeper`
            times as steep, and with other fields of the network's Spec. In a network of the user's own, only
            `surrogate` can be changed.
        variants: Arguments of `another` by name, one for each convention in the derivative of a spiking network.
        threshold: Threshold of the neurons; None if the surrogate cannot be replaced.
        provenance: Description of what was analysed, as plain JSON values.
    """

    path: Path
    objective: Objective
    another: Callable[..., Objective]
    variants: dict[str, dict[str, Any]]
    threshold: float | None
    provenance: dict[str, Any]


def measured_on(objective: Objective) -> dict[str, Any]:
    """Return what the numbers depend on, in addition to settings and provenance."""
    return {
        "dtype": str(objective.dtype),
        "device": objective.device.type,  # not its number, which differs between ranks
        "batches": objective.sizes,
        "parameters": {name: p.numel() for name, p in objective.parameters.items()},
    }


def resume_key(job: Job, settings: Any, others: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what the numbers of an analysis depend on. An interrupted run is resumed only if this has not changed.

    Args:
        job: The opened checkpoint.
        settings: What is computed, a dataclass.
        others: What else they depend on, by the name that a message gives it.
    """
    from hessian_tools.io.json import clean
    from hessian_tools.io.versions import versions

    key = {"settings": dataclasses.asdict(settings), **job.provenance, **measured_on(job.objective)}
    cleaned: dict[str, Any] = clean({**key, "versions": versions(), **(others or {})})
    return cleaned
