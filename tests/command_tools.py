"""Helpers for tests of the commands: quick options, checks of error lines, and runs that kill themselves."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cli
from ikun_hessian.jobs.progress_bar import Bar

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "checkpoints"
FAST = ["--top", "3", "--smallest", "2", "--steps", "8", "--probes", "2", "--samples", "96"]
TINY_TRAINING = """
[train]
model = "mlp"
hidden = [8]
norm = "none"
epochs = 2
subset = 64
batch-size = 16
"""
TINY_SPECTRUM = """
operator = "ggn"
samples = 32
top = 1
smallest = 0
density = false
"""
KILL = """
import os, signal, sys
import cli
from ikun_hessian.jobs.progress_bar import Bar
calls = 0
def update(self, name, done, total, worst):
    global calls
    calls += name == {phase!r}
    if calls == {call}:
        os.kill(os.getpid(), signal.{signal})
Bar.update = update
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(cli.run(sys.argv[1:]))
"""

Capture = pytest.CaptureFixture[str]


def fails(capture: Capture, code: int, message: str, *arguments: str) -> None:
    """The command ends with the code and one line on standard error, with no traceback."""
    capture.readouterr()
    assert cli.run(list(arguments)) == code
    lines = [line for line in capture.readouterr().err.splitlines() if not line.startswith("opening ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def interrupted(run: list[str], phase: str, call: int) -> None:
    """The command ends with code 130 if it is interrupted where it reports its progress in a phase."""
    calls = 0

    def stop(self: object, name: str, done: int, total: int, worst: float = 0.0) -> None:
        nonlocal calls
        calls += name == phase
        if calls == call:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "update", stop)
        assert cli.run(run) == 130


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Fail if the body takes longer: it waits for ever, for instance for the other end of a pipe."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} seconds")  # no OSError, which the code may handle

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def arrays(path: Path) -> list[bytes]:
    with np.load(path) as found:
        return [found[name].tobytes() for name in sorted(found)]


def equal(found: Path, expected: Path) -> None:
    """Two runs' spectra and arrays, to the bit."""
    assert arrays(found.with_suffix(".spectrum.npz")) == arrays(expected.with_suffix(".spectrum.npz"))
    raw = [json.loads(path.with_suffix(".spectrum.json").read_text()) for path in (found, expected)]
    for part in ("spectra", "sensitivity", "loss", "gradient_norm"):
        assert raw[0][part] == raw[1][part]
