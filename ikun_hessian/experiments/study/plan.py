"""Turn a preset into the work of a study: runs and analyses with every option checked, and the record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.experiments.generalization.network import NetworkUnit
from ikun_hessian.experiments.generalization.plan import units as network_units
from ikun_hessian.experiments.generalization.settings import GeneralizationSettings
from ikun_hessian.experiments.study import preset
from ikun_hessian.experiments.study.grid import run_grid
from ikun_hessian.experiments.study.our_training import OurTraining
from ikun_hessian.experiments.study.own_plan import own_trainings
from ikun_hessian.experiments.study.own_training import OwnTraining
from ikun_hessian.experiments.study.preset import AnalysisTable, Preset, PresetError
from ikun_hessian.experiments.study.record import STUDY_SCHEMA, others
from ikun_hessian.experiments.study.step_sizes import check_sizes
from ikun_hessian.experiments.study.unit import Step, Unit
from ikun_hessian.jobs.analyses.flatness import flatness_settings
from ikun_hessian.jobs.analyses.robustness import robustness_settings
from ikun_hessian.jobs.analyses.spectrum import spectrum_settings
from ikun_hessian.jobs.errors import in_options
from ikun_hessian.jobs.options import FLATNESS, ROBUSTNESS, SPECTRUM, TRAIN
from ikun_hessian.jobs.schema import OptionError, meant, read_options
from ikun_hessian.jobs.training import specifications

if TYPE_CHECKING:
    from ikun.data.spec import DataSpec
    from ikun.networks import Spec


OPTIONS = {"train": TRAIN, "spectrum": SPECTRUM, "flatness": FLATNESS, "robustness": ROBUSTNESS}


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """The work of a study.

    Attributes:
        units: The runs with their analyses, or the networks of a study of generalization.
        skipped: Data sets that cannot be read, with the reason. Their runs are skipped.
        record: The content of study.json.
        others: Names of the runs in the folder that were made with other settings.
        refusal: The reason why the study is refused in this folder, or "".
    """

    units: tuple[Unit | NetworkUnit, ...]
    skipped: dict[str, str]
    record: dict[str, Any]
    others: set[str]
    refusal: str

    def levels(self, by: str) -> set[str]:
        """Return the values of a varied key in the runs that are not skipped."""
        return {preset.text(options[by]) for options in self.record["runs"].values()}


def make(
    found: Preset, out: Path, *, data_dir: Path | None, device: str, memory: float, leader: int, force: bool = False
) -> StudyPlan:
    """Plan everything that a study does in the folder `out`.

    Args:
        found: The preset.
        out: Folder of the study.
        data_dir: Folder of the data set, or a folder with one folder per data set; None for the download cache.
        device: "cpu" or "cuda".
        memory: Memory for one run in GiB.
        leader: Process ID of the study.
        force: Whether more than grid.MOST_RUNS runs are allowed.

    Returns:
        The plan.

    Raises:
        PresetError: If the preset cannot be used.
        DataError: If the data cannot be read.
    """
    from ikun_hessian.experiments.figures.names import FIGURE_NAMES
    from ikun_hessian.experiments.grouping import LEVELS

    for figure in found.figures:
        if figure not in FIGURE_NAMES:
            raise PresetError(f"{found.source}: figures: no '{figure}'{meant(figure, FIGURE_NAMES)}")
    if found.generalization:
        return _generalization(found, out, data_dir, device, leader, force)
    steps = tuple(_step(found.source, analysis, memory) for analysis in found.analyses)
    options_of = run_grid(found, force)
    skipped: dict[str, str] = {}
    trainings: Mapping[str, OurTraining | OwnTraining]
    if found.own:
        trainings = own_trainings(found, options_of, steps, data_dir, memory)
    else:
        trainings = _our_trainings(found, options_of, steps, data_dir, skipped)
    units = [
        Unit(name, out / "runs", training, steps, training.data_dir, device, memory, leader)
        for name, training in trainings.items()
    ]
    if not units:
        raise PresetError(f"{found.source}: all runs are skipped: {next(iter(skipped.values()))}")
    _moments(found, units)
    record = {
        "schema": STUDY_SCHEMA,
        **{key: getattr(found, key) for key in ("title", "question", "by", "accuracy")},
        "runs": {unit.name: {**options_of[unit.name], **_own_record(unit, found)} for unit in units},
        "analyses": {str(analysis): analysis.options for analysis in found.analyses},
    }
    made = StudyPlan(tuple(units), skipped, record, *others(record, out))
    if (count := len(made.levels(found.by))) > LEVELS:
        raise PresetError(f"{found.source}: by = '{found.by}' has {count} levels: figures can show at most {LEVELS}")
    return made


def _generalization(
    found: Preset, out: Path, data_dir: Path | None, device: str, leader: int, force: bool
) -> StudyPlan:
    """Plan a study of generalization (arguments as in `make`)."""
    from ikun.data.download import DataError

    if found.analyses or found.own:
        wrong = found.analyses[0].command if found.analyses else "own"
        raise PresetError(f"{found.source}: [{wrong}] cannot be combined with [generalization]")
    try:
        settings = GeneralizationSettings.from_table(found.generalization)
        where: dict[str, Any] = {"data_dir": data_dir, "device": device, "study": leader}
        units, options = network_units(run_grid(found, force), settings, out / "runs", text=preset.text, **where)
    except (DataError, PresetError):
        raise
    except ValueError as error:
        raise PresetError(f"{found.source}: [generalization] {error}") from None
    record = {
        "schema": STUDY_SCHEMA,
        **{key: getattr(found, key) for key in ("title", "question", "by", "accuracy")},
        "runs": options,
        "analyses": {"generalization final": settings.measured()},
    }
    return StudyPlan(units, {}, record, *others(record, out))


def _own_record(unit: Unit, found: Preset) -> dict[str, Any]:
    """Return what else a run on a network of the user's own depends on: the table [own], and the code."""
    if not isinstance(unit.training, OwnTraining):
        return {}
    return {**{f"own.{key}": value for key, value in found.own.items()}, "code": unit.training.code}


