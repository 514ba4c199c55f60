"""Landscapes of a small network, and made-up ones of known curves."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from objectives import spiking_objective

from hessian_tools.analysis.landscape import LandscapeSettings, landscape
from hessian_tools.results.landscape import LANDSCAPE_SCHEMA, LandscapeResult, Line, Plane

FEW = LandscapeSettings(points=9, plane_points=5, memory=0.1)
PROVENANCE: dict[str, Any] = {
    "checkpoint": {"path": "/somewhere/ckpt.pt", "sha256": "0123456789abcdef"},
    "data": {"name": "digits", "split": "train", "loss": "mse"},
    "network": {
        "model": "csnn", "neuron": "if", "reset": "hard", "detach_reset": False, "surrogate": "atan:2", "timesteps": 4,
        "coding": "direct", "norm": "bn", "ties": "first",
    },
}  # fmt: skip

spiking = functools.partial(
    spiking_objective,
    samples=24,
    inputs_seed=0,
    labels="cyclic",
    batch_size=16,
    hidden=(6,),
    input_shape=(1, 3, 3),
)


@functools.cache
def measured() -> LandscapeResult:
    settings = dataclasses.replace(FEW, accuracy=True)
    return landscape(spiking(), settings, relaxed=spiking(relaxed=True), provenance=PROVENANCE)


def made(scale: float = 1.0, **changes: Any) -> LandscapeResult:
    """A result with known curves: 0.1 + x^2 for the true loss and 0.2 + x^2 / 2 for the relaxed network."""

    def one(name: str, reach: float, curvature: float) -> Line:
        t = tuple((10 * reach * np.linspace(-1, 1, 21)).tolist())
        x = np.linspace(-1, 1, 21)
        true, soft = (tuple((scale * y).tolist()) for y in (0.1 + x**2, 0.2 + x**2 / 2))
        return Line(name, scale * curvature, scale * 0.5, scale * 0.01, 1e-6, True, t, true, soft, (), ())

    def two(first: str, second: str, reach: float, cosine: float = 0.0) -> Plane:
        x = np.linspace(-1, 1, 7)
        grid = 0.1 + (x[None] - 1 / 3) ** 2 + 3 * x[:, None] ** 2  # the minimum is not in the middle
        rows = tuple(tuple((scale * row).tolist()) for row in grid)
        return Plane((first, second), cosine, tuple((10 * reach * x).tolist()), rows, rows)

    base = LandscapeResult(
        schema=LANDSCAPE_SCHEMA,
        **PROVENANCE,
        training={},
        settings={"range": None},
        num_parameters=500,
        parameters={"fc.weight": 500},
        weight_norm=10.0,
        loss=scale * 0.1,
        relaxed_loss=scale * 0.2,
        accuracy=0.9,
        gradient_norm=0.1,
        dtype="float32",
        device="cpu",
        seed=7,
        symmetry_error=1e-7,
        lines=(
            *(one(name, 0.05, c) for name, c in (("top1", 4.0), ("top2", 2.0), ("negative", -3.0), ("gradient", 1.0))),
            *(one(f"random{k}", 0.5, 0.1) for k in (1, 2)),
        ),
        planes=(two("random1", "random2", 0.5), two("top1", "negative", 0.05)),
        refused={},
        products=40,
        evaluations=2256,
        seconds=1.0,
        versions={},
    )
    base = dataclasses.replace(base, data={**base.data, "samples": 1437})
    return dataclasses.replace(base, **changes)


def without_relaxed() -> LandscapeResult:
    lines = tuple(dataclasses.replace(line, relaxed_loss=()) for line in made().lines)
    planes = tuple(dataclasses.replace(plane, relaxed_loss=()) for plane in made().planes)
    reason = {"relaxed network": "surrogate fast_sigmoid:25 has area 0.08, not 1, so it has no relaxed network"}
    return made(lines=lines, planes=planes, relaxed_loss=math.nan, refused=reason)


def with_accuracy() -> LandscapeResult:
    x = np.linspace(-1, 1, 21)
    return made(lines=tuple(dataclasses.replace(line, accuracy=tuple((1 - x**2).tolist())) for line in made().lines))


def not_finite() -> LandscapeResult:
    nan = (math.nan,) * 21
    lines = (dataclasses.replace(made().lines[0], loss=nan, relaxed_loss=nan), *made().lines[1:])
    rows = ((math.nan,) * 7,) * 7
    planes = (dataclasses.replace(made().planes[0], loss=rows), made().planes[1])
    return made(lines=lines, planes=planes)


def many() -> LandscapeResult:
    lines = tuple(dataclasses.replace(made().lines[0], name=f"top{k}") for k in range(1, 13))
    return made(lines=lines, planes=made().planes * 4)
