"""Cost of one curvature product, in eager gradients: python benchmarks/product.py [Fashion-MNIST folder] [--rounds 15].

Reference job: CSNN of width 16, T = 4, hard reset, atan(2), 28 x 28, 64 images, float32, two threads. All candidates
run interleaved in one process; a ratio is taken within each round, against that round's eager gradient of the plain
torch network. Then the digits network (width 8, batch norm, 8 x 8, 1,437 images), where a product is compared with
the cached double backward, and numba's start from an empty and from a filled cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from hessian_tools import operators, second_order  # noqa: E402
from hessian_tools.objective import Objective, make_objective  # noqa: E402
from ikun import data  # noqa: E402
from ikun.networks import LOSSES, Network, Spec  # noqa: E402

Candidates = dict[str, Callable[[], object]]


def measure(candidates: Candidates, rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, in turn, after one warm-up each."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return times


def report(times: dict[str, list[float]], unit: str) -> None:
    """Least time, median and range of the ratios to `unit`."""
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[unit], strict=True)]
        print(
            f"  {name:36s} {1e3 * min(seconds):8.1f} ms   median {statistics.median(ratios):.2f}"
            f"   range {min(ratios):.2f} to {max(ratios):.2f}"
            f"   ratio of least times {min(seconds) / min(times[unit]):.2f}"
        )


def candidates_for(objective: Objective) -> Candidates:
    batch, (x, y) = objective.batches[0], objective.batches[0]
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(0))
    parameters = list(objective.parameters.values())
    fast = {kind: second_order.linearize(objective, batch, kind) for kind in ("hessian", "ggn")}
    cached = operators._autograd_hessian(objective, batch)
    hessian, ggn = fast["hessian"], fast["ggn"]
    assert hessian is not None
    assert ggn is not None
    exact = cached(v)
    error = float((hessian(v) - exact).norm() / exact.norm())
    print(f"  {objective.size:,} parameters; |fast - double backward| / |Hv| = {error:.1e}")
    print(f"  memory of the cached part {hessian.nbytes / 2**20:.0f} MiB")

    def uncached() -> torch.Tensor:
        product = second_order.linearize(objective, batch, "hessian")
        assert product is not None
        return product(v)

    return {
        "eager gradient": lambda: torch.autograd.grad(objective.loss(objective.outputs(x), y), parameters),
        "fast Hessian product": lambda: hessian(v),
        "fast Gauss-Newton product": lambda: ggn(v),
        "cached double backward": lambda: cached(v),
        "fast, uncached (value to product)": uncached,
    }


def cold_start() -> None:
    """Seconds until the first product in a fresh process, beyond the second one."""
    code = (
        "import time, torch; from ikun.networks import Network, Spec, LOSSES;"
        "from hessian_tools import second_order as s;"
        "from hessian_tools.objective import make_objective as m; torch.set_num_threads(2);"
        "o = m(Network(Spec()), LOSSES['mse'], (torch.rand(8, 1, 8, 8), torch.arange(8)));"
        "f = s.linearize; v = torch.ones(o.size); t = [time.perf_counter()];"
        "[(f(o, o.batches[0], 'hessian')(v), t.append(time.perf_counter())) for _ in range(2)];"
        "print(2 * t[1] - t[0] - t[2])"
    )
    with tempfile.TemporaryDirectory() as folder:
        for label in ("empty", "filled"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            )
            print(f"  numba's cache {label}: {float(done.stdout):.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files; without it, padded digits")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.folder is None:
        digits = data.load("digits")
        images, labels = F.pad(digits.images, (10, 10, 10, 10)), digits.labels
        print("Images: digits padded to 28 x 28 (no Fashion-MNIST folder given)")
    else:
        fashion = data.load("fashion-mnist", data_dir=options.folder)
        images, labels = fashion.images, fashion.labels
        print("Images: Fashion-MNIST")
    for norm in ("none", "bn"):
        torch.manual_seed(0)
        net = Network(Spec(input_shape=(1, 28, 28), channels=16, norm=norm))
        print(f"CSNN, width 16, 28 x 28, 64 images, norm {norm}")
        job = make_objective(net, LOSSES["mse"], (images[:64], labels[:64]))
        report(measure(candidates_for(job), options.rounds), "eager gradient")
    digits = data.load("digits")
    torch.manual_seed(0)
    net = Network(Spec(input_shape=(1, 8, 8), channels=8, norm="bn"))
    print(f"CSNN, width 8, 8 x 8, {len(digits.labels)} digits, norm bn")
    job = make_objective(net, LOSSES["mse"], (digits.images, digits.labels))
    report(measure(candidates_for(job), options.rounds), "cached double backward")
    print("First product in a fresh process")
    cold_start()


if __name__ == "__main__":
    main()
