"""What the other scripts share: rounds of candidates, ratios within a round, the reference job, a plain network.

On Linux a timing waits for a moment when nothing else runs, and is taken again if other processes used the CPUs
meanwhile: operations spread over all threads wait for the slowest one, so that a busy machine slows some candidates
many times more than others. What was disturbed even so is counted and printed.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hessian_tools.objective import Objective, make_objective  # noqa: E402
from ikun.data import datasets as data  # noqa: E402
from ikun.layers import MaxPool  # noqa: E402
from ikun.losses import LOSSES  # noqa: E402
from ikun.networks import Network, Spec  # noqa: E402
from ikun.neurons import Neuron  # noqa: E402

Candidates = dict[str, Callable[[], object]]
Times = dict[str, list[float]]
PATIENCE = 90.0  # seconds in which one timing must be undisturbed


def others() -> float:
    """CPU seconds that everything but this process and its finished children has used; 0 where that is not known."""
    try:
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    except (OSError, ValueError):
        return 0.0
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - sum(u.ru_utime + u.ru_stime for u in own)


def timed(run: Callable[[], object]) -> tuple[float, bool]:
    """(seconds that run() takes, whether other processes disturbed each of the timings; the least one counts then).

    A timing is the mean of so many runs as take a fifth of a second, behind a first one that does not count: caches and
    threads are as in an iteration, not as another candidate left them.
    """
    disturbed: list[float] = []
    patience = time.monotonic() + PATIENCE
    while not disturbed or time.monotonic() < patience:
        while time.monotonic() < patience:
            before = others()
            time.sleep(0.1)
            if others() - before <= 0.02:
                break
        began = time.perf_counter()
        run()
        count = max(1, round(0.2 / (time.perf_counter() - began)))
        before, began = others(), time.perf_counter()
        for _ in range(count):
            run()
        seconds = time.perf_counter() - began
        if others() - before <= 0.03 + 0.05 * seconds:  # clocks tick in hundredths
            return seconds / count, False
        disturbed.append(seconds / count)
    return min(disturbed), True


def measure(candidates: Candidates, rounds: int) -> Times:
    """Seconds of every candidate in every round, in turn."""
    times: Times = {name: [] for name in candidates}
    disturbed = 0
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds, noisy = timed(run)
            times[name].append(seconds)
            disturbed += noisy
    if disturbed:
        print(f"  {disturbed} of {rounds * len(candidates)} timings were disturbed by other processes")
    return times


def ratios(times: Times, name: str, unit: str, per: float = 1.0) -> list[float]:
    """Of `name`, divided by `per`, to `unit`, round by round."""
    return [a / b / per for a, b in zip(times[name], times[unit], strict=True)]


def report(times: Times, unit: str, per: dict[str, float] | None = None) -> None:
    """Least time, median and range of the ratios to `unit`; per: vectors that a candidate multiplies."""
    for name, seconds in times.items():
        each = (per or {}).get(name, 1.0)
        r = ratios(times, name, unit, each)
        print(
            f"  {name:44s} {1e3 * min(seconds) / each:8.1f} ms   median {statistics.median(r):5.2f}"
            f"   range {min(r):.2f} to {max(r):.2f}",
            flush=True,
        )


def images(folder: str | None, count: int) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST images [count, 1, 28, 28] from the IDX files in `folder`, padded digits without one; labels."""
    found = data.load_dataset("digits") if folder is None else data.load_dataset("fashion-mnist", data_dir=folder)
    name = "digits padded to 28 x 28 (no Fashion-MNIST folder given)" if folder is None else "Fashion-MNIST"
    print(f"images: {name}")
    x = found.images[:count]
    return F.pad(x, (10, 10, 10, 10)) if folder is None else x, found.labels[:count]


def reference_job(batch: tuple[Tensor, Tensor], batch_size: int | None = None, **changes: Any) -> Objective:
    """CSNN of width 16 with batch norm, T = 4, hard reset, atan(2), float32, freshly drawn, on these images."""
    torch.manual_seed(0)
    network = Network(Spec(**{"input_shape": (1, 28, 28), "channels": 16, **changes}))
    return make_objective(network, LOSSES["mse"], batch, batch_size=batch_size)


def eager_gradient(objective: Objective, model: nn.Module | None = None) -> Callable[[], object]:
    """One gradient of the plain torch network, or of `model` with the same parameters, over all batches."""
    parameters = list(objective.parameters.values())
    outputs = partial(objective.model, plain=True) if model is None else model

    def run() -> list[tuple[Tensor, ...]]:
        return [torch.autograd.grad(objective.loss(outputs(x), y), parameters) for x, y in objective.batches]

    return run


class Atan(torch.autograd.Function):
    """A spike as spiking libraries write it: a step forward, the surrogate's derivative (atan(2)) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return g / (1 + (math.pi * x).square())


class Conventional(nn.Module):
    """The network `net` (IF neurons, hard reset to 0, atan(2)) with such spikes and with torch's own max-pooling.

    The same spikes, gradient and Hessian in fewer element-wise operations than the network's own plain forward, which
    can be differentiated in every mode.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        assert isinstance(net, Network)
        self.net, self.steps = net, net.spec.timesteps

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> rates [N, classes]; a repeated image is convolved once."""
        repeats = True
        for layer in self.net.children():
            if isinstance(layer, Neuron):
                v, spikes = torch.zeros_like(x if repeats else x[0]), []
                for t in range(self.steps):
                    h = v + (x if repeats else x[t])
                    s = Atan.apply(h - 1)
                    v = h * (1 - s)
                    spikes.append(s)
                x, repeats = torch.stack(spikes), False
            elif repeats:
                x = layer(x)
            else:
                flat = x.flatten(0, 1)
                y = F.max_pool2d(flat, 2) if isinstance(layer, MaxPool) else layer(flat)
                x = y.unflatten(0, (self.steps, -1))
        rates: Tensor = x.mean(0)
        return rates


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())
