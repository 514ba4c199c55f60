"""Cost of a gradient and of curvature products on a CUDA device: python benchmarks/gpu.py [--count] [--rounds 20].

Reference job: CSNN of width 128 with batch norms, T = 4, 28 x 28, 512 images, float32 without TF32. First a small case
is compared with float64 on the CPU. Then all candidates run in turn, timed by events; a table in Markdown says how
long each takes (median), what it has to compute and to move, and how close it comes to the device's limits: the share
is sum over operations of max(operations / peak, bytes / bandwidth), divided by the time. Bytes are what each operation
has to read and write once; temporaries of element-wise formulas are left out, as is what fits the caches.

--count prints what is counted and needs no device. Peak and bandwidth are an H200's unless they are given.

--all runs this, the tests that need a GPU, and a comparison of whole commands on the CPU and the GPU, in less than ten
minutes, and writes one report in Markdown (gpu_report.py).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import gpu_report  # noqa: E402
from hessian_tools.analysis.operator_spectrum.pyhessian import _Live  # noqa: E402
from hessian_tools.engine.linearized import Linearized  # noqa: E402
from hessian_tools.objective import Objective, make_objective  # noqa: E402
from hessian_tools.operators.curvature import linearize_ggn, linearize_hessian  # noqa: E402
from hessian_tools.runtime.cuda import Captured, full_precision, side_stream  # noqa: E402
from ikun.losses import LOSSES  # noqa: E402
from ikun.networks import Network, Spec  # noqa: E402

SIDE, CLASSES, WORD = 28, 10, 4  # pixels, classes, bytes of a float32 or an index


# ---------------------------------------------------------------- counted by hand
@dataclass(frozen=True)
class Work:
    """One operation: floating-point operations and bytes."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Map:
    """A linear map of `rows` inputs; numbers of entries. normed: a batch norm follows, folded in but in a gradient."""

    rows: int
    inputs: int
    outputs: int
    weights: int
    fan_in: int
    first: bool
    normed: bool

    def once(self) -> Work:
        """y = B(x, w), or one of its transposes: each touches x, w and y once."""
        x, y = self.rows * self.inputs, self.rows * self.outputs
        return Work(2 * y * self.fan_in, WORD * (x + y + self.weights))

    def streams(self, inputs: int, outputs: int, weights: int = 0) -> Work:
        """Element-wise work that passes so many times over arrays of these kinds."""
        entries = inputs * self.rows * self.inputs + outputs * self.rows * self.outputs + weights * self.weights
        return Work(0, WORD * entries)

    def gradient(self) -> list[Work]:
        norm = [self.streams(0, 2), self.streams(0, 3)] if self.normed else []  # y; gx and the sums from g and x
        return [self.once()] * (2 if self.first else 3) + norm

    def tangent(self) -> list[Work]:
        """B(x', w) + B(x, w')."""
        return [self.once()] if self.first else [self.once(), self.once(), self.streams(0, 3)]

    def adjoint(self) -> list[Work]:
        """gx, gw, and the sum of g for a batch norm's bias."""
        return [self.once()] * (1 if self.first else 2) + [self.streams(0, 1)] * self.normed

    def adjoint_tangent(self) -> list[Work]:
        """B*(g', w) + B*(g, w'), B*(x, g') + B*(x', g)."""
        if self.first:
            return self.adjoint()
        return [self.once()] * 4 + [self.streams(3, 0), self.streams(0, 0, 3)] + [self.streams(0, 1)] * self.normed


@dataclass(frozen=True)
class Neurons:
    """A scan over T steps of `size` neurons; static: its input is one row; pooled: a quarter comes out, and indices."""

    size: int
    steps: int
    static: bool
    pooled: bool

    def work(self, full: int, inputs: int, outputs: int, flops: int) -> Work:
        """full: arrays [T, size]; inputs, outputs: like x, and like s, which has its index with it if it is pooled."""
        whole = self.size * self.steps
        x = self.size if self.static else whole
        s = whole / 2 if self.pooled else whole
        return Work(flops * whole, WORD * (full * whole + inputs * x + outputs * s))

    def gradient(self) -> list[Work]:
        """value: x -> s, z; slopes: z -> f1, c; adjoint."""
        return [self.work(1, 1, 1, 6), self.work(3, 0, 0, 10), *self.adjoint()]

    def tangent(self) -> list[Work]:
        """x', f1, c -> s'."""
        return [self.work(2, 1, 1, 5)]

    def adjoint(self) -> list[Work]:
        """gs, f1, c -> gx."""
        return [self.work(2, 1, 1, 5)]

    def adjoint_tangent(self) -> list[Work]:
        """gs', x', f1, c (once for h', once for gh'), e -> gx'."""
        return [self.work(4, 2, 1, 11)]


