"""Hessian spectrum of a SpikingJelly network.

The script trains a small convolutional SpikingJelly network on scikit-learn's digits. `ikun.adapt` runs it over time,
resets its state before every forward pass, and checks its surrogate gradient: the Hessian needs a correct second
derivative, which the library's training never uses. The script prints what was found and the largest eigenvalues of the
surrogate Hessian and of the Gauss-Newton matrix.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from hessian_tools import SpectrumSettings, make_objective, spectrum
from ikun import adapt, mean_square

STEPS = 4


def build() -> nn.Module:
    """Return an untrained network in multi-step mode: inputs and outputs have time first."""
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False),
        layer.BatchNorm2d(4),
        neuron.IFNode(surrogate_function=surrogate.ATan()),
        layer.MaxPool2d(2, 2),
        layer.Flatten(),
        layer.Linear(64, 10, bias=False),
        neuron.IFNode(surrogate_function=surrogate.ATan()),
    )
    functional.set_step_mode(net, "m")
    return net


def train(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Train for two epochs, as usual with SpikingJelly."""
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(2):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            rates = net(x[part].repeat(STEPS, 1, 1, 1, 1)).mean(0)
            mean_square(rates, y[part]).backward()
            optimizer.step()
            functional.reset_net(net)


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    torch.manual_seed(0)
    net = build()
    train(net, x, y)

    adapted = adapt(net, x[:128], steps=STEPS)
    for found in adapted.surrogates:
        print(f"surrogate: {found.verdict.kind}")
    objective = make_objective(adapted.model, mean_square, (x[:128], y[:128]), reset=adapted.reset)
    result = spectrum(objective, SpectrumSettings(top=3, smallest=1, density=False))
    for name, spectrum_of in result.spectra.items():
        values = ", ".join(f"{pair.value:.4g} +- {pair.data_stderr:.1g}" for pair in spectrum_of.eigenvalues)
        print(f"{name}: {values}")


if __name__ == "__main__":
    main()
