"""Output to the terminal: text, JSON, and the error of a failed computation."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ikun_hessian.jobs.job import Own

_output: IO[str] | None = None  # where results go while standard output is redirected


class FailedError(Exception):
    """The computation failed, but the command line was correct (exit code 1)."""


def dumps(value: Any) -> str:
    """Serialize to JSON, with null for numbers that are not finite."""
    from hessian_tools.io.json import clean

    return json.dumps(clean(value))


def echo(text: object = "", err: bool = False, newline: bool = True) -> None:
    """Print a line to standard output or standard error. Control characters, as in file names, become "?"."""
    from hessian_tools.io.text import without_control_codes

    click.echo(without_control_codes(str(text)), file=None if err else _output, err=err, nl=newline)


def echo_red(text: str) -> None:
    """Print wrapped lines to standard output, in red if it is a terminal."""
    from hessian_tools.io.text import one_line
    from ikun_hessian.reports.text import paragraph

    for line in paragraph(text):
        click.secho(one_line(line), fg="red", file=_output)


def echo_opening(path: Path, own: Own) -> None:
    """Say on standard error which file is opened, and which loss is taken if none was given for a user's network."""
    assumed = own.loss is None and (own.model is not None or path.suffix == ".nir")
    echo(f"opening {path}{' (no --loss given: mse of one-hot targets)' if assumed else ''}", err=True)


def show_result(detail: str, number: int, brief: str, summary: str, full: Sequence[str]) -> None:
    """Print a result as briefly as was asked for.

    Args:
        detail: "summary", "full", "brief" or "quiet".
        number: Number of the result, from 1. Longer texts of later results begin with a line.
        brief: The result in one line.
        summary: The result in a few lines.
        full: Lines of all tables.
    """
    if detail == "brief":
        echo(brief)
    elif detail != "quiet":
        echo("-" * 80 + "\n" if number > 1 else "", newline=False)
        echo(summary if detail == "summary" else "\n".join(full))


@contextlib.contextmanager
def only_ours() -> Iterator[None]:
    """Keep standard output for `say`. Whatever else is printed, also by user code and other processes, goes to stderr.

    Both sys.stdout and file descriptor 1 are redirected, so code in C and child processes are covered. The redirection
    holds for all threads.
    """
    global _output
    if _output is not None:  # a command inside a command
        yield
        return
    kept, copy = sys.stdout, -1
    try:
        if kept is sys.__stdout__ and kept is not None and kept.fileno() == 1:
            kept.flush()
            copy = os.dup(1)
            os.dup2(2, 1)
    except (OSError, ValueError, io.UnsupportedOperation):
        copy = -1
    _output = kept if copy < 0 else _stream(copy, kept.encoding, kept.errors or "strict")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        opened, _output = _output, None
        if copy >= 0:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os.dup2(copy, 1)
            with contextlib.suppress(OSError):
                opened.close()
            os.close(copy)


def _stream(number: int, encoding: str = "utf-8", errors: str = "backslashreplace") -> io.TextIOWrapper:
    """Return a text stream that writes to a file descriptor and leaves it open at its end."""
    file = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return io.TextIOWrapper(file, encoding=encoding, errors=errors)


class _Tolerant(io.TextIOWrapper):
    """A stream that drops what cannot be written, because its reader has gone."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def keep_streams() -> None:
    """Open the standard streams that are closed, and make standard error unable to fail.

    Without this, a file opened later could become standard error, and a message that nobody reads would end an
    analysis.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
            os.set_inheritable(number, True)  # for the workers of a study
    if sys.stdout is None:
        sys.stdout = _stream(1)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    file = io.FileIO(2, "w", closefd=False)  # without a buffer, which would fail again at the end of the process
    sys.stderr = _Tolerant(file, encoding=encoding, errors="backslashreplace", line_buffering=True)
