"""Decide what to do with existing results: keep them, refuse to overwrite them, or (with --force) redo them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Job, measured_on

if TYPE_CHECKING:
    from hessian_tools.results.provenance import Analysed


R = TypeVar("R", bound="Analysed")
LONGEST_VALUE = 60  # characters of a value in a message


def existing_result(
    stem: Path, load: Callable[[Path], R], settings: Any, job: Job, force: bool, resume: bool, locks: ExitStack
) -> R | None:
    """Return the finished result STEM.json if --resume keeps it, or None if the analysis must be done.

    If it must be done, no other process can write this result until `locks` is closed.

    Args:
        stem: Path of the result without ending.
        load: Reads a result of the command.
        settings: The dataclass of settings, which the result stores.
        job: The opened checkpoint.
        force: Whether to discard an existing result and an interrupted analysis.
        resume: Whether to keep a finished result, and to resume an interrupted analysis.
        locks: Holds the lock.

    Raises:
        UsageError: If the result was made with other settings (it may have taken an hour), if an interrupted analysis
            exists, or if another process is writing the result.
        OSError: If the folder cannot be written.
    """
    from hessian_tools.resume import Phases

    state = Path(f"{stem}.resume")
    old = None if force else _same(Path(f"{stem}.json"), load, settings, job)
    if old and resume and not state.exists():
        return old
    hold(locks, analysis_lock(stem), stem, "choose another --out or --tag")
    if force:
        Phases.remove(state)
    elif state.exists() and not resume:
        raise UsageError(f"{state}: an interrupted analysis. Use --resume to continue it, or --force to start again.")
    return None


def analysis_lock(stem: Path) -> AbstractContextManager[None]:
    """Return a lock on the results STEM.* (hessian_tools.io.files.alone)."""
    from hessian_tools.io.files import alone

    return alone(stem, rf"{re.escape(stem.name)}(\.layers|\.samples)?\.(json|npz|png|pdf)")


def hold(locks: ExitStack, lock: AbstractContextManager[None], output: Path, elsewhere: str) -> None:
    """Hold a lock until `locks` is closed. Raise UsageError if another process has it."""
    try:
        locks.enter_context(lock)
    except BlockingIOError:
        raise UsageError(f"{output}: another process is writing it: wait for it, or {elsewhere}") from None


def _same(existing: Path, load: Callable[[Path], R], settings: Any, job: Job) -> R | None:
    """Return the existing result, or None. Raise UsageError if it was made in another way."""
    from hessian_tools.io.json import ResultError

    if not existing.exists():
        return None
    try:
        old = load(existing)
    except ResultError:
        raise UsageError(
            f"{existing} exists but was not written by this version. Use --tag NAME to keep it, or --force to "
            "overwrite it."
        ) from None
    if difference := next(_differences(old, settings, job), ""):
        raise UsageError(
            f"{existing} was made with {difference}. Keep both with --tag NAME, or replace it with --force."
        )
    return old


def _differences(old: Analysed, settings: Any, job: Job) -> Iterator[str]:
    """Yield what differs between an existing result and the analysis asked for: old and new value, where they help."""
    here = measured_on(job.objective)
    if (samples := old.data.get("samples", job.objective.samples)) != job.objective.samples:
        yield f"{_shown(samples)} samples; now {_shown(job.objective.samples)}"
    asked = json.loads(json.dumps(dataclasses.asdict(settings)))
    usual = {f.name: f.default for f in dataclasses.fields(settings)}  # settings that an older version did not know
    made = {**usual, **old.settings, **old.settings.get("asked", {})}  # asked: where parts were left out to fit a time
    parts = (
        (made, {name: v for name, v in asked.items() if name != "memory"}),  # it changes no number
        (old.data, {name: value for name, value in job.provenance["data"].items() if name != "sha256"}),
        (old.network, job.provenance["network"]),
        ({"dtype": old.dtype}, {"dtype": here["dtype"].removeprefix("torch.")}),
    )
    for before, now in parts:
        for name, value in now.items():
            if before.get(name) != value:
                yield _difference(name.replace("_", " "), _shown(before.get(name)), _shown(value))
    if old.checkpoint.get("sha256") != job.provenance["checkpoint"]["sha256"]:
        yield "other weights"
    if old.data.get("sha256") != job.provenance["data"]["sha256"]:
        yield "other samples"
    named: dict[str, Any] = getattr(old, "parameters", None) or getattr(old, "weight_norms", {})
    if list(named) != list(here["parameters"]):
        yield _difference("parameters", _shown(list(named)), _shown(list(here["parameters"])))


def _difference(name: str, old: str, new: str) -> str:
    return f"{name} {old}; now {new}" if max(len(old), len(new)) <= LONGEST_VALUE else f"other {name}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)
