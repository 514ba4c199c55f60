"""Generate the options of the commands from the tables in jobs.options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ikun_hessian.cli.screen import only_ours
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.options import OWN, Option

Command = Callable[..., Any]


def options(*table: Option) -> Command:
    """Return a decorator that adds these options to a command; the help lists them in this order."""
    return _all([_click_option(option, callback=_checked(option)) for option in table])


def own_options(command: Command) -> Command:
    """Add the options that describe a network of the user's own. The command gets them as one argument `own`.

    While the command runs, what the user's code prints goes to standard error.
    """

    @functools.wraps(command)
    def collected(**values: Any) -> Any:
        with only_ours():
            return command(own=Own(**click.get_current_context().meta[Own.__qualname__]), **values)

    add = _all([_click_option(option, callback=_keep, expose_value=False) for option in OWN])
    added: Command = add(collected)
    return added


def _all(decorators: list[Command]) -> Command:
    def add(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def _click_option(option: Option, **settings: Any) -> Command:
    names = f"--{option.name}/--{option.opposite}" if option.opposite else f"--{option.name}"
    if option.kind is bool:
        settings |= {"is_flag": True, "default": option.default, "show_default": bool(option.default)}
    else:
        shown = option.default not in (None, ())
        settings |= {"type": _type(option), "multiple": option.multiple, "metavar": option.metavar}
        settings |= {"default": option.default, "show_default": True} if shown else {}
    return click.option(names, option.parameter, help=option.help, **settings)


def _type(option: Option) -> Any:
    if option.kind is Path:
        return click.Path(path_type=Path, file_okay=option.path != "folder", dir_okay=option.path != "file")
    return click.Choice(option.choices) if isinstance(option.choices, tuple) and option.choices else option.kind


def _checked(option: Option) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            option.check(value)
        except ValueError as error:  # OptionError, which begins with the name
            raise click.UsageError(f"--{error}") from None
        return value

    return callback


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    context.meta.setdefault(Own.__qualname__, {})[parameter.name] = value
