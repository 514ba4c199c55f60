"""A study as a TOML file says it: which runs, what is measured of each, and what is compared.

title = "..."                   # one line
question = "..."                # what it asks
by = "init"                     # the condition compared: a key of [vary]
accuracy = 0.9                  # for epochs to a test accuracy
seeds = 5                       # runs of every combination, seeds 0, 1, ...
figures = ["epochs", "ranks"]   # of `ikun-hessian figures`; all without this line

[train]                         # options of `ikun-hessian train`, by their names
data = "digits"

[vary]                          # the grid: every combination; several grids are [[vary]], ...
init = ["ikun", "kaiming"]
optimizer = ["adam", "sgd"]

[when.optimizer.sgd]            # train options that hold where a varied key has this value
lr = 0.1

[[spectrum]]                    # options of `ikun-hessian spectrum`
at = ["final", "loss"]          # the end, each save-at-loss, the snapshots
[[spectrum]]
tag = "published"               # part of the results' names
samples = 1

[flatness]                      # options of `ikun-hessian flatness`; [robustness]: of robustness.Settings

[quick]                         # with --quick; tables are merged key by key, everything else is replaced
[quick.train]
epochs = 20
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "presets"
MOST_RUNS = 1000
LONGEST = 1000  # characters of an error line
MOMENTS = ("final", "loss", "snapshots")
ANALYSES = ("spectrum", "flatness", "robustness")
_VALUE_KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list"}
PLAIN = {"title": str, "question": str, "by": str, "accuracy": float, "seeds": int, "figures": list}
ROBUSTNESS: dict[str, tuple[type, ...]] = {
    "corruptions": (str,),
    "severities": (int,),
    "noise": (int, float),
    "draws": (int,),
}
TABLES = ("train", "vary", "when", *ANALYSES)


class PresetError(ValueError):
    """A preset that cannot be used: one line that names the file, the key and what is right."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else f"{message[:LONGEST]} ...")  # it quotes the file


@dataclass(frozen=True)
class Analysis:
    """One command's work at one moment (of MOMENTS) of every run. options: as the preset has them."""

    command: str
    moment: str
    tag: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(part for part in (self.command, self.moment, self.tag) if part)


@dataclass(frozen=True)
class Preset:
    """A study read and checked, but for the values of its options. grids: varied keys with their values, every
    combination of each; when: (key, value, options) in the order of the file. Options by their names on the command
    line."""

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
    analyses: tuple[Analysis, ...]


def names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Path:
    """The file of a preset's name, or a file of the user's own. Raises PresetError."""
    if name.endswith(".toml"):
        return Path(name)
    if name not in names():
        raise PresetError(f"no preset '{name}'{meant(name, names())} (--list tells of them; your own end in .toml)")
    return FOLDER / f"{name}.toml"


def read_preset(path: Path, *, quick: bool = False, changes: Sequence[str] = (), seeds: int | None = None) -> Preset:
    """The preset in a file. quick: its smaller form. changes: "KEY=VALUE" each, on top. seeds: so many instead.

    Raises PresetError for a file that cannot be read and for anything in it that is not known.
    """
    from hessian_tools.io.json import ResultError, read_text

    try:
        values = tomllib.loads(read_text(path))
    except ResultError as error:
        raise PresetError(str(error)) from None
    except ValueError as error:  # a TOMLDecodeError, or int() about a number of thousands of digits
        raise PresetError(f"{path}: no valid TOML: {error}") from None
    except RecursionError:
        raise PresetError(f"{path}: no valid TOML: too many lists in one another") from None
    if odd := _odd(values):
        raise PresetError(f"{path}: {odd} has no meaning in a preset")
    _known(path, "", values, (*PLAIN, *TABLES, "quick"))
    smaller = values.pop("quick", {})
    if not isinstance(smaller, dict):
        raise PresetError(f"{path}: [quick] must be a table")
    _known(path, "quick.", smaller, (*PLAIN, *TABLES))
    if quick and not smaller:
        raise PresetError(f"{path}: has no [quick]: run it without --quick, or write one")
    both = [*_grids(path, values), *_grids(path, smaller)]
    if quick:
        values = _merged(path, values, smaller)
    for change in changes:
        values = _changed(path, values, change)
    if seeds is not None:
        values["seeds"] = seeds
    return _preset(path, values, [*both, *_grids(path, values)])


