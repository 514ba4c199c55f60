"""One update of the weights: plain, or by sharpness-aware minimization (SAM) on spikes or on relaxed spikes.

SAM minimizes the largest loss within a distance rho of the weights, max_{|e| <= rho} L(w + e). An update takes two
gradients: g at w, and then one at w + e(g), which is given to the optimizer at w. There e is

- rho g / |g| for SAM (Foret et al. 2021, Sharpness-aware minimization for efficiently improving generalization, ICLR);
- rho T^2 g / |T g| for adaptive SAM (Kwon et al. 2021, ASAM, ICML), with T = |w| + 0.01 for weights and T = 1 for
  other parameters, as in the authors' code. e does not change if a layer is scaled up and the next one down.

On spikes, g is a surrogate gradient, which is not the gradient of any function, so e need not point to a larger loss.
The relaxed network has a true gradient, but its loss is that of another network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ikun.layer_statistics import batch_norm_by_batch
from ikun.losses import Loss
from ikun.networks import Network
from ikun.neurons import Neuron
from ikun.surrogates import Surrogate

ASAM_ETA = 0.01  # added to |w|, so that weights of 0 are perturbed too


def relaxed_twin(network: Network) -> Network:
    """Return the network with relaxed spikes F(h - threshold) in the forward pass.

    Its parameters and buffers are those of `network`, not copies: training one trains the other.

    Raises:
        ValueError: If the surrogate has no relaxed network.
    """
    require_relaxed(network.spec.surrogate)
    shared: dict[int, object] = {id(t): t for t in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, shared)
    twin.spec = replace(network.spec, relaxed=True)
    for neuron in twin.modules():
        if isinstance(neuron, Neuron):
            neuron.dynamics = replace(neuron.dynamics, relaxed=True)
    return twin


def require_relaxed(surrogate: str) -> None:
    """Raise ValueError if networks with this surrogate cannot be relaxed, because its area is not 1."""
    if abs((area := Surrogate.parse(surrogate).area) - 1) > 1e-12:
        raise ValueError(
            f"surrogate {surrogate} has area {area:.3g}, not 1, so it has no relaxed network: choose another "
            "surrogate, such as atan:2"
        )


def ascent(names: Sequence[str], weights: Sequence[Tensor], radius: float, adaptive: bool) -> list[Tensor]:
    """Return the step e from the weights to the point where SAM takes its second gradient.

    Args:
        names: Names of the parameters. Adaptive SAM scales those that end in "weight".
        weights: The parameters, with their gradients in `.grad`. None counts as zeros.
        radius: The radius rho.
        adaptive: Whether to take the step of adaptive SAM.

    Returns:
        One tensor per parameter, of its shape. All are zero if the gradient is zero.
    """
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    scales = [
        w.detach().abs() + ASAM_ETA if adaptive and name.endswith("weight") else torch.ones_like(w)
        for name, w in zip(names, weights, strict=True)
    ]
    scaled = [t * g for t, g in zip(scales, gradients, strict=True)]
    norm = torch.stack([s.norm() for s in scaled]).norm()
    factor = torch.where(norm == 0, torch.zeros_like(norm), radius / norm)
    return [factor * t * s for t, s in zip(scales, scaled, strict=True)]


def update(
    network: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    radius: float = 0.0,
    adaptive: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, float]:
    """Update the weights of a network on one batch.

    The running statistics of BatchNorm are updated by the forward pass at w and not by the one at w + e. Both passes
    draw the same dropout masks.

    Args:
        network: The network, in training mode.
        loss: The loss.
        optimizer: Optimizer of the network's parameters.
        x: Inputs of the batch.
        y: Labels of the batch.
        radius: Radius rho of SAM; 0 for a plain update.
        adaptive: Whether to use adaptive SAM.
        seed: Seed of the dropout masks. It is used only with SAM.

    Returns:
        The outputs and the loss at w, before the update, and the norm of the gradient at w.
    """
    if radius:
        torch.manual_seed(seed)
    out = network(x)
    value = loss(out, y)
    optimizer.zero_grad()
    value.backward()
    norm = float(torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm())
    if radius:
        named = dict(network.named_parameters())
        steps = ascent(tuple(named), tuple(named.values()), radius, adaptive)
        optimizer.zero_grad()
        torch.manual_seed(seed)
        with _moved(tuple(named.values()), steps), batch_norm_by_batch(network):
            loss(network(x), y).backward()
    optimizer.step()
    return out.detach(), value.detach(), norm


@contextmanager
def _moved(weights: Sequence[Tensor], steps: Sequence[Tensor]) -> Iterator[None]:
    """Add the steps to the weights within this context. Afterwards the weights have their old values, bit for bit."""
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, step in zip(weights, steps, strict=True):
            w.add_(step)
    try:
        yield
    finally:
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)
