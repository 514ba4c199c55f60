"""Plan the networks of the study of generalization: the grid in every environment, in a random order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ikun_hessian.experiments.generalization.network import NetworkUnit
from ikun_hessian.experiments.generalization.settings import GeneralizationSettings
from ikun_hessian.jobs.options import TRAIN
from ikun_hessian.jobs.schema import read_options
from ikun_hessian.jobs.training import specifications

RATE = "lr"  # the axis whose levels are the first, second, ... learning rate of an optimizer


def in_environments(
    runs: Mapping[str, Mapping[str, Any]], environments: Mapping[str, Mapping[str, Any]], order: int
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Repeat the runs of a grid in every environment.

    Args:
        runs: Options of `train` by the name of the run.
        environments: Options of `train` by the name of the environment.
        order: Seed of the order.

    Returns:
        Environment and options by the name of the network, in a random order: every prefix is a random sample.

    Raises:
        ValueError: If an environment sets an option that is varied, or the seed.
    """
    varied = varied_keys(runs)
    for environment, options in environments.items():
        if wrong := sorted({*varied, "seed"} & set(options)):
            raise ValueError(f"environments: '{environment}' sets '{wrong[0]}', which is varied itself")
    found = [
        (f"{environment}-{name}", (environment, {**run, **options}))
        for environment, options in environments.items()
        for name, run in runs.items()
    ]
    places = np.argsort(np.random.PCG64(order).random_raw(len(found)), kind="stable")  # a stream that never changes
    return dict(found[i] for i in places)


def varied_keys(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the options that differ between runs, without the seed."""
    keys = dict.fromkeys(key for run in runs.values() for key in run if key != "seed")
    return [key for key in keys if len({repr(run.get(key)) for run in runs.values()}) > 1]


def axes_of(runs: Mapping[str, Mapping[str, Any]], text: Any) -> dict[str, dict[str, str]]:
    """Return the value of every run on every axis of the grid, as text, by the name of the run.

    Every optimizer has learning rates of its own. On the axis of the learning rate the value is therefore "1" for the
    smallest rate of the run's optimizer, "2" for the next, and so on.

    Args:
        runs: Options of `train` by the name of the run.
        text: Function that formats an option.
    """
    varied = varied_keys(runs)
    rates: dict[Any, set[float]] = {}
    for run in runs.values():
        rates.setdefault(run.get("optimizer"), set()).add(float(run.get(RATE, 0)))
    return {
        name: {
            key: str(sorted(rates[run.get("optimizer")]).index(float(run[RATE])) + 1) if key == RATE else text(run[key])
            for key in varied
        }
        for name, run in runs.items()
    }


def units(
    runs: Mapping[str, Mapping[str, Any]],
    settings: GeneralizationSettings,
    folder: Path,
    *,
    text: Any,
    data_dir: Path | None,
    device: str,
    study: int,
) -> tuple[tuple[NetworkUnit, ...], dict[str, dict[str, Any]]]:
    """Describe all networks of the study.

    Args:
        runs: Options of `train` of the grid, by the name of the run.
        settings: The environments, and the settings of the measures.
        folder: Folder of the results.
        text: Function that formats an option.
        data_dir: Folder of the data set, or a folder with one folder per data set; None for the download cache.
        device: "cpu" or "cuda".
        study: Process ID of the study.

    Returns:
        The networks in the order of their runs, and their options by name.

    Raises:
        OptionError: If an option is unknown or invalid.
        DataError: If the data cannot be read.
        ValueError: If a network or training cannot be built, or there are fewer samples than are measured.
    """
    made, options_of, known = [], {}, {}
    shared, samples = None, None
    axes = axes_of(runs, text)
    for name, (environment, options) in in_environments(runs, settings.environments, settings.order).items():
        condition = {key: value for key, value in options.items() if key != "seed"}
        parsed = {**read_options(TRAIN, condition), "seed": 0}  # seed 0 draws the training images of all networks
        at = data_dir
        if data_dir is not None and (data_dir / str(parsed["data_name"])).is_dir():
            at = data_dir / str(parsed["data_name"])
        if (key := repr(sorted(condition.items()))) not in known:
            known[key] = specifications(data_dir=at, samples=samples, **parsed)
        network, data, training = known[key]
        shared = shared or data
        samples = samples or shared.load("train", at)
        if data != shared:
            raise ValueError(f"run {name}: all networks must have the same samples: data and subset cannot vary")
        if training.epochs < 1:
            raise ValueError(f"run {name}: epochs must be at least 1, not {training.epochs}")
        made.append(
            NetworkUnit(
                name,
                folder,
                environment,
                axes[name.removeprefix(f"{environment}-")],
                network,
                data,
                replace(training, seed=options["seed"]),
                settings,
                at,
                device,
                study,
            )
        )
        options_of[name] = dict(options)
    if samples is not None and settings.samples > len(samples):
        raise ValueError(f"samples {settings.samples}: there are {len(samples)} training samples")
    return tuple(made), options_of
