"""Errors that the user can correct, and the spelling of the libraries' parameters as options of the command line."""

from __future__ import annotations

from hessian_tools.io.errors import ParameterError, in_python

OPTIONS = {  # parameter of a function in ikun -> option of the command line
    "coding": "--coding",
    "data_dir": "--data-dir",
    "dt": "--dt",
    "image_size": "--image-size",
    "frames": "--timesteps",
    "library": "--library",
    "loss": "--loss",
    "memory": "--memory",
    "output": "--output",
    "readout": "--readout",
    "replacement": "--replace-surrogate NAME:P",
    "reset": "--reset",
    "samples": "--samples",
    "sequences": "--sequences",
    "spike": "--surrogate NAME:P",
    "steps": "--timesteps",
    "surrogate": "--surrogate",
    "time_first": "--batch-first",
    "time_first_data": "--time-first-data",
    "timesteps": "--timesteps",
    "valid": "--valid",
}


class UsageError(ParameterError):
    """An option, a file or a function of the user's that cannot be used. The message is one line with what to do."""


def in_options(error: BaseException) -> str:
    """Return the message of an error, with the parameters of the libraries written as command-line options."""
    return error.spelled(_option) if isinstance(error, ParameterError) else str(error)


def _option(name: str, value: object) -> str:
    """Spell a parameter as an option. Flags, and parameters named without a value, have only the option's name."""
    if name == "time_first" and value is True:
        return "--time-first"
    if name not in OPTIONS:
        return in_python(name, value)
    return OPTIONS[name] if value is ... or isinstance(value, bool) else f"{OPTIONS[name]} {value}"


KEYWORDS = {"replacement": "replace_surrogate", "spike": "surrogate", "steps": "timesteps"}


def in_keywords(error: ParameterError) -> str:
    """Return the message of an error, with the parameters of the libraries written as arguments of `ikun_hessian`."""
    return error.spelled(lambda name, value: in_python(KEYWORDS.get(name, name), value))
