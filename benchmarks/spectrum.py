"""The default `spectrum` of a shipped checkpoint, end to end: python benchmarks/spectrum.py [CHECKPOINT] [--runs 3].

Every run is a process of its own that starts, opens the checkpoint, computes, draws and writes; two threads. Printed:
seconds in all, products with the operators, and the shares: `start` is a process that only imports what the command
needs and opens the checkpoint, `analysis` what the result says itself, the rest is figures and files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rounds import ROOT

START = (
    "import torch, hessian_tools.plots.spectrum, ikun_hessian.reports.spectrum, sys;"
    "import hessian_tools.analysis.spectrum, ikun_hessian.cli.spectrum;"
    "from pathlib import Path; from ikun_hessian.jobs.open import open_job;"
    "open_job(Path(sys.argv[1]), samples='all', split='train', batch_size=None, params='*', surrogate=None,"
    " dtype='float32', memory=4.0, data_dir=None, device='cpu')"
)


def seconds(*arguments: str) -> float:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", nargs="?", default=str(ROOT / "checkpoints" / "digits-csnn-ikun.pt"))
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for run in range(options.runs):
        with tempfile.TemporaryDirectory() as out:
            start = seconds("-c", START, options.checkpoint)
            whole = seconds("-m", "ikun_hessian", "spectrum", options.checkpoint, "--out", out)
            (file,) = Path(out).glob("*.spectrum.json")
            result = json.loads(file.read_text())
        products = sum(operator["hessian_vector_products"] for operator in result["spectra"].values())
        rows.append((whole, start, float(result["seconds"])))
        print(
            f"run {run + 1}: {whole:5.1f} s, {products} products; start {start:.1f} s, analysis "
            f"{result['seconds']:.1f} s",
            flush=True,
        )
    whole, start, analysis = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"median: {whole:.1f} s (range {min(r[0] for r in rows):.1f} to {max(r[0] for r in rows):.1f}); start "
        f"{start / whole:.0%}, analysis {analysis / whole:.0%}, figures and files {1 - (start + analysis) / whole:.0%}"
    )


if __name__ == "__main__":
    main()
