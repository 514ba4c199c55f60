"""Measure how exact the Hessian of the smoothed loss is, against the number of weights and of forward passes.

    python benchmarks/true_hessian.py             # all parts, about 15 minutes on one thread
    python benchmarks/true_hessian.py variance    # one part: coverage, brute, variance, search or large

It trains networks on the digits data and prints the tables of docs/true-hessian.md.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import cli
from hessian_tools.analysis.true_hessian import sampling
from hessian_tools.analysis.true_hessian.analysis import true_hessian
from hessian_tools.analysis.true_hessian.settings import PASSES, TRACE_PASSES, TrueHessianSettings
from hessian_tools.linalg.lanczos import eigenpairs
from hessian_tools.linalg.stein import covariances
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import scaled
from hessian_tools.operators.curvature import ggn
from hessian_tools.seeding import stream
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.open import open_job

SAMPLES, NOISE = 256, 0.1
FOLDER = Path(tempfile.mkdtemp())


def network(hidden: str, params: str = "*") -> Objective:
    """Train an MLP of IF neurons on the digits for 15 epochs, and open its first samples; "csnn": a shipped network."""
    path = Path("checkpoints/digits-csnn-ikun.pt") if hidden == "csnn" else FOLDER / f"mlp-{hidden}.pt"
    if not path.exists():
        options = "--model mlp --norm none --init kaiming --epochs 15 --lr 0.005 --timesteps 4 --seed 1"
        assert cli.run(["train", *options.split(), "--hidden", hidden, "--out", str(path)]) == 0
    job = open_job(
        path, own=Own(), samples=str(SAMPLES), split="train", batch_size=None, params=params, surrogate=None,
        dtype="float32", memory=2.0, data_dir=None, device="cpu",
    )  # fmt: skip
    return job.objective


def brute() -> None:
    """Compare with a sum over 300,000 pairs in other code, for the 100 weights of an output layer."""
    objective = network("10", "fc2*")
    x, y = objective.batches[0]
    spikes: list[Tensor] = []
    layers = dict(objective.model.named_modules())
    handle = layers["fc2"].register_forward_pre_hook(lambda module, args: spikes.append(args[0].detach()))
    with torch.no_grad():
        objective.outputs(x)
    handle.remove()
    entered = torch.stack(spikes) if len(spikes) > 1 else spikes[0]
    entered = entered.reshape(-1, SAMPLES, 10).double()  # [T, N, 10]
    w = objective.weights().reshape(10, 10).double()
    unit = w.square().mean(1, keepdim=True).sqrt().expand(10, 10)
    target = torch.nn.functional.one_hot(y, 10).double()

    def losses(weights: Tensor) -> Tensor:
        v = rate = torch.zeros(len(weights), SAMPLES, 10, dtype=torch.float64)
        for current in torch.einsum("tni,koi->tkno", entered, weights):
            h = v + current
            s = (h >= 1).double()
            v, rate = h * (1 - s), rate + s / len(entered)
        return (rate - target).square().mean((1, 2))

    ours = float(next(sampling.batch_losses(objective, lambda _, b: [objective.weights()], [0], 1))[0, 0])
    assert abs(float(losses(w[None])[0]) - ours) < 1e-6, "the two codes compute other losses"
    count, chunk = 300_000, 500
    generator = torch.Generator().manual_seed(123)
    total, mean, second = torch.zeros(100, 100, dtype=torch.float64), 0.0, torch.zeros(100, 100, dtype=torch.float64)
    base = float(losses(w[None])[0])
    for _ in range(count // chunk):
        z = torch.randn(chunk, 100, generator=generator, dtype=torch.float64)
        step = NOISE * unit * z.reshape(-1, 10, 10)
        c = (losses(w + step) + losses(w - step) - 2 * base) / (2 * NOISE**2)
        total += (z.T * c) @ z / count
        second += z.T @ z / count
        mean += float(c.sum()) / count
    exact = total - mean * second
    values, vectors = torch.linalg.eigh(exact)
    print(f"brute force, {count:,} pairs: trace {exact.trace():.4f}, largest {values.flip(0)[:3].tolist()}, "
          f"smallest {values[:2].tolist()}")  # fmt: skip
    result = true_hessian(objective, TrueHessianSettings(noise=NOISE, draws=10_000, top=3, smallest=2))
    for name, mean_ in (
        ("trace", result.trace),
        *((f"eigenvalue {i}", e.form) for i, e in enumerate(result.eigenvalues, 1)),
        *((f"eigenvalue {100 - i}", e.form) for i, e in enumerate(result.smallest_eigenvalues)),
    ):
        print(f"  {name:<15} {mean_.value:.4f} +- {mean_.stderr:.4f}  [{mean_.ci95[0]:.4f}, {mean_.ci95[1]:.4f}]")
    forms = torch.linalg.eigvalsh(exact)[[-1, 0]]
    print(f"  {sum(result.passes.values()):,} passes, {result.seconds:.0f} s; brute force {forms.tolist()}")
    sampler = sampling.make_sampler(objective, NOISE, seed=9)
    for k in (-1, -2, 0):
        found = sampling.draw_mean(sampling.line_values(sampler, vectors[:, k], 100, 50 + k))
        print(f"  along eigenvector {k}: {found.value:.4f} +- {found.stderr:.4f}, brute force {values[k]:.4f}")


def variance() -> None:
    """What each measure saves: the variance times the number of forward passes, for the same mean."""
    for hidden in ("16", "64,64", "csnn"):
        objective = network(hidden)
        print(f"\nP = {objective.size}, {SAMPLES} samples, noise {NOISE}")
        spread: dict[str, float] = {}
        op = ggn(objective)
        for group in (SAMPLES, 64, 16):
            sampler = sampling.make_sampler(objective, NOISE, group=group)
            began = time.perf_counter()
            c = sampling.search_differences(sampler, 300)
            seconds = (time.perf_counter() - began) / 600
            spread[f"own noise for {group} samples"] = float((c.var(0) @ sampler.weights.square()).sqrt())
            print(f"  {group} samples per draw: {seconds * 1000:.1f} ms a pass")
            if group != 64:
                continue
            pairs = eigenpairs(scaled(op, sampler.unit), 10, generator=stream(0), tol=1e-3)
            plain = sampling.stein_hessian(sampler, c, (pairs.vectors, torch.diag(pairs.values)))
            spread["64, the GGN of rank 10 as control"] = math.sqrt(
                float(plain.residual_variances @ sampler.weights.square())
            )
            second, y = sampling.projection(sampler, pairs.vectors, 200)
            m = sampling.entries(second, y, sampler.weights).mean(0)
            measured = sampling.stein_hessian(sampler, c, (pairs.vectors, m))
            spread["64, its eigenvectors measured, 600 passes"] = math.sqrt(
                float(measured.residual_variances @ sampler.weights.square())
            )
            _forms(sampler, pairs.vectors, c, second, y)
        first = next(iter(spread.values()))
        for name, value in spread.items():
            print(f"  noise of the sample estimate, {name}: {value:.4f}, variance x {(value / first) ** 2:.2f}")


def _forms(sampler: sampling.Sampler, vectors: Tensor, c: Tensor, second: Tensor, y: Tensor) -> None:
    """Compare estimates of v'Hv and of the trace by variance times forward passes."""
    v = vectors[:, 0].to(sampler.dtype)
    along = torch.stack([(sampler.draws((sampling.SEARCH,), k) @ v).double() for k in range(len(c))])
    norms = torch.stack([sampler.draws((sampling.SEARCH,), k).double().square().sum(1) for k in range(len(c))])
    size = sampler.objective.size
    plain = (sampler.losses("plain", lambda k, b: [sampler.draw((9,), k, b)], 600, 1)[:, 0]) / sampler.scale**2
    alone = torch.stack([(sampler.draws((9,), k) @ v).double() for k in range(600)])
    trace, _ = sampling.trace_values(sampler, 100)
    table: dict[str, tuple[Tensor, int]] = {
        "v'Hv, Stein's identity as it stands": ((plain * (alone.square() - 1)) @ sampler.weights, 1),
        "v'Hv, second differences, centred": (covariances(c, along.square(), sampler.weights), 2),
        "v'Hv, differences within 10 directions": (covariances(second, y[..., 0].square(), sampler.weights), 3),
        "v'Hv, along the line": (sampling.line_values(sampler, vectors[:, 0], 100), PASSES),
        "trace, second differences, centred": (covariances(c, norms - size, sampler.weights), 2),
        "trace, along radii": (trace, TRACE_PASSES),
    }
    for name, (values, passes) in table.items():
        error = float(values.std()) * math.sqrt(passes / 1000)
        print(f"  {name}: mean {float(values.mean()):.4g}; standard error from 1,000 passes {error:.2g}")


