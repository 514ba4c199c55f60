"""Tests of the path of training in a plane, against NumPy's SVD and closed forms."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from landscape_tools import PROVENANCE, spiking
from objectives import quadratic
from result_tools import untimed
from torch import Tensor

from hessian_tools.analysis.training_path import (
    SavedWeights,
    TrainingPathSettings,
    principal_components,
    saved_weights,
    training_path,
)
from hessian_tools.io import json as results
from hessian_tools.objective import Objective
from hessian_tools.perturbation import mean_loss, outputs_at
from hessian_tools.results.training_path import TRAINING_PATH_SCHEMA, TrainingPath
from hessian_tools.resume import Phases

pytestmark = pytest.mark.usefixtures("warnings_are_errors")
FEW = TrainingPathSettings(points=5, memory=0.1)
P = 12


def descent(count: int = 6, seed: int = 3) -> tuple[Tensor, list[Tensor]]:
    """A positive definite A [P, P], and the weights of gradient descent with some noise on w'Aw / 2."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(P, P, dtype=torch.float64, generator=generator)
    a, w = b @ b.T / P, torch.randn(P, dtype=torch.float64, generator=generator)
    found = []
    for _ in range(count):
        found.append(w)
        w = w - 0.2 * (a @ w) + 0.05 * torch.randn(P, dtype=torch.float64, generator=generator)
    return a, found


def on_quadratic(settings: TrainingPathSettings = FEW, count: int = 6) -> tuple[Tensor, list[Tensor], TrainingPath]:
    a, weights = descent(count)
    saved = [saved_weights(quadratic(a, w), f"s{i}", i) for i, w in enumerate(weights)]
    return a, weights, training_path(quadratic(a, weights[-1]), saved, settings)


def test_principal_components_are_those_of_numpys_svd() -> None:
    weights = torch.stack(descent(7)[1])
    components, shares = principal_components(weights)
    x = weights.numpy() - weights.numpy().mean(0)
    _, sizes, rows = np.linalg.svd(x, full_matrices=False)
    assert components.shape == (P, 6)  # seven points around their mean
    assert shares.numpy() == pytest.approx(sizes[:6] ** 2 / (sizes**2).sum())
    for k in range(6):
        assert abs(components[:, k].numpy() @ rows[k]) == pytest.approx(1)
        assert (weights[0] - weights[-1]) @ components[:, k] >= 0
    assert (components.T @ components).numpy() == pytest.approx(np.eye(6), abs=1e-9)


def test_the_path_in_its_principal_plane_is_numpys() -> None:
    a, weights, found = on_quadratic()
    x = np.stack([w.numpy() for w in weights])
    _, sizes, rows = np.linalg.svd(x - x.mean(0), full_matrices=False)
    plane = rows[:2] * np.sign(rows[:2] @ (x[0] - x[-1]))[:, None]
    places = (x - x[-1]) @ plane.T
    assert np.array([s.position for s in found.snapshots]) == pytest.approx(places)
    assert found.explained == pytest.approx(sizes[:2] ** 2 / (sizes**2).sum())
    off = np.linalg.norm(x - x[-1] - places @ plane, axis=1)
    assert [s.off_plane for s in found.snapshots] == pytest.approx(off, abs=1e-12)
    assert found.snapshots[-1].position == (0, 0)

    def loss(w: Any) -> float:
        return float(w @ a.numpy() @ w) / 2

    for s, w, at in zip(found.snapshots, x, places, strict=True):
        assert s.loss == pytest.approx(loss(w))
        assert s.projected_loss == pytest.approx(loss(x[-1] + at @ plane))
        assert found.first[0] < at[0] < found.first[-1]
        assert found.second[0] < at[1] < found.second[-1]
    for i, t in enumerate(found.second):
        for j, s in enumerate(found.first):
            assert found.plane_loss[i][j] == pytest.approx(loss(x[-1] + np.array([s, t]) @ plane))
    assert found.evaluations == 25 + 6
    assert found.weight_norm == pytest.approx(np.linalg.norm(x[-1]))
    assert found.relaxed_loss == ()


