"""Peak memory of 50 eigenpairs at 13 million parameters: python benchmarks/memory.py [--size P] [--memory GiB].

The operator is diagonal and costs nothing, so what is measured is the algorithm: the Lanczos basis, restarted thick,
and the eigenvectors. Printed beside the budget that `ikun-hessian spectrum --memory` gives it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOP = 50


def peak() -> int:
    """Bytes, of this process so far."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure(size: int, memory: float) -> None:
    import torch

    from hessian_tools.lanczos import eigenpairs
    from hessian_tools.measure import budget
    from hessian_tools.operators import Composed

    room, kept = budget(memory * 2**30, size, TOP)
    diagonal = torch.linspace(-1, 1, size)
    diagonal[: TOP + 10] = torch.linspace(2, 30, TOP + 10)
    op = Composed(size, torch.float32, torch.device("cpu"), lambda block: diagonal[:, None] * block)
    before = peak()
    pairs = eigenpairs(op, TOP, generator=torch.Generator().manual_seed(0), tol=1e-4, max_basis=room)
    used = (peak() - before) / 2**30
    print(
        f"P = {size:,}, top {TOP}, --memory {memory:g}: basis of {room} vectors, {pairs.products} products, "
        f"{int(pairs.converged.sum())} converged\n"
        f"peak {used:.2f} GiB; allowed for basis, pairs and work {memory - kept / 2**30:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=13_014_656)
    parser.add_argument("--memory", type=float, default=14.0)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return measure(options.size, options.memory)
    # a process of its own: what a parent had at its peak is inherited, and freed small blocks stay on the heap
    again = [sys.executable, __file__, "--here", "--size", str(options.size), "--memory", str(options.memory)]
    subprocess.run(again, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})


if __name__ == "__main__":
    main()
