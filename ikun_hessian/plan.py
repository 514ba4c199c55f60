"""From a preset to the work of a study: its runs and analyses with every option checked, and its record on disk."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ikun_hessian import flatness, preset, robustness, runner, spectrum, train
from ikun_hessian.preset import Analysis, Preset, PresetError, meant

if TYPE_CHECKING:
    from ikun.checkpoint import DataSpec

SCHEMA = "ikun-hessian/study/1"
COMMANDS = {"train": train.train, "spectrum": spectrum.spectrum, "flatness": flatness.flatness}
MINE = {"resume", "force", "out", "tag", "json", "data-dir", "device", "memory", "seed", "trajectory", "calibrate"}
IN_NAMES = {"final": "", "loss": r"\.loss[\d.e+-]+", "snapshots": r"\.epoch\d+"}  # a moment, in a result's name


@dataclasses.dataclass(frozen=True)
class Plan:
    """units: the runs. skipped: data sets that cannot be had, and why; their runs are left out. record: study.json."""

    units: tuple[runner.Unit, ...]
    skipped: dict[str, str]
    record: dict[str, Any]


def make(
    found: Preset, out: Path, *, data_dir: Path | None, device: str, memory: float, leader: int, force: bool = False
) -> Plan:
    """Everything that a study is to do in the folder `out`.

    data_dir: a folder of data sets by name, or that of the only one. memory: GiB for one run. leader: the study's
    process. force: more than preset.MOST_RUNS runs are meant. Raises PresetError for whatever does not fit, DataError
    if the data cannot be had.
    """
    from hessian_tools.study_figures import NAMES

    for figure in found.figures:
        if figure not in NAMES:
            raise PresetError(f"{found.source}: figures: no '{figure}'{meant(figure, NAMES)}")
    steps = tuple(_step(found.source, analysis, memory) for analysis in found.analyses)
    conditions: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    counts: dict[Any, int] = {}
    units = []
    options_of = preset.runs(found, force)
    for name, options in options_of.items():
        condition = {key: value for key, value in options.items() if key != "seed"}
        key = json.dumps(condition)
        if key not in conditions:
            conditions[key] = _specifications(found, name, condition, data_dir, skipped)
        if conditions[key] is None:
            continue
        network, data, training, folder = conditions[key]
        _enough(found.source, data, folder, steps, counts)
        units.append(
            runner.Unit(
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
    record = {
        "schema": SCHEMA,
        **{key: getattr(found, key) for key in ("title", "question", "by", "accuracy")},
        "runs": {unit.name: options_of[unit.name] for unit in units},
        "analyses": {str(analysis): analysis.options for analysis in found.analyses},
    }
    return Plan(tuple(units), skipped, record)


def parsed(source: str, table: str, options: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The parameters of a command as its own parser makes them from a preset's options, defaults included.

    Raises PresetError with the file, the key and the nearest valid one.
    """
    command = COMMANDS[table]
    known = {p.opts[0].removeprefix("--"): p for p in command.params if isinstance(p, click.Option)}
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
    from ikun.files import DataError

    options = parsed(found.source, "train", condition)
    folder = data_dir
    if data_dir is not None and (data_dir / str(options["data_name"])).is_dir():
        folder = data_dir / str(options["data_name"])
    if options["data_name"] in skipped:
        return None
    try:
        return *train.specifications(data_dir=folder, **options), folder
    except DataError as error:
        if not any("data" in grid for grid in found.grids):
            raise
        skipped[options["data_name"]] = str(error)
        return None
    except (ValueError, click.UsageError) as error:
        message = error.message if isinstance(error, click.UsageError) else str(error)
        raise PresetError(f"{found.source}: run {name}: {message}") from None


