"""Where the time of one product goes: python benchmarks/profile_product.py [Fashion-MNIST folder] [--runs 20].

Reference job: CSNN of width 16 with batch norm, T = 4, 64 images of 28 x 28 in one batch, two threads. torch.profiler
over the Hessian product with its primal kept, the same from scratch, the Gauss-Newton product, and the eager gradient
of the plain torch network (2-jet) and of that written as spiking libraries do (Function). Shares of the calling
thread's own time by kind of operation, and for convolutions and matrix products the arithmetic done, as a share of
what one large matrix product reaches here; for the scans the bytes of their arguments and results, each once, as a
share of what copying reaches.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from rounds import Conventional, eager_gradient, images, reference_job, timed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from hessian_tools.chain import second_order
from hessian_tools.engine.linearized import Linearized
from hessian_tools.objective import Objective
from ikun.kernels import dispatch as fused

KINDS = {
    "convolutions": ("conv", "mkldnn"),
    "matrix products": ("mm", "addmm", "matmul", "bmm", "linear"),
    "scans (neurons, pooling)": ("scan",),
    "batch norm": ("batch_norm",),
    "max-pooling": ("max_pool",),
    "sums": ("sum", "mean"),
    "copies and fills": ("copy", "fill", "zero", "cat", "stack", "clone", "empty", "contiguous", "to"),
}
OTHER = "element-wise, the rest"
COUNTED = ("convolutions", "matrix products")


def kind(name: str) -> str:
    """Of an operation by its name in the profile."""
    bare = name.removeprefix("aten::").lstrip("_")
    return next((k for k, starts in KINDS.items() if any(bare.startswith(s) for s in starts)), OTHER)


@contextmanager
def marked_scans(moved: Counter[str]) -> Iterator[None]:
    """The numba kernels get a name in the profile; `moved` counts the bytes of their arrays, each once."""
    launch = fused._launch

    def named(name: str, like: Tensor, unit: int, tensors: list[Tensor | None], *others: object) -> float | None:
        arrays = [*tensors, *(t for t in others if isinstance(t, Tensor))]
        moved["bytes"] += sum(t.nbytes for t in arrays if t is not None)
        with record_function(f"scan {name}"):
            return launch(name, like, unit, tensors, *others)  # type: ignore[arg-type]

    with patch.object(fused, "_launch", named):
        yield


def profiled(run: Callable[[], object], runs: int) -> tuple[dict[str, float], float, float]:
    """(milliseconds a run by kind, floating-point operations, bytes moved by the scans)."""
    run()
    moved: Counter[str] = Counter()
    with marked_scans(moved), profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(runs):
            run()
    shares: dict[str, float] = {}
    for event in found.key_averages():
        name = kind(event.key)
        shares[name] = shares.get(name, 0.0) + event.self_cpu_time_total / 1e3 / runs
    with FlopCounterMode(display=False) as flops:
        run()
    return shares, float(flops.get_total_flops()), moved["bytes"] / runs


def limits() -> tuple[float, float]:
    """(floating-point operations a second of a large product, bytes a second of a large copy, both ways counted)."""
    a, b = torch.rand(2, 2048, 2048)
    big, target = torch.rand(2, 2**24)
    product = min(timed(lambda: a @ b)[0] for _ in range(3))
    copied = min(timed(lambda: target.copy_(big))[0] for _ in range(3))
    return 2 * 2048**3 / product, 2 * big.nbytes / copied


def jobs(objective: Objective) -> dict[str, Callable[[], object]]:
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(0))

    def product(kind: str) -> Linearized:
        found = second_order.linearize(objective, objective.batches[0], kind)
        assert found is not None
        return found

    hessian, ggn = product("hessian"), product("ggn")
    return {
        "Hessian product, primal kept": lambda: hessian(v),
        "Gauss-Newton product, primal kept": lambda: ggn(v),
        "Hessian product, from scratch": lambda: product("hessian")(v),
        "eager gradient (2-jet)": eager_gradient(objective),
        "eager gradient (Function)": eager_gradient(objective, Conventional(objective.model)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files; without it, padded digits")
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(2)
    objective = reference_job(images(options.folder, 64))
    peak, bandwidth = limits()
    print(f"a product of 2048 x 2048 matrices: {peak / 1e9:.0f} GFLOP/s; a copy of 64 MiB: {bandwidth / 1e9:.1f} GB/s")
    for name, run in jobs(objective).items():
        shares, flops, moved = profiled(run, options.runs)
        total = sum(shares.values())
        print(f"{name}: {total:.1f} ms in the calling thread, {flops / 1e9:.2f} GFLOP, scans move {moved / 1e6:.0f} MB")
        for part, spent in sorted(shares.items(), key=lambda item: -item[1]):
            if spent >= 0.005 * total:
                print(f"  {part:28s} {spent:7.2f} ms {spent / total:5.0%}")
        arithmetic = sum(shares.get(part, 0.0) for part in COUNTED) / 1e3
        print(f"  arithmetic at {flops / arithmetic / peak:.0%} of the large product's speed", end="")
        scans = shares.get("scans (neurons, pooling)", 0.0) / 1e3
        print(f"; scans at {moved / scans / bandwidth:.0%} of a copy's speed" if scans else "")


if __name__ == "__main__":
    main()