def _preset(path: Path, values: Mapping[str, Any], anywhere: Sequence[Mapping[str, Any]]) -> Preset:
    """anywhere: the grids of all forms of the preset; its [when] may speak of any of them."""
    plain: dict[str, Any] = {"accuracy": 0.9, "seeds": 5, "figures": [], "question": ""}
    plain |= {key: values[key] for key in PLAIN if key in values}
    for key, kind in PLAIN.items():
        if key not in plain:
            raise PresetError(f"{path}: lacks '{key}'")
        allowed = (int, float) if kind is float else (kind,)
        if not isinstance(plain[key], allowed) or isinstance(plain[key], bool):
            raise PresetError(f"{path}: {key} must be {_VALUE_KINDS[kind]}, not {plain[key]!r}")
    if plain["seeds"] < 1:
        raise PresetError(f"{path}: seeds must be at least 1, not {plain['seeds']}")
    if not 0 < plain["accuracy"] <= 1:
        raise PresetError(f"{path}: accuracy must lie above 0 and not above 1, not {plain['accuracy']}")
    grids = _grids(path, values)
    if not grids:
        raise PresetError(f"{path}: lacks [vary], what is varied")
    varied = list(dict.fromkeys(key for grid in grids for key in grid))
    if plain["by"] not in varied:
        raise PresetError(f"{path}: by = '{plain['by']}' is not varied{meant(plain['by'], varied)}")
    train = _unseeded(path, "train", values.get("train", {}))
    for key in varied:
        if key in train and all(key in grid for grid in grids):
            raise PresetError(f"{path}: '{key}' is in [train] and in [vary]: leave it in one of them")
        if key not in train and any(key not in grid for grid in grids):
            raise PresetError(f"{path}: '{key}' is not in every [[vary]]: say in [train] what it is in the others")
    return Preset(
        source=str(path),
        **{**plain, "accuracy": float(plain["accuracy"]), "figures": tuple(map(str, plain["figures"]))},
        train=train,
        grids=tuple(grids),
        when=tuple(_when(path, values.get("when", {}), anywhere, varied)),
        analyses=tuple(a for command in ANALYSES for a in _analyses(path, command, values.get(command))),
    )


def _grids(path: Path, values: Mapping[str, Any]) -> list[dict[str, list[Any]]]:
    found = values.get("vary", [])
    grids = [_unseeded(path, "vary", grid) for grid in (found if isinstance(found, list) else [found])]
    for grid in grids:
        for key, value in grid.items():
            if not isinstance(value, list) or not value:
                raise PresetError(f"{path}: [vary] {key} must be a list of values, not {value!r}")
            if twice := [text(v) for i, v in enumerate(value) if v in value[:i]]:
                raise PresetError(f"{path}: [vary] {key} has '{twice[0]}' twice: leave one out")
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
                raise PresetError(f"{path}: [when.{key}.{value}]: '{value}' is no value of {key}{meant(value, known)}")
            options = _unseeded(path, f"when.{key}.{value}", options)
            if wrong := sorted(set(options) & set(varied)):
                raise PresetError(f"{path}: [when.{key}.{value}] sets '{wrong[0]}', which is varied itself")
            yield key, value, options


def _analyses(path: Path, command: str, found: Any) -> Iterable[Analysis]:
    if found is None:
        return
    seen = set()
    for values in found if isinstance(found, list) else [found]:
        options = dict(_table(path, command, values))
        at, tag = options.pop("at", ["final"]), options.pop("tag", "")
        if not isinstance(tag, str) or not re.fullmatch(r"[A-Za-z0-9_-]*", tag):
            raise PresetError(f"{path}: [{command}] tag must be a word of letters, digits, - and _, not {tag!r}")
        for key, kind in ROBUSTNESS.items() if command == "robustness" else ():
            written = options.get(key, [])
            for value in written if isinstance(written, list) else [written]:
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise PresetError(f"{path}: [robustness] {key} cannot be {value!r}")
        if not isinstance(at, list) or not at:
            raise PresetError(f"{path}: [{command}] at must be a list of {', '.join(MOMENTS)}, not {at!r}")
        for moment in at:
            if moment not in MOMENTS:
                raise PresetError(f"{path}: [{command}] at: no moment '{moment}'{meant(str(moment), MOMENTS)}")
            if (moment, tag) in seen:
                raise PresetError(f"{path}: two [[{command}]] for '{moment}' with tag '{tag}': give one another tag")
            seen.add((moment, tag))
            yield Analysis(command, moment, tag, options)


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PresetError(f"{path}: [{name}] must be a table, not {value!r}")
    return value


def _unseeded(path: Path, name: str, value: Any) -> dict[str, Any]:
    """A table of train options, which leave the seeds to the study."""
    if "seed" in _table(path, name, value):
        raise PresetError(f"{path}: [{name}] seed: give seeds = N at the top, or --seeds N, for seeds 0 to N - 1")
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
            raise PresetError(f"{path}: [quick.{where}{key}]: the preset has a list of tables there: [[quick.{key}]]")
        else:
            found[key] = value
    return found