def layers(channels: int, steps: int, batch: int) -> tuple[list[Map | Neurons], int]:
    """(the CSNN's layers, its number of parameters)."""
    many, area, hidden = steps * batch, SIDE * SIDE, 16 * channels
    flat = channels * area // 16
    parts: list[Map | Neurons] = [
        Map(batch, area, channels * area, 9 * channels, 9, True, True),
        Neurons(batch * channels * area, steps, True, True),
        Map(many, channels * area // 4, channels * area // 4, 9 * channels**2, 9 * channels, False, True),
        Neurons(batch * channels * area // 4, steps, False, True),
        Map(many, flat, hidden, flat * hidden, flat, False, False),
        Neurons(batch * hidden, steps, False, False),
        Map(many, hidden, CLASSES, hidden * CLASSES, hidden, False, False),
        Neurons(batch * CLASSES, steps, False, False),
    ]
    size = sum(p.weights for p in parts if isinstance(p, Map)) + 4 * channels
    return parts, size


def counted(channels: int, steps: int, batch: int) -> dict[str, list[Work]]:
    """The operations of a gradient, a Hessian and a Gauss-Newton product with everything kept that can be."""
    parts, size = layers(channels, steps, batch)
    vector = [Work(0, WORD * 6 * size)]  # into the graph's input, from the parts into one vector, out of the graph
    tangent = [work for p in parts for work in p.tangent()]
    return {
        "gradient": [work for p in parts for work in p.gradient()],
        "hessian": tangent + [work for p in parts for work in p.adjoint_tangent()] + vector,
        "ggn": tangent + [work for p in parts for work in p.adjoint()] + vector,
    }


def floor(works: list[Work], peak: float, bandwidth: float) -> float:
    """Seconds that no implementation of these operations, one after the other, can undercut."""
    return sum(max(w.flops / peak, w.bytes / bandwidth) for w in works)


# ---------------------------------------------------------------- measured
def job(channels: int, steps: int, batch: int, device: str, dtype: torch.dtype) -> Objective:
    """Random images; batch norms as after one pass over them, so that all layers fire."""
    torch.manual_seed(0)
    net = Network(Spec(input_shape=(1, SIDE, SIDE), channels=channels, timesteps=steps)).to(device, dtype)
    x = torch.rand(batch, 1, SIDE, SIDE, dtype=torch.float64).to(device, dtype)
    y = torch.arange(batch, device=device) % CLASSES
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
        elif isinstance(m, nn.Linear):
            m.weight.data.add_(3 / m.weight.shape[1])
    with torch.no_grad():
        net(x)
    return make_objective(net, LOSSES["mse"], (x, y))


def products(objective: Objective) -> dict[str, Linearized]:
    found = {}
    for kind, linearize in (("hessian", linearize_hessian), ("ggn", linearize_ggn)):
        with side_stream(objective.device):
            found[kind] = linearize(objective, objective.batches[0])
    return found


def gradient(objective: Objective, plain: bool) -> Callable[[], object]:
    (x, y), parameters = objective.batches[0], list(objective.parameters.values())
    return lambda: torch.autograd.grad(objective.loss(objective.model(x, plain=plain), y), parameters)


def error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


def check() -> None:
    """A small case against float64 on the CPU. Raises SystemExit where it is wrong."""
    exact = job(8, 4, 32, "cpu", torch.float64)
    v = torch.randn(exact.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wide = copy.deepcopy(exact.model).cuda()
    x, y = (t.cuda() for t in exact.batches[0])
    there = make_objective(wide, exact.loss, (x, y))
    here = products(exact)
    for kind, product in products(there).items():
        graph = Captured(product, product.nbytes)
        found = [graph(v.cuda()) for _ in range(3)]  # as it is, captured, replayed
        worst = max(error(f, here[kind](v)) for f in found)
        print(f"Small case, {kind} in float64 against the CPU: relative error {worst:.1e}")
        if not worst < 1e-9:
            raise SystemExit("the product is wrong: no times")
    if not torch.equal(wide(x, plain=True), wide(x)):
        raise SystemExit("the fused spikes are not the eager ones: no times")


def milliseconds(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Of every candidate in every round, in turn, after three warm-ups each."""
    for run in candidates.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return times


def ceilings(size: int) -> tuple[float, float]:
    """(operations a second of a large float32 product, bytes a second of a large copy) on this device."""
    a, b = torch.randn(2, size, size, device="cuda").unbind()
    source = torch.randn(8 * size**2, device="cuda")
    target = torch.empty_like(source)
    times = milliseconds({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10)
    product, copied = (1e-3 * statistics.median(times[name]) for name in ("product", "copy"))
    return 2 * size**3 / product, 2 * WORD * source.numel() / copied


def pyhessian(objective: Objective, v: Tensor) -> Callable[[], Tensor]:
    """A product by PyHessian, from its graph of the gradient, which it keeps for a single batch."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    live = _Live(objective)
    found = hessian(live, live.loss, data=objective.batches[0], cuda=True)
    parts = objective.split(v)
    return lambda: objective.flatten(hessian_vector_product(found.gradsH, found.params, parts))


def measure(options: argparse.Namespace) -> None:
    objective = job(options.channels, options.steps, options.batch, "cuda", torch.float32)
    v = torch.randn(objective.size, device="cuda")
    kept = products(objective)
    graphs = {kind: Captured(product, product.nbytes) for kind, product in kept.items()}
    candidates: dict[str, Callable[[], object]] = {
        "eager gradient": gradient(objective, True),
        "fused gradient": gradient(objective, False),
        "Hessian product": lambda: graphs["hessian"](v),
        "Hessian product, without its graph": lambda: kept["hessian"](v),
        "GGN product": lambda: graphs["ggn"](v),
    }
    notes = [f"kept for a Hessian product: {kept['hessian'].nbytes / 2**30:.1f} GiB"]
    try:
        reference = candidates["PyHessian, cached graph"] = pyhessian(objective, v)
        notes.append(f"Hessian product against PyHessian's: {error(graphs['hessian'](v), reference()):.1e}")
    except (ImportError, torch.OutOfMemoryError) as problem:
        candidates.pop("PyHessian, cached graph", None)
        missing = isinstance(problem, ImportError)
        notes.append("without pyhessian" if missing else "PyHessian's cached graph does not fit this device")
    times = {name: statistics.median(t) for name, t in milliseconds(candidates, options.rounds).items()}
    peak, bandwidth = 1e12 * options.tflops, 1e12 * options.bandwidth
    rate, copied = ceilings(options.size)
    works = counted(options.channels, options.steps, options.batch)
    of = dict(zip(candidates, ("gradient", "gradient", "hessian", "hessian", "ggn", "hessian"), strict=False))
    print(
        f"\n{datetime.date.today()}, {torch.cuda.get_device_name()}, PyTorch {torch.__version__}: CSNN of width "
        f"{options.channels}, T = {options.steps}, {options.batch} images, float32, {objective.size:,} parameters; "
        f"limits {options.tflops:g} TFLOP/s and {options.bandwidth:g} TB/s (measured: a product at {rate / 1e12:.1f} "
        f"TFLOP/s, a copy at {copied / 1e12:.2f} TB/s); {'; '.join(notes)}\n"
    )
    print("| | ms | eager gradients | TFLOP | GB | least ms | share of the limit |\n|---|---|---|---|---|---|---|")
    for name, time in times.items():
        work = works[of[name]]
        least = 1e3 * floor(work, peak, bandwidth)
        print(
            f"| {name} | {time:.2f} | {time / times['eager gradient']:.2f} | {sum(w.flops for w in work) / 1e12:.3f} "
            f"| {sum(w.bytes for w in work) / 1e9:.1f} | {least:.2f} | {100 * least / time:.0f}% |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", action="store_true", help="print what is counted and stop")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--tflops", type=float, default=67.0, help="the device's float32 peak (H200: 67)")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of its memory, TB/s (H200: 4.8)")
    parser.add_argument("--size", type=int, default=8192, help="of the matrices whose product is timed")
    every = parser.add_argument_group("the report")
    every.add_argument("--all", action="store_true", help="run everything that needs a GPU and write a report")
    every.add_argument("--out", default="gpu-report.md", help="file of the report")
    every.add_argument("--spectrum", default="", help="options of the command spectrum")
    every.add_argument("--checkpoints", type=int, default=3, help="how many of the shipped checkpoints")
    every.add_argument("--tests", default="", help="what pytest runs, instead of all tests that need a GPU")
    every.add_argument("--python", default="", help="command that starts Python")
    options = parser.parse_args()
    if options.all:
        sys.exit(gpu_report.write_report(options))
    if options.count:
        print("| | TFLOP | GB | least ms |\n|---|---|---|---|")
        for name, works in counted(options.channels, options.steps, options.batch).items():
            flops, moved = sum(w.flops for w in works), sum(w.bytes for w in works)
            least = 1e3 * floor(works, 1e12 * options.tflops, 1e12 * options.bandwidth)
            print(f"| {name} | {flops / 1e12:.3f} | {moved / 1e9:.1f} | {least:.2f} |")
        return
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: this PyTorch finds no CUDA device", file=sys.stderr)
        sys.exit(2)
    with full_precision(torch.device("cuda")):
        check()
        measure(options)


if __name__ == "__main__":
    main()
