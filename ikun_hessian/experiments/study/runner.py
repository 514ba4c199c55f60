"""Run one unit of a study: train a run, then analyse it. Finished work is kept.

All state is in files that are either complete or missing, so that a unit can be killed at any time and run again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ikun_hessian.experiments.generalization.network import NetworkUnit
from ikun_hessian.experiments.study.unit import Step, Unit, is_measured
from ikun_hessian.jobs.errors import in_options
from ikun_hessian.jobs.user.code import users_error

FAILED = "ikun-hessian/failed/1"


def run_unit(unit: Unit | NetworkUnit) -> str:
    """Do the unfinished work of a unit. Return the reason of a failure in one line, or "".

    A failure is stored in NAME.failed.json, and the unit is tried again the next time. Errors that do not concern the
    run end the study: KeyboardInterrupt, and OSError, which includes another process that writes the same files.
    """
    _end_orphan(unit)
    import torch

    from ikun_hessian.jobs.device import pick

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # units run in parallel, and results must not depend on how many
    failure = ""
    try:
        with _working(unit):
            pick(unit.device)
            if isinstance(unit, NetworkUnit):
                failure = _tried("network", unit.run)
            elif failure := _tried("train", partial(_train, unit)):
                _describe(unit)
            else:
                left = [work for work in unit.stems() if not is_measured(*work)]
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
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints
            work()
    except OSError:
        raise
    except Exception as error:  # the other runs continue, whatever the error
        error = users_error(error) or error
        message = " ".join(in_options(error).split()) or type(error).__name__
        known = isinstance(error, ValueError | RuntimeError | MemoryError)
        return f"{step}: {message if known else f'{type(error).__name__}: {message}'}"
    return ""


def _train(unit: Unit) -> None:
    from ikun.training.log import run_paths
    from ikun.training.loop import training_lock

    with training_lock(unit.checkpoint):
        if not unit.trained():
            unit.training.run(unit.checkpoint, unit.device)
        run_paths(unit.checkpoint)["resume"].unlink(missing_ok=True)


def _analyse(unit: Unit, step: Step, path: Path, stem: Path) -> None:
    from ikun_hessian.jobs.existing_results import analysis_lock

    with analysis_lock(stem):
        _written(unit, step, path, stem)


def _written(unit: Unit, step: Step, path: Path, stem: Path) -> None:
    from hessian_tools.io.json import save_result
    from hessian_tools.resume import Phases, ResumeError
    from ikun_hessian.jobs.analyses import flatness, robustness, spectrum
    from ikun_hessian.jobs.open import open_job

    where: dict[str, Any] = {"memory": unit.memory, "data_dir": unit.data_dir, "device": unit.device}
    job = open_job(path, own=unit.training.own, **step.opening, **where)
    if step.command == "robustness":
        save_result(robustness.analyse_robustness(job, step.settings, unit.data_dir), Path(f"{stem}.json"))
        return
    for last in (False, True):
        try:
            if step.command == "spectrum":
                spectrum.write_spectrum(
                    spectrum.analyse_spectrum(job, step.settings, stem, shown=False), stem, figures=False
                )
            else:
                flatness.analyse_flatness(job, step.settings, stem, shown=False)
            return
        except ResumeError:
            if last:
                raise
            Phases.remove(Path(f"{stem}.resume"))  # damaged, or of another number of jobs: start again


def _describe(unit: Unit) -> None:
    """Write NAME.train.json for a run that failed before it wrote its own, so that the run is counted."""
    if not unit.description():
        _write(
            unit.checkpoint.with_suffix(".train.json"),
            {
                "schema": "ikun-hessian/train/1",
                **unit.training.settings(),
                "finished": False,
                "epochs_run": 0,
                "best_epoch": 0,
                "failures": [],
                "seconds": 0.0,
                "start": None,
            },
        )


def _write(path: Path, value: dict[str, Any]) -> None:
    from hessian_tools.io.files import write_atomically
    from hessian_tools.io.json import clean

    text = json.dumps(clean(value), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


WORKING = ".working.lock"  # shared lock of the processes that work on runs of a folder


@contextlib.contextmanager
def _working(unit: Unit | NetworkUnit) -> Iterator[None]:
    """Hold the shared lock of the folder, and end this process if the study that started it has ended.

    Without this, a run could be computed by two processes at the same time.
    """
    from hessian_tools.io.files import locked

    with locked(unit.runs.parent / WORKING, shared=True):
        if os.getppid() == unit.study:
            threading.Thread(target=_watch, args=(unit.study,), daemon=True).start()
        yield


def _end_orphan(unit: Unit | NetworkUnit) -> None:
    """End this worker process if the study that started it ended before the work began, as during imports."""
    kind = type(multiprocessing.current_process())
    if "loky" in kind.__module__ and unit.study not in (os.getpid(), os.getppid()):
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
