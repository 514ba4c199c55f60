"""From a preset to the work of a study: its runs and analyses with every option checked, and its record on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian.cli import flatness, spectrum, train
from ikun_hessian.experiments import preset
from ikun_hessian.experiments.preset import Analysis, Preset, PresetError, meant
from ikun_hessian.experiments.study_record import STUDY_SCHEMA, others
from ikun_hessian.experiments.unit import Step, Unit
from ikun_hessian.jobs import robustness
from ikun_hessian.jobs.flatness import flatness_settings
from ikun_hessian.jobs.spectrum import spectrum_settings

if TYPE_CHECKING:
    from ikun.data.spec import DataSpec
    from ikun.networks import Spec


COMMANDS = {"train": train.train_command, "spectrum": spectrum.spectrum_command, "flatness": flatness.flatness_command}
MINE = {"resume", "force", "out", "tag", "json", "data-dir", "device", "memory", "seed", "trajectory", "calibrate"}


@dataclasses.dataclass(frozen=True)
class StudyPlan:
    """units: the runs. skipped: data sets that cannot be had, and why; their runs are left out. record: study.json.
    others, refusal: the runs in its folder that were made with other settings, and why it is refused; "" if it is not.
    """

    units: tuple[Unit, ...]
    skipped: dict[str, str]
    record: dict[str, Any]
    others: set[str]
    refusal: str

    def levels(self, by: str) -> set[str]:
        """Of a varied key, those of the runs that are not left out."""
        return {preset.text(options[by]) for options in self.record["runs"].values()}


def make(
    found: Preset, out: Path, *, data_dir: Path | None, device: str, memory: float, leader: int, force: bool = False
) -> StudyPlan:
    """Everything that a study is to do in the folder `out`.

    data_dir: a folder of data sets by name, or that of the only one. memory: GiB for one run. leader: the study's
    process. force: more than preset.MOST_RUNS runs are meant. Raises PresetError for whatever does not fit, DataError
    if the data cannot be had.
    """
    from ikun_hessian.experiments.figures.names import FIGURE_NAMES
    from ikun_hessian.experiments.grouping import LEVELS

    for figure in found.figures:
        if figure not in FIGURE_NAMES:
            raise PresetError(f"{found.source}: figures: no '{figure}'{meant(figure, FIGURE_NAMES)}")
    steps = tuple(_step(found.source, analysis, memory) for analysis in found.analyses)
    conditions: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    counts: dict[Any, int] = {}
    seen = set()
    units = []
    options_of = preset.run_grid(found, force)
    for name, options in options_of.items():
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
        units.append(
            Unit(
                name=name,
                runs=out / "runs",
                network=network,
                data=dataclasses.replace(data, seed=options["seed"]),
                training=dataclasses.replace(training, seed=options["seed"]),
                steps=steps,
                data_dir=folder,
                device=device,
                memory=memory,
                study=leader,
            )
        )
    if not units:
        raise PresetError(f"{found.source}: no run is left: {next(iter(skipped.values()))}")
    _moments(found, units)
    record = {
        "schema": STUDY_SCHEMA,
        **{key: getattr(found, key) for key in ("title", "question", "by", "accuracy")},
        "runs": {unit.name: options_of[unit.name] for unit in units},
        "analyses": {str(analysis): analysis.options for analysis in found.analyses},
    }
    made = StudyPlan(tuple(units), skipped, record, *others(record, out))
    if (count := len(made.levels(found.by))) > LEVELS:
        raise PresetError(f"{found.source}: by = '{found.by}' has {count} levels: at most {LEVELS} can be told apart")
    return made


def parse_options(source: str, table: str, options: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The parameters of a command as its own parser makes them from a preset's options, defaults included.

    Raises PresetError with the file, the key and the nearest valid one.
    """
    command = COMMANDS[table]
    known = {p.opts[0].removeprefix("--"): p for p in command.params if isinstance(p, click.Option) and p.expose_value}
    arguments = []
    for key, value in options.items():
        if key in MINE or key not in known:
            raise PresetError(f"{source}: [{table}] has no option '{key}'{meant(key, set(known) - MINE)}")
        option = known[key]
        _one_of(source, table, key, option, value)
        if option.is_flag:
            if not isinstance(value, bool):
                raise PresetError(f"{source}: [{table}] {key} must be true or false, not {value!r}")
            arguments += [f"--{key}"] if value else option.secondary_opts[:1]
        elif option.multiple and isinstance(value, list):
            arguments += [word for one in value for word in (f"--{key}", str(one))]
        elif isinstance(value, list):
            arguments += [f"--{key}", ",".join(map(str, value))]
        else:
            arguments += [f"--{key}", str(value)]
    files = ["x.pt"] if any(isinstance(p, click.Argument) for p in command.params) else []
    try:
        context = command.make_context(table, [*arguments, *files])
    except click.ClickException as error:
        where = (
            f" {error.param.opts[0].removeprefix('--')}"
            if isinstance(error, click.BadParameter) and error.param
            else ""
        )
        raise PresetError(f"{source}: [{table}]{where}: {error.message}") from None
    own = {option.name for key, option in known.items() if key in MINE} - {"seed"}
    return {key: value for key, value in context.params.items() if key not in {*own, "checkpoints"}} | {"seed": seed}


