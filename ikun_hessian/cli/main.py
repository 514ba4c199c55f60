"""The command line: the group of commands, exit codes and error messages.

Commands import heavy modules when they run, so that --help is fast.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from ikun_hessian.cli.compare import compare_command
from ikun_hessian.cli.figures import figures_command
from ikun_hessian.cli.flatness import flatness_command
from ikun_hessian.cli.info import info_command
from ikun_hessian.cli.landscape import landscape_command
from ikun_hessian.cli.screen import FailedError
from ikun_hessian.cli.signals import end_by_signals, interrupted_by
from ikun_hessian.cli.spectrum import spectrum_command
from ikun_hessian.cli.study import study_command
from ikun_hessian.cli.train import train_command
from ikun_hessian.jobs.errors import in_options


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ikun-hessian")
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
    n, for example 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP.
    """
    try:
        code = cli.main(arguments, prog_name="ikun-hessian", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort) as error:
        rank, size = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))
        one = f"rank {rank} of {size}: " if size > 1 else ""
        died = " (torchrun ends all processes if one has died)" if size > 1 else ""
        click.echo(f"{one}Interrupted{died}. Run the same command with --resume to continue.", err=True)
        return interrupted_by(error.__cause__ or error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        click.echo(f"error: {_message(Exception(error.format_message()))}", err=True)
        return 2
    except ValueError as error:  # CheckpointError, DataError, ResultError, UsageError and invalid settings
        click.echo(f"error: {_message(error)}", err=True)
        return 2
    except OSError as error:
        why, code = _unwritten(error)
        click.echo(f"error: {error.filename or 'writing failed'}: {why}", err=True)
        return code
    except FailedError as error:
        click.echo(f"error: {_message(error)}", err=True)
        return 1
    except (RuntimeError, MemoryError) as error:  # AnalysisError and errors of torch, such as out of memory
        message = _message(error) or type(error).__name__
        hint = ": lower --batch-size or --memory" if "memory" in message.lower() else ""
        click.echo(f"error: {message}{hint}", err=True)
        return 1
    return code if isinstance(code, int) else 0  # click returns the code of an Exit, or the command's result


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
    end_by_signals()
    sys.exit(run())
