"""Tests of the figure of a path of training."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from figure_tools import collisions, said
from landscape_tools import PROVENANCE

from hessian_tools.plots.training_path import training_path_figure
from hessian_tools.results.training_path import TRAINING_PATH_SCHEMA, Snapshot, TrainingPath

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def made(**changes: object) -> TrainingPath:
    """A path of four snapshots over the loss 0.1 + s^2 + t^2, with ||w|| = 10."""
    grid = np.linspace(-1, 4, 7)
    rows = tuple(tuple((0.1 + grid**2 + t**2).tolist()) for t in grid)
    snapshots = tuple(
        Snapshot(f"e{k}.pt", "", 2 * k, (3.0 - k, (3.0 - k) / 2), 0.1 * (3 - k), 1.0, 0.5, 1.1) for k in range(4)
    )
    base = TrainingPath(
        TRAINING_PATH_SCHEMA, **PROVENANCE, training={}, settings={}, num_parameters=500, parameters={"fc.weight": 500},
        weight_norm=10.0, loss=0.1, accuracy=0.9, dtype="float32", device="cpu", seed=7, directions=("pc1", "pc2"),
        explained=(0.75, 0.2), cosine=0.0, first=tuple(grid.tolist()), second=tuple(grid.tolist()), plane_loss=rows,
        relaxed_loss=rows, snapshots=snapshots, refused={}, evaluations=60, seconds=1.0, versions={},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_snapshots_are_at_their_places_in_both_panels() -> None:
    figure = training_path_figure(made())
    for ax in figure.axes[:2]:
        white = next(line for line in ax.lines if line.get_color() == "#ffffff")
        assert np.array(white.get_xydata()) == pytest.approx(np.array([[(3 - k) / 10, (3 - k) / 20] for k in range(4)]))
        assert ax.get_xlabel() == "principal component 1 (75% of the variance)"
        assert ax.get_xlim() == pytest.approx((-0.1, 0.4))
    text = said(figure).replace("\n", " ")
    for part in (
        "first snapshot (epoch 0)",
        "last snapshot (epoch 6)",
        "up to 0.03 ‖w‖ away",
        "random walk",
        "BatchNorm",
    ):
        assert part in text
    assert collisions(figure) == []


def test_odd_paths_are_drawn() -> None:
    nan = ((math.nan,) * 7,) * 7
    unknown = tuple(dataclasses.replace(s, epoch=None) for s in made().snapshots)
    for result in (made(relaxed_loss=()), made(plane_loss=nan, relaxed_loss=()), made(snapshots=unknown)):
        assert collisions(training_path_figure(result)) == []
    assert "BatchNorm" not in said(training_path_figure(made(), captioned=False))
    chosen = training_path_figure(made(directions=("top1", "negative"), cosine=0.3))
    assert chosen.axes[0].get_xlabel() == "eigenvector 1 (75% of the variance)"
    assert "made orthogonal to the first (cosine 0.3)" in said(chosen).replace("\n", " ")
