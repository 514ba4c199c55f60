"""One Hessian product, here and in other tools: python benchmarks/peers.py [Fashion-MNIST folder] [--rounds 15].

Needs: pip install '.[benchmarks]'. Reference job: CSNN of width 16 with batch norm, T = 4, hard reset, atan(2), 64
images of 28 x 28, all parameters, float32, two threads. All candidates run interleaved in one process; a ratio is taken
within each round, against that round's eager gradient of the plain torch network. Peers get the network in two forms:
`2-jet`, our own plain torch forward, which can be differentiated in every mode; `Function`, the same network as spiking
libraries write it (surrogate in a torch.autograd.Function, torch's max-pooling), which is faster. Every product is
compared with ours before it is timed; what a tool cannot do is printed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch
from rounds import Candidates, Conventional, eager_gradient, images, measure, reference_job, relative_error, report
from torch import Tensor, nn

from hessian_tools.objective import Objective
from hessian_tools.operators.curvature import hessian

BLOCK = 4
Product = Callable[[Tensor], Tensor]  # [P] or [P, k] -> the same


def pyhessian(objective: Objective, model: nn.Module, loader: bool) -> Product:
    from pyhessian import hessian as theirs
    from pyhessian.utils import hessian_vector_product

    (batch,) = objective.batches
    if loader:
        computation = theirs(model, objective.loss, dataloader=[batch], cuda=False)
        return lambda v: objective.flatten(computation.dataloader_hv_product(objective.split(v))[1])
    computation = theirs(model, objective.loss, data=batch, cuda=False)
    graph, parameters = computation.gradsH, computation.params
    return lambda v: objective.flatten(hessian_vector_product(graph, parameters, objective.split(v)))


def eigenthings(objective: Objective, model: nn.Module) -> Product:
    from hessian_eigenthings import HessianOperator  # type: ignore[import-untyped]

    operator = HessianOperator(model, list(objective.batches), lambda m, batch: objective.loss(m(batch[0]), batch[1]))
    return lambda v: operator.matvec(v)


class Loss(nn.Module):
    """curvlinops wants a module."""

    reduction = "mean"

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.function = objective.loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.function(outputs, targets)


def curvlinops(objective: Objective, model: nn.Module) -> Product:
    from curvlinops import HessianLinearOperator  # type: ignore[import-untyped]

    parameters = list(objective.parameters.values())
    operator = HessianLinearOperator(
        model, Loss(objective), parameters, list(objective.batches), check_deterministic=False
    )
    return lambda v: operator @ v


def ours(objective: Objective, memory: float) -> Product:
    operator = hessian(objective, memory)
    return lambda v: operator @ v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files; without it, padded digits")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", message="Using backward")  # PyHessian's way
    batch = images(options.folder, 64)
    objective, halves = reference_job(batch), reference_job(batch, batch_size=32)
    models = {"2-jet": objective.model, "Function": Conventional(objective.model)}
    products: dict[str, Callable[[], Product]] = {
        "ours, primal kept": lambda: ours(objective, 2**32),
        "ours, primal kept, in two batches": lambda: ours(halves, 2**32),
        "ours, primal recomputed": lambda: ours(objective, 0),
        "ours, primal recomputed, in two batches": lambda: ours(halves, 0),
    }
    for form, model in models.items():
        made: dict[str, Callable[[], Product]] = {
            "PyHessian, one batch": lambda m=model: pyhessian(objective, m, False),  # type: ignore[misc]
            "PyHessian, data loader": lambda m=model: pyhessian(objective, m, True),  # type: ignore[misc]
            "hessian-eigenthings": lambda m=model: eigenthings(objective, m),  # type: ignore[misc]
            "curvlinops": lambda m=model: curvlinops(objective, m),  # type: ignore[misc]
        }
        products |= {f"{name} ({form})": make for name, make in made.items()}
    names = ("pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names))
    print(f"{objective.size:,} parameters, {objective.samples} images, {torch.get_num_threads()} threads")
    block = torch.randn(objective.size, BLOCK, generator=torch.Generator().manual_seed(0))
    v = block[:, 0].contiguous()
    exact = ours(objective, 2**32)(block)

    candidates: Candidates = {
        "eager gradient (2-jet)": eager_gradient(objective),
        "eager gradient (Function)": eager_gradient(objective, models["Function"]),
    }
    per: dict[str, float] = {}
    print("relative difference from our product")
    for name, make in products.items():
        blocked = f"{name}, block of {BLOCK}"
        try:
            product = make()
            print(f"  {name:44s} {relative_error(product(v), exact[:, 0]):.1e}", flush=True)
            candidates[name] = lambda p=product: p(v)  # type: ignore[misc]
            if name.startswith(("ours", "curvlinops")):
                print(f"  {blocked:44s} {relative_error(product(block), exact):.1e}", flush=True)
                candidates[blocked], per[blocked] = (lambda p=product: p(block)), BLOCK  # type: ignore[misc]
        except Exception as error:  # a peer may raise anything
            (line, *_) = str(error).splitlines() or [""]
            print(f"  {name:44s} fails: {type(error).__name__}: {line[:50]}", flush=True)
    print(f"time a vector, and in eager gradients (2-jet), {options.rounds} rounds")
    report(measure(candidates, options.rounds), "eager gradient (2-jet)", per)


if __name__ == "__main__":
    main()
