"""All eigenvalues of the GGN from its Gram matrix: time, memory and error, beside Lanczos and probes.

    python benchmarks/gram.py                  # the paper's network in SpikingJelly: C = 128, 13 million parameters
    python benchmarks/gram.py --channels 16 --samples 150

Each way runs in a process of its own. "default" is what `spectrum` computes for operator ggn: 10 eigenpairs, density,
trace and their errors.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools import SpectrumSettings, make_objective, spectrum
from hessian_tools.objective import Objective
from hessian_tools.operators.gram import gram_matrix
from ikun.adapters import adapt

WAYS = ("gram", "exact", "default")


def network(channels: int) -> nn.Module:
    """Return the CSNN of the paper: 28 x 28 pixels, two convolutions, T = 4."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def spike() -> Any:
        return neuron.IFNode(surrogate_function=surrogate.ATan())

    parts: list[nn.Module] = []
    for inputs in (1, channels):
        parts += [layer.Conv2d(inputs, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels), spike()]
        parts += [layer.MaxPool2d(2, 2)]
    wide = channels * 49
    hidden = channels * 16
    parts += [layer.Flatten(), layer.Linear(wide, hidden, bias=False), spike()]
    parts += [layer.Linear(hidden, 10, bias=False), spike()]
    net = nn.Sequential(*parts)
    functional.set_step_mode(net, "m")
    return net


def objective_of(channels: int, samples: int) -> Objective:
    torch.manual_seed(0)
    net, x, y = network(channels), torch.rand(samples, 1, 28, 28), torch.arange(samples) % 10
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.mul_(3)
    found = adapt(net, x, steps=4)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, F.one_hot(targets, 10).to(outputs))

    return make_objective(found.model, loss, (x, y), reset=found.reset, check=False)


def measured(way: str, channels: int, samples: int) -> dict[str, Any]:
    objective = objective_of(channels, samples)
    began = time.perf_counter()
    if way == "gram":
        gram = gram_matrix(objective)
        values = gram.values.tolist()
    else:
        settings = SpectrumSettings(operators=("ggn",), exact=way == "exact", draws=0, memory=8.0)
        found = spectrum(objective, settings).spectra["ggn"]
        values = [e.value for e in found.eigenvalues]
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak": peak, "parameters": objective.size, "top": values[:10]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.ways[0], options.channels, options.samples)))
        return
    print("| way | parameters | N C | s | peak GiB | largest relative difference of the top 10 |")
    print("|" + "---|" * 6)
    first: list[float] = []
    for way in options.ways:
        command = [sys.executable, __file__, "--child", "--ways", way]
        command += ["--channels", str(options.channels), "--samples", str(options.samples)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        first = first or row["top"]
        error = max(abs(a - b) / abs(first[0]) for a, b in zip(first, row["top"], strict=True))
        print(
            f"| {way} | {row['parameters']:,} | {10 * options.samples} | {row['seconds']:.1f} | {row['peak']:.1f} | "
            f"{error:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
