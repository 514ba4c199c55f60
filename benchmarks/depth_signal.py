"""How much of the class is left in every layer at initialization, without a norm: python benchmarks/depth_signal.py.

For each layer, the share of the variance of its current (mean over time, on 256 digits) that is between classes. Random
labels have a share of 0 on average, because the degrees of freedom are subtracted as in a one-way analysis of variance.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
import torch

from ikun.data.spec import DataSpec
from ikun.initializers.catalog import initialize
from ikun.initializers.probe import Probe, stages_of
from ikun.networks import Network, Spec

Array = npt.NDArray[np.float64]


def class_share(values: Array, labels: npt.NDArray[np.int64]) -> float:
    """Return the share of the variance of values [samples, units] that is between classes; 0 if nothing varies."""
    centred = values - values.mean(0)
    total = float(np.square(centred).sum())
    if total == 0:
        return 0.0
    parts = [centred[labels == k] for k in np.unique(labels)]
    between = sum(len(part) * float(np.square(part.mean(0)).sum()) for part in parts)
    within = (total - between) / (len(values) - len(parts))
    return (between - (len(parts) - 1) * within) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--depth", type=int, default=20, help="hidden layers of 64 IF neurons")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    data = DataSpec("digits").load("train")
    x, labels = torch.as_tensor(data.images[:256]), np.asarray(data.labels[:256])
    rules = [(name, 1.0) for name in ("relay", "two_sided", "lsuv", "fluctuation", "firing")]
    for name, alpha in [*rules, *(("ikun", alpha) for alpha in (0.05, 0.1, 0.3, 1.0))]:
        shares = []
        for seed in range(arguments.seeds):
            net = Network(Spec(model="mlp", hidden=(64,) * arguments.depth, norm="none"))
            generator = torch.Generator().manual_seed(seed)
            initialize(net, name, generator=generator, x=x, alpha=alpha)
            probe = Probe(net, stages_of(net), x)
            currents = [probe.look(group).current.double().mean(0).flatten(1).numpy() for group in probe.groups()]
            shares.append([class_share(current, labels) for current in currents])
        label = f"{name}, alpha {alpha:g}" if name == "ikun" else name
        print(f"{label}: {' '.join(f'{share:.3f}' for share in np.median(shares, 0))}", flush=True)


if __name__ == "__main__":
    main()
