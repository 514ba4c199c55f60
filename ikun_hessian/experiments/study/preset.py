"""Read a study from a TOML file: which runs, which analyses of each run, and what is compared.

title = "..."                   # one line
question = "..."                # the question that the study asks
by = "init"                     # the condition that is compared: a key of [vary]
accuracy = 0.9                  # target test accuracy, to which epochs are counted
seeds = 5                       # number of runs per combination, with seeds 0, 1, ...
figures = ["epochs", "ranks"]   # names of `ikun-hessian figures` [default: all]

[train]                         # options of `ikun-hessian train`
data = "digits"

[vary]                          # the grid: all combinations are run; [[vary]] for several grids
init = ["ikun", "kaiming"]
optimizer = ["adam", "sgd"]

[when.optimizer.sgd]            # options of train for runs in which a varied key has this value
lr = 0.1

[[spectrum]]                    # options of `ikun-hessian spectrum`
at = ["final", "loss"]          # final weights, checkpoints of save-at-loss, snapshots
[[spectrum]]
tag = "published"               # part of the names of the results
samples = 1

[flatness]                      # options of `ikun-hessian flatness`; [robustness]: jobs.options.ROBUSTNESS

[own]                           # a network of your own: options of `ikun-hessian spectrum` for such networks
model = "nets:build"
data = "nets:samples"
train = "nets:train"            # called as train(network, **options) with the options of [train] and [vary]

[generalization]                # one small result per network: see experiments.generalization.settings

[quick]                         # changes for --quick: tables are merged key by key, other values are replaced
[quick.train]
epochs = 20
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ikun_hessian.jobs.schema import meant

FOLDER = Path(__file__).parents[1] / "presets"
LONGEST = 1000  # characters of an error message
DEEPEST, MOST_VALUES = 30, 20_000  # nested tables and lists; keys and values of a file
MOMENTS = ("final", "loss", "snapshots")
ANALYSES = ("spectrum", "flatness", "robustness")
_VALUE_KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list"}
PLAIN = {"title": str, "question": str, "by": str, "accuracy": float, "seeds": int, "figures": list}
TABLES = ("train", "vary", "when", "own", "generalization", *ANALYSES)


class PresetError(ValueError):
    """A preset cannot be used. The message is one line with the file, the key and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else f"{message[:LONGEST]} ...")  # it may quote the file


@dataclass(frozen=True)
class AnalysisTable:
    """One analysis of every run.

    Attributes:
        command: Name of the analysis, one of ANALYSES.
        moment: The checkpoints that are analysed, one of MOMENTS.
        tag: Part of the names of the results.
        options: Options of the analysis, as written in the preset.
    """

    command: str
    moment: str
    tag: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(part for part in (self.command, self.moment, self.tag) if part)


