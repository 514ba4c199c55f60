"""Robustness of a checkpoint: accuracy on corrupted test images and under weight noise. A step of studies."""

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


OPTIONS = ("corruptions", "severities", "noise", "draws", "samples")


def robustness_settings(options: dict[str, Any]) -> tuple[RobustnessSettings, dict[str, Any]]:
    """What to measure and how to open a checkpoint for it, from a preset's [robustness], keys of OPTIONS.

    Raises ValueError for values that do not fit.
    """
    from hessian_tools.analysis.robustness import RobustnessSettings
    from ikun.data.corruptions import CORRUPTIONS

    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    opening: dict[str, Any] = {"samples": str(options.pop("samples", "all")), "split": "test", "batch_size": None}
    opening |= {"params": "*", "surrogate": None, "dtype": "float32"}
    for key, value in options.items():
        if isinstance(value, tuple) != (key != "draws"):
            raise ValueError(f"{key} must be {'a number' if key == 'draws' else 'a list'}, not {value!r}")
    settings = RobustnessSettings(**options)
    for kind in settings.corruptions:
        if kind not in CORRUPTIONS:
            raise ValueError(f"no corruption '{kind}': choose of {', '.join(CORRUPTIONS)}")
    if not all(severity in range(1, 6) for severity in settings.severities):
        raise ValueError(f"severities must be whole numbers from 1 to 5, not {settings.severities}")
    return settings, opening


def analyse_robustness(job: Job, settings: RobustnessSettings, data_dir: Path | None) -> RobustnessResult:
    """Measure a checkpoint that was opened on its test samples. Raises DataError for data that cannot be corrupted."""
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
