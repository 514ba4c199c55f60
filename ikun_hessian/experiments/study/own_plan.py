"""Plan the runs of a study on a network of the user's own: read and check the options before hours of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ikun.initializers.names import INITIALIZERS
from ikun_hessian.experiments.study.own_training import AS_BUILT, OwnTraining, code_of, refuse_call
from ikun_hessian.experiments.study.preset import Preset, PresetError
from ikun_hessian.experiments.study.step_sizes import check_sizes
from ikun_hessian.experiments.study.unit import Step
from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.options import OWN, TRAIN
from ikun_hessian.jobs.schema import Option, OptionError, read_options
from ikun_hessian.jobs.training import ALPHA
from ikun_hessian.jobs.user.code import called, load_function
from ikun_hessian.jobs.user.samples import read_samples

STARTS = (*INITIALIZERS, AS_BUILT)
OURS = tuple(  # options of a run that are not arguments of the training function
    Option("init", str, AS_BUILT, choices=STARTS) if option.name == "init" else option
    for option in TRAIN
    if option.name in ("init", "alpha", "gain", "snapshots", "save-at-loss")
)
WHOLE = (*OWN, Option("train"))  # the table [own]


def own_trainings(
    found: Preset, runs: Mapping[str, Mapping[str, Any]], steps: Sequence[Step], data_dir: Path | None, memory: float
) -> dict[str, OwnTraining]:
    """Read the options of all runs of a study with a table [own].

    Args:
        found: The preset.
        runs: Options of every run by its name, with the seed. Those of OURS and of jobs.options.OWN have the same
            meaning in all studies. All others are arguments of the training function, with "_" in place of "-".
        steps: The analyses.
        data_dir: The option --data-dir, which must not be given.
        memory: Memory of a run in GiB.

    Returns:
        The training of every run, by name.

    Raises:
        PresetError: If an option cannot be used.
        UsageError: If a function of the user's cannot be used.
    """
    if data_dir is not None:
        raise PresetError(f"{found.source}: --data-dir is for data of ikun-hessian: [own] data has the samples")
    for step in steps:
        if step.command == "robustness":
            raise PresetError(f"{found.source}: [robustness] needs a network of ikun-hessian: remove it")
        if step.opening["split"] != "train":
            raise PresetError(f"{found.source}: [{step.command}] split: the samples are those of [own] data: remove it")
    made: dict[str, OwnTraining] = {}
    codes: dict[Own, str] = {}
    for name, options in runs.items():
        training = _training(found, name, options, memory, codes)
        if training.own not in [other.own for other in made.values()]:
            _check_network(found.source, training.own, steps, memory)
        made[name] = training
    return made


def _training(
    found: Preset, name: str, options: Mapping[str, Any], memory: float, codes: dict[Own, str]
) -> OwnTraining:
    known, ours = {option.name for option in OWN}, {option.name for option in OURS}
    where = f"{found.source}: run {name}"
    try:
        table = {**found.own, **{key: value for key, value in options.items() if key in known}}
        described = read_options(WHOLE, table)
    except OptionError as error:
        raise PresetError(f"{found.source}: [own] {error}") from None
    try:
        given = read_options(OURS, {key: value for key, value in options.items() if key in ours})
    except OptionError as error:
        raise PresetError(f"{where}: {error}") from None
    if given["alpha"] is None:
        given["alpha"] = ALPHA.get(given["init"], 1.0)
    function = described.pop("train")
    own = Own(**described)
    for key, value in (("model", own.model), ("data", own.data), ("train", function)):
        if value is None:
            raise PresetError(f'{found.source}: [own] {key} is missing: {key} = "module:function"')
    free = {key.replace("-", "_"): value for key, value in options.items() if key not in (*known, *ours, "seed")}
    try:
        refuse_call(function, free)
    except UsageError as error:
        raise PresetError(f"{where}: {error}") from None
    if own not in codes:
        codes[own] = code_of(own, function)
    epochs = free.get("epochs", 0)
    if given["snapshots"] and not (isinstance(epochs, int) and epochs > 0):
        raise PresetError(f"{where}: snapshots needs epochs, an argument of [own] train with the number of epochs")
    return OwnTraining(own, function, **given, options=free, seed=options["seed"], epochs=epochs, code=codes[own],
                       memory=memory)  # fmt: skip


def _check_network(source: str, own: Own, steps: Sequence[Step], memory: float) -> None:
    """Check the samples and the parameters that the analyses ask for."""
    most = max((int(s.opening["samples"]) for s in steps if s.opening["samples"] != "all"), default=1)
    for step in steps:
        curve = getattr(step.settings, "samples_curve", ())
        limit = step.opening["samples"]
        if curve and limit != "all" and max(curve) > int(limit):
            raise PresetError(f"{source}: [{step.command}] samples-curve needs {max(curve)} samples, of {limit}")
        most = max([most, *curve])
    read_samples(str(own.data), str(most), memory / 4, own.time_first_data)
    network = called("--model", str(own.model), load_function("--model", str(own.model)))
    check_sizes(source, {key: p.numel() for key, p in network.named_parameters()}, steps)
