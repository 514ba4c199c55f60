"""Tests of commands that end at any of their writes.

Files are always complete, processes do not interfere with each other, and a resumed command ends with the result of an
uninterrupted one. Run as a script, this file repeats one command in processes that kill themselves at one write each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_tools import ROOT, TINY_SPECTRUM

import cli
from hessian_tools import resume as phases
from hessian_tools.io import files
from hessian_tools.io.files import alone, locked
from ikun.checkpoint import load_checkpoint, read_plain, save_checkpoint
from ikun_hessian.cli.signals import end_by_signals
from ikun_hessian.experiments.study import runner
from ikun_hessian.jobs import existing_results as earlier

SMALL = ["--model", "mlp", "--hidden", "6", "--norm", "none", "--subset", "40", "--batch-size", "20", "--lr", "0.02"]
STUDY = f"""
title = "Tiny"
by = "init"
seeds = 1
figures = ["epochs"]
[train]
model = "mlp"
hidden = [6]
norm = "none"
epochs = 1
subset = 40
batch-size = 20
lr = 0.02
[vary]
init = ["kaiming", "ikun"]
[[spectrum]]
{TINY_SPECTRUM}"""
# DATA and OUT are folders
COMMANDS = {
    "train": " ".join([*SMALL, "--epochs 3 --snapshots 1 --out OUT/x.pt"]),
    "spectrum": "DATA/a.pt --samples 16 --top 2 --smallest 1 --probes 2 --steps 4 --operator ggn --out OUT",
    "flatness": "DATA/a.pt --samples 6 --draws 4 --out OUT",
    "landscape": "DATA/a.pt --samples 16 --points 3 --directions gradient,random1 --no-planes --out OUT",
    "study": "DATA/tiny.toml --jobs 1 --out OUT/s",
}
MOST = 5  # writes of the longest attempt that is killed: more than a last one does
# Imported once for all attempts
HEAVY = ["fontTools.ttLib", "numba", "sklearn.datasets", "torch._dynamo", "ikun.training.loop"]
HEAVY += [f"hessian_tools.analysis.{name}" for name in ("flatness.flatness", "landscape", "spectrum")]
HEAVY += ["hessian_tools.plots.style", "ikun_hessian.experiments.figures.figures"]
# What each attempt ends by and at which of its writes; the last one goes through
SIGNALS = [("SIGTERM", 2), ("SIGHUP", 3), ("SIGINT", 2), ("full", 1), ("full", 3), ("", 0)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert cli.run(["train", *SMALL, "--epochs", "1", "--out", str(folder / "a.pt")]) == 0
    (folder / "tiny.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module", params=COMMANDS)
def ended(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A command and the folders that the script left: whole, killed, signals."""
    folder = tmp_path_factory.mktemp(request.param)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, __file__, request.param, str(data), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, folder


def content(folder: Path) -> dict[str, Any]:
    """What the files of a folder hold but for times and places; loading fails where one is not whole."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".part", ".lock")):
        value: Any = None
        if path.name.endswith(".pt"):
            one = load_checkpoint(path)
            value = {k: v.tolist() for k, v in one.state.items()}, one.training, one.history
        elif path.name.endswith(".pt.resume"):
            assert read_plain(path)["epoch"] >= 0
        elif path.suffix == ".resume" or path.stem.endswith(".resume"):
            if path.suffix != ".journal":
                phases._read(path, path.open("rb"))
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                value = {name: arrays[name].tobytes() for name in arrays}
        elif path.suffix == ".json":
            value = json.loads(path.read_text())
            for key in ("seconds", "checkpoint", "settings", "start"):
                value.pop(key, None)
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".pdf":
            assert path.read_bytes().endswith(b"%%EOF\n")
        else:
            value = path.read_text()
        found[str(path.relative_to(folder))] = value
    return found


def left(folder: Path) -> set[str]:
    """Temporaries and locks, but those of figures and that of a study's workers, which nothing can collide with."""
    found = {p.name for p in folder.rglob(".*") if p.parent.name != "figures"}
    return found - {runner.WORKING}


@pytest.mark.slow
def test_a_run_killed_at_any_write_resumes_to_the_same_file(ended: tuple[str, Path]) -> None:
    """kill -9 before and behind the renaming of the first, second, ... file that an attempt writes, until one is done
    earlier: the files are those of the run that nothing ended, to the bit."""
    _, folder = ended
    codes = json.loads((folder / "killed.codes").read_text())
    assert json.loads((folder / "whole.codes").read_text()) == [0], (folder / "whole.err").read_text()
    assert codes[-1] == 0
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > MOST
    assert content(folder / "killed") == content(folder / "whole")
    assert left(folder / "killed") == set()


def test_a_run_ended_by_a_signal_resumes(ended: tuple[str, Path]) -> None:
    """Each signal gives its exit code, one line that says how to resume, and no incomplete file."""
    _, folder = ended
    assert json.loads((folder / "signals.codes").read_text()) == [143, 129, 130, 2, 2, 0]
    said = (folder / "signals.err").read_text()
    assert said.count("Run the same command") == 3
    full = [line for line in said.splitlines() if "no space left" in line]
    assert len(full) == 2
    assert all(line.startswith(f"error: {folder / 'signals'}/") and ".part" not in line for line in full)
    assert "Traceback" not in said
    assert content(folder / "signals") == content(folder / "whole")
    assert left(folder / "signals") == set()


# ------------------------------------------------------------------------------------------------- at the same time
@contextlib.contextmanager
def busy(name: str, folder: Path) -> Iterator[None]:
    """What the command writes is being written by another process; a lock of this one does as well."""
    if name == "train":
        from ikun.training.loop import training_lock

        with training_lock(folder / "x.pt"):
            yield
    elif name == "study":
        with alone(folder / "s/study", "x"):
            yield
    else:
        with earlier.analysis_lock(folder / f"a.{name}"):
            yield


