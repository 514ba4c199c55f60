"""Errors whose messages name parameters, so that another interface can spell those names its own way."""

from __future__ import annotations

from collections.abc import Callable

LEAST_SCALE, MOST_SCALE = 1e-12, 1e6  # of noise and radii, relative to the weights; beyond, squares are not normal


def in_python(name: str, value: object) -> str:
    """Spell a parameter as a keyword argument: `steps=4`, or `steps=` if `value` is `...`."""
    return f"{name}=" if value is ... else f"{name}={value!r}"


class ParameterError(ValueError):
    """An error that the caller can correct. Its message is one line that may name parameters.

    Parameters are named placeholders of the template and values are positional ones. `str(error)` spells the
    parameters as Python's keyword arguments. A command line can call `spelled` to name its options instead.

        >>> error = ParameterError("{} has {} steps: pass {timesteps}", "a.pt", 4, timesteps=4)
        >>> str(error)
        'a.pt has 4 steps: pass timesteps=4'
        >>> error.spelled(lambda name, value: f"{name.upper()} {value}")
        'a.pt has 4 steps: pass TIMESTEPS 4'

    Args:
        template: A format string. It is the whole message, and braces have no meaning, if nothing else is given.
        values: The positional fields. Braces in a value have no meaning. A value that is itself a ParameterError is
            spelled in the same way as this one, so an error can be wrapped with more context.
        parameters: The named fields: each parameter's value, or `...` to name the parameter without a value.
    """

    def __init__(self, template: str, *values: object, **parameters: object) -> None:
        super().__init__(template, *values)  # the arguments that pickle passes when it restores the error
        self.parameters = parameters

    def __str__(self) -> str:
        return self.spelled(in_python)

    def spelled(self, spell: Callable[[str, object], str]) -> str:
        """Return the message with each parameter written as `spell(name, value)`."""
        text, *values = self.args
        if values or self.parameters:
            parts = [value.spelled(spell) if isinstance(value, ParameterError) else value for value in values]
            text = text.format(*parts, **{name: spell(name, value) for name, value in self.parameters.items()})
        return " ".join(str(text).splitlines())


class ObjectiveError(ParameterError):
    """The model or the loss does not define a mean over independent samples; one line that says why and what to do."""


def check_scale(name: str, value: float) -> None:
    """Check the scale of a noise or a radius. Raise ValueError if it is not from LEAST_SCALE to MOST_SCALE."""
    if not LEAST_SCALE <= value <= MOST_SCALE:
        raise ValueError(f"{name} must be a positive number from {LEAST_SCALE:g} to {MOST_SCALE:g}, not {value}")