def _changed(path: Path, values: dict[str, Any], change: str) -> dict[str, Any]:
    """values with one KEY=VALUE of --set: a key of the top, of [vary] or of [train], or TABLE.KEY, TABLE.TAG.KEY."""
    name, equals, written = change.partition("=")
    name = name.strip()
    if not equals or not name:
        raise PresetError(f"--set {change}: give KEY=VALUE")
    first, _, rest = name.partition(".")
    if not rest and name in PLAIN:
        return {**values, name: _value(written, listed=PLAIN[name] is list)}
    if name in ANALYSES:
        if _value(written) is not False:
            raise PresetError(f"--set {change}: give {name}=false to leave it out, or {name}.KEY=VALUE")
        return {key: value for key, value in values.items() if key != name}
    if rest and first in ANALYSES:
        if first not in values:
            raise PresetError(f"--set {change}: {path} has no [{first}]: write one, in a preset of your own")
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
    if table in ("", "train"):
        train = {**values.get("train", {}), key: _value(written)}
        return {**values, "train": train, "when": _without(values.get("when", {}), key)}
    raise PresetError(f"--set {change}: no such place: a key of [vary] or [train], or {'.KEY, '.join(ANALYSES)}.KEY")


def _without(when: Any, key: str) -> Any:
    """[when] less a train option, which is then the same for all runs; what is no table is refused later."""

    def less(table: Any, depth: int) -> Any:
        if not isinstance(table, dict):
            return table
        return {k: less(v, depth + 1) for k, v in table.items() if depth < 2 or k != key}

    return less(when, 0)


def _value(written: str, listed: bool = False) -> Any:
    """What is written behind --set KEY=: TOML, or words without their quotation marks."""

    def one(word: str) -> Any:
        try:
            return tomllib.loads(f"x = {word}")["x"]
        except tomllib.TOMLDecodeError:
            return word

    value = one(written.strip())
    if not listed or isinstance(value, list):
        return value
    return [one(word.strip()) for word in written.split(",")]


def _odd(value: Any) -> str:
    """What in it is no value of any option; "" if nothing."""
    if isinstance(value, dict):
        return next((odd for k, v in value.items() if (odd := _odd(k) or _odd(v))), "")
    if isinstance(value, list):
        return next((odd for v in value if (odd := _odd(v))), "")
    if isinstance(value, str):
        return "" if value.replace("\n", "").isprintable() else f"the text {value!r}"
    if isinstance(value, int):
        return "" if abs(value) < 2**63 else "a number of more than 64 bits"
    return "" if isinstance(value, float) else f"a {type(value).__name__}"


def _known(path: Path, where: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in values:
        if key not in known:
            raise PresetError(f"{path}: unknown key '{where}{key}'{meant(key, known)}")


def meant(word: str, known: Iterable[str]) -> str:
    """The end of a line that names a word nobody knows: the nearest one known, or all where none is near."""
    nearest = difflib.get_close_matches(str(word), sorted(known), 1)
    return f": did you mean '{nearest[0]}'?" if nearest else f": choose one of {', '.join(sorted(known))}"


# --- from a preset to runs
def text(value: Any) -> str:
    """A value as it stands in [when.KEY.VALUE]: numbers in their shortest form."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}"
    return ",".join(map(text, value)) if isinstance(value, list) else str(value)


def run_grid(preset: Preset, force: bool = False) -> dict[str, dict[str, Any]]:
    """The options of `train` of every run, seed among them, by the run's name: ikun-sgd-s0, what is varied and not as
    in [train].

    Seeds go slowest, so that a study that is stopped half-way has all of its conditions. Raises PresetError for more
    than MOST_RUNS runs without force, and for two runs of one name.
    """
    count = sum(math.prod(map(len, grid.values())) for grid in preset.grids) * preset.seeds
    if count > MOST_RUNS and not force:
        raise PresetError(f"{preset.source}: {count} runs: shorten the lists of [vary] or seeds, or --force it")
    varied = list(dict.fromkeys([preset.by, *(key for grid in preset.grids for key in grid)]))
    usual = {key: preset.train[key] for key in varied if key in preset.train}
    choices = [
        {**usual, **dict(zip(grid, values, strict=True))}
        for grid in preset.grids
        for values in itertools.product(*grid.values())
    ]
    named = [key for key in varied if key == preset.by or len({text(c[key]) for c in choices}) > 1]
    found: dict[str, dict[str, Any]] = {}
    for seed, choice in itertools.product(range(preset.seeds), choices):
        options = dict(preset.train)
        for key, value, extra in preset.when:
            if text(choice[key]) == value:
                options |= extra
        options |= {**choice, "seed": seed}
        words = [_word(key, choice[key]) for key in named if key == preset.by or choice[key] != usual.get(key)]
        name = "-".join([*words, f"s{seed}"])
        if found.setdefault(name, options) != options:
            raise PresetError(f"{preset.source}: two runs would be called {name}: leave one of the values out")
    return found


def _word(key: str, value: Any) -> str:
    """Part of a run's name: the value, with its key before it where the value alone says nothing."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "", re.sub(r"[,]", "x", text(value).replace(".", "p")))
    return plain if isinstance(value, str) and plain and value != "none" and not plain[0].isdigit() else f"{key}{plain}"
