"""Explain where `smoothed` fails on the networks of hard_networks.py: second derivatives, and the step of the truth.

    python benchmarks/hard_steps.py FOLDER --half development    # after hard_networks.py, with the same folder

For the MLPs without normalization. The mean network is written here once more, in a form that shares no code with the
product of the operator: along a direction v, the currents, potentials and spikes of every layer are followed to second
order, with the averaged derivatives of docs/calibration.md. Four predictions of the measured c are compared:

- operator: v'Av of `smoothed`, with 32 draws.
- first order: the same without the own terms of the last hidden layer. It agrees with the operator up to these terms.
- second order: also the second derivatives of mean spikes, of the reset, and of products of weights and spikes.
- along the step: the same, where the noise includes the step of the measurement. The second difference with step e is
  the mean of the second derivative at w + e t v, where t has a triangular density on [-1, 1] and the variance 1/6. So
  the variance of every current or potential grows by (e h')^2 / 6, with h' its derivative along v.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hard_cases import Case, cases, halves, trained
from hard_networks import SCALE, compared
from torch import Tensor

from hessian_tools.evaluation import copy_model
from hessian_tools.objective import Objective
from hessian_tools.perturbation import noise, noise_scales
from ikun.averages import SHARE, CallPlan, Noisy, floor_of, shifts
from ikun.nodes.recording import record_calls
from ikun.smoothed_operator import smoothed

DRAWS, SEED = 32, 1
TRIANGLE = 1 / 6  # variance of a triangular density on [-1, 1]


class MeanNetwork:
    """The mean of an MLP's spikes over draws of the noise, followed along directions."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        (self.x, self.y), weights = objective.batches[0], objective.weights()
        outputs, self.base = record_calls(copy_model(objective.model), self.x)
        self.plan = CallPlan.of(outputs, self.base.calls)
        self.noisy, self.outputs = Noisy(self.plan, self.base), torch.zeros_like(outputs)
        model, unit = copy_model(objective.model), SCALE * noise_scales(objective)
        named = dict(model.named_parameters())
        for i in range(DRAWS):
            for name, part in zip(
                objective.parameters, objective.split(weights + unit * noise(objective, SEED, i)), strict=True
            ):
                named[name].data.copy_(part)
            out, seen = record_calls(model, self.x)
            self.noisy.add(seen, i, DRAWS)
            self.outputs += out / DRAWS

    def shifted(self, fire: Any, layer: int, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Return two derivatives of E fire(current + a) by a, where the shift has a further variance [1, M]."""
        currents = self.noisy.currents[layer]
        mean = torch.stack(currents).mean(0)
        variance = torch.stack(currents).var(0)
        own = variance.sqrt().mean(0, keepdim=True).clamp_min(floor_of(self.base.calls[layer]))
        width = ((SHARE * own).square() + extra).sqrt()
        first = second = torch.zeros(())
        for i, current in enumerate(currents):
            shrunk = mean + math.sqrt(1 - SHARE**2) * (current - mean)
            for u, one, two in shifts(len(currents), i):
                fired = fire(shrunk + u * width)
                first, second = first + one * fired, second + two * fired
        return first / len(currents) / width, second / len(currents) / width.square()

    def rates(self, current: Tensor) -> Tensor:
        """Return the rates and the squares of their deviations [2, N K] for other currents of the output neurons."""
        last = self.plan.last
        found = self.noisy.fire(last, current).reshape(-1, *self.outputs.shape).mean(0) * self.plan.factor
        return torch.stack([found.flatten(), (found - self.outputs).square().flatten()])

    def loss_along(self, first: Tensor, second: Tensor, extra: float) -> tuple[float, float]:
        """Return the two parts of the second derivative of the mean loss, for derivatives of mean currents [N, K]."""
        wide = (extra * first.square()).reshape(1, -1)
        one, two = self.shifted(self.rates, self.plan.last[0], wide)
        r1, r2, m2 = (t.view_as(first) for t in (one[0], two[0], two[1]))
        outputs = self.outputs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.objective.loss(outputs, self.y), outputs, create_graph=True)
        own = torch.stack(
            [
                torch.autograd.grad(slope[:, k].sum(), outputs, retain_graph=True)[0][:, k]
                for k in range(first.shape[1])
            ],
            1,
        )
        (image,) = torch.autograd.grad(slope, outputs, r1 * first)
        full = first * r1 * image + first.square() * (slope.detach() * r2 + own * m2 / 2 - own * r1.square())
        return float(full.sum()), float((second * slope.detach() * r1).sum())

    def along(self, v: Tensor, e: float = 0.0) -> tuple[float, float]:
        """Return the first-order part of the curvature along v [P], and what second derivatives add to it.

        Args:
            v: The direction.
            e: Step of the measurement; 0: the curvature at the weights.
        """
        named = self.objective.parameters
        change = dict(zip(named, self.objective.split(v), strict=True))
        spikes = self.x.transpose(0, 1).flatten(2) if self.x.dim() == 5 else self.x.flatten(1)[None]
        s1 = s2 = None
        for layer, (name, weight) in enumerate(named.items()):
            a1 = spikes @ change[name].T
            a2 = torch.zeros_like(a1)
            if s1 is not None and s2 is not None:
                a2 = s2 @ weight.detach().T + 2 * s1 @ change[name].T
                a1 = a1 + s1 @ weight.detach().T
            call, steps = self.base.calls[layer], self.base.calls[layer].steps
            if layer in self.plan.last:
                return self.loss_along(a1.mean(0), a2.mean(0), TRIANGLE * e**2)
            shape = (steps, len(self.y), -1)
            if [layer] in self.plan.static:
                extra = (TRIANGLE * (e * a1[:1]).square()).reshape(1, -1)
                f1, f2 = (t.view(shape) for t in self.shifted(partial(self.noisy.fire, [layer]), layer, extra))
                s1, s2 = f1 * a1[:1], f1 * a2[:1] + f2 * a1[:1].square()
            else:
                spread = (self.noisy.squares[layer] / (DRAWS - 1)).sqrt().clamp_min(floor_of(call))
                means = self.noisy.means[layer].view(shape)
                s1, s2 = _potentials(call, means, spread.view(shape), call.z.view(shape), a1, a2, e)
            spikes = call.y.flatten(2)
        raise AssertionError("an MLP ends with output neurons")


def _potentials(
    call: Any, means: Tensor, spreads: Tensor, z: Tensor, a1: Tensor, a2: Tensor, e: float
) -> tuple[Tensor, Tensor]:
    """Follow normally distributed potentials over time. Returns two derivatives of the mean spikes [T, N, M]."""
    spec, ones, twos = call.spec, [], []
    v1 = v2 = torch.zeros_like(means[0])
    for t in range(call.steps):
        k = t if len(a1) > 1 else 0
        h1, h2 = spec.decay * v1 + spec.gain * a1[k], spec.decay * v2 + spec.gain * a2[k]
        q = (spreads[t].square() + TRIANGLE * (e * h1).square()).sqrt()
        f1 = torch.exp(-0.5 * (means[t] / q).square()) / (q * math.sqrt(2 * math.pi))
        f2 = -means[t] / q.square() * f1
        if spec.reset == "soft":
            c1, c2 = 1 - spec.threshold * f1, -spec.threshold * f2
        else:
            height = spec.threshold - spec.v_reset
            c1, c2 = (z[t] < 0).to(f1) - height * f1, -f1 - height * f2
        ones.append(f1 * h1)
        twos.append(f1 * h2 + f2 * h1.square())
        v1, v2 = c1 * h1, c1 * h2 + c2 * h1.square()
    return torch.stack(ones), torch.stack(twos)


def chosen(case: Case) -> bool:
    """Whether a case is an MLP that `MeanNetwork` describes."""
    fields = {"model": "mlp", "norm": "none", **case.network}
    return fields["model"] == "mlp" and fields["norm"] == "none" and fields.get("neuron") != "plif"


def explained(case: Case, kept: dict[str, Any], objective: Objective) -> str:
    """Return a line of the table."""
    v, truth = kept["vectors"], kept["truth"]
    net = MeanNetwork(objective)
    now = [net.along(column) for column in v.unbind(1)]
    far = [net.along(column, e) for column, e in zip(v.unbind(1), truth["step"], strict=True)]
    operator = smoothed(objective, scale=SCALE, seed=SEED, draws=DRAWS)
    cells = []
    for forms in (
        ((operator @ v).double() * v.double()).sum(0).tolist(),
        [first for first, _ in now],
        [sum(parts) for parts in now],
        [sum(parts) for parts in far],
        kept["repeat"]["curvature"],
    ):
        found = compared(forms, truth["curvature"], kept["kinds"])
        cells.append(f"{found['correlation']:.2f} / {found['within']:.2f} / {found['ratio']:.2f}")
    return f"| {case.name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", choices=("development", "test", "all"), default="development")
    parser.add_argument("--fashion-mnist", type=Path)
    parser.add_argument("--n-mnist", type=Path)
    arguments = parser.parse_args()
    print("| network | operator | first order | second order | along the step | repeat of the truth |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in filter(chosen, cases()):
        file = arguments.folder / f"{case.name}.pt"
        if arguments.half in ("all", halves()[case.name]) and file.exists():
            kept = torch.load(file, weights_only=False)
            objective = trained(case, (arguments.fashion_mnist, arguments.n_mnist))
            print(explained(case, kept, objective), flush=True)


if __name__ == "__main__":
    main()