def _our_trainings(
    found: Preset,
    runs: Mapping[str, Mapping[str, Any]],
    steps: Sequence[Step],
    data_dir: Path | None,
    skipped: dict[str, str],
) -> dict[str, OurTraining]:
    """Read the options of all runs, with the networks and data of this package. Fills `skipped`."""
    conditions: dict[str, Any] = {}
    counts: dict[Any, int] = {}
    seen = set()
    made = {}
    for name, options in runs.items():
        condition = {key: value for key, value in options.items() if key != "seed"}
        key = json.dumps(condition)
        if key not in conditions:
            conditions[key] = _specifications(found, name, condition, data_dir, skipped)
        if conditions[key] is None:
            continue
        network, data, training, folder = conditions[key]
        if key not in seen:
            _enough(found.source, data, folder, steps, counts)
            _possible(found.source, name, network, steps)
            seen.add(key)
        seed = options["seed"]
        made[name] = OurTraining(
            network, dataclasses.replace(data, seed=seed), dataclasses.replace(training, seed=seed), folder
        )
    return made


def parse_options(source: str, table: str, options: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Read the options of one table of a preset, as the command line would read them.

    Args:
        source: File of the preset, for error messages.
        table: "train", or one of preset.ANALYSES.
        options: Values by option name.
        seed: Random seed, which presets cannot set in a table.

    Returns:
        The value of every option by parameter name, including defaults, and `seed`.

    Raises:
        PresetError: If an option is unknown or has an invalid value. The message names the file, the table, the option
            and the most similar valid name.
    """
    try:
        return {**read_options(OPTIONS[table], options), "seed": seed}
    except OptionError as error:
        raise PresetError(f"{source}: [{table}] {error}") from None


def _specifications(
    found: Preset, name: str, condition: Mapping[str, Any], data_dir: Path | None, skipped: dict[str, str]
) -> Any:
    """Return (network, data, training, folder of the data) of one condition.

    Return None if the data cannot be read and the study also uses other data sets.
    """
    from ikun.data.download import DataError

    options = parse_options(found.source, "train", condition)
    folder = data_dir
    if data_dir is not None and (data_dir / str(options["data_name"])).is_dir():
        folder = data_dir / str(options["data_name"])
    if options["data_name"] in skipped:
        return None
    try:
        if options["epochs"] < 1:
            raise ValueError(f"epochs must be at least 1 in a study, not {options['epochs']}")
        return *specifications(data_dir=folder, **options), folder
    except DataError as error:
        if not any("data" in grid for grid in found.grids):
            raise
        skipped[options["data_name"]] = in_options(error)
        return None
    except ValueError as error:
        raise PresetError(f"{found.source}: run {name}: {error}") from None


def _enough(source: str, data: DataSpec, folder: Path | None, steps: Sequence[Step], counts: dict[Any, int]) -> None:
    """Check that no analysis asks for more samples than there are, before hours of training. `counts` is a cache."""
    for step in steps:
        samples, split = step.opening["samples"], step.opening["split"]
        curve = getattr(step.settings, "samples_curve", ())
        if samples == "all" and not curve:
            continue
        if (data, split) not in counts:
            counts[data, split] = len(data.load(split, folder))
        here = counts[data, split]
        if samples != "all" and not 1 <= int(samples) <= here:
            raise PresetError(f"{source}: [{step.command}] samples {samples}: {data.name} {split} has {here} samples")
        if curve and max(curve) > (most := here if samples == "all" else int(samples)):
            raise PresetError(f"{source}: [{step.command}] samples-curve needs {max(curve)} samples, of {most}")


def _possible(source: str, name: str, network: Spec, steps: Sequence[Step]) -> None:
    """Check the parameters, the surrogate and the number of eigenpairs of every analysis, before hours of training."""
    import torch

    from ikun.networks import Network

    with torch.device("meta"):  # only the shapes are needed
        sizes = {key: tensor.numel() for key, tensor in Network(network).named_parameters()}
    check_sizes(f"{source}: run {name}", sizes, steps)


def _moments(found: Preset, units: Sequence[Unit]) -> None:
    """Check that every moment that is analysed occurs in some run."""
    for analysis in found.analyses:
        where = f"{found.source}: [{analysis.command}] at: no run "
        if analysis.moment == "loss" and not any(unit.training.save_at_loss for unit in units):
            raise PresetError(f"{where}has a save-at-loss: give [train] save-at-loss = [X], or remove 'loss' from at")
        if analysis.moment == "snapshots" and not any(unit.training.snapshots for unit in units):
            raise PresetError(f"{where}has snapshots: give [train] snapshots = N, or remove 'snapshots' from at")


def _step(source: str, analysis: AnalysisTable, memory: float) -> Step:
    options = parse_options(source, analysis.command, analysis.options)
    settings: Any
    try:
        if analysis.command == "robustness":
            settings, opening = robustness_settings(**options)
        elif analysis.command == "spectrum":
            settings, opening = spectrum_settings(memory, **options)
        else:
            settings, opening = flatness_settings(memory, **options)
    except ValueError as error:
        raise PresetError(f"{source}: [{analysis.command}] {error}") from None
    if not (opening["samples"] == "all" or opening["samples"].isdecimal()):
        raise PresetError(f"{source}: [{analysis.command}] samples: a number or 'all', not '{opening['samples']}'")
    return Step(analysis.command, analysis.moment, analysis.tag, settings, opening)
