"""The command `spectrum` of two trees in turn: CPU time, and what changed, relative to its printed error.

    python benchmarks/before_after.py OLD_TREE NEW_TREE [--runs 3] [--case CHECKPOINT:SAMPLES ...]

Every run is a process of its own with one thread. The first run of each tree is not counted, because it fills numba's
cache. "change" is the largest |new - old| of a kind of number, divided by the old standard error over the data (or its
lower limit); for numbers without one, by the old number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rounds import ROOT

SHIPPED = ROOT / "checkpoints"


def run(tree: Path, checkpoint: Path, samples: str) -> tuple[float, dict[str, Any]]:
    """Return the CPU seconds of one command, and its result."""
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as out:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "ikun_hessian", "spectrum", str(checkpoint.resolve()), "--samples", samples]
        subprocess.run(
            [*command, "--threads", "1", "--out", out], env=environment, check=True, capture_output=True, cwd=out
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (file,) = Path(out).glob("*.spectrum.json")
        result = json.loads(file.read_text())
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, result


def known(number: dict[str, Any]) -> float:
    """Return the standard error over the data of a number, or its lower limit."""
    return float(number["data_stderr"] or number["data_stderr_least"] or math.nan)


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, float]:
    """Return the largest changes of the numbers of one operator, by kind."""
    found: dict[str, float] = {}

    def add(kind: str, change: float) -> None:
        found[kind] = max(found.get(kind, 0.0), abs(change))

    for end in ("eigenvalues", "smallest_eigenvalues"):
        for a, b in zip(old[end], new[end], strict=True):
            add(f"{end} / data error", (b["value"] - a["value"]) / known(a))
            add(f"data error of {end}, relative", known(b) / known(a) - 1)
    a, b = old["trace"], new["trace"]
    add("trace / data error", (b["estimate"] - a["estimate"]) / known(a))
    add("data error of the trace, relative", known(b) / known(a) - 1)
    for name in ("frobenius_norm", "scale_free_lambda_max"):
        add(f"{name}, relative", new[name] / old[name] - 1)
    for name in ("effective_dimension", "log_determinant", "negative_share"):
        if old[name] and new[name] and old[name]["stderr"]:
            add(f"{name} / error of the probes", (new[name]["estimate"] - old[name]["estimate"]) / old[name]["stderr"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", action="append", help="CHECKPOINT:SAMPLES; without it, four of the shipped networks")
    options = parser.parse_args()
    shipped = [("ikun", "all"), ("kaiming", "all"), ("xavier", "400"), ("ikun", "100")]
    cases = options.case or [f"{SHIPPED / f'digits-csnn-{name}.pt'}:{samples}" for name, samples in shipped]
    for case in cases:
        checkpoint, samples = case.rsplit(":", 1)
        seconds: dict[Path, list[float]] = {options.old: [], options.new: []}
        results: dict[Path, dict[str, Any]] = {}
        for i in range(options.runs + 1):
            for tree in seconds:
                taken, results[tree] = run(tree, Path(checkpoint), samples)
                seconds[tree] += [taken] if i else []
        print(f"{Path(checkpoint).name}, {samples} samples")
        for tree, each in seconds.items():
            products = {n: s["hessian_vector_products"] for n, s in results[tree]["spectra"].items()}
            middle = f"{statistics.median(each):.1f} s (range {min(each):.1f} to {max(each):.1f})" if each else "-"
            print(f"  {'old' if tree == options.old else 'new'}: CPU time {middle}, products {products}")
        old, new = results[options.old], results[options.new]
        for name, spectrum in old["spectra"].items():
            for kind, change in changes(spectrum, new["spectra"][name]).items():
                print(f"  {name:8} {kind:45} {change:.2g}")
        for label, value in old["sensitivity"].items():
            print(f"  {'':8} {f'lambda_max, {label}, relative':45} {abs(new['sensitivity'][label] / value - 1):.2g}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
