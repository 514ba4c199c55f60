"""Time to the top 50 eigenpairs: python benchmarks/eigenpairs.py [Fashion-MNIST folder] [--train EPOCHS].

Reference job: CSNN of width 16 with batch norm, T = 4, hard reset, atan(2), 28 x 28, 64 images, all 205,776 parameters,
float32, two threads; trained for some epochs first. In one run: our Lanczos to a relative residual of 1e-3 for every
pair; scipy's eigsh over our operator to the same; PyHessian's eigenvalues(top_n=50) at its defaults, with the residuals
that it reached; and PyHessian's top 5 with its tolerance lowered until their residuals are 1e-3 too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.sparse.linalg import eigsh  # noqa: E402

from hessian_tools.analysis.operator_spectrum.pyhessian import _Live  # noqa: E402
from hessian_tools.linalg.lanczos import Eigenpairs, certified, eigenpairs  # noqa: E402
from hessian_tools.objective import Objective, make_objective  # noqa: E402
from hessian_tools.operators.base import to_scipy  # noqa: E402
from hessian_tools.operators.curvature import hessian  # noqa: E402
from ikun.data.spec import DataSpec  # noqa: E402
from ikun.losses import LOSSES  # noqa: E402
from ikun.networks import Spec  # noqa: E402
from ikun.training.loop import train  # noqa: E402
from ikun.training.spec import TrainingSpec  # noqa: E402

TOP, TOLERANCE = 50, 1e-3


def job(folder: str | None, epochs: int) -> Objective:
    """64 images at a network trained on the Fashion-MNIST files in folder, or on digits where there are none."""
    name = "digits" if folder is None else "fashion-mnist"
    print(f"images: {name}" + ("" if folder else " of 8 x 8 (no Fashion-MNIST folder given): a smaller job"))
    spec = DataSpec(name, None, 42)
    images = spec.load(data_dir=folder)
    network = Spec(input_shape=tuple(images.images.shape[1:]), channels=16)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as out:
        trained = train(network, spec, TrainingSpec("kaiming", epochs=epochs), Path(out) / "a.pt", data_dir=folder)
    x, y = trained.inputs(images.images)[:64], images.labels[:64]
    return make_objective(trained.build(), LOSSES["mse"], (x, y), batch_size=32)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def pyhessian(objective: Objective, top: int, tol: float, most: int) -> Any:
    """PyHessian's own eigenvectors, on one batch, where it keeps its graph and is fastest."""
    from pyhessian import hessian as theirs

    torch.manual_seed(0)
    (batch,) = objective.rebatched(objective.samples).batches
    computation = theirs(_Live(objective), objective.loss, data=batch, cuda=False)
    return computation.eigenvalues(maxIter=most, tol=tol, top_n=top)


def residuals(objective: Objective, vectors: torch.Tensor) -> Eigenpairs:
    return certified(hessian(objective), vectors / vectors.norm(dim=0), TOLERANCE)


def line(name: str, seconds: float, unit: float, pairs: Eigenpairs, products: str) -> None:
    """unit: seconds of our own run for as many pairs."""
    relative = pairs.residuals / pairs.norm
    print(
        f"  {name:34s}{seconds:9.1f} s {seconds / unit:8.1f} x  products {products:>6}  relative residuals: median "
        f"{float(relative.median()):.0e}, worst {float(relative.max()):.0e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files")
    parser.add_argument("--train", type=int, default=5, help="epochs")
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", message="Using backward")  # PyHessian's way
    objective = job(options.folder, options.train)
    print(f"{objective.size:,} parameters, {objective.samples} samples, top {TOP} by size of the eigenvalue")
    hessian(objective) @ torch.ones(objective.size)  # numba's kernels are compiled or read

    def ours() -> Eigenpairs:
        draws = torch.Generator().manual_seed(0)
        return eigenpairs(hessian(objective), 0, magnitude=TOP, generator=draws, tol=TOLERANCE)

    found, unit = timed(ours)
    line("ours (Lanczos)", unit, unit, found, str(found.products))
    op = hessian(objective)
    (_, vectors), seconds = timed(
        lambda: eigsh(
            to_scipy(op), TOP, which="LM", tol=TOLERANCE, v0=np.random.default_rng(0).normal(size=op.shape[0])
        )
    )
    products = op.products
    line("scipy's eigsh on our operator", seconds, unit, residuals(objective, torch.from_numpy(vectors)), str(products))
    (_, vectors), seconds = timed(lambda: pyhessian(objective, TOP, 1e-3, 100))
    columns = torch.stack([objective.flatten(v).double() for v in vectors], 1)
    line("PyHessian, top 50, its defaults", seconds, unit, residuals(objective, columns), "-")
    first, five = timed(
        lambda: eigenpairs(hessian(objective), 0, magnitude=5, generator=torch.Generator(), tol=TOLERANCE)
    )
    line("ours, top 5", five, five, first, str(first.products))
    for tol in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        (_, vectors), seconds = timed(lambda tol=tol: pyhessian(objective, 5, tol, 2000))
        columns = torch.stack([objective.flatten(v).double() for v in vectors], 1)
        pairs = residuals(objective, columns)
        line(f"PyHessian, top 5, tolerance {tol:.0e}", seconds, five, pairs, "-")
        if bool(pairs.converged.all()):
            break


if __name__ == "__main__":
    main()
