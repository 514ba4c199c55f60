"""Computation and files of the path of a training run in a plane."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ikun_hessian.jobs.analyses.landscape import relaxed_objective
from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Job, measured_on
from ikun_hessian.jobs.progress_bar import Bar

if TYPE_CHECKING:
    from hessian_tools.analysis.training_path import SavedWeights, TrainingPathSettings
    from hessian_tools.results.training_path import TrainingPath


def saved_snapshots(paths: Sequence[Path], open_one: Callable[[Path], Job]) -> tuple[Job, list[SavedWeights]]:
    """Open the snapshots of a run one after another, and keep their weights and losses.

    Snapshots that record an epoch are sorted by it; others stay in the order given. Of equal weights under several
    names, the last is kept.

    Args:
        paths: The snapshots.
        open_one: Opens a checkpoint.

    Returns:
        The job of the last snapshot, and all snapshots.

    Raises:
        UsageError: If only some snapshots record an epoch, or two with different weights record the same one.
        ValueError: If they are not snapshots of one run.
    """
    import torch

    from hessian_tools.analysis.training_path import saved_weights
    from hessian_tools.results.trajectory import one_run

    opened = []
    for path in paths:
        job = open_one(path)
        training = job.provenance["training"]
        best, last = training.get("best_epoch"), training.get("epochs_run")
        epoch = last if best is None else best
        saved = saved_weights(job.objective, path.name, epoch, job.provenance["checkpoint"]["sha256"])
        opened.append((path, saved, training, job.provenance["network"]))
    one_run([(path.name, training, network) for path, _, training, network in opened])
    epochs = [saved.epoch for _, saved, *_ in opened]
    if any(epoch is None for epoch in epochs) and any(epoch is not None for epoch in epochs):
        unknown = paths[epochs.index(None)].name
        raise UsageError(f"{unknown} does not say after how many epochs it was saved: it is not a snapshot of a run")
    if None not in epochs:
        opened.sort(key=lambda one: one[1].epoch or 0)
    kept = []
    for i, one in enumerate(opened):
        later = [other for other in opened[i + 1 :] if torch.equal(other[1].weights, one[1].weights)]
        kept += [] if later else [one]
    for (path, saved, *_), (other, beside, *_) in itertools.pairwise(kept):
        if saved.epoch is not None and saved.epoch == beside.epoch:
            raise UsageError(f"{path.name} and {other.name} are both of epoch {saved.epoch}: use only one of them")
    return open_one(kept[-1][0]), [saved for _, saved, *_ in kept]


def analyse_training_path(
    job: Job, snapshots: Sequence[SavedWeights], settings: TrainingPathSettings, stem: Path, shown: bool = True
) -> TrainingPath:
    """Compute the path, or resume an interrupted analysis of it."""
    from hessian_tools.analysis.training_path import training_path
    from hessian_tools.io.json import clean
    from hessian_tools.io.versions import versions
    from hessian_tools.resume import Phases

    stem.parent.mkdir(parents=True, exist_ok=True)
    provenance = {name: job.provenance[name] for name in ("checkpoint", "data", "network", "training")}
    key = {
        "settings": dataclasses.asdict(settings),
        **provenance,
        **measured_on(job.objective),
        "versions": versions(),
    }
    relaxed, refused = relaxed_objective(job)
    with Bar("", shown) as bar:
        return training_path(
            job.objective,
            snapshots,
            settings,
            relaxed=relaxed,
            refused=refused,
            provenance=provenance,
            progress=bar.update,
            phases=Phases(Path(f"{stem}.resume"), clean(key)),
        )


def write_training_path(result: TrainingPath, stem: Path, captioned: bool = True) -> None:
    """Write the figure and the result, and remove the state of an interrupted run."""
    from hessian_tools.io.json import save_result
    from hessian_tools.plots.style import save_figure
    from hessian_tools.plots.training_path import training_path_figure
    from hessian_tools.resume import Phases

    save_figure(training_path_figure(result, captioned), stem)
    save_result(result, Path(f"{stem}.json"))
    Phases.remove(Path(f"{stem}.resume"))
