"""Tests of locks and states whose place is taken by something that is not a file."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hessian_tools.io.files import alone, locked
from hessian_tools.resume import Phases, ResumeError


@pytest.fixture(autouse=True)
def _in_a_minute() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_a_lock_that_is_not_a_file_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe that nobody reads would wait for ever."""
    monkeypatch.chdir(tmp_path)
    lock = Path(".a.lock")
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind(str(lock))
    with pytest.raises(OSError, match="not a regular file") as caught, locked(lock):
        raise AssertionError("locked")
    assert caught.value.filename == str(lock)
    with pytest.raises(OSError, match="not a regular file"), alone(Path("a"), "a"):
        raise AssertionError("locked")
    assert lock.exists()


@pytest.mark.parametrize("name", ["a.resume", "a.resume.1", "a.resume.journal"])
def test_a_state_that_is_not_a_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.resume"
    if name != path.name:
        with pytest.raises(ZeroDivisionError):  # interrupted
            Phases(path, {}).keep("first", lambda: {"x": 1 // 0})
        (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ResumeError, match=f"{name}: not a regular file"):
        Phases(path, {}).keep("first", lambda: {"x": 1})
