"""Results that are there already: kept, refused, or cleared away, but never overwritten unasked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Job, measured_on

if TYPE_CHECKING:
    from hessian_tools.results.provenance import Analysed


R = TypeVar("R", bound="Analysed")


def existing_result(
    stem: Path, load: Callable[[Path], R], settings: Any, job: Job, force: bool, resume: bool, locks: ExitStack
) -> R | None:
    """The finished result STEM.json that --resume keeps, or None where the analysis is to be done.

    load reads a result of the command; settings: the dataclass that it stores. With --force the way is cleared. Until
    `locks` closes, no other process may write this result. Raises UsageError for a result made in another way
    (it may have cost an hour), for an interrupted analysis and for one that is under way, and OSError for a folder that
    cannot be written.
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
        raise UsageError(f"an interrupted analysis lies at {state}: --resume it, or --force a new one")
    return None


def analysis_lock(stem: Path) -> AbstractContextManager[None]:
    """While the results STEM.* are made: no other process does the same (hessian_tools.io.files.alone)."""
    from hessian_tools.io.files import alone

    return alone(stem, rf"{re.escape(stem.name)}(\.layers|\.samples)?\.(json|npz|png|pdf)")


def hold(locks: ExitStack, lock: AbstractContextManager[None], output: Path, elsewhere: str) -> None:
    """Hold a lock until `locks` closes. Raises UsageError if another process has it."""
    try:
        locks.enter_context(lock)
    except BlockingIOError:
        raise UsageError(f"{output}: another process is writing it: wait for it, or {elsewhere}") from None


def _same(existing: Path, load: Callable[[Path], R], settings: Any, job: Job) -> R | None:
    from hessian_tools.io.json import ResultError

    if not existing.exists():
        return None
    try:
        old = load(existing)
    except ResultError:
        raise UsageError(f"{existing} exists and is no result of this version: --tag NAME or --force") from None
    asked = json.loads(json.dumps(dataclasses.asdict(settings)))
    here = measured_on(job.objective)
    new: dict[str, dict[str, Any]] = {
        "settings": {name: value for name, value in asked.items() if name != "memory"},  # which changes no number
        "checkpoint": {"sha256": job.provenance["checkpoint"]["sha256"]},
        "data": job.provenance["data"],
        "network": job.provenance["network"],
    }
    differing = [
        f"{part} {key}"
        for part, values in new.items()
        for key, value in values.items()
        if getattr(old, part).get(key) != value
    ]
    if old.dtype != here["dtype"].removeprefix("torch."):
        differing.append("dtype")
    named: dict[str, Any] = getattr(old, "parameters", None) or getattr(old, "weight_norms", {})
    if list(named) != list(here["parameters"]):
        differing.append("set of parameters")
    if differing:
        raise UsageError(
            f"{existing} was made with another {differing[0]}: keep both with --tag NAME, or overwrite it with --force"
        )
    return old
