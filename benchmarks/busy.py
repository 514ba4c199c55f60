"""Whole commands on a machine that others use, too: python benchmarks/busy.py [--rivals 2] [--rounds 2].

`spectrum` of a small and of a larger network runs alone, and then as one of several at once, with threads that wait
passively (the default), that spin, and with one thread each. The table has wall-clock seconds until the last of them
ends, and its ratio to one alone. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "checkpoints" / "digits-csnn-ikun.pt"
WAYS: dict[str, dict[str, str]] = {
    "default": {},
    "threads that spin": {"OMP_WAIT_POLICY": "ACTIVE"},
    "one thread each": {"OMP_NUM_THREADS": "1"},
}


def command(checkpoint: Path, folder: Path, i: int) -> list[str]:
    copy = folder / f"{i}.pt"
    copy.write_bytes(checkpoint.read_bytes())
    return [sys.executable, "-m", "ikun_hessian", "spectrum", str(copy), "--quiet"]


def seconds(checkpoint: Path, together: int, changes: dict[str, str]) -> float:
    """Return the wall-clock seconds until `together` commands that start at once have ended."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    environment |= {"PYTHONPATH": str(ROOT), **changes}
    with tempfile.TemporaryDirectory() as folder:
        commands = [command(checkpoint, Path(folder), i) for i in range(together)]
        began = time.perf_counter()
        running = [subprocess.Popen(c, env=environment) for c in commands]
        if any(process.wait() for process in running):
            raise SystemExit("a command failed")
        return time.perf_counter() - began


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
    options = parser.parse_args()
    counts = range(1, options.rivals + 2)
    with tempfile.TemporaryDirectory() as folder:
        networks = {"6,056 parameters": SHIPPED, "32 channels": larger(Path(folder))}
        print("| network | way | " + " | ".join(f"{n} at once" for n in counts) + " |")
        print("| --- " * (2 + len(counts)) + "|")
        for name, path in networks.items():
            for way, changes in WAYS.items():
                found = [statistics.median(seconds(path, n, changes) for _ in range(options.rounds)) for n in counts]
                cells = " | ".join(f"{t:.1f} s ({t / found[0]:.2f})" for t in found)
                print(f"| {name} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