def one_line(capture: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capture.readouterr()
    assert cli.run(arguments) == 2
    lines = [line for line in capture.readouterr().err.splitlines() if not line.startswith("opening ")]
    assert len(lines) == 1, lines
    return lines[0]


def arguments(name: str, data: Path, out: Path) -> list[str]:
    return [name, *(word.replace("DATA", str(data)).replace("OUT", str(out)) for word in COMMANDS[name].split())]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("more", [[], ["--force"], ["--resume"]])
def test_two_processes_cannot_write_the_same_file(
    name: str, more: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "study" and more == ["--resume"]:
        return
    with busy(name, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        said = one_line(capsys, [*arguments(name, data, tmp_path), *more])
        assert ("another study is running" if name == "study" else "another process is writing it") in said
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is forbidden to root: opening a file to write in it fails here as in a file system mounted read-only."""
    plain = Path.open

    def opening(self: Path, mode: str = "r", *others: Any, **options: Any) -> Any:
        if set(mode) & set("wax") and tmp_path in self.parents:
            raise OSError(30, "Read-only file system", str(self))
        return plain(self, mode, *others, **options)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("begun")

    for work in ("ikun.training.loop.train", "ikun_hessian.experiments.study.runner.run_unit"):
        monkeypatch.setattr(work, never)
    for work in ("spectrum.spectrum", "flatness.flatness.flatness", "landscape.landscape"):
        monkeypatch.setattr(f"hessian_tools.analysis.{work}", never)
    monkeypatch.setattr(Path, "open", opening)
    said = one_line(capsys, arguments(name, data, tmp_path))
    out = tmp_path / "s" if name == "study" else tmp_path
    assert said == f"error: {out}: Read-only file system: choose another place with --out"


def test_finished_results_in_a_folder_that_cannot_be_written_are_shown(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments("flatness", data, tmp_path)
    assert cli.run(command) == 0
    monkeypatch.setattr(files, "alone", None)
    assert cli.run([*command, "--resume"]) == 0


def test_a_checkpoint_rewritten_while_it_is_read_is_not_analysed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights would bear another's hash."""
    path = tmp_path / "a.pt"
    shutil.copy(data / "a.pt", path)

    def read(path: Path) -> Any:
        found = load_checkpoint(path)
        save_checkpoint(dataclasses.replace(found, history=[]), path)  # as a training does that ends just now
        return found

    monkeypatch.setattr("ikun.checkpoint.load_checkpoint", read)
    said = one_line(capsys, ["spectrum", str(path), "--samples", "8"])
    assert said == f"error: {path} changed while it was read: run the same command again"


def test_a_study_that_is_terminated_ends_its_workers(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ikun_hessian", "study", str(data / "tiny.toml"), "--jobs", "2"]
    command += ["--set", "epochs=2000", "--out", str(tmp_path / "s")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as one:
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("s/runs/*.train.json"))) < 2 and one.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        one.terminate()
        _, said = one.communicate(timeout=60)
    assert one.returncode == 143, said
    assert said.decode().splitlines()[-1] == "Interrupted. Run the same command again to resume."
    with locked(tmp_path / "s" / runner.WORKING, wait=10):
        content(tmp_path)


# -------------------------------------------------------------------------------------------------- as a script
def ending(how: str, count: int) -> None:
    """This process ends itself at its write of this number: before it is renamed, behind it, or by a signal then. Or
    the disk is full in the middle of it."""
    replace, done = os.replace, 0
    if how == "full":
        fill(count)
        return

    def replacing(source: Any, target: Any) -> None:
        nonlocal done
        done += 1
        if done == count and how == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL if how == "after" else getattr(signal, how))

    os.replace = replacing  # type: ignore[assignment]


def fill(count: int) -> None:
    plain, opened = Path.open, 0

    def opening(self: Path, mode: str = "r", *others: Any, **options: Any) -> Any:
        nonlocal opened
        file: Any = plain(self, mode, *others, **options)
        opened += mode == "xb"
        if opened < count or mode != "xb":
            return file
        return io.BufferedWriter(Full(file.detach()))

    Path.open = opening  # type: ignore[method-assign]


class Full(io.RawIOBase):
    """A file of which the first 60 bytes find a place."""

    def __init__(self, file: io.RawIOBase) -> None:
        self.file, self.room = file, 60

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= (written := self.file.write(bytes(data)[: self.room]) or 0)
        return written


def attempt(command: list[str], errors: Path, how: str, count: int) -> int:
    """Return the exit code of the command in a separate process, or minus the number of a signal."""
    child = os.fork()
    if child == 0:
        with errors.open("a") as file:
            os.dup2(file.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if how:
            ending(how, count)
        for number in (signal.SIGINT, signal.SIGHUP):  # which may be ignored here
            signal.signal(number, signal.default_int_handler)
        end_by_signals()
        code = cli.run(command)
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def script(name: str, data: Path, folder: Path) -> None:
    most = 9 if name == "study" else MOST
    kills = [(how, count) for count in range(1, most + 1) for how in ("before", "after")] * 9
    for case, plan in {"whole": [("", 0)], "killed": kills, "signals": SIGNALS}.items():
        out, codes = folder / case, list[int]()
        words = arguments(name, data, out)
        out.mkdir()
        for how, count in plan:
            resume = ["--resume"] if name != "study" and any(out.glob("*.resume")) else []
            codes.append(attempt([*words, *resume], folder / f"{case}.err", how, count))
            content(out)
            if codes[-1] >= 0 and case == "killed":
                break
        (folder / f"{case}.codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    for module in HEAVY:
        importlib.import_module(module)
    torch.set_num_threads(1)
    script(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
