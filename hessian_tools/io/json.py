"""Results as JSON files: reading with checks, cleaning, and writing."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from hessian_tools.io.files import write_atomically

MOST_BYTES = 2**25  # of a text file: parsed, one of nothing but brackets takes 25 times as much memory
LONGEST = 1000  # characters of an error line
DEEPEST = 30  # lists and objects in one another


class ResultError(ValueError):
    """A result file that cannot be used: one line that names it and says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else f"{message[:LONGEST]} ...")  # it quotes the file


class MissingError(ResultError):
    """There is no such file."""


def clean(value: Any) -> Any:
    """Plain values for JSON: null for what is not finite, lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of the annotated type from JSON; raises ResultError naming the field that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(arguments[0], value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        optional = {f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
        if missing := [name for name in hints if name not in value and name not in optional]:
            raise ResultError(f"field '{where}' lacks {', '.join(missing)}")
        known = {name: hint for name, hint in hints.items() if name in value and name != "vectors"}
        return kind(**{name: _build(hint, value[name], f"{where}.{name}") for name, hint in known.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise ResultError(f"field '{where}' has not {len(arguments)} entries")
        return tuple(_build(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ResultError(f"field '{where}' is not {getattr(kind, '__name__', kind)}")


R = typing.TypeVar("R")


def load_result(path: str | Path, kind: type[R], schema: str) -> R:
    """Read a result of the dataclass `kind` from JSON; schema: "ikun-hessian/COMMAND/VERSION", what the file must say.

    Raises ResultError for a missing, foreign, damaged or newer file.
    """
    text = read_text(path)
    try:
        values = parse_json(text)
    except ResultError as error:
        raise ResultError(f"{path}: {error}: run `ikun-hessian {schema.split('/')[1]}` again") from None
    try:
        return from_plain(values, kind, schema)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None


def read_text(path: str | Path) -> str:
    """A text file of a sensible size. Raises ResultError, MissingError where there is none."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ResultError(f"{path}: cannot be read (a folder or device, and no file)")
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ResultError(f"{path}: cannot be read (more than {MOST_BYTES:,} bytes)")
        return data.decode("utf-8")
    except FileNotFoundError as error:
        raise MissingError(f"{path}: cannot be read ({error.strerror})") from None
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ResultError(f"{path}: no text file") from None


def parse_json(text: str) -> Any:
    """What a JSON text holds, with numbers, names and depths that the rest can count on. Raises ResultError."""
    try:
        return _legal(json.loads(text, parse_constant=_no_number), 0)
    except ResultError:
        raise
    except (ValueError, RecursionError):  # int() refuses thousands of digits with a ValueError
        raise ResultError("not a JSON file") from None


def _no_number(word: str) -> Any:
    raise ResultError(f"not a JSON file ({word} in it)")


def _legal(value: Any, depth: int) -> Any:
    """The value, its texts without what is no character or commands a terminal."""
    if depth > DEEPEST:
        raise ResultError(f"more than {DEEPEST} lists and objects in one another")
    if isinstance(value, dict):
        return {_legal(k, depth + 1): _legal(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_legal(v, depth + 1) for v in value]
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() or c == "\n" else "?" for c in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ResultError("a whole number of more than 64 bits")
    if isinstance(value, float) and abs(value) > 1e150:  # whose square is no number
        raise ResultError("a number beyond 1e150")
    return value


def from_plain(values: Any, kind: type[R], schema: str) -> R:
    """A result of the dataclass `kind` from what its JSON holds. Raises ResultError for anything else."""
    command = schema.split("/")[1]
    found = values.get("schema") if isinstance(values, dict) else None
    if found != schema:
        raise ResultError(f"not a {command} of this version (schema {found!r}, expected {schema!r})")
    try:
        result: R = _build(kind, values, "result")
    except ValueError as error:  # a dataclass that checks its fields raises its own kind
        raise ResultError(f"{error}: run `ikun-hessian {command}` again") from None
    return result


def save_result(result: Any, path: Path) -> None:
    """Write a result, a dataclass with a field `schema`, as JSON: complete or not at all."""
    text = json.dumps(clean(dataclasses.asdict(result)), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
