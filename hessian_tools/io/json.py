"""Results as JSON files: read, validate, clean and write them."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from hessian_tools.io.files import write_atomically

MOST_BYTES = 2**25  # largest text file; parsing one that is all brackets takes 25 times as much memory
LONGEST = 1000  # largest number of characters in an error message
DEEPEST = 30  # largest nesting depth of lists and objects
# Fields of any result that are counts, errors or norms, and those that are shares.
_NOT_NEGATIVE = {
    *("samples", "epochs_run", "best_epoch", "forward_passes", "residual", "bound", "stderr", "data_stderr"),
    *("data_stderr_least", "symmetry_error", "gradient_norm", "frobenius_norm", "num_parameters"),
}
ARRAYS = {"vectors", "entries"}  # fields that only the NPZ file has
_SHARES = {"accuracy", "test_accuracy", "held_out_accuracy", "firing_rate", "dead"}


class ResultError(ValueError):
    """A result file cannot be used. The message is one line that names the file and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST else f"{message[:LONGEST]} ...")  # it may quote the file


class MissingError(ResultError):
    """The result file does not exist."""


def clean(value: Any) -> Any:
    """Convert to plain JSON values: non-finite numbers become null, tuples lists, and keys strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to the annotated type `kind`. Raises ResultError naming the field that does not fit."""
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
        known = {name: hint for name, hint in hints.items() if name in value and name not in ARRAYS}
        return kind(**{name: _build(hint, value[name], f"{where}.{name}") for name, hint in known.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise ResultError(f"field '{where}' must have {len(arguments)} entries")
        return tuple(_build(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        if isinstance(value, int) and value < 0:  # all whole numbers in results are counts or seeds
            raise ResultError(f"field '{where}' must not be negative")
        return value
    raise ResultError(f"field '{where}' must be {getattr(kind, '__name__', kind)}")


R = typing.TypeVar("R")


def load_result(path: str | Path, kind: type[R], schema: str) -> R:
    """Read a result from a JSON file.

    Args:
        path: The file.
        kind: The dataclass of the result.
        schema: The expected value of the field `schema`, such as "ikun-hessian/spectrum/1".

    Returns:
        An instance of `kind`.

    Raises:
        MissingError: If the file does not exist.
        ResultError: If the file is not such a result, is damaged, or was written by another version.
    """
    text = read_text(path)
    try:
        values = parse_json(text)
    except ResultError as error:
        raise ResultError(f"{path}: {error}. Create the {schema.split('/')[1]} file again.") from None
    try:
        return from_plain(values, kind, schema)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file of at most MOST_BYTES.

    Raises:
        MissingError: If the file does not exist.
        ResultError: If the file is not a regular file, is too large, is not text, or cannot be read.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ResultError(f"{path}: not a regular file")
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ResultError(f"{path}: too large ({MOST_BYTES:,} bytes at most)")
        return data.decode("utf-8")
    except FileNotFoundError as error:
        raise MissingError(f"{path}: cannot be read ({error.strerror})") from None
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ResultError(f"{path}: not a text file") from None


def parse_json(text: str) -> Any:
    """Parse a JSON text, with limits on nesting depth and on the size of numbers.

    Unprintable characters in strings are replaced by "?".

    Raises:
        ResultError: If the text is not valid JSON or exceeds a limit.
    """
    try:
        return _legal(json.loads(text, parse_constant=_no_number), 0)
    except ResultError:
        raise
    except (ValueError, RecursionError):  # int() raises ValueError for thousands of digits
        raise ResultError("not a JSON file") from None


def _no_number(word: str) -> Any:
    """Refuse the constants NaN and Infinity."""
    raise ResultError(f"not a JSON file (it contains {word})")


def _legal(value: Any, depth: int) -> Any:
    """Recursively check limits, and replace unprintable characters and terminal control codes in strings."""
    if depth > DEEPEST:
        raise ResultError(f"JSON nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        for name in value.keys() & (_NOT_NEGATIVE | _SHARES):
            number = value[name] if isinstance(value[name], int | float) else 0
            if number < 0 or (number > 1 and name in _SHARES):
                raise ResultError(f"field '{name}' must not be {'negative' if number < 0 else 'larger than 1'}")
        return {_legal(k, depth + 1): _legal(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_legal(v, depth + 1) for v in value]
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() or c == "\n" else "?" for c in value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ResultError("an integer does not fit in 64 bits")
    if isinstance(value, float) and abs(value) > 1e150:  # its square would overflow
        raise ResultError("a number is larger than 1e150")
    return value


def from_plain(values: Any, kind: type[R], schema: str) -> R:
    """Build a result from parsed JSON values.

    Args:
        values: The parsed JSON.
        kind: The dataclass of the result.
        schema: The expected value of the field `schema`.

    Raises:
        ResultError: If the values are not a result of this kind and version.
    """
    command = schema.split("/")[1]
    found = values.get("schema") if isinstance(values, dict) else None
    if found != schema:
        raise ResultError(f"not a {command} of this version (schema {found!r}, expected {schema!r})")
    try:
        result: R = _build(kind, values, "result")
    except ValueError as error:  # a dataclass that validates its fields may raise ValueError
        raise ResultError(f"{error}. Create the {command} file again.") from None
    return result


def save_result(result: Any, path: Path) -> None:
    """Write a result (a dataclass with a field `schema`) as JSON, atomically."""
    text = json.dumps(clean(dataclasses.asdict(result)), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
