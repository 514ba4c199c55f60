"""What an option is, the values that it can have, and how a preset's table is read as the command line would read it.

This module does not import click, torch or NumPy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

LARGEST = 2**63 - 1  # the largest integer that torch and the result files hold
_NUMBERS = {int: "integer", float: "float"}


class OptionError(ValueError):
    """An option that does not exist, or a value that it cannot have. A message about a value begins with its name."""


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: Name on the command line, without dashes, and in presets.
        kind: Type of the value: str, int, float, Path, or bool for a flag.
        default: Value if the option is not given.
        help: Help text.
        renamed: Name of the parameter that takes the value, if it is not `name` with underscores.
        multiple: Whether the option may be repeated. The value is then a tuple.
        choices: The values allowed, or "module:NAMES" for a collection that takes long to import. The command line
            leaves the check of such a collection to the library. NAMES may be followed by a parameter, as in atan:2.
        opposite: Name of the flag that sets the value to False.
        metavar: Placeholder of the value in the help.
        positive: Whether the value must be larger than 0.
        least: Smallest value that is accepted; None for any.
        most: Largest value that is accepted; None for any.
        path: Which kind of existing path is accepted.
        preset: Whether a preset may set the option. Studies set the others themselves.
        letter: Short form on the command line: o for -o.
        aliases: Other spellings of values.
        pattern: Regular expression that a value must match.
    """

    name: str
    kind: type[Any] = str
    default: Any = None
    help: str = ""
    renamed: str = ""
    multiple: bool = False
    choices: tuple[str, ...] | str = ()
    opposite: str = ""
    metavar: str | None = None
    positive: bool = False
    least: float | None = None
    most: float | None = None
    path: Literal["any", "file", "folder"] = "any"
    preset: bool = True
    letter: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)
    pattern: str = ""

    @property
    def parameter(self) -> str:
        """Name of the parameter that takes the value."""
        return self.renamed or self.name.replace("-", "_")

    def check(self, value: Any) -> None:
        """Raise OptionError if a value is not in the range of the option, or an integer has more than 64 bits."""
        for one in value if isinstance(value, tuple) else [] if value is None else [value]:
            if self.kind is int and abs(one) > LARGEST:
                raise OptionError(f"{self.name} must be at most 2^63 - 1 in size: give a smaller number")
            if self.positive and not one > 0:
                raise OptionError(f"{self.name} must be positive, not {one:g}")
            if self.least is not None and not one >= self.least:
                raise OptionError(f"{self.name} must be at least {self.least:g}, not {one:g}")
            if self.most is not None and not one <= self.most:
                raise OptionError(f"{self.name} must be at most {self.most:g}, not {one:g}")
            if self.pattern and not re.fullmatch(self.pattern, str(one)):
                raise OptionError(f"{self.name}: no '{one}': give {self.metavar}")


def read_options(table: Iterable[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of a preset's table, as the command line would read them.

    Args:
        table: The options of the command. Those that presets cannot set are ignored.
        values: Values by option name: numbers, strings, booleans, or lists of them. A list for an option that takes
            one value is joined by commas.

    Returns:
        The value of every option that a preset can set, by parameter name, with defaults for those that are not given.

    Raises:
        OptionError: One line that names the option, what is wrong, and the nearest valid name.
    """
    known = {option.name: option for option in table if option.preset}
    found = {option.parameter: option.default for option in known.values()}
    for name, value in values.items():
        if name not in known:
            raise OptionError(f"has no option '{name}'{meant(name, known)}")
        found[known[name].parameter] = _read(known[name], value)
    return found


def meant(word: str, known: Iterable[str]) -> str:
    """End of an error message about an unknown word: the most similar known word, or all known words."""
    nearest = difflib.get_close_matches(word, sorted(known), 1)
    return f": did you mean '{nearest[0]}'?" if nearest else f": choose one of {', '.join(sorted(known))}"


def _read(option: Option, value: Any) -> Any:
    if option.kind is bool:
        if not isinstance(value, bool):
            raise OptionError(f"{option.name} must be true or false, not {value!r}")
        return value
    if option.multiple:
        return tuple(_read_one(option, one) for one in (value if isinstance(value, list) else [value]))
    return _read_one(option, ",".join(map(str, value)) if isinstance(value, list) else value)


def _read_one(option: Option, value: Any) -> Any:
    if isinstance(value, dict | list):
        raise OptionError(f"{option.name} must be a single value, not {value!r}")
    text = option.aliases.get(str(value), str(value))
    if option.choices:
        out_of(option, text)
    try:
        found = option.kind(text)
    except ValueError:
        raise OptionError(f"{option.name}: '{text}' is not a valid {_NUMBERS[option.kind]}") from None
    option.check(found)
    return found


def out_of(option: Option, text: str) -> None:
    """Raise OptionError if a value is not one of the option's choices."""
    known, name = option.choices, text
    if isinstance(known, str):
        module, _, collection = known.partition(":")
        known, name = tuple(getattr(import_module(module), collection)), text.partition(":")[0]
    if name not in known:
        raise OptionError(f"{option.name}: no '{text}'{meant(name, known)}")
