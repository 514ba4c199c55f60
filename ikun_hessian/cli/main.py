"""The group of commands; exit codes and error lines.

Heavy imports happen inside the commands, so that --help answers at once.
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ikun-hessian")
def cli() -> None:
    """How flat is the minimum my spiking network found?

    Train a spiking network from a chosen initializer, open its checkpoint, and see the Hessian spectrum with its
    errors: `ikun-hessian train`, then `ikun-hessian spectrum ckpt.pt`.
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


def _message(error: BaseException) -> str:
    return " ".join(str(error).split())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 the computation failed, 2 what the user can mend (a full disk too),
    128 + n ended by signal n: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    try:
        code = cli.main(arguments, prog_name="ikun-hessian", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort) as error:
        rank, size = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))
        one = f"rank {rank} of {size}: " if size > 1 else ""
        died = " (torchrun ends all processes when one has died)" if size > 1 else ""
        click.echo(f"{one}interrupted{died}: --resume goes on", err=True)
        return interrupted_by(error.__cause__ or error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        click.echo(f"error: {_message(Exception(error.format_message()))}", err=True)
        return 2
    except ValueError as error:  # CheckpointError, DataError, ResultError and settings that do not fit are ValueErrors
        click.echo(f"error: {_message(error)}", err=True)
        return 2
    except OSError as error:
        why, code = _unwritten(error)
        click.echo(f"error: {error.filename or 'writing failed'}: {why}", err=True)
        return code
    except FailedError as error:
        click.echo(f"error: {_message(error)}", err=True)
        return 1
    except (RuntimeError, MemoryError) as error:  # AnalysisError and torch's own, out of memory among them
        message = _message(error) or type(error).__name__
        hint = ": lower --batch-size or --memory" if "memory" in message.lower() else ""
        click.echo(f"error: {message}{hint}", err=True)
        return 1
    return code if isinstance(code, int) else 0  # click returns the code of an Exit, or what the command did


def _unwritten(error: OSError) -> tuple[str, int]:
    """(why and what to do, exit code) of a file that could not be written or read."""
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left ({why}): make room, then run the same again, with --resume where there is one", 2
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return f"{why}: choose another place with --out", 2
    return why, 2 if isinstance(error, BlockingIOError) else 1


def main() -> None:
    end_by_signals()
    sys.exit(run())
