"""One unit of a study: a run, its analyses, and its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ikun_hessian.experiments.study.our_training import OurTraining
    from ikun_hessian.experiments.study.own_training import OwnTraining


@dataclass(frozen=True)
class Step:
    """An analysis of one run.

    Attributes:
        command: Name of the analysis, one of preset.ANALYSES.
        moment: The checkpoints that are analysed, one of preset.MOMENTS.
        tag: Part of the names of the results.
        settings: Settings of the analysis.
        opening: Arguments of `open_job`.
    """

    command: str
    moment: str
    tag: str
    settings: Any
    opening: dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A run and its analyses.

    Attributes:
        name: Name of the run.
        runs: Folder of its files.
        training: The network, the data and the training.
        steps: The analyses.
        data_dir: Folder of the data set; None for the download cache.
        device: "cpu" or "cuda".
        memory: Memory in GiB.
        study: Process ID of the study.
    """

    name: str
    runs: Path
    training: OurTraining | OwnTraining
    steps: tuple[Step, ...]
    data_dir: Path | None
    device: str
    memory: float
    study: int

    @property
    def checkpoint(self) -> Path:
        return self.runs / f"{self.name}.pt"

    def checkpoints(self, moment: str) -> list[Path]:
        """Return the checkpoints of a moment: the final one, those of the losses reached, or all snapshots."""
        if moment == "final":
            return [self.checkpoint]
        from ikun.training.log import loss_path

        if moment == "loss":
            return [p for p in (loss_path(self.checkpoint, x) for x in self.training.save_at_loss) if p.is_file()]
        return sorted(p for p in self.runs.glob(f"{self.name}.epoch[0-9][0-9][0-9][0-9].pt") if p.is_file())

    def stems(self) -> Iterator[tuple[Step, Path, Path]]:
        """Yield every analysis with its checkpoint and the path of its result without ending."""
        from ikun_hessian.jobs.results import result_stem

        for step in self.steps:
            for path in [] if step.moment == "final" and self.diverged() else self.checkpoints(step.moment):
                yield step, path, result_stem(path, None, step.tag or None, step.command)

    def description(self) -> dict[str, Any]:
        """Return the content of NAME.train.json, or {} if there is none."""
        from hessian_tools.io.json import ResultError, parse_json, read_text

        try:
            found = parse_json(read_text(self.checkpoint.with_suffix(".train.json")))
        except ResultError:
            return {}
        return found if isinstance(found, dict) else {}

    def trained(self) -> bool:
        return self.checkpoint.is_file() and self.description().get("finished") is True

    def diverged(self) -> bool:
        """Return whether the training ended in NaN. The last finite weights are then not a minimum to measure."""
        return any(str(f).startswith("NaN") for f in self.description().get("failures", []))

    def done(self) -> bool:
        """Return whether all work is done, without a failure."""
        if self.failure.exists() or not self.trained():
            return False
        return all(is_measured(step, path, stem) for step, path, stem in self.stems())

    def files(self) -> list[Path]:
        """Return the existing description and results that comparisons use."""
        from ikun_hessian.experiments.runs import FLATNESS, SPECTRUM, TRAIN

        files = self.runs.glob("*.json") if self.runs.is_dir() else []
        return [p for p in files if p.name.startswith(f"{self.name}.") and p.name.endswith((TRAIN, SPECTRUM, FLATNESS))]

    @property
    def failure(self) -> Path:
        return self.runs / f"{self.name}.failed.json"

    def progress(self) -> float:
        """Return the fraction of finished work according to the files. Training and analyses count half each."""
        if not self.trained():
            from hessian_tools.io.json import ResultError, read_text

            try:
                epochs = read_text(self.checkpoint.with_suffix(".train.jsonl")).count("\n")
            except ResultError:
                return 0.0
            return 0.5 * min(1.0, epochs / max(1, self.training.epochs))
        results = [Path(f"{stem}.json").exists() for _, _, stem in self.stems()]
        return 0.5 + 0.5 * (sum(results) / len(results) if results else 1.0)


def is_measured(step: Step, path: Path, stem: Path) -> bool:
    """Return whether there is a complete result of this checkpoint."""
    from hessian_tools.io.json import ResultError, load_result
    from hessian_tools.results import flatness, robustness
    from hessian_tools.results import spectrum as results
    from ikun.checkpoint import sha256

    kinds: dict[str, tuple[type[Any], str]] = {
        "spectrum": (results.SpectrumResult, results.SPECTRUM_SCHEMA),
        "flatness": (flatness.FlatnessResult, flatness.FLATNESS_SCHEMA),
        "robustness": (robustness.RobustnessResult, robustness.ROBUSTNESS_SCHEMA),
    }
    try:
        found = load_result(f"{stem}.json", *kinds[step.command])
    except ResultError:
        return False
    return bool(found.checkpoint.get("sha256") == sha256(path))
