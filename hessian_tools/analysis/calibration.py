"""Measure how well each curvature operator predicts the curvature of the true spiking loss, direction by direction.

The reference is a second difference of the smoothed true loss L_s(w) = E L(w + s D z) (see
`hessian_tools.perturbation`), with a step e along a unit direction v:

    c = (L_s(w + e v) + L_s(w - e v) - 2 L_s(w)) / e^2

All three points use the same noise z. For each direction, e is chosen such that the step changes the outputs as much as
the noise does (root mean square). A shorter step is dominated by the jumps of the loss, and a longer one leaves the
region that the noise explores. So c is the curvature over a region of the size of the noise. No surrogate and no
gradient is involved.

The prediction of an operator A is v'Av. The result holds the rank correlation over the directions and the ratio c /
v'Av.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.analysis.agreement import agreement
from hessian_tools.analysis.context import SmoothedFactory
from hessian_tools.evaluation import differentiable
from hessian_tools.io.errors import check_scale
from hessian_tools.linalg.lanczos import eigenpairs
from hessian_tools.linalg.lanczos_quadrature import quadrature, tridiagonal
from hessian_tools.linalg.trace import estimate, probe_forms
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator, scaled
from hessian_tools.operators.curvature import fisher, ggn, hessian
from hessian_tools.perturbation import mean_loss, noise, noise_scales, outputs_at
from hessian_tools.results.calibration import Calibration, Scale
from hessian_tools.resume import Phases
from hessian_tools.seeding import stream

ABSOLUTE_STEPS = 12  # Lanczos steps for v'|H|v
TRACE_STEP = 0.25  # relative change of s^2 in the difference quotient for the trace
CalibrationProgress = Callable[[str, int, int], None]  # (phase, steps done, steps in total)


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of `calibrate`.

    The directions are eigenvectors (both ends of the Hessian; the largest of GGN, Fisher and the smoothed operator),
    the gradient, and random directions of several kinds (isotropic, filter-normalized, mixtures with eigenvectors, one
    layer at a time).

    Attributes:
        scales: Noise standard deviations, relative to each filter's root mean square.
        draws: Number of noise samples, in antithetic pairs: an even number, at least 4.
        step: Change of the outputs by a step, relative to that by the noise.
        eigenvectors: Number of eigenvectors from each end of a spectrum (half as many for Fisher).
        random: Number of directions of each random kind.
        seed: Random seed.
        memory: Memory in GiB for the operators.
    """

    scales: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    draws: int = 32
    step: float = 1.0
    eigenvectors: int = 8
    random: int = 8
    seed: int = 0
    memory: float = 4.0

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < s < math.inf for s in self.scales):
            raise ValueError(f"noise scales must be positive numbers, not {list(self.scales)}")
        for scale in self.scales:
            check_scale("noise", scale)
        if self.draws < 4 or self.draws % 2:
            raise ValueError(f"draws must be even and at least 4 (they form antithetic pairs), not {self.draws}")
        for name in ("eigenvectors", "random"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.step < math.inf:
            raise ValueError(f"step must be a positive number, not {self.step}")


@differentiable
def calibrate(
    objective: Objective,
    settings: CalibrationSettings,
    *,
    variants: Mapping[str, Objective] | None = None,
    family: Mapping[str, Objective] | None = None,
    smoothed: SmoothedFactory | None = None,
    phases: Phases | None = None,
    progress: CalibrationProgress | None = None,
) -> Calibration:
    """Measure how well every operator predicts the curvature of the true smoothed loss.

    Args:
        objective: The loss, its data and its weights.
        settings: Settings of the calibration.
        variants: Objectives with the same weights under another convention (tie rule, surrogate), by label. The Hessian
            and the GGN of each take part.
        family: Objectives with the same weights and surrogates of several widths, by label. At each scale, the GGN of
            the width whose median ratio is nearest to 1 takes part as "ggn, fitted" (see `Scale.fitted`).
        smoothed: Function that makes the operator `smoothed` (`ikun.smoothed`). The operator is left out for networks
            that do not have it.
        phases: Storage of finished phases and products, to resume an interrupted run.
        progress: Callback with the phase, the steps done and the steps in total.

    Returns:
        The measured curvatures and the predictions.

    Raises:
        ValueError: If the loss is not finite, or if the noise does not change the outputs (for example because no
            neuron fires).
    """
    phases, tell = phases or Phases(), progress or (lambda name, done, total: None)
    loss, gradient = objective.value_and_gradient()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at these weights; calibration needs a finite loss")
    memory = settings.memory * 2**30 / (len(MAIN) + len(settings.scales))
    operators: dict[str, Operator] = {op: make(objective, memory) for op, make in MAIN.items()}
    matched: dict[float, Operator] = {}
    if smoothed is not None:
        with contextlib.suppress(ValueError):  # some networks have no such operator
            matched = {s: smoothed(objective, memory, scale=s, seed=settings.seed + 1) for s in settings.scales}
    middle = matched.get(sorted(settings.scales)[len(settings.scales) // 2])

    def find() -> dict[str, Any]:
        vectors, kinds = directions(objective, operators, middle, gradient, settings, tell)
        return {"vectors": vectors, "kinds": kinds}

    found = phases.keep("directions", find)
    v: Tensor = found["vectors"]
    kinds: list[str] = found["kinds"]

    def predict() -> dict[str, Any]:
        forms: dict[str, list[float]] = {}
        others = {f"{op}, {label}": make(o, 0) for label, o in (variants or {}).items() for op, make in MAIN.items()}
        others |= {f"ggn, {label}": ggn(o, 0) for label, o in (family or {}).items()}
        everything = {**operators, **{op: a for op, a in others.items() if not op.startswith("fisher, ")}}
        for i, (name, op) in enumerate(everything.items()):
            tell("predictions", i, len(everything))
            forms[name] = _forms(op, v)
        forms["|hessian|"] = _absolute_forms(operators["hessian"], v, lambda i: tell("|hessian|", i, v.shape[1]))
        unit = noise_scales(objective)
        traces = {name: _trace(scaled(op, unit), settings.seed) for name, op in operators.items()}
        return {"forms": forms, "traces": traces}

    predicted = phases.keep("predictions", predict)
    forms: dict[str, list[float]] = predicted["forms"]
    scales = []
    for s in settings.scales:
        own: dict[str, Any] = {}
        if s in matched:
            own = phases.keep(
                f"smoothed {s}",
                lambda s=s: {  # type: ignore[misc]
                    "forms": {"smoothed": _forms(matched[s], v)},
                    "traces": {"smoothed": _trace(scaled(matched[s], noise_scales(objective)), settings.seed)},
                    "redrawn": _forms(smoothed(objective, 0, scale=s, seed=settings.seed + 2), v),  # type: ignore[misc]
                },
            )
        truth = phases.keep(f"truth {s}", lambda s=s: curvatures(objective, v, s, settings, tell))  # type: ignore[misc]
        scales.append(_scale(s, truth, forms, own, list(family or {}), settings.seed))
    return Calibration(
        tuple(kinds), {name: tuple(values) for name, values in forms.items()}, predicted["traces"], tuple(scales)
    )


MAIN: dict[str, Callable[[Objective, float], Operator]] = {"hessian": hessian, "ggn": ggn, "fisher": fisher}


def directions(
    objective: Objective,
    operators: Mapping[str, Operator],
    matched: Operator | None,
    gradient: Tensor,
    settings: CalibrationSettings,
    tell: CalibrationProgress,
) -> tuple[Tensor, list[str]]:
    """Return the directions along which curvature is measured.

    Args:
        objective: The loss and its weights.
        operators: Operators whose eigenvectors are used, by name.
        matched: The operator `smoothed` whose eigenvectors are used too, if there is one.
        gradient: Gradient [P].
        settings: Number of directions and seed.
        tell: Progress callback.

    Returns:
        Unit vectors [P, K] and the kind of each.
    """
    count, size = min(settings.eigenvectors, objective.size // 2), objective.size
    columns: list[Tensor] = []
    kinds: list[str] = []

    def add(kind: str, block: Tensor) -> None:
        norms = block.norm(dim=0)
        if (norms > 0).all():
            columns.append((block / norms).to(objective.dtype))
            kinds.extend([kind] * block.shape[1])

    everything = {**operators, "smoothed": matched} if matched is not None else operators
    for i, (name, op) in enumerate(everything.items()):
        tell("directions", i, len(everything))
        pairs = eigenpairs(
            op,
            count if name != "fisher" else (count + 1) // 2,
            count if name == "hessian" else 0,
            generator=stream(settings.seed, i),
            tol=1e-3,
            max_products=200,
        )
        order = pairs.values.argsort(descending=True)
        block = pairs.vectors[:, order].to(objective.device)
        top = block.shape[1] - (count if name == "hessian" else 0)
        add(f"{name}, top", block[:, :top])
        if name == "hessian":
            add("hessian, most negative", block[:, top:])
    eigenvectors = torch.cat(columns, 1).double()
    add("gradient", gradient[:, None])
    draw = stream(settings.seed, 99)

    def normal(rows: int, k: int) -> Tensor:
        return torch.randn(rows, k, generator=draw, dtype=torch.float64).to(objective.device)

    add("random", normal(size, settings.random))
    add("random, filter-normalized", normal(size, settings.random) * noise_scales(objective)[:, None])
    inside = eigenvectors @ normal(eigenvectors.shape[1], settings.random)
    outside = normal(size, settings.random)
    share = torch.rand(settings.random, generator=draw, dtype=torch.float64).to(objective.device)
    add("mixture", share * inside / inside.norm(dim=0) + (1 - share.square()).sqrt() * outside / outside.norm(dim=0))
    sizes = [p.numel() for p in objective.parameters.values()]
    layers = [name for name, p in objective.parameters.items() if p.dim() > 1]
    for name in layers:
        block = normal(size, max(1, settings.random // len(layers)))
        for part, parameter in zip(block.split(sizes), objective.parameters, strict=True):
            part *= parameter == name
        add("random, one layer", block)
    return torch.cat(columns, 1), kinds


def _forms(op: Operator, v: Tensor) -> list[float]:
    """Return v'Av for every column of v [P, K]."""
    forms: list[float] = ((op @ v).double() * v.double()).sum(0).tolist()
    return forms


def _absolute_forms(op: Operator, v: Tensor, tell: Callable[[int], None]) -> list[float]:
    """Return v'|A|v for every column of v [P, K], by the quadrature of a Lanczos process started at the column."""
    found = []
    for i, column in enumerate(v.unbind(1)):
        tell(i)
        nodes, weights = quadrature(*tridiagonal(op, column.double(), min(ABSOLUTE_STEPS, op.shape[0])))
        found.append(float((weights * nodes.abs()).sum()))
    return found


def _trace(op: Operator, seed: int) -> float:
    """Estimate the trace with 16 probes."""
    forms, _ = probe_forms(op, 16, stream(seed, 7))
    return estimate(forms, 0.0).estimate


def curvatures(
    objective: Objective, v: Tensor, scale: float, settings: CalibrationSettings, tell: CalibrationProgress
) -> dict[str, Any]:
    """Measure second differences of the smoothed loss along directions, and its trace, at one noise scale.

    Args:
        objective: The loss and its weights.
        v: Unit directions [P, K].
        scale: Noise scale, relative to each filter's root mean square.
        settings: Number of draws, relative step and seed.
        tell: Progress callback.

    Returns:
        The fields `loss`, `movement`, `curvature`, `stderr`, `halves`, `step`, `trace` and `trace_stderr` of `Scale`.

    Raises:
        ValueError: If the noise does not change the outputs.
    """
    weights, unit = objective.weights(), noise_scales(objective)
    draws, count = settings.draws, v.shape[1]
    name = f"noise {scale:g}"

    def point(item: tuple[int, int, float]) -> Tensor:
        draw, k, e = item
        base = weights + scale * unit * noise(objective, settings.seed, draw)
        return base if e == 0 else base + e * v[:, k]

    (start,) = outputs_at(objective, lambda _: weights, [0])
    base = torch.empty(draws, dtype=torch.float64)
    movement, moved = 0.0, []
    for j, out in enumerate(outputs_at(objective, point, [(j, 0, 0.0) for j in range(draws)])):
        base[j] = mean_loss(objective, out)
        movement += float((out - start).double().square().mean()) / draws
        if j < 2:
            moved.append(out)
    movement = math.sqrt(movement)
    if movement == 0:
        raise ValueError(f"noise of scale {scale:g} does not move the outputs: the neurons never fire, or always fire")
    steps = _steps(objective, v, point, moved, settings.step * movement, scale * float(weights.norm()))
    items = [(j, k, sign * steps[k]) for k in range(count) for sign in (1, -1) for j in range(draws)]
    losses = torch.empty(count, 2, draws, dtype=torch.float64)
    for i, out in enumerate(outputs_at(objective, point, items)):
        losses[i // (2 * draws), i // draws % 2, i % draws] = mean_loss(objective, out)
        if i % draws == 0:
            tell(name, i, len(items))
    second = (losses.sum(1) - 2 * base) / torch.tensor(steps, dtype=torch.float64)[:, None].square()
    pairs = second.reshape(count, -1, 2).mean(2)  # an antithetic pair is one observation
    # The trace uses the same noise at s^2 (1 +- TRACE_STEP).
    wide, narrow = (scale * math.sqrt(1 + sign * TRACE_STEP) for sign in (1, -1))

    def farther(item: tuple[int, float]) -> Tensor:
        return weights + item[1] * unit * noise(objective, settings.seed, item[0])

    outs = outputs_at(objective, farther, [(j, s) for j in range(draws) for s in (wide, narrow)])
    change = torch.tensor([mean_loss(objective, out) for out in outs], dtype=torch.float64).reshape(draws, 2)
    slopes = (2 * (change[:, 0] - change[:, 1]) / (2 * TRACE_STEP * scale**2)).reshape(-1, 2).mean(1)
    return {
        "loss": float(base.mean()),
        "movement": movement,
        "curvature": second.mean(1).tolist(),
        "stderr": (pairs.std(1) / math.sqrt(pairs.shape[1])).tolist(),
        "halves": [pairs[:, half::2].mean(1).tolist() for half in (0, 1)],
        "step": steps,
        "trace": float(slopes.mean()),
        "trace_stderr": float(slopes.std() / math.sqrt(len(slopes))),
    }


def _steps(
    objective: Objective,
    v: Tensor,
    point: Callable[[tuple[int, int, float]], Tensor],
    moved: Sequence[Tensor],
    wanted: float,
    longest: float,
) -> list[float]:
    """Return steps along the columns of v that change the outputs by `wanted` (root mean square), to within 10%."""
    steps = [longest / 8] * v.shape[1]
    short, long = [0.0] * len(steps), [math.inf] * len(steps)  # largest step known to be too short, smallest too long
    open_ = list(range(v.shape[1]))
    for _ in range(8):
        items = [(j, k, steps[k]) for k in open_ for j in range(len(moved))]
        squares = dict.fromkeys(open_, 0.0)
        for (j, k, _), out in zip(items, outputs_at(objective, point, items), strict=True):
            squares[k] += float((out - moved[j]).double().square().mean()) / len(moved)
        still = []
        for k in open_:
            factor = wanted / math.sqrt(squares[k]) if squares[k] > 0 else 4.0
            if abs(math.log(factor)) > 0.1:
                (short if factor > 1 else long)[k] = steps[k]
                steps[k] *= min(4.0, max(0.25, factor**1.2))
                if not short[k] < steps[k] < long[k]:  # the movement grows faster than the step: bisect
                    steps[k] = math.sqrt(short[k] * long[k])
                still.append(k)
        open_ = still
        if not open_:
            break
    return steps


def _scale(
    s: float,
    truth: Mapping[str, Any],
    forms: Mapping[str, Sequence[float]],
    own: Mapping[str, Any],
    family: Sequence[str],
    seed: int,
) -> Scale:
    """Combine the measurements at one scale with the agreement of every operator."""
    c = np.array(truth["curvature"])
    named = {f"ggn, {label}": label for label in family}
    compared = {name: values for name, values in forms.items() if name not in named} | own.get("forms", {})
    fitted = ""
    if named:
        ratios = {name: agreement(np.array(forms[name]), c, seed, resamples=0).ratio for name in named}
        best = min(ratios, key=lambda name: abs(math.log(ratios[name])) if ratios[name] > 0 else math.inf)
        fitted = named[best]
        compared["ggn, fitted"] = forms[best]
    return Scale(
        scale=s,
        loss=truth["loss"],
        movement=truth["movement"],
        curvature=tuple(truth["curvature"]),
        stderr=tuple(truth["stderr"]),
        step=tuple(truth["step"]),
        trace=truth["trace"],
        trace_stderr=truth["trace_stderr"],
        predictions={name: tuple(values) for name, values in own.get("forms", {}).items()},
        traces=own.get("traces", {}),
        agreement={name: agreement(np.array(values), c, seed) for name, values in compared.items()},
        fitted=fitted,
        halves=tuple(map(tuple, truth.get("halves", ()))),  # none in a run that an older version began
        redrawn=tuple(own.get("redrawn", ())),
    )
