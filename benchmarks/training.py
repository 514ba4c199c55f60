"""Training with the fused scans and without: python benchmarks/training.py [Fashion-MNIST folder] [--rounds 9].

One step (forward in training mode, backward, Adam) on 128 images of 28 x 28: the network with its fused scans, in plain
torch (2-jet), and as spiking libraries write it (Function, rounds.Conventional). The spikes' rates must be the same to
the bit and the gradients to rounding. Then a whole epoch of `train` on digits, evaluation and log included, with the
scans and with them switched off. Float32, two threads, everything interleaved in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from rounds import Candidates, Conventional, images, measure, relative_error, report
from torch import Tensor

from ikun.data.spec import DataSpec
from ikun.kernels import dispatch as fused
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.training.loop import train
from ikun.training.spec import TrainingSpec

JOBS = {
    "CSNN, width 16, T = 4": Spec(input_shape=(1, 28, 28), timesteps=4),
    "CSNN, width 16, T = 16": Spec(input_shape=(1, 28, 28), timesteps=16),
    "MLP 784-128-128-10, T = 4": Spec("mlp", (1, 28, 28), timesteps=4),
    "MLP 784-128-128-10, T = 16": Spec("mlp", (1, 28, 28), timesteps=16),
}


def steps(spec: Spec, batch: tuple[Tensor, Tensor]) -> Candidates:
    """A training step each; prints how far outputs and gradients are apart at equal weights."""
    x, y = batch
    found: Candidates = {}
    first: tuple[Tensor, Tensor] | None = None
    for form in ("plain torch (2-jet)", "plain torch (Function)", "fused scans"):
        torch.manual_seed(0)
        net = Network(spec).train()
        forms: dict[str, Callable[[Tensor], Tensor]] = {
            "plain torch (2-jet)": partial(net, plain=True),
            "plain torch (Function)": Conventional(net),
            "fused scans": net,
        }
        forward = forms[form]
        optimizer = torch.optim.Adam(net.parameters())
        outputs = forward(x)
        gradients = torch.autograd.grad(LOSSES["mse"](outputs, y), list(net.parameters()))
        gradient = torch.cat([g.flatten() for g in gradients])
        first = first or (outputs, gradient)
        same = "the same rates" if torch.equal(outputs, first[0]) else "OTHER RATES"
        print(f"  {form:24s} {same}; relative difference of the gradient {relative_error(gradient, first[1]):.0e}")

        def step(forward: Callable[[Tensor], Tensor] = forward, optimizer: torch.optim.Adam = optimizer) -> None:
            optimizer.zero_grad()
            LOSSES["mse"](forward(x), y).backward()
            optimizer.step()

        found[f"step, {form}"] = step
    return found


def epochs(folder: Path) -> Candidates:
    """`train` for one epoch on digits."""
    spec = TrainingSpec("kaiming", epochs=1, batch_size=64)

    def fast() -> None:
        train(Spec(channels=8), DataSpec("digits", None, 0), spec, folder / "a.pt")

    def plain() -> None:
        with patch.object(fused, "usable", lambda like: False):
            fast()

    return {"epoch of train, plain torch (2-jet)": plain, "epoch of train, fused scans": fast}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", help="folder of the Fashion-MNIST IDX files; without it, padded digits")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(2)
    batch = images(options.folder, 128)
    for name, spec in JOBS.items():
        print(f"{name}, 128 images")
        report(measure(steps(spec, batch), options.rounds), "step, plain torch (2-jet)")
    print("CSNN, width 8, T = 4, an epoch of 1,437 digits")
    with tempfile.TemporaryDirectory() as out:
        report(measure(epochs(Path(out)), options.rounds), "epoch of train, plain torch (2-jet)")


if __name__ == "__main__":
    main()
