"""Robustness of a checkpoint: accuracy on corrupted test images and under weight noise. Used by studies."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.job import Job

if TYPE_CHECKING:
    from torch import Tensor

    from hessian_tools.analysis.robustness import RobustnessSettings
    from hessian_tools.results.robustness import RobustnessResult


def robustness_settings(samples: str, **options: Any) -> tuple[RobustnessSettings, dict[str, Any]]:
    """Split the options of a preset's [robustness] into settings of the analysis and arguments of `open_job`.

    Args:
        samples: Number of test samples, or "all".
        options: The other options of jobs.options.ROBUSTNESS, and `seed`.

    Returns:
        The settings, and the arguments of `open_job` that the results depend on.

    Raises:
        ValueError: If a setting has an invalid value.
    """
    from hessian_tools.analysis.robustness import RobustnessSettings

    settings = RobustnessSettings(**options)
    if not all(severity in range(1, 6) for severity in settings.severities):
        raise ValueError(f"severities must be whole numbers from 1 to 5, not {settings.severities}")
    opening = {"samples": samples, "split": "test", "batch_size": None, "params": "*"}
    return settings, {**opening, "surrogate": None, "dtype": "float32"}


def analyse_robustness(job: Job, settings: RobustnessSettings, data_dir: Path | None) -> RobustnessResult:
    """Measure the robustness of a checkpoint that was opened on test samples.

    Raises:
        DataError: If the data are not images, which are the only data that can be corrupted.
    """
    import torch

    from hessian_tools.analysis.robustness import noisy_accuracy
    from hessian_tools.io.json import clean
    from hessian_tools.io.versions import versions
    from hessian_tools.objective import make_objective
    from hessian_tools.perturbation import accuracy, outputs_at
    from hessian_tools.results.robustness import ROBUSTNESS_SCHEMA, WEIGHTS, Accuracy, RobustnessResult
    from hessian_tools.seeding import stream
    from ikun.checkpoint import load_checkpoint
    from ikun.data.corruptions import corrupted
    from ikun.losses import LOSSES

    began = time.perf_counter()
    checkpoint, count = load_checkpoint(job.path), job.objective.samples
    data = checkpoint.samples("test", data_dir)
    images, labels = data.images[:count], data.labels[:count]

    @torch.no_grad()
    def share(pictures: Tensor) -> float:
        inputs = checkpoint.inputs(pictures)
        objective = make_objective(
            checkpoint.build(),
            LOSSES[checkpoint.loss],
            (inputs, labels),
            batch_size=max(job.objective.sizes),
            device=job.objective.device,
        )
        (outputs,) = outputs_at(objective, lambda _: objective.weights(), [0])
        return accuracy(objective, outputs)

    disturbed = {
        kind: {
            str(severity): Accuracy(share(corrupted(images, kind, severity, stream(settings.seed, severity))))
            for severity in settings.severities
        }
        for kind in settings.corruptions
    }
    if settings.noise:
        disturbed[WEIGHTS] = {
            f"{scale:g}": noisy_accuracy(job.objective, scale, settings.draws, settings.seed)
            for scale in settings.noise
        }
    return RobustnessResult(
        schema=ROBUSTNESS_SCHEMA,
        checkpoint=job.provenance["checkpoint"],
        data={**job.provenance["data"], "samples": count},
        network=job.provenance["network"],
        training=job.provenance["training"],
        settings=clean(dataclasses.asdict(settings)),
        accuracy=share(images),
        disturbed=disturbed,
        seconds=time.perf_counter() - began,
        versions=versions(),
    )
