"""The training of one run of a study with the networks, data and initializers of this package."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ikun.data.spec import DataSpec
    from ikun.networks import Spec
    from ikun.training.spec import TrainingSpec
    from ikun_hessian.jobs.job import Own


@dataclasses.dataclass(frozen=True)
class OurTraining:
    """One training run.

    Attributes:
        network: The network.
        data: The data.
        training: The training.
        data_dir: Folder of the data set; None for the download cache.
    """

    network: Spec
    data: DataSpec
    training: TrainingSpec
    data_dir: Path | None

    @property
    def own(self) -> Own | None:
        """Description of a network of the user's own: None."""
        return None

    @property
    def epochs(self) -> int:
        return self.training.epochs

    @property
    def snapshots(self) -> int:
        return self.training.snapshots

    @property
    def save_at_loss(self) -> tuple[float, ...]:
        return self.training.save_at_loss

    def settings(self) -> dict[str, Any]:
        """Return the settings that NAME.train.json records."""
        return {
            "network": dataclasses.asdict(self.network),
            "data": dataclasses.asdict(self.data),
            "training": dataclasses.asdict(self.training),
        }

    def run(self, out: Path, device: str) -> None:
        """Train, or resume an interrupted training, and write the checkpoint `out` with its log."""
        from ikun.checkpoint import CheckpointError
        from ikun.training.log import run_paths
        from ikun.training.loop import train

        state = run_paths(out)["resume"]
        specs = (self.network, self.data, self.training, out)
        work: dict[str, Any] = {"data_dir": self.data_dir, "device": device}
        try:
            train(*specs, resume=state.exists(), **work)
        except CheckpointError:
            if not state.exists():
                raise
            state.unlink()  # damaged, or of other settings: start again
            train(*specs, **work)
