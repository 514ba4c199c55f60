"""Blocks of probes against single products: python benchmarks/blocks.py [Fashion-MNIST folder] [--rounds 9].

Reference job of width 16 (see product.py), 64 images in one batch and 256 in four, two threads: a block of k = 2, 4, 8
vectors, cost a vector in single products; the batches' primal kept, and recomputed for every block. With fewer batches
than threads the columns run side by side, one thread each (runtime/threads.py): `in turn` is the same without it,
every operation spread over all threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rounds import Candidates, images, measure, reference_job, relative_error, report
from torch import Tensor

from hessian_tools.engine.linearized import Linearized
from hessian_tools.objective import Objective
from hessian_tools.operators.curvature import hessian, linearize_hessian

SIZES = (2, 4, 8)


def in_turn(objective: Objective, keep: bool) -> Callable[[Tensor], Tensor]:
    """The only batch's product with a block, column by column, operations spread over all threads."""

    def made() -> Linearized:
        return linearize_hessian(objective, objective.batches[0])

    def run(block: Tensor) -> Tensor:
        product = kept or made()
        return torch.stack([product(v) for v in block.unbind(1)], 1)

    kept = made() if keep else None
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files; without it, padded digits")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(2)
    x, y = images(options.folder, 256)
    for count in (64, 256):
        objective = reference_job((x[:count], y[:count]), batch_size=64)
        block = torch.randn(objective.size, max(SIZES), generator=torch.Generator().manual_seed(0))
        for keep in (True, False):
            batches = "1 batch" if count == 64 else f"{count // 64} batches"
            print(f"{count} images in {batches}, primal {'kept' if keep else 'recomputed'}")
            operator = hessian(objective, 2**33 if keep else 0)
            ways = {"": operator.__matmul__} | ({" in turn": in_turn(objective, keep)} if count == 64 else {})
            single = torch.stack([operator @ v for v in block.unbind(1)], 1)
            found: Candidates = {"single product": lambda op=operator, v=block[:, 0]: op @ v}  # type: ignore[misc]
            per: dict[str, float] = {}
            for way, multiply in ways.items():
                print(f"  block{way} and single products: difference {relative_error(multiply(block), single):.0e}")
                for k in SIZES:
                    name = f"block of {k}{way}, a vector"
                    found[name] = lambda m=multiply, b=block[:, :k]: m(b)  # type: ignore[misc]
                    per[name] = k
            report(measure(found, options.rounds), "single product", per)


if __name__ == "__main__":
    main()
