"""First product in a fresh process, and numba's scans against torch.compile's: python benchmarks/start.py [--rounds 9].

Four processes, in each order: numba's cache empty and filled, torch.compile's cache empty and filled. For numba the
seconds are those of the first Hessian product, with its trace, beyond the second (a small CSNN); for torch.compile
those until the three scans of a product (fused.torch_tangent, torch_adjoint, torch_adjoint_tangent; IF neurons, no
pooling, T = 4) have run once. Then both run on 200,000 neurons, interleaved, two threads, against plain torch: what
lost, and by how much. torch.compile needs a C++ compiler; without one that is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from rounds import ROOT, Candidates, measure, relative_error, report
from torch import Tensor

from ikun.kernels import dispatch as fused
from ikun.kernels.scan import Scan, torch_adjoint, torch_adjoint_tangent, torch_tangent

STEPS, NEURONS = 4, 200_704  # 16 channels of 14 x 14, 64 images


def first_product() -> None:
    """Prints the seconds."""
    from hessian_tools.objective import make_objective
    from hessian_tools.operators.curvature import linearize_hessian
    from ikun.losses import LOSSES
    from ikun.networks import Network, Spec

    batch = torch.rand(8, 1, 8, 8), torch.arange(8)
    objective = make_objective(Network(Spec()), LOSSES["mse"], batch)
    times = [time.perf_counter()]
    for _ in range(2):
        linearize_hessian(objective, batch)(torch.ones(objective.size))
        times.append(time.perf_counter())
    print(2 * times[1] - times[0] - times[2])


def example() -> tuple[Scan, Tensor]:
    """A scan at random coefficients, and an input [T, M]."""
    draws = torch.Generator().manual_seed(0)
    f1, c, e, x = torch.rand(4, STEPS, NEURONS, generator=draws)
    return Scan(f1, c, 1.0, 1.0, static=False, index=None, unit=1, e=e), x


def passes() -> dict[str, tuple[Candidates, Tensor]]:
    """Per way of running them: the three scans, and one result to compare."""
    scan, x = example()
    plain = {
        "tangent": lambda scan, x: torch_tangent(scan, x, 0.0),
        "adjoint": lambda scan, x: torch_adjoint(scan, x)[0],
        "tangent of adjoint": lambda scan, x: torch_adjoint_tangent(scan, x, x, 0.0)[0],
    }
    ours = {
        "tangent": fused.tangent,
        "adjoint": lambda scan, x: fused.adjoint(scan, x)[0],
        "tangent of adjoint": lambda scan, x: fused.adjoint_tangent(scan, x, x)[0],
    }
    made = {"plain torch": plain, "numba": ours, "torch.compile": {n: torch.compile(f) for n, f in plain.items()}}
    found = {}
    for way, functions in made.items():
        runs: Candidates = {n: lambda f=f: f(scan, x) for n, f in functions.items()}  # type: ignore[misc]
        found[way] = runs, functions["tangent of adjoint"](scan, x) if way != "torch.compile" else x
    return found


def compiled() -> None:
    """Prints the seconds until the compiled scans have run once."""
    runs, _ = passes()["torch.compile"]
    began = time.perf_counter()
    for run in runs.values():
        run()
    print(time.perf_counter() - began)


def fresh(what: str, folder: str) -> str:
    """The last line that a process of its own prints, with its caches in `folder`; of its error if it fails."""
    caches = {"NUMBA_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
    environment = {**os.environ, **caches, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--only", what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return lines[-1][:160] if done.returncode else f"{float(lines[-1]):.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["numba", "compile"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.only:
        return first_product() if options.only == "numba" else compiled()
    for what, label in (("numba", "numba, first product"), ("compile", "torch.compile, three scans")):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("empty", "filled"):
                print(f"{label}, cache {state}: {fresh(what, folder)}", flush=True)
    found = passes()
    (plain, exact), (ours, result), (theirs, _) = found["plain torch"], found["numba"], found["torch.compile"]
    print(f"numba and plain torch, tangent of the adjoint: relative difference {relative_error(result, exact):.0e}")
    try:
        third = theirs["tangent of adjoint"]()
    except Exception as error:  # no compiler, or one that fails
        print(f"torch.compile fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        theirs = {}
    else:
        assert isinstance(third, Tensor)
        print(f"torch.compile and plain torch: relative difference {relative_error(third, exact):.0e}")
    for name in plain:
        ways = {"plain torch": plain, "numba": ours, **({"torch.compile": theirs} if theirs else {})}
        print(f"{name}, {NEURONS:,} neurons, T = {STEPS}")
        report(measure({way: runs[name] for way, runs in ways.items()}, options.rounds), "numba")


if __name__ == "__main__":
    main()