def _enough(
    source: str, data: DataSpec, folder: Path | None, steps: Sequence[runner.Step], counts: dict[Any, int]
) -> None:
    """No analysis asks for more samples than there are: before hours of training. counts: those known already."""
    for step in steps:
        samples, split = step.opening["samples"], step.opening["split"]
        if samples == "all":
            continue
        if (data, split) not in counts:
            counts[data, split] = len(data.load(split, folder))
        if not 1 <= int(samples) <= counts[data, split]:
            raise PresetError(
                f"{source}: [{step.command}] samples {samples}: {data.name} {split} has {counts[data, split]} here"
            )


def _step(source: str, analysis: Analysis, memory: float) -> runner.Step:
    settings: Any
    try:
        if analysis.command == "robustness":
            for key in analysis.options:
                if key not in robustness.OPTIONS:
                    raise PresetError(f"{source}: [robustness] has no option '{key}'{meant(key, robustness.OPTIONS)}")
            settings, opening = robustness.settings_of(analysis.options)
        else:
            module: Any = {"spectrum": spectrum, "flatness": flatness}[analysis.command]
            settings, opening = module.settings_of(memory, **parsed(source, analysis.command, analysis.options))
    except PresetError:
        raise
    except (ValueError, click.UsageError) as error:
        message = error.message if isinstance(error, click.UsageError) else str(error)
        raise PresetError(f"{source}: [{analysis.command}] {message}") from None
    if not (opening["samples"] == "all" or opening["samples"].isdecimal()):
        raise PresetError(f"{source}: [{analysis.command}] samples: a number or 'all', not '{opening['samples']}'")
    return runner.Step(analysis.command, analysis.moment, analysis.tag, settings, opening)


# --- the record of a study


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(part, name, key) of everything that two records share and that is another in each: "runs" or "analyses", the
    name of the run or analysis, the option."""
    return [
        (part, name, key)
        for part in ("runs", "analyses")
        for name, options in new[part].items()
        if name in old[part]
        for key in {**options, **old[part][name]}
        if options.get(key) != old[part][name].get(key)
    ]


def read(path: Path) -> dict[str, Any] | None:
    """A study's record, None where there is none. Raises PresetError for a file that is no such record."""
    from hessian_tools.results import MissingError, ResultError, parsed, read_text

    try:
        found = parsed(read_text(path))
    except MissingError:
        return None
    except ResultError:
        found = None
    parts = [found.get(part) for part in ("runs", "analyses")] if isinstance(found, dict) else []
    whole = len(parts) == 2 and all(
        isinstance(part, dict) and all(isinstance(v, dict) for v in part.values()) for part in parts
    )
    if not whole or found.get("schema") != SCHEMA:
        raise PresetError(f"{path}: not the record of a study: choose another --out, or remove it")
    return dict(found)


def settle(record: Mapping[str, Any], out: Path, force: bool) -> None:
    """Write OUT/study.json: the record, and of what is there already what this study leaves alone.

    With force, the files of runs and analyses that were made with other settings are removed; without, PresetError.
    """
    from hessian_tools.results import write_atomically

    path = out / "study.json"
    old = read(path) or {"runs": {}, "analyses": {}}
    for part, name, key in changed(old, record):
        if not force:
            kind = "run" if part == "runs" else "analysis"
            raise PresetError(
                f"{path}: {kind} {name} had another {key} ({_show(old[part][name].get(key))}, now "
                f"{_show(record[part][name].get(key))}): choose another --out, or --force to do it again"
            )
        _remove(out / "runs", part, name)
    whole = {**record, **{part: {**old[part], **record[part]} for part in ("runs", "analyses")}}
    text = json.dumps(whole, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _show(value: Any) -> str:
    return "not given" if value is None else preset.text(value)


def _remove(runs: Path, part: str, name: str) -> None:
    if part == "runs":
        pattern = re.escape(name) + r"\..*"
    else:
        command, moment, *tag = name.split(" ")
        ending = "".join(rf"\.{re.escape(word)}" for word in (*tag, command))
        pattern = rf"[^.]+{IN_NAMES[moment]}{ending}\.(json|npz|resume.*)"
    for file in list(runs.iterdir()) if runs.is_dir() else []:
        if re.fullmatch(pattern, file.name):
            file.unlink()
