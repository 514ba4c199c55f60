"""Peak memory: python benchmarks/memory.py [--size P] [--memory GiB] [--images 1000 60000] [--batch-size 64].

Of 50 eigenpairs at 13 million parameters: the operator is diagonal and costs nothing, so what is measured is the
algorithm: the Lanczos basis, restarted thick, and the eigenvectors; printed beside the budget that `ikun-hessian
spectrum --memory` gives it. Then of one Hessian product with few and with many random images of 28 x 28 (CSNN of width
8, T = 4, two threads), in batches of one size, primals kept within 256 MiB: what it takes beyond the images themselves.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOP, KEPT = 50, 2**28


def _status(field: str) -> int:
    """Bytes, of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def growth(run: Callable[[], object]) -> int:
    """Bytes by which the process grows at most while run() runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def eigenpairs(size: int, memory: float) -> None:
    import torch

    from hessian_tools.analysis.planning.memory import budget
    from hessian_tools.linalg.lanczos import eigenpairs
    from hessian_tools.operators.base import Composed

    room = budget(memory * 2**30, size, TOP, dtype=torch.float32)
    diagonal = torch.linspace(-1, 1, size)
    diagonal[: TOP + 10] = torch.linspace(2, 30, TOP + 10)
    op = Composed(size, torch.float32, torch.device("cpu"), lambda block: diagonal[:, None] * block)
    before = _status("VmHWM")
    pairs = eigenpairs(
        op,
        TOP,
        generator=torch.Generator().manual_seed(0),
        tol=1e-4,
        max_basis=room.vectors,
        basis_dtype=room.basis_dtype,
    )
    used = (_status("VmHWM") - before) / 2**30
    print(
        f"P = {size:,}, top {TOP}, --memory {memory:g}: basis of {room.vectors} vectors ({room.basis_dtype}), "
        f"{pairs.products} products, {int(pairs.converged.sum())} converged\n"
        f"peak {used:.2f} GiB; allowed for basis, pairs and work {memory - room.kept / 2**30:.2f} GiB"
    )


def product(images: int, batch_size: int) -> None:
    import torch

    from hessian_tools.objective import Objective, make_objective
    from hessian_tools.operators.curvature import hessian
    from ikun.losses import LOSSES
    from ikun.networks import Network, Spec

    torch.set_num_threads(2)

    def job(count: int) -> Objective:
        torch.manual_seed(0)
        x, y = torch.rand(count, 1, 28, 28), torch.arange(count) % 10
        net = Network(Spec(input_shape=(1, 28, 28), channels=8))
        return make_objective(net, LOSSES["mse"], (x, y), batch_size=batch_size)

    small = job(1)
    hessian(small) @ torch.ones(small.size)  # numba's kernels are compiled or read
    objective = job(images)
    data = sum(x.nbytes for x, _ in objective.batches)
    used = growth(lambda: hessian(objective, KEPT) @ torch.ones(objective.size))
    print(
        f"{images:6,} images in batches of {batch_size}, primals kept within {KEPT >> 20} MiB: a product takes "
        f"{used / 2**20:.0f} MiB beyond the images' own {data / 2**20:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=13_014_656)
    parser.add_argument("--memory", type=float, default=14.0)
    parser.add_argument("--images", type=int, nargs="*", default=[1_000, 60_000])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--only", choices=["eigenpairs", "product"])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here and options.only == "eigenpairs":
        return eigenpairs(options.size, options.memory)
    if options.here:
        return product(options.images[0], options.batch_size)
    # a process of its own: what a parent had at its peak is inherited, and freed small blocks stay on the heap
    again, environment = (
        [sys.executable, __file__, "--here", "--only"],
        {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if options.only != "product":
        sizes = ["eigenpairs", "--size", str(options.size), "--memory", str(options.memory)]
        subprocess.run([*again, *sizes], check=True, env=environment)
    for images in options.images if options.only != "eigenpairs" else ():
        sizes = ["product", "--images", str(images), "--batch-size", str(options.batch_size)]
        subprocess.run([*again, *sizes], check=True, env=environment)


if __name__ == "__main__":
    main()
