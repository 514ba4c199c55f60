"""Tests of locks and temporary files that several processes share."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hessian_tools.io.files import alone, locked

ROOT = Path(__file__).parents[3]
HEX = "0123456789abcdef" * 2
COUNTER = """
import sys
from pathlib import Path
from hessian_tools.io.files import locked
count = Path(sys.argv[1])
for _ in range(60):
    with locked(count.with_name("lock"), wait=60):
        count.write_text(str(int(count.read_text()) + 1))
"""


def test_one_process_holds_the_lock_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path) as held:
        assert held
        for shared in (False, True):
            with pytest.raises(BlockingIOError), locked(path, shared=shared):
                pass
    assert not path.exists()
    both = locked(path, shared=True), locked(path, shared=True)
    with both[0], both[1], pytest.raises(BlockingIOError), locked(path, wait=0.2):
        pass
    with locked(path):  # which nobody has, though it is there
        pass
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_lost_where_many_wait(tmp_path: Path) -> None:
    """Every process increments the number that it reads, under a lock that the previous one removes."""
    count = tmp_path / "count"
    count.write_text("0")
    command = [sys.executable, "-c", COUNTER, str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    counting = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait() for process in counting] == [0, 0, 0]
    assert count.read_text() == "180"


def test_a_lock_removed_between_opening_and_locking_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who had it removes it just then, and a third makes another: ours is that one, not the removed."""
    path, plain, calls = tmp_path / "lock", fcntl.flock, 0

    def flock(file: Any, kind: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()
        plain(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(path):
        assert path.exists()
        assert calls == 2


def test_without_lock_support_processes_proceed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems; temporary files that may belong to other processes are kept."""
    part = tmp_path / f".a.json.{HEX}.part"
    part.touch()
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO):

        def flock(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        if number == errno.EIO:
            with pytest.raises(OSError, match="Input/output"), alone(tmp_path / "a", r"a\.json"):
                pass
        else:
            with locked(tmp_path / "lock") as held, alone(tmp_path / "a", r"a\.json"):
                assert not held
    assert part.exists()


def test_half_written_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """Only files of its own outputs are removed, and its lock blocks nobody."""
    code = "import os, sys; from pathlib import Path; from hessian_tools.io.files import alone\n"
    code += "with alone(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "a")]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "new"
    assert [p.name for p in folder.iterdir()] == [".a.lock"]
    ours = [f".a.json.{HEX}.part", f".a.npz.{HEX}.part"]
    others = ["a.json", f".b.json.{HEX}.part", f".a.json.{HEX}", f".a.json.{HEX[1:]}.part", f"xa.json.{HEX}.part"]
    for name in [*ours, *others]:
        (folder / name).touch()
    with alone(folder / "a", r"a\.(json|npz)"):
        assert {p.name for p in folder.iterdir()} == {*others, ".a.lock"}
    assert {p.name for p in folder.iterdir()} == set(others)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, alone(tmp_path / "file" / "x" / "a", "a"):
        pass
    assert str(tmp_path / "file") in str(caught.value.filename)
