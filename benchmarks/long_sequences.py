"""Long sequences, whole, in segments and in small batches: python benchmarks/long_sequences.py [--samples 16].

CSNN of width 16 with batch norm, digits padded to 28 x 28, T = 16, 64 and 256, float32, two threads. Peak memory of one
Hessian product, in a process of its own for every T; time in eager gradients of the plain torch network, all candidates
interleaved in one process. A whole product is timed with its primal kept and from scratch; one in segments keeps
nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from memory import growth  # noqa: E402
from rounds import measure, report  # noqa: E402

from hessian_tools.engine.product import kept_bytes  # noqa: E402
from hessian_tools.objective import Objective, make_objective  # noqa: E402
from hessian_tools.operators.curvature import hessian, linearize_ggn, linearize_hessian  # noqa: E402
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
    """Print what one product takes, beyond what the process had before it: whole, in segments, in small batches."""
    small = job(2, 1)
    hessian(small) @ torch.ones(small.size)  # numba's kernels are compiled or read
    objective = job(steps, samples)
    v, kept = torch.ones(objective.size), kept_bytes(objective)
    assert kept is not None
    one = objective.rebatched(1)
    ways = {"whole": (objective, 2**40), "in segments": (objective, 1), "one sample a batch": (one, 0)}
    found = ", ".join(
        f"{growth(lambda o=o, m=memory: hessian(o, m) @ v) / 2**20:5.0f} MiB {way}"  # type: ignore[misc]
        for way, (o, memory) in ways.items()
    )
    print(f"T = {steps:3d}: peak of a product {found}; a sample keeps {kept[1] / 2**20:.1f} MiB", flush=True)


def times(steps: int, samples: int, rounds: int) -> None:
    objective = job(steps, samples)
    (batch,) = objective.batches
    x, y = batch
    v, parameters = torch.randn(objective.size), list(objective.parameters.values())
    kept, cut = linearize_hessian(objective, batch), linearize_hessian(objective, batch, memory=1)
    exact, one = kept(v), hessian(objective.rebatched(1), 0)
    error = (cut(v) - exact).norm() / exact.norm()
    print(f"T = {steps}, {samples} samples: |in segments - whole| / |Hv| = {float(error):.0e}")
    candidates = {
        "eager gradient": lambda: torch.autograd.grad(objective.loss(objective.outputs(x), y), parameters),
        "eager forward": lambda: objective.outputs(x),
        "Hessian product, whole, primal kept": lambda: kept(v),
        "Hessian product, whole, from scratch": lambda: linearize_hessian(objective, batch)(v),
        "Hessian product, in segments": lambda: cut(v),
        "Hessian product, one sample a batch, from scratch": lambda: one @ v,
        "Gauss-Newton, whole, from scratch": lambda: linearize_ggn(objective, batch)(v),
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
