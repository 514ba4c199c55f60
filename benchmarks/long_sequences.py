"""Products over long sequences, whole and in segments of time: python benchmarks/long_sequences.py [--samples 16].

CSNN of width 16 with batch norm, digits padded to 28 x 28, T = 16, 64 and 256, float32, two threads. Peak memory of one
Hessian product, in a process of its own for every T; time in eager gradients of the plain torch network, all candidates
interleaved in one process. A whole product is timed with its primal kept and from scratch; one in segments keeps
nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from memory import growth  # noqa: E402
from rounds import measure, report  # noqa: E402

from hessian_tools.chain import (  # noqa: E402
    second_order,
    segments,
)
from hessian_tools.engine.linearized import Linearized  # noqa: E402
from hessian_tools.objective import Objective, make_objective  # noqa: E402
from hessian_tools.operators.curvature import hessian  # noqa: E402
from ikun.data import datasets as data  # noqa: E402
from ikun.losses import LOSSES  # noqa: E402
from ikun.networks import Network, Spec  # noqa: E402

STEPS = (16, 64, 256)


def job(steps: int, samples: int) -> Objective:
    torch.manual_seed(0)
    net = Network(Spec(input_shape=(1, 28, 28), channels=16, timesteps=steps))
    digits = data.load_dataset("digits")
    images = F.pad(digits.images[:samples], (10, 10, 10, 10))
    return make_objective(net, LOSSES["mse"], (images, digits.labels[:samples]))


def peaks(steps: int, samples: int) -> None:
    """Print what one product takes, beyond what the process had before it, in each of two ways."""
    small = replace(job(2, 1), segmentation=segments)
    hessian(small) @ torch.ones(small.size)  # numba's kernels are compiled or read
    objective = job(steps, samples)
    v, each = torch.ones(objective.size), segments.bytes_per_sample(objective)
    assert each is not None
    cut, whole = (
        growth(lambda o=o: hessian(o) @ v)  # type: ignore[misc]
        for o in (replace(objective, segmentation=segments), objective)
    )
    print(
        f"T = {steps:3d}: peak of a product {whole / 2**20:7.0f} MiB whole (its primal {samples * each / 2**20:5.0f}), "
        f"{cut / 2**20:5.0f} MiB in segments of {segments.length(objective)}",
        flush=True,
    )


def times(steps: int, samples: int, rounds: int) -> None:
    objective = job(steps, samples)
    (batch,) = objective.batches
    x, y = batch
    v, parameters = torch.randn(objective.size), list(objective.parameters.values())

    def product(kind: str) -> Linearized:
        found = second_order.linearize(objective, batch, kind)
        assert found is not None
        return found

    def cut(kind: str) -> Linearized:
        found = segments.linearize_in_segments(objective, batch, kind)
        assert found is not None
        return found

    kept, exact = product("hessian"), product("hessian")(v)
    error = (cut("hessian")(v) - exact).norm() / exact.norm()
    print(f"T = {steps}, {samples} samples: |in segments - whole| / |Hv| = {float(error):.0e}")
    candidates = {
        "eager gradient": lambda: torch.autograd.grad(objective.loss(objective.outputs(x), y), parameters),
        "eager forward": lambda: objective.outputs(x),
        "gradient in segments": lambda: segments.value_and_gradient(objective, batch),
        "Hessian product, whole, primal kept": lambda: kept(v),
        "Hessian product, whole, from scratch": lambda: product("hessian")(v),
        "Hessian product, in segments": lambda: cut("hessian")(v),
        "Gauss-Newton, whole, from scratch": lambda: product("ggn")(v),
        "Gauss-Newton, in segments": lambda: cut("ggn")(v),
    }
    report(measure(candidates, rounds), "eager gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return peaks(options.peak, options.samples)
    torch.set_num_threads(2)
    for steps in STEPS:
        again = [sys.executable, __file__, "--samples", str(options.samples), "--peak", str(steps)]
        subprocess.run(again, check=True)
    for steps in STEPS:
        times(steps, options.samples, options.rounds)


if __name__ == "__main__":
    main()
