"""Cost of `ikun_hessian.Monitor` in training: python benchmarks/monitor.py [--steps 400] [--every 100] [--batch 128].

A SpikingJelly CSNN (two convolutions with BatchNorm, IF neurons, T = 4) is trained with Adam on scikit-learn's digits,
enlarged to 28 x 28, once through with a monitor at its defaults. CPU seconds of the training steps and of the monitor's
calls are summed in one process, so the ratio does not depend on the load of the machine. The first call copies and
traces the network; it is reported separately.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import ikun_hessian as ih

STEPS = 4


def csnn(channels: int = 16) -> nn.Sequential:
    """Return the network in multi-step mode."""

    def spikes() -> nn.Module:
        return neuron.IFNode(surrogate_function=surrogate.ATan())

    def block(inputs: int) -> list[nn.Module]:
        convolution = layer.Conv2d(inputs, channels, 3, padding=1, bias=False)
        return [convolution, layer.BatchNorm2d(channels), spikes(), layer.MaxPool2d(2, 2)]

    hidden = [layer.Flatten(), layer.Linear(49 * channels, 128, bias=False), spikes()]
    net = nn.Sequential(*block(1), *block(channels), *hidden, layer.Linear(128, 10, bias=False), spikes())
    functional.set_step_mode(net, "m")
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), 28)
    y = torch.tensor(labels)
    torch.manual_seed(0)
    net = csnn()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    monitor = ih.Monitor((x, y), loss="mse", timesteps=STEPS, every=options.every)
    training, calls = 0.0, []
    for step in range(options.steps):
        began = time.process_time()
        chosen = torch.randint(len(x), (options.batch,))
        optimizer.zero_grad()
        rates = net(x[chosen].repeat(STEPS, 1, 1, 1, 1)).mean(0)
        F.mse_loss(rates, F.one_hot(y[chosen], 10).float()).backward()
        optimizer.step()
        functional.reset_net(net)
        training += time.process_time() - began
        began = time.process_time()
        if monitor(net) is not None:
            calls.append(time.process_time() - began)
            print(f"step {step:4d}  {', '.join(f'{k} {v:.4g}' for k, v in monitor.history[-1].items() if k != 'step')}")
    first, *later = calls
    each = training / options.steps
    print(f"a training step of {options.batch} samples: {1000 * each:.0f} ms of CPU time")
    print(f"the first call: {first:.1f} s, {first / each:.1f} training steps, once")
    if later:
        mean = sum(later) / len(later)
        share = mean / (options.every * each)
        print(f"every later call: {mean:.2f} s, {mean / each:.1f} training steps: {share:.1%} of training")
    print(f"all calls: {sum(calls) / training:.1%} of {options.steps} steps of training")


if __name__ == "__main__":
    main()
