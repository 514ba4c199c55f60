"""Generate the options of the commands from the tables in jobs.options."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ikun_hessian.cli.screen import only_ours
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.options import OWN
from ikun_hessian.jobs.schema import Option, meant, out_of

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


def screen_options(command: Command) -> Command:
    """Add the options that choose how much is printed. The command gets one argument `detail`.

    It is "summary", "full", "brief" or "quiet".
    """
    kinds = (
        (("--full", "-v", "--verbose"), "full", "Print all tables and all warnings, not only the summary."),
        (("--brief",), "brief", "Print one line per checkpoint."),
        (("--quiet", "-q"), "quiet", "Print nothing except errors and warnings."),
    )
    decorators = [click.option(*names, "detail", flag_value=kind, help=told) for names, kind, told in kinds]

    @functools.wraps(command)
    def detailed(detail: str | None, **values: Any) -> Any:
        return command(detail=detail or "summary", **values)

    added: Command = _all(decorators)(detailed)
    return added


def threads_option(command: Command) -> Command:
    """Add the option --threads, which applies while the command runs."""
    added: Command = click.option(
        "--threads",
        type=click.IntRange(1),
        callback=_set_threads,
        expose_value=False,
        help="Number of CPU threads [default: the cores that this process may use].",
    )(command)
    return added


def _set_threads(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    """Set the number of threads of torch and of the compiled kernels, before they are imported if possible."""
    if value is None:
        return
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None

    def restore() -> None:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old
        if torch:
            torch.set_num_threads(threads)

    context.call_on_close(restore)
    for name in names:
        if name != "NUMBA_NUM_THREADS" or "numba" not in sys.modules:  # numba refuses a change after its start
            os.environ[name] = str(value)
    if torch:
        torch.set_num_threads(value)


def _all(decorators: list[Command]) -> Command:
    def add(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def _click_option(option: Option, **settings: Any) -> Command:
    names = [f"--{option.name}/--{option.opposite}" if option.opposite else f"--{option.name}"]
    names += [f"-{option.letter}"] if option.letter else []
    if option.kind is bool:
        settings |= {"is_flag": True, "default": option.default, "show_default": bool(option.default)}
    else:
        shown = option.default not in (None, ())
        settings |= {"type": _type(option), "multiple": option.multiple, "metavar": option.metavar}
        settings |= {"default": option.default, "show_default": True} if shown else {}
    return click.option(*names, option.parameter, help=option.help, **settings)


def _type(option: Option) -> Any:
    if option.kind is Path:
        return click.Path(path_type=Path, file_okay=option.path != "folder", dir_okay=option.path != "file")
    return _Choice(option.choices) if isinstance(option.choices, tuple) and option.choices else option.kind


class _Choice(click.Choice[str]):
    """A choice whose error names the most similar value."""

    def get_invalid_choice_message(self, value: str, ctx: click.Context | None) -> str:
        return f"no '{value}'{meant(str(value), [*map(str, self.choices)])}"


def _checked(option: Option) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        value = option.aliases.get(value, value) if option.aliases else value
        try:
            option.check(value)
            if context.get_parameter_source(str(parameter.name)) == ParameterSource.COMMANDLINE:
                _known(option, value)
        except ValueError as error:  # OptionError, which begins with the name
            raise click.UsageError(f"--{error}") from None
        return value

    return callback


def _known(option: Option, value: Any) -> None:
    """Check values of a collection that takes long to import, when it is needed anyway."""
    if isinstance(option.choices, str) and option.choices:
        for one in value if isinstance(value, tuple) else [value]:
            out_of(option, str(one))


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    aliases = {option.parameter: option.aliases for option in OWN}.get(str(parameter.name), {})
    context.meta.setdefault(Own.__qualname__, {})[parameter.name] = aliases.get(value, value) if aliases else value
