"""The command line: the group of commands, exit codes and error messages.

Commands import heavy modules when they run, so that --help is fast.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from hessian_tools.io.text import one_line
from ikun_hessian.cli.compare import compare_command
from ikun_hessian.cli.figures import figures_command
from ikun_hessian.cli.flatness import flatness_command
from ikun_hessian.cli.info import info_command
from ikun_hessian.cli.landscape import landscape_command
from ikun_hessian.cli.report import report_command
from ikun_hessian.cli.screen import FailedError, echo, keep_streams
from ikun_hessian.cli.signals import end_by_signals, interrupted_by
from ikun_hessian.cli.spectrum import spectrum_command
from ikun_hessian.cli.study import study_command
from ikun_hessian.cli.train import train_command
from ikun_hessian.jobs.errors import in_options
from ikun_hessian.jobs.schema import meant
from ikun_hessian.jobs.user import code as user_code


class _Commands(click.Group):
    """The group of commands. Errors of the user's own code become one line before click gives them another meaning."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.commands:
            raise click.UsageError(f"no command '{name}'{meant(name, self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except BaseException as error:
            if (told := user_code.users_error(error)) is not None:
                raise told from error
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ikun-hessian")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the whole traceback of an error.")
def cli() -> None:
    """How flat is the minimum that my spiking network found?

    Train a spiking network from an initializer with `ikun-hessian train`. Then analyse its checkpoint: for example,
    `ikun-hessian spectrum ckpt.pt` shows the spectrum of the Hessian, with errors.
    """


for command in (
    train_command,
    spectrum_command,
    flatness_command,
    landscape_command,
    info_command,
    compare_command,
    figures_command,
    report_command,
    study_command,
):
    cli.add_command(command)


HINTS = {  # by class of the error, because the libraries do not name options
    "ResumeError": "--resume with the same settings, or --force",
    "RankError": "run the same command with --resume",
}


def _message(error: BaseException) -> str:
    hint = HINTS.get(type(error).__name__)
    return " ".join(in_options(error).split()) + (f" ({hint})" if hint else "")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: the computation failed. 2: an error that the user can correct, or a full disk. 128 + n: ended by signal
    n, for example 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP. With --debug, the traceback of an error is
    printed before its line.
    """
    given, debug = _without_debug(list(sys.argv[1:] if arguments is None else arguments))
    user_code.forget()
    try:
        code = cli.main(given, prog_name="ikun-hessian", standalone_mode=False)
    except BaseException as error:
        if debug and not isinstance(error, click.exceptions.Exit | click.exceptions.NoArgsIsHelpError):
            echo("".join(traceback.format_exception(error)).rstrip(), err=True)
        return _failed(error)
    return code if isinstance(code, int) else 0  # click returns the code of an Exit, or the command's result


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove the flag --debug, which may be before or after the name of the command."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [word for word in arguments[:end] if word != "--debug"]
    return [*kept, *arguments[end:]], len(kept) < end


def _failed(error: BaseException) -> int:
    """Print one line about an error, and return the exit code."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
        one = f"rank {rank} of {size}: " if size != "1" else ""
        died = " (torchrun ends all processes if one has died)" if size != "1" else ""
        echo(f"{one}Interrupted{died}. Run the same command with --resume to continue.", err=True)
        return interrupted_by(error.__cause__ or error)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    if isinstance(error, click.exceptions.Exit):
        return int(error.exit_code)
    if isinstance(error, SystemExit):  # raised by click if standard output is closed
        return error.code if isinstance(error.code, int) else 1
    message, code = _told(error)
    echo(f"error: {one_line(message)}", err=True)
    return code


def _told(error: BaseException) -> tuple[str, int]:
    """Return the message about an error, and the exit code."""
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, OSError):
        why, code = _unwritten(error)
        return f"{error.filename or 'writing failed'}: {why}", code
    if isinstance(error, FailedError):
        return _message(error), 1
    if isinstance(error, RuntimeError | MemoryError):  # AnalysisError and errors of torch, such as out of memory
        message = _message(error) or type(error).__name__
        return message + (": lower --batch-size or --memory" if "memory" in message.lower() else ""), 1
    if isinstance(error, ValueError) and str(error) != "math domain error":
        return _message(error), 2  # CheckpointError, DataError, ResultError, UsageError and invalid settings
    return f"unexpected {user_code.told(error)}: run the command with --debug to see where, and report it", 1


def _unwritten(error: OSError) -> tuple[str, int]:
    """Return the reason why a file could not be written or read, with what to do, and the exit code."""
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no space left ({why}). Free some and run the same command again, with --resume if it has that option.",
            2,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return f"{why}: choose another place with --out", 2
    return why, 2 if isinstance(error, BlockingIOError) else 1


def main() -> None:
    keep_streams()
    end_by_signals()
    sys.exit(run())