def search() -> None:
    """Largest eigenvalue found, against P and the number of forward passes, with and without the GGN's eigenvectors."""
    print("\n| P | passes | control | threshold | halves agree on | lambda_max at least | seconds |")
    print("|---|---|---|---|---|---|---|")
    for hidden, params in (("10", "fc2*"), ("16", "*"), ("csnn", "*"), ("64,64", "*")):
        objective = network(hidden, params)
        for draws in (1000, 5000):
            for control in (False, True):
                settings = TrueHessianSettings(noise=NOISE, draws=draws, top=5, smallest=0)
                r = true_hessian(objective, settings, operators={"ggn": ggn(objective)} if control else None)
                threshold = f"{r.search.threshold:.3f}" if r.search else "-"
                agreed = f"{sum(a > 0.5 for a in r.search.agreement)} of {len(r.search.agreement)}" if r.search else "-"
                top = (
                    f"{r.eigenvalues[0].form.value:.4f} +- {r.eigenvalues[0].form.stderr:.4f}" if r.eigenvalues else "-"
                )
                name = "GGN" if control else "none"
                print(f"| {objective.size:,} | {draws:,} | {name} | {threshold} | {agreed} | {top} | {r.seconds:.0f} |",
                      flush=True)  # fmt: skip


def large() -> None:
    """Trace and directions at sizes where no search is possible."""
    print("\n| P | trace | largest in the span of 5 GGN eigenvectors | GGN's own | seconds |")
    print("|---|---|---|---|---|")
    for hidden in ("64,64", "256,256", "800,800"):
        objective = network(hidden)
        settings = TrueHessianSettings(noise=NOISE, draws=1000, top=5, smallest=0)
        r = true_hessian(objective, settings, operators={"ggn": ggn(objective)})
        top = r.eigenvalues[0].form
        cells = f"{r.trace.value:.3f} +- {r.trace.stderr:.3f} | {top.value:.4f} +- {top.stderr:.4f}"
        print(f"| {objective.size:,} | {cells} | {r.directions[0].predicted:.4f} | {r.seconds:.0f} |", flush=True)