@dataclass(frozen=True)
class Preset:
    """A study. The values of its options are not checked yet (plan.parse_options).

    Attributes:
        source: File of the preset.
        title: Title of the study.
        question: The question that it asks.
        by: The condition that is compared.
        accuracy: Target test accuracy.
        seeds: Number of runs per combination.
        figures: Names of the figures; empty for all.
        train: Options of `train` that all runs share, by their names on the command line.
        grids: Varied options with their values. All combinations of a grid are run.
        when: (key, value, options) in the order of the file: options of the runs in which `key` has this value.
        analyses: The analyses of every run.
        own: Options that describe a network of the user's own and its training function; empty for ours.
        generalization: Settings of a study of generalization; empty for all others.
    """

    source: str
    title: str
    question: str
    by: str
    accuracy: float
    seeds: int
    figures: tuple[str, ...]
    train: dict[str, Any]
    grids: tuple[dict[str, list[Any]], ...]
    when: tuple[tuple[str, str, dict[str, Any]], ...]
    analyses: tuple[AnalysisTable, ...]
    own: dict[str, Any] = field(default_factory=dict)
    generalization: dict[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """Return the names of the presets of the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Path:
    """Return the file of a preset of the package, or a .toml file of the user. Raise PresetError if it is unknown."""
    if name.endswith(".toml"):
        return Path(name)
    if name not in names():
        raise PresetError(f"no preset '{name}'{meant(name, names())} (see --list; files of your own end in .toml)")
    return FOLDER / f"{name}.toml"


def read_preset(path: Path, *, quick: bool = False, changes: Sequence[str] = (), seeds: int | None = None) -> Preset:
    """Read a preset from a file.

    Args:
        path: The file.
        quick: Whether to apply [quick].
        changes: Changes "KEY=VALUE", applied last.
        seeds: Number of runs per combination, instead of that of the file.

    Returns:
        The preset.

    Raises:
        PresetError: If the file cannot be read, or has unknown or invalid parts.
    """
    from hessian_tools.io.json import ResultError, read_text

    try:
        values = tomllib.loads(read_text(path))
    except ResultError as error:
        raise PresetError(str(error)) from None
    except ValueError as error:  # TOMLDecodeError, or int() for a number with thousands of digits
        raise PresetError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise PresetError(f"{path}: not valid TOML: lists are nested too deeply") from None
    if odd := _odd(values):
        raise PresetError(f"{path}: {odd} cannot be used in a preset")
    _known(path, "", values, (*PLAIN, *TABLES, "quick"))
    smaller = values.pop("quick", {})
    if not isinstance(smaller, dict):
        raise PresetError(f"{path}: [quick] must be a table")
    _known(path, "quick.", smaller, (*PLAIN, *TABLES))
    if quick and not smaller:
        raise PresetError(f"{path}: has no [quick]: run it without --quick, or add that table")
    both = [*_grids(path, values), *_grids(path, smaller)]
    if quick:
        values = _merged(path, values, smaller)
    for change in changes:
        values = _changed(path, values, change)
    if seeds is not None:
        values["seeds"] = seeds
    return _preset(path, values, [*both, *_grids(path, values)])


def _preset(path: Path, values: Mapping[str, Any], anywhere: Sequence[Mapping[str, Any]]) -> Preset:
    """Check the values. `anywhere` has the grids with and without [quick]: [when] may name any value of them."""
    plain: dict[str, Any] = {"accuracy": 0.9, "seeds": 5, "figures": [], "question": ""}
    plain |= {key: values[key] for key in PLAIN if key in values}
    for key, kind in PLAIN.items():
        if key not in plain:
            raise PresetError(f"{path}: '{key}' is missing")
        allowed = (int, float) if kind is float else (kind,)
        if not isinstance(plain[key], allowed) or isinstance(plain[key], bool):
            raise PresetError(f"{path}: {key} must be {_VALUE_KINDS[kind]}, not {plain[key]!r}")
    if plain["seeds"] < 1:
        raise PresetError(f"{path}: seeds must be at least 1, not {plain['seeds']}")
    if not 0 < plain["accuracy"] <= 1:
        raise PresetError(f"{path}: accuracy must be above 0 and at most 1, not {plain['accuracy']}")
    grids = _grids(path, values)
    if not grids:
        raise PresetError(f"{path}: [vary], the table of what is varied, is missing")
    varied = list(dict.fromkeys(key for grid in grids for key in grid))
    if plain["by"] not in varied:
        raise PresetError(f"{path}: by = '{plain['by']}' is not varied{meant(plain['by'], varied)}")
    train = _unseeded(path, "train", values.get("train", {}))
    for key in varied:
        if key in train and all(key in grid for grid in grids):
            raise PresetError(f"{path}: '{key}' is in [train] and in [vary]: remove it from one of them")
        if key not in train and any(key not in grid for grid in grids):
            raise PresetError(f"{path}: '{key}' is not in every [[vary]]: set it in [train] for the others")
    return Preset(
        source=str(path),
        **{**plain, "accuracy": float(plain["accuracy"]), "figures": tuple(map(str, plain["figures"]))},
        train=train,
        grids=tuple(grids),
        when=tuple(_when(path, values.get("when", {}), anywhere, varied)),
        analyses=tuple(a for command in ANALYSES for a in _analyses(path, command, values.get(command))),
        own=_table(path, "own", values.get("own", {})),
        generalization=_table(path, "generalization", values.get("generalization", {})),
    )


def _grids(path: Path, values: Mapping[str, Any]) -> list[dict[str, list[Any]]]:
    found = values.get("vary", [])
    grids = [_unseeded(path, "vary", grid) for grid in (found if isinstance(found, list) else [found])]
    for grid in grids:
        for key, value in grid.items():
            if not isinstance(value, list) or not value:
                raise PresetError(f"{path}: [vary] {key} must be a list of values, not {value!r}")
            if twice := [text(v) for i, v in enumerate(value) if v in value[:i]]:
                raise PresetError(f"{path}: [vary] {key} has '{twice[0]}' twice: remove one")
    return grids


def _when(
    path: Path, values: Any, anywhere: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> Iterable[tuple[str, str, dict[str, Any]]]:
    for key, cases in _table(path, "when", values).items():
        known = sorted({text(v) for grid in anywhere for v in grid.get(key, [])})
        if not known:
            everything = {k for grid in anywhere for k in grid}
            raise PresetError(f"{path}: [when.{key}]: '{key}' is not varied{meant(key, everything)}")
        for value, options in _table(path, f"when.{key}", cases).items():
            if value not in known:
                raise PresetError(f"{path}: [when.{key}.{value}]: {key} is never '{value}'{meant(value, known)}")
            options = _unseeded(path, f"when.{key}.{value}", options)
            if wrong := sorted(set(options) & set(varied)):
                raise PresetError(f"{path}: [when.{key}.{value}] sets '{wrong[0]}', which is varied itself")
            yield key, value, options


def _analyses(path: Path, command: str, found: Any) -> Iterable[AnalysisTable]:
    if found is None:
        return
    seen = set()
    for values in found if isinstance(found, list) else [found]:
        options = dict(_table(path, command, values))
        at, tag = options.pop("at", ["final"]), options.pop("tag", "")
        if not isinstance(tag, str) or not re.fullmatch(r"[A-Za-z0-9_-]*", tag):
            raise PresetError(f"{path}: [{command}] tag must be a word of letters, digits, - and _, not {tag!r}")
        if not isinstance(at, list) or not at:
            raise PresetError(f"{path}: [{command}] at must be a list of {', '.join(MOMENTS)}, not {at!r}")
        for moment in at:
            if moment not in MOMENTS:
                raise PresetError(f"{path}: [{command}] at: no moment '{moment}'{meant(str(moment), MOMENTS)}")
            if (moment, tag) in seen:
                raise PresetError(f"{path}: two [[{command}]] for '{moment}' have tag '{tag}': change one tag")
            seen.add((moment, tag))
            yield AnalysisTable(command, moment, tag, options)


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PresetError(f"{path}: [{name}] must be a table, not {value!r}")
    return value


def _unseeded(path: Path, name: str, value: Any) -> dict[str, Any]:
    """Return a table of train options. Raise PresetError if it has a seed, which the study sets."""
    if "seed" in _table(path, name, value):
        raise PresetError(f"{path}: [{name}] seed: set seeds = N at the top level, or --seeds N, for seeds 0 to N - 1")
    return dict(value)


def _merged(path: Path, values: Mapping[str, Any], over: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found = dict(values)
    for key, value in over.items():
        old = found.get(key)
        if key in ANALYSES and value is False:
            found.pop(key, None)
        elif isinstance(old, dict) and isinstance(value, dict):
            found[key] = _merged(path, old, value, f"{where}{key}.")
        elif isinstance(value, dict) and isinstance(old, list):
            raise PresetError(f"{path}: [quick.{where}{key}]: the preset has a list of tables: write [[quick.{key}]]")
        else:
            found[key] = value
    return found


def _changed(path: Path, values: dict[str, Any], change: str) -> dict[str, Any]:
    """Apply one KEY=VALUE of --set. KEY: a top-level key, a key of [vary] or [train], TABLE.KEY, or TABLE.TAG.KEY."""
    name, equals, written = change.partition("=")
    name = name.strip()
    if not equals or not name:
        raise PresetError(f"--set {change}: give KEY=VALUE")
    first, _, rest = name.partition(".")
    if not rest and name in PLAIN:
        return {**values, name: _value(written, listed=PLAIN[name] is list)}
    if name in ANALYSES:
        if _value(written) is not False:
            raise PresetError(f"--set {change}: give {name}=false to remove it, or {name}.KEY=VALUE")
        return {key: value for key, value in values.items() if key != name}
    if rest and first in ANALYSES:
        if first not in values:
            raise PresetError(f"--set {change}: {path} has no [{first}]: add it to a preset of your own")
        tag, _, key = rest.rpartition(".")
        entries = values[first] if isinstance(values[first], list) else [values[first]]
        if all(entry.get("tag", "") != tag for entry in entries):
            raise PresetError(f"--set {change}: {path} has no [{first}] with tag '{tag}'")
        value = _value(written, listed=key == "at")
        return {**values, first: [{**e, key: value} if e.get("tag", "") == tag else e for e in entries]}
    table, key = ("", name) if not rest else (first, rest)
    grids = _grids(path, values)
    if table in ("", "vary") and any(key in grid for grid in grids):
        value = _value(written, listed=True)
        return {**values, "vary": [{**grid, key: value} for grid in grids]}
    if table in ("own", "generalization") and table in values:
        return {**values, table: {**values[table], key: _value(written)}}
    if table in ("", "train"):
        train = {**values.get("train", {}), key: _value(written)}
        return {**values, "train": train, "when": _without(values.get("when", {}), key)}
    raise PresetError(f"--set {change}: unknown key: use a key of [vary] or [train], or {'.KEY, '.join(ANALYSES)}.KEY")


def _without(when: Any, key: str) -> Any:
    """Return [when] without a train option, which is then the same in all runs."""

    def less(table: Any, depth: int) -> Any:
        if not isinstance(table, dict):
            return table
        return {k: less(v, depth + 1) for k, v in table.items() if depth < 2 or k != key}

    return less(when, 0)


def _value(written: str, listed: bool = False) -> Any:
    """Parse the value of --set KEY=VALUE: TOML, or words without quotation marks."""

    def one(word: str) -> Any:
        try:
            return tomllib.loads(f"x = {word}")["x"]
        except (ValueError, RecursionError):  # TOMLDecodeError, or int() for a number with thousands of digits
            return word

    value = one(written.strip())
    if not listed or isinstance(value, list):
        return value
    return [one(word.strip()) for word in written.split(",")]


def _odd(value: Any) -> str:
    """Return a description of a part that no option can have as its value, or ""."""
    left: list[tuple[Any, int]] = [(value, 0)]
    for count in range(MOST_VALUES):
        if not left:
            return ""
        part, depth = left.pop()
        if depth > DEEPEST:
            return f"a table or list nested more than {DEEPEST} levels deep"
        if isinstance(part, dict | list):
            inner = [*part, *part.values()] if isinstance(part, dict) else part
            if len(left) + len(inner) + count > MOST_VALUES:
                break
            left += [(one, depth + 1) for one in reversed(inner)]
        elif odd := _odd_value(part):
            return odd
    return f"more than {MOST_VALUES:,} keys and values"


def _odd_value(value: Any) -> str:
    """Return a description of a single value that no option can have, or ""."""
    if isinstance(value, str):
        return "" if value.replace("\n", "").isprintable() else f"the unprintable text {value!r}"
    if isinstance(value, int):
        return "" if abs(value) < 2**63 else "a number with more than 64 bits"
    return "" if isinstance(value, float) else f"a {type(value).__name__}"


def _known(path: Path, where: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in values:
        if key not in known:
            raise PresetError(f"{path}: unknown key '{where}{key}'{meant(key, known)}")


def text(value: Any) -> str:
    """Format a value as in [when.KEY.VALUE], with numbers in their shortest form."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}"
    return ",".join(map(text, value)) if isinstance(value, list) else str(value)
