"""Cost of one curvature product, in eager gradients: python benchmarks/product.py [Fashion-MNIST folder] [--rounds 15].

Reference job: CSNN of width 16, T = 4, hard reset, atan(2), 28 x 28, 64 images, float32, two threads. All candidates
run interleaved in one process; a ratio is taken within each round, against that round's eager gradient of the plain
torch network. `Function`: the same network as spiking libraries write it (rounds.Conventional), faster. Then the digits
network (width 8, batch norm, 8 x 8, 1,437 images), where a product is compared with the cached double backward.
"""

from __future__ import annotations

import argparse

import torch
from rounds import (
    Candidates,
    Conventional,
    eager_gradient,
    images,
    measure,
    reference_job,
    relative_error,
    report,
)

from hessian_tools.objective import Objective
from hessian_tools.operators import curvature as operators
from ikun.data import datasets as data


def candidates_for(objective: Objective) -> Candidates:
    (batch,) = objective.batches
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(0))
    hessian, ggn = operators.linearize_hessian(objective, batch), operators.linearize_ggn(objective, batch)
    cached = operators._autograd_hessian(objective, batch)
    error = relative_error(hessian(v), cached(v))
    print(f"  {objective.size:,} parameters; |fast - double backward| / |Hv| = {error:.1e}")
    print(f"  memory of the cached part {hessian.nbytes / 2**20:.0f} MiB")

    def uncached() -> torch.Tensor:
        return operators.linearize_hessian(objective, batch)(v)

    return {
        "eager gradient": eager_gradient(objective),
        "eager gradient (Function)": eager_gradient(objective, Conventional(objective.model)),
        "fast Hessian product": lambda: hessian(v),
        "fast Gauss-Newton product": lambda: ggn(v),
        "cached double backward": lambda: cached(v),
        "fast, uncached (value to product)": uncached,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files; without it, padded digits")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(2)
    batch = images(options.folder, 64)
    for norm in ("none", "bn"):
        print(f"CSNN, width 16, 28 x 28, 64 images, norm {norm}")
        report(measure(candidates_for(reference_job(batch, norm=norm)), options.rounds), "eager gradient")
    digits = data.load_dataset("digits")
    print(f"CSNN, width 8, 8 x 8, {len(digits.labels)} digits, norm bn")
    job = reference_job((digits.images[:], digits.labels), input_shape=(1, 8, 8), channels=8)
    report(measure(candidates_for(job), options.rounds), "cached double backward")


if __name__ == "__main__":
    main()