def test_chosen_directions_are_those_of_the_last_snapshot_made_orthogonal() -> None:
    a, weights, found = on_quadratic(dataclasses.replace(FEW, directions=("top1", "gradient")))
    w = weights[-1].numpy()
    gradient = a.numpy() @ w
    u = np.linalg.eigh(a.numpy())[1][:, -1]
    u *= np.sign(u @ gradient)
    g = gradient / np.linalg.norm(gradient)
    v = g - (g @ u) * u
    v /= np.linalg.norm(v)
    assert found.cosine == pytest.approx(g @ u, rel=1e-3)
    for s, x in zip(found.snapshots, weights, strict=True):
        assert s.position == pytest.approx(((x.numpy() - w) @ u, (x.numpy() - w) @ v), abs=1e-3)
    assert sum(found.explained) <= 1


def snapshots_of(objective: Objective) -> list[SavedWeights]:
    """Three snapshots that end at the weights of the objective."""
    generator = torch.Generator().manual_seed(0)
    w = objective.weights().double()
    moves = [torch.randn(len(w), dtype=torch.float64, generator=generator) for _ in range(2)]
    places = [w + 0.1 * move for move in moves]
    found = []
    for i, place in enumerate(places):
        outputs = next(iter(outputs_at(objective, lambda _, place=place: place, [0])))
        found.append(SavedWeights(f"s{i}", place, mean_loss(objective, outputs), math.nan))
    return [*found, saved_weights(objective, "last", 3, "ab")]


def measured(**more: Any) -> TrainingPath:
    objective = spiking()
    return training_path(
        objective, snapshots_of(objective), FEW, relaxed=spiking(relaxed=True), provenance=PROVENANCE, **more
    )


def test_three_snapshots_lie_in_their_plane_and_have_their_losses_there() -> None:
    found = measured()
    assert found.explained[0] + found.explained[1] == pytest.approx(1)
    for s in found.snapshots:
        assert s.off_plane < 1e-9
    assert found.snapshots[-1].projected_loss == found.snapshots[-1].loss == found.loss
    assert np.shape(found.relaxed_loss) == np.shape(found.plane_loss) == (5, 5)
    assert found.evaluations == 2 * (25 + 3)
    assert (found.snapshots[-1].epoch, found.snapshots[-1].sha256, found.data["samples"]) == (3, "ab", 24)


def test_a_saved_path_loads_unchanged_and_an_interrupted_one_resumes(tmp_path: Path) -> None:
    calls: list[str] = []

    def stop(name: str, done: int, total: int, worst: float) -> None:
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(progress=stop, phases=Phases(tmp_path / "state", {"a": 1}))
    found = measured(phases=Phases(tmp_path / "state", {"a": 1}))
    assert untimed(found) == untimed(measured())
    results.save_result(found, tmp_path / "a.json")
    loaded = results.load_result(tmp_path / "a.json", TrainingPath, TRAINING_PATH_SCHEMA)
    assert results.clean(dataclasses.asdict(loaded)) == results.clean(dataclasses.asdict(found))
    assert "3 snapshots; variance along pc1" in repr(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 2}, "at least 3"),
        ({"directions": ("top1", "top1")}, "two different directions"),
        ({"directions": ("top1", "east")}, "unknown direction 'east'"),
        ({"directions": ("pc1", "top1")}, "come in one pair"),
        ({"directions": ("pc2", "pc1")}, "come in one pair"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingPathSettings(**settings)


def test_what_spans_no_plane_is_refused() -> None:
    a, weights = descent(3)
    last = quadratic(a, weights[-1])
    line = [weights[-1] + k * (weights[0] - weights[-1]) for k in (2.0, 1.0, 0.0)]
    cases = [
        (weights[:2] and [weights[0], weights[-1]], "at least three snapshots"),
        (line, "span no plane"),
        ([weights[-1]] * 3, "span no plane"),
        (weights[::-1], "other weights than the objective"),
    ]
    for found, message in cases:
        saved = [saved_weights(quadratic(a, w), f"s{i}") for i, w in enumerate(found)]
        with pytest.raises(ValueError, match=message):
            training_path(last, saved, FEW)
    flat = quadratic(torch.zeros(P, P, dtype=torch.float64), weights[-1])
    saved = [saved_weights(quadratic(a, w), f"s{i}") for i, w in enumerate(weights)]
    with pytest.raises(ValueError, match="direction gradient is not available"):
        training_path(flat, saved, dataclasses.replace(FEW, directions=("gradient", "random1")))
