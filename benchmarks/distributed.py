"""One analysis on one and on several processes of one thread: python benchmarks/distributed.py [Fashion-MNIST folder].

The paper's CSNN of width 16 on 1,024 images, trained for one epoch. Printed for each number of processes: the time of
a Hessian product, and that of the whole default command `spectrum`, start of the processes and files included. Next to
each is the CPU time of the process that used most of it. The ratio of CPU times is the speed-up where every process has
a core of its own. The ratio of times is what this machine gives, with what else it does.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def product(path: Path, images: str, folder: str | None, count: int) -> None:
    """Print the times of products; as one of the ranks."""
    from hessian_tools.operators.curvature import hessian
    from hessian_tools.runtime.distributed import initialize_group
    from ikun_hessian.jobs.open import open_job

    group = initialize_group("cpu")
    where = {"data_dir": None if folder is None else Path(folder), "device": "cpu", "group": group}
    opening = {"samples": images, "split": "train", "batch_size": None, "params": "*", "surrogate": None}
    job = open_job(path, **opening, dtype="float32", memory=2.0, **where)  # type: ignore[arg-type]
    import torch

    op, v = hessian(job.objective), torch.ones(job.objective.size)
    op @ v  # primals are kept by now
    used, began = own_cpu(), time.perf_counter()
    for _ in range(count):
        op @ v
    seconds, cpu = time.perf_counter() - began, own_cpu() - used
    print(f"one: {seconds / count:.4f} s, {cpu / count:.4f} s of CPU", flush=True)


def command(arguments: list[str]) -> None:
    """Run the command and print its CPU time; as one of the ranks."""
    from ikun_hessian.cli.main import run

    code = run(arguments)
    print(f"one: 0 s, {own_cpu():.4f} s of CPU", flush=True)
    sys.exit(code)


def started(processes: int, *arguments: str) -> tuple[float, float, float]:
    """Return the time of all processes, the longest time that one prints, and the largest CPU time that one prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    printed = [tuple(map(float, found)) for found in re.findall(r"one: ([\d.]+) s, ([\d.]+) s of CPU", done.stdout)]
    assert len(printed) == processes, done.stdout + done.stderr
    return seconds, max(one for one, _ in printed), max(cpu for _, cpu in printed)


def trained(out: Path, folder: str | None, images: int) -> None:
    """Train the network for an epoch, on digits without a folder of Fashion-MNIST."""
    from ikun.data.spec import DataSpec
    from ikun.networks import Spec
    from ikun.training.loop import train
    from ikun.training.spec import TrainingSpec

    spec = DataSpec("digits" if folder is None else "fashion-mnist", None if folder is None else images, 42)
    shape = tuple(spec.load(data_dir=folder).images.shape[1:])
    train(Spec(input_shape=shape, channels=16), spec, TrainingSpec("kaiming", epochs=1), out, data_dir=folder)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--products", type=int, default=10)
    parser.add_argument("--spectrum", nargs=argparse.REMAINDER, default=[], help="more options of the command")
    options = parser.parse_args()
    data = [] if options.folder is None else ["--data-dir", options.folder]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "csnn.pt"
        trained(path, options.folder, options.images)
        first: list[float] = []
        for processes in options.processes:
            _, one, cpu = started(
                processes, "--product", str(path), str(options.images), options.folder or "", str(options.products)
            )
            spectrum = ["spectrum", str(path), "--samples", str(options.images), "--memory", "2", *data]
            out = ["--out", f"{scratch}/{processes}", *options.spectrum]
            whole, _, used = started(processes, "--command", *spectrum, *out)
            times = [one, cpu, whole, used]
            first = first or times
            ratios = [a / b for a, b in zip(first, times, strict=True)]
            print(
                f"{processes} process(es): product {one:.3f} s ({ratios[0]:.2f} x), {cpu:.3f} s of CPU "
                f"({ratios[1]:.2f} x); command {whole:.1f} s ({ratios[2]:.2f} x), {used:.1f} s of CPU "
                f"({ratios[3]:.2f} x)",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--product"]:
        product(Path(sys.argv[2]), sys.argv[3], sys.argv[4] or None, int(sys.argv[5]))
    elif sys.argv[1:2] == ["--command"]:
        command(sys.argv[2:])
    else:
        main()
