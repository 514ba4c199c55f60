"""From the options of `train` to the description of a training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError

if TYPE_CHECKING:
    from ikun.data.datasets import Dataset
    from ikun.data.spec import DataSpec
    from ikun.networks import Spec
    from ikun.training.spec import TrainingSpec


ALPHA = {"ikun": 0.1}  # with 1, the literal reading of the paper, small networks hardly train; 1 for all others


def specifications(
    *,
    data_name: str,
    data_dir: Path | None,
    subset: int | None,
    image_size: int | None,
    hidden: str,
    held_out: int,
    timesteps: int | None,
    coding: str | None,
    alpha: float | None = None,
    samples: Dataset | None = None,
    **options: Any,
) -> tuple[Spec, DataSpec, TrainingSpec]:
    """Describe the network, the data and the training that the options of `train` ask for.

    The data set is opened, because the network depends on its shape, its classes and its number of time steps.

    Args:
        data_name: Name of the data set.
        data_dir: Folder with its files; None for the download cache.
        subset: Number of training samples; None for all.
        image_size: Side length in pixels, for image folders.
        hidden: Sizes of the hidden layers, for example "128,128".
        held_out: Number of held-out samples; 0 with `patience` means 10%.
        timesteps: Number of time steps; None for that of the data, or 4. For recordings of events, it is also the
            number of frames.
        coding: Encoding of the inputs; None for the usual one of the data.
        alpha: Parameter of ikun and tdbn; None for the usual one of the initializer.
        samples: The training samples, if they are loaded already.
        options: The other fields of TrainingSpec and of the network's Spec.

    Returns:
        The descriptions of the network, of the data and of the training.

    Raises:
        UsageError: If `hidden` or `held_out` cannot be used.
        DataError: If the data set cannot be read.
        ValueError: If another option has an invalid value.
    """
    from ikun.data.n_mnist import FRAMES
    from ikun.data.spec import DataSpec
    from ikun.networks import Spec
    from ikun.training.spec import TrainingSpec
    from ikun.training.update import require_relaxed

    options["alpha"] = ALPHA.get(options["init"], 1.0) if alpha is None else alpha
    fields = {f.name for f in dataclasses.fields(TrainingSpec)}
    spec = TrainingSpec(**{k: v for k, v in options.items() if k in fields})
    frames = (timesteps or FRAMES) if data_name == "n-mnist" else None
    probe = DataSpec(data_name, subset, spec.seed, image_size=image_size, frames=frames)
    found = probe.load(data_dir=data_dir) if samples is None else samples
    if spec.patience and not held_out:
        held_out = max(1, len(found) // 10)
    if held_out and not 0 < held_out < len(found):
        raise UsageError(
            f"--held-out {held_out} leaves no training samples, of {len(found)}: give a number from 1 to "
            f"{len(found) - 1}"
        )
    try:
        sizes = tuple(int(part) for part in hidden.split(","))
    except ValueError:
        raise UsageError(f"--hidden '{hidden}' is not a list of sizes like 128,128") from None
    if timesteps is None:
        timesteps = found.timesteps or 4
    network = Spec(
        input_shape=found.input_shape,
        classes=found.classes,
        hidden=sizes,
        timesteps=timesteps,
        coding=coding or ("direct" if found.timesteps is None else "spikes"),
        **{k: v for k, v in options.items() if k not in fields},
    )
    if spec.needs_relaxed:
        require_relaxed(network.surrogate)
    return network, dataclasses.replace(probe, held_out=held_out), spec
