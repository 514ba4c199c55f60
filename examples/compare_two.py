"""Compare the curvature of two checkpoints.

The script opens two of the shipped checkpoints, which were trained from different initializers with the same seed, and
measures both on the same samples. It prints the largest eigenvalues raw and with the weights in units of their filters'
norms, since rescaling a filter before a BatchNorm changes the raw value without changing the network. It writes a
figure of eigenvalue against rank to the folder given on the command line (default: the current folder). One seed per
initializer is not enough to rank initializers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hessian_tools import SpectrumSettings, make_objective, rank_figure, save_figure, spectrum
from ikun import LOSSES, load_checkpoint

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
NAMES = ("digits-csnn-ikun", "digits-csnn-kaiming")
SAMPLES = 128


def main(folder: Path) -> None:
    results = []
    for name in NAMES:
        checkpoint = load_checkpoint(CHECKPOINTS / f"{name}.pt")
        data = checkpoint.data.load("train")
        samples = checkpoint.inputs(data.images)[:SAMPLES], data.labels[:SAMPLES]
        objective = make_objective(checkpoint.build(), LOSSES[checkpoint.loss], samples)
        results.append((name, spectrum(objective, SpectrumSettings(top=5, smallest=1, density=False))))

    for name, result in results:
        print(f"{name}: loss {result.loss:.4g}, accuracy {result.accuracy:.1%}")
        for operator, found in result.spectra.items():
            top, scaled = found.eigenvalues[0], found.scale_free_lambda_max
            print(f"  {operator:8} lambda_max {top.value:.4f} +- {top.data_stderr:.4f}, scaled {scaled:.4f}")
    print("written:", *save_figure(rank_figure(results), folder / "compare-two"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