class _Weights(nn.Module):
    """A model whose output is its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(1 + torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 8)


def coverage(runs: int = 200) -> None:
    """How often 95% intervals hold the truth, for losses of 8 weights whose smoothed Hessian is known."""
    s, w = 0.4, _Weights().w.detach()
    g = torch.linspace(0.8, -0.4, 8, dtype=torch.float64)
    q = w * g
    length = float(q.norm())

    def case(loss: Callable[[Tensor], Tensor], second: float) -> tuple[Objective, float]:
        """Return the loss of g'w, and the only eigenvalue of its smoothed Hessian in units of the noise."""
        data = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return make_objective(_Weights(), lambda o, y: loss(o @ g).mean(), data, check=False), second * length**2

    at, spread = float(g @ w), s * length
    b = at + spread  # a step at one standard deviation
    cases = {
        "quadratic": case(lambda h: h.square() / 2, 1.0),
        "step": case(lambda h: (h > b).double(), math.exp(-0.5) / math.sqrt(2 * math.pi) / spread**2),
        "exponential, lognormal under the noise": case(torch.exp, math.exp(at + spread**2 / 2)),
    }
    v = q / length
    for name, (objective, exact) in cases.items():
        hits = [0, 0, 0]
        for seed in range(runs):
            sampler = sampling.make_sampler(objective, s, seed=seed)
            second, y = sampling.projection(sampler, v[:, None], 100)
            found = (
                sampling.line_values(sampler, v, 12),
                sampling.trace_values(sampler, 40)[0],
                covariances(second, y[..., 0].square(), sampler.weights),
            )
            for i, values in enumerate(found):
                low, high = sampling.draw_mean(values).ci95
                hits[i] += low <= exact <= high
        shares = [f"{100 * h / runs:.0f}%" for h in hits]
        print(f"  {name}: line of 12 observations {shares[0]}, trace of 40 {shares[1]}, projection of 100 {shares[2]}")


PARTS: dict[str, Callable[[], None]] = {
    "coverage": coverage,
    "brute": brute,
    "variance": variance,
    "search": search,
    "large": large,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