def _one_of(source: str, table: str, key: str, option: click.Option, value: Any) -> None:
    """An option that lists its choices has one of them; NAME:P has a NAME."""
    if isinstance(option, train.Listed):
        module, _, name = option.choices.partition(":")
        choices = list(getattr(import_module(module), name))
        if str(value).partition(":")[0] not in choices:
            raise PresetError(f"{source}: [{table}] {key}: no '{value}'{meant(str(value), choices)}")


def _specifications(
    found: Preset, name: str, condition: Mapping[str, Any], data_dir: Path | None, skipped: dict[str, str]
) -> Any:
    """(network, data, training, folder of the data) of one condition; None for data that are not here, if others are
    asked for besides."""
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
        return *train.specifications(data_dir=folder, **options), folder
    except DataError as error:
        if not any("data" in grid for grid in found.grids):
            raise
        skipped[options["data_name"]] = str(error)
        return None
    except (ValueError, click.UsageError) as error:
        message = error.message if isinstance(error, click.UsageError) else str(error)
        raise PresetError(f"{found.source}: run {name}: {message}") from None


def _enough(source: str, data: DataSpec, folder: Path | None, steps: Sequence[Step], counts: dict[Any, int]) -> None:
    """No analysis asks for more samples than there are: before hours of training. counts: those known already."""
    for step in steps:
        samples, split = step.opening["samples"], step.opening["split"]
        curve = getattr(step.settings, "samples_curve", ())
        if samples == "all" and not curve:
            continue
        if (data, split) not in counts:
            counts[data, split] = len(data.load(split, folder))
        here = counts[data, split]
        if samples != "all" and not 1 <= int(samples) <= here:
            raise PresetError(f"{source}: [{step.command}] samples {samples}: {data.name} {split} has {here} here")
        if curve and max(curve) > (most := here if samples == "all" else int(samples)):
            raise PresetError(f"{source}: [{step.command}] samples-curve goes to {max(curve)}, samples to {most}")


def _possible(source: str, name: str, network: Spec, steps: Sequence[Step]) -> None:
    """No analysis names parameters or a surrogate that are not there, or pairs for which the memory does not suffice:
    before hours of training as well."""
    import torch

    from hessian_tools.analysis.context import budget
    from ikun.networks import Network
    from ikun.surrogates import Surrogate

    with torch.device("meta"):  # shapes alone
        sizes = {key: tensor.numel() for key, tensor in Network(network).named_parameters()}
    for step in steps:
        patterns = [pattern.strip() for pattern in step.opening["params"].split(",")]
        size = sum(n for key, n in sizes.items() if any(fnmatchcase(key, pattern) for pattern in patterns))
        try:
            if not size:
                raise ValueError(f"params: none matches '{step.opening['params']}': choose of {', '.join(sizes)}")
            if step.opening["surrogate"]:
                Surrogate.parse(step.opening["surrogate"])
            if step.command == "spectrum":
                pairs = max(step.settings.magnitude or step.settings.top, step.settings.scaled)
                if pairs > size:
                    raise ValueError(f"{pairs} eigenvalues of {size} parameters: ask for fewer")
                budget(step.settings.memory * 2**30, size, pairs)
        except ValueError as error:
            raise PresetError(f"{source}: run {name}: [{step.command}] {error}") from None


def _moments(found: Preset, units: Sequence[Unit]) -> None:
    """Every moment that is analysed comes in some run."""
    for analysis in found.analyses:
        where = f"{found.source}: [{analysis.command}] at: no run "
        if analysis.moment == "loss" and not any(unit.training.save_at_loss for unit in units):
            raise PresetError(f"{where}has a save-at-loss: give [train] save-at-loss = [X], or take 'loss' out of at")
        if analysis.moment == "snapshots" and not any(unit.training.snapshots for unit in units):
            raise PresetError(f"{where}has snapshots: give [train] snapshots = N, or take 'snapshots' out of at")


def _step(source: str, analysis: Analysis, memory: float) -> Step:
    settings: Any
    try:
        if analysis.command == "robustness":
            for key in analysis.options:
                if key not in robustness.OPTIONS:
                    raise PresetError(f"{source}: [robustness] has no option '{key}'{meant(key, robustness.OPTIONS)}")
            settings, opening = robustness.robustness_settings(analysis.options)
        else:
            read: Any = {"spectrum": spectrum_settings, "flatness": flatness_settings}[analysis.command]
            settings, opening = read(memory, **parse_options(source, analysis.command, analysis.options))
    except PresetError:
        raise
    except (ValueError, click.UsageError) as error:
        message = error.message if isinstance(error, click.UsageError) else str(error)
        raise PresetError(f"{source}: [{analysis.command}] {message}") from None
    if not (opening["samples"] == "all" or opening["samples"].isdecimal()):
        raise PresetError(f"{source}: [{analysis.command}] samples: a number or 'all', not '{opening['samples']}'")
    return Step(analysis.command, analysis.moment, analysis.tag, settings, opening)
