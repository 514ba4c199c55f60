"""One unit of a study's work: a run is trained, then analysed, and what is done already is left as it is.

Everything lies in files that are complete or not there, so that a unit may be killed anywhere and run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ikun.checkpoint import DataSpec
    from ikun.networks import Spec
    from ikun.training import TrainingSpec

FAILED = "ikun-hessian/failed/1"


@dataclass(frozen=True)
class Step:
    """An analysis of one run. moment: of preset.MOMENTS; settings, opening: as the command's settings_of has them."""

    command: str
    moment: str
    tag: str
    settings: Any
    opening: dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A run and its analyses. runs: the folder of its files."""

    name: str
    runs: Path
    network: Spec
    data: DataSpec
    training: TrainingSpec
    steps: tuple[Step, ...]
    data_dir: Path | None
    device: str
    memory: float  # GiB
    study: int  # the process that leads the study

    @property
    def checkpoint(self) -> Path:
        return self.runs / f"{self.name}.pt"

    def checkpoints(self, moment: str) -> list[Path]:
        """Those of a moment that a finished training may have left: the losses that it reached, all its snapshots."""
        if moment == "final":
            return [self.checkpoint]
        from ikun.record import loss_path

        if moment == "loss":
            return [p for p in (loss_path(self.checkpoint, x) for x in self.training.save_at_loss) if p.exists()]
        return sorted(self.runs.glob(f"{self.name}.epoch[0-9][0-9][0-9][0-9].pt"))

    def stems(self) -> Iterator[tuple[Step, Path, Path]]:
        """Every analysis to be done, the checkpoint of each, and where its result goes, less the ending."""
        from ikun_hessian.options import result_stem

        for step in self.steps:
            for path in [] if step.moment == "final" and self.diverged() else self.checkpoints(step.moment):
                yield step, path, result_stem(path, None, step.tag or None, step.command)

    def description(self) -> dict[str, Any]:
        """NAME.train.json; {} while there is none."""
        from hessian_tools.results import ResultError, parsed, read_text

        try:
            found = parsed(read_text(self.checkpoint.with_suffix(".train.json")))
        except ResultError:
            return {}
        return found if isinstance(found, dict) else {}

    def trained(self) -> bool:
        return self.checkpoint.exists() and self.description().get("finished") is True

    def diverged(self) -> bool:
        """The training ended in NaN: the last finite weights are no minimum to be measured."""
        return any(str(f).startswith("NaN") for f in self.description().get("failures", []))

    def done(self) -> bool:
        """Nothing is left to do, or to be tried again."""
        if self.failure.exists() or not self.trained():
            return False
        return all(_measured(step, path, stem) for step, path, stem in self.stems())

    def files(self) -> list[Path]:
        """The description and the results that a comparison is made of, as far as they are there."""
        from hessian_tools.runs import FLATNESS, SPECTRUM, TRAIN

        beside = self.runs.glob("*.json") if self.runs.is_dir() else []
        return [
            p for p in beside if p.name.startswith(f"{self.name}.") and p.name.endswith((TRAIN, SPECTRUM, FLATNESS))
        ]

    @property
    def failure(self) -> Path:
        return self.runs / f"{self.name}.failed.json"

    def progress(self) -> float:
        """The share of the work that is done, as far as its files tell: half of it training, half analyses."""
        if not self.trained():
            try:
                epochs = self.checkpoint.with_suffix(".train.jsonl").read_bytes().count(b"\n")
            except OSError:
                return 0.0
            return 0.5 * min(1.0, epochs / max(1, self.training.epochs))
        results = [Path(f"{stem}.json").exists() for _, _, stem in self.stems()]
        return 0.5 + 0.5 * (sum(results) / len(results) if results else 1.0)


def run(unit: Unit) -> str:
    """Do what is left of a unit; returns why it failed, in one line, or "".

    A failure is kept as NAME.failed.json and tried again next time. What is no fault of the run ends the study: OSError
    and KeyboardInterrupt. Another process that writes the same is an OSError too.
    """
    import torch

    from ikun_hessian.options import pick

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # units run side by side; and the same numbers for any number of them
    failure = ""
    try:
        with _working(unit):
            pick(unit.device)
            if failure := _tried("train", lambda: _train(unit)):
                _describe(unit)
            else:
                left = [work for work in unit.stems() if not _measured(*work)]
                failures = [
                    _tried(f"{work[0].command} {work[1].stem}", partial(_analyse, unit, *work)) for work in left
                ]
                failure = next(filter(None, failures), "")
            if failure:
                step, _, error = failure.partition(": ")
                _write(unit.failure, {"schema": FAILED, "step": step, "error": error})
            else:
                unit.failure.unlink(missing_ok=True)
    finally:
        torch.set_num_threads(threads)
    return failure


def _tried(step: str, work: Callable[[], None]) -> str:
    try:
        work()
    except OSError:
        raise
    except Exception as error:  # the others go on, whatever it was
        message = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, ValueError | RuntimeError | MemoryError | click.ClickException)
        return f"{step}: {message if known else f'{type(error).__name__}: {message}'}"
    return ""


def _train(unit: Unit) -> None:
    from ikun.checkpoint import CheckpointError
    from ikun.record import run_paths
    from ikun.training import at_work, train

    state = run_paths(unit.checkpoint)["resume"]
    with at_work(unit.checkpoint):
        if not unit.trained():
            work: dict[str, Any] = {"data_dir": unit.data_dir, "device": unit.device}
            try:
                train(unit.network, unit.data, unit.training, unit.checkpoint, resume=state.exists(), **work)
            except CheckpointError:
                if not state.exists():
                    raise
                state.unlink()  # damaged, or of other settings: from the start
                train(unit.network, unit.data, unit.training, unit.checkpoint, **work)
        state.unlink(missing_ok=True)


def _analyse(unit: Unit, step: Step, path: Path, stem: Path) -> None:
    from ikun_hessian.earlier import at_work

    with at_work(stem):
        _written(unit, step, path, stem)


def _written(unit: Unit, step: Step, path: Path, stem: Path) -> None:
    from hessian_tools.phases import Phases, ResumeError
    from hessian_tools.results import save
    from ikun_hessian import flatness, robustness, spectrum
    from ikun_hessian.opening import open_job

    where: dict[str, Any] = {"memory": unit.memory, "data_dir": unit.data_dir, "device": unit.device}
    if step.command == "robustness":
        save(robustness.analyse(path, step.settings, step.opening, **where), Path(f"{stem}.json"))
        return
    job = open_job(path, **step.opening, **where)
    for last in (False, True):
        try:
            if step.command == "spectrum":
                spectrum.write(spectrum.analyse(job, step.settings, stem, shown=False), stem, figures=False)
            else:
                flatness.analyse(job, step.settings, stem, shown=False)
            return
        except ResumeError:
            if last:
                raise
            Phases.remove(Path(f"{stem}.resume"))  # damaged, or of another number of jobs: from the start


def _measured(step: Step, path: Path, stem: Path) -> bool:
    """There is a whole result, of this very checkpoint."""
    from hessian_tools import flatness, results, robustness
    from ikun.checkpoint import sha256

    kinds: dict[str, tuple[type[Any], str]] = {
        "spectrum": (results.SpectrumResult, results.SCHEMA),
        "flatness": (flatness.FlatnessResult, flatness.SCHEMA),
        "robustness": (robustness.RobustnessResult, robustness.SCHEMA),
    }
    try:
        found = results.load(f"{stem}.json", *kinds[step.command])
    except results.ResultError:
        return False
    return bool(found.checkpoint.get("sha256") == sha256(path))


def _describe(unit: Unit) -> None:
    """A NAME.train.json for a run that never came to write its own, so that it is counted."""
    if not unit.description():
        _write(
            unit.checkpoint.with_suffix(".train.json"),
            {
                "schema": "ikun-hessian/train/1",
                "network": dataclasses.asdict(unit.network),
                "data": dataclasses.asdict(unit.data),
                "training": dataclasses.asdict(unit.training),
                "finished": False,
                "epochs_run": 0,
                "best_epoch": 0,
                "failures": [],
                "seconds": 0.0,
                "start": None,
            },
        )


def _write(path: Path, value: dict[str, Any]) -> None:
    from hessian_tools.results import clean, write_atomically

    text = json.dumps(clean(value), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


# --- one study at a time in a folder

WORKING = ".working.lock"  # shared by those at work on a run


@contextlib.contextmanager
def _working(unit: Unit) -> Iterator[None]:
    """Dies with the study that started this process, and until then says that it is at work in the folder: two must
    not work on one run."""
    from ikun.files import locked

    with locked(unit.runs.parent / WORKING, shared=True):
        if os.getppid() == unit.study:
            threading.Thread(target=_watch, args=(unit.study,), daemon=True).start()
        yield


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
