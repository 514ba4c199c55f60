"""Whole commands on a machine that others use, too: python benchmarks/busy.py [--rivals 2] [--rounds 2].

`spectrum` of a small and of a larger network, a study with one run per core, and a part of the tests run alone, and
then as one of several at once, with threads that wait passively (the default), that spin, and with one thread each. The
table has wall-clock seconds until the last of them ends, their ratio to one alone, and the CPU time of each in CPU
times of one alone: what exceeds 1 is burned by waiting. Commands that use all cores cannot share them, so that two of
them take twice the time. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "checkpoints" / "digits-csnn-ikun.pt"
WAYS: dict[str, dict[str, str]] = {
    "default": {},
    "threads that spin": {"OMP_WAIT_POLICY": "ACTIVE"},
    "one thread each": {"OMP_NUM_THREADS": "1"},
}
KINDS = ("spectrum", "study", "pytest")
Command = Callable[[Path, int], list[str]]


def spectrum(checkpoint: Path) -> Command:
    def command(folder: Path, i: int) -> list[str]:
        copy = folder / f"{i}.pt"
        copy.write_bytes(checkpoint.read_bytes())
        return ["-m", "ikun_hessian", "spectrum", str(copy), "--quiet"]

    return command


def study(folder: Path, i: int) -> list[str]:
    short = ["--quick", "--seeds", "1", "--set", "epochs=3"]
    return ["-m", "ikun_hessian", "study", "stationarity", *short, "--out", str(folder / str(i))]


def tests(folder: Path, i: int) -> list[str]:
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/hessian_tools/linalg")]


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(command: Command, together: int, changes: dict[str, str]) -> tuple[float, float]:
    """Return the wall-clock seconds until commands that start at once have ended, and the CPU seconds of each."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    environment |= {"PYTHONPATH": str(ROOT), **changes}
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, *command(Path(folder), i)] for i in range(together)]
        used, began = cpu(), time.perf_counter()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = [subprocess.Popen(c, env=environment, cwd=ROOT, **quiet) for c in commands]  # type: ignore[call-overload]
        if any(process.wait() for process in running):
            raise SystemExit("a command failed")
        return time.perf_counter() - began, (cpu() - used) / together


def larger(folder: Path) -> Path:
    """Return a checkpoint of the paper's network with 32 channels on 256 digits, trained for an epoch."""
    path = folder / "larger.pt"
    train = ["train", "--channels", "32", "--subset", "256", "--epochs", "1", "--out", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "ikun_hessian", *train], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rivals", type=int, default=2, help="most rivals")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    counts = range(1, options.rivals + 2)
    with tempfile.TemporaryDirectory() as folder:
        commands: dict[str, Command] = {
            "spectrum, 6,056 parameters": spectrum(SHIPPED),
            "spectrum, 32 channels": spectrum(larger(Path(folder))),
            "study, 12 runs": study,
            "pytest": tests,
        }
        print("| command | threads | " + " | ".join(f"{n} at once" for n in counts) + " |")
        print("| --- " * (2 + len(counts)) + "|")
        for name, command in commands.items():
            if not name.startswith(tuple(options.only)):
                continue
            for way, changes in WAYS.items():
                rounds = [[seconds(command, n, changes) for n in counts] for _ in range(options.rounds)]
                medians = [
                    [statistics.median(values) for values in zip(*some, strict=True)]
                    for some in zip(*rounds, strict=True)
                ]
                (alone, used), *_ = medians
                cells = " | ".join(f"{t:.1f} s ({t / alone:.2f}, CPU {c / used:.2f})" for t, c in medians)
                print(f"| {name} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
