"""Hessian spectrum of an ordinary torch model, trained here on scikit-learn's digits.

The script trains a small multilayer perceptron, and computes the spectrum of the Hessian and the Gauss-Newton matrix of
its training loss. It prints the largest eigenvalues with their errors, and writes digits-mlp.spectrum.json and .npz,
and the figure as .png and .pdf, to the folder given on the command line (default: the current folder).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from hessian_tools import SpectrumSettings, make_objective, save_figure, save_spectrum, spectrum, spectrum_figure


def trained(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Return a network trained for 20 epochs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(20):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model


def main(folder: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

    # The loss must be a mean over the samples of a batch. The model is copied, and set to evaluation mode.
    objective = make_objective(trained(x, y), nn.functional.cross_entropy, (x, y), batch_size=600)
    result = spectrum(objective, SpectrumSettings(top=5, smallest=2))

    for name, found in result.spectra.items():
        if found.trace is not None:
            print(f"{name}: trace {found.trace.estimate:.4g}, 95% interval {found.trace.ci95}")
        for pair in found.eigenvalues:
            print(f"  {pair.value:11.4e}  residual {pair.residual:.0e}  data standard error {pair.data_stderr:.1e}")
    stem = folder / "digits-mlp.spectrum"
    print("written:", *save_spectrum(result, stem), *save_figure(spectrum_figure(result), stem))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
