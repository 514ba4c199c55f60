"""Tests of trajectories: which results belong to one run, the table, and the stability limit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from figure_tools import run, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_tools.results.operator_spectrum import Trace
from hessian_tools.results.spectrum import SpectrumResult
from hessian_tools.results.trajectory import RANKS, epoch, snapshots, stability_limit, trace_error, trajectory_rows


def test_snapshots_come_in_the_order_of_their_epochs() -> None:
    ordered = snapshots([snapshot(e) for e in (12, 3, 6)])
    assert [r.training["epochs_run"] for r in ordered] == [3, 6, 12]


def test_one_snapshot_under_two_names_counts_once() -> None:
    last = snapshot(12)
    twin = dataclasses.replace(last, checkpoint={"path": "/x/ckpt.pt", "sha256": "other"})
    assert len(snapshots([snapshot(3), last, twin])) == 2
    with pytest.raises(ValueError, match="at least two snapshots"):
        snapshots([last, twin])


def test_weights_kept_by_early_stopping_are_of_their_own_epoch() -> None:
    """The last of 12 epochs is another snapshot than the checkpoint, whose weights are of epoch 6."""
    best = dataclasses.replace(snapshot(6), checkpoint={"path": "/x/ckpt.pt", "sha256": "other"})
    best = dataclasses.replace(best, training={**best.training, "epochs_run": 12, "best_epoch": 6})
    assert [epoch(r) for r in snapshots([snapshot(12), best, snapshot(3)])] == [3, 6, 12]
    assert len(snapshots([snapshot(3), snapshot(6), best])) == 2


def with_(part: str, **changes: Any) -> SpectrumResult:
    made = snapshot(6)
    return dataclasses.replace(made, **{part: {**getattr(made, part), **changes}})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            with_("training", init="xavier"),
            r"not one run: initializer differs, kaiming for run.epoch0003.pt but xavier",
        ),
        (with_("training", seed=1), "training seed differs"),
        (with_("training", lr=0.2), "learning rate differs"),
        (with_("network", channels=99), "channels of the network differs"),
        (with_("network", norm="bn"), "norm of the network differs, None"),
        (with_("data", name="mnist"), "data set differs"),
        (with_("data", sha256="f" * 64), "samples differs"),
        (with_("training", epochs_run=3), "run.epoch0003.pt and run.epoch0006.pt are both of epoch 3"),
        (with_("training", epochs_run=None), "run.epoch0006.pt does not say after how many epochs"),
        (dataclasses.replace(snapshot(6), parameters={"fc.weight": 3}), "set of parameters differs"),
    ],
)
def test_what_is_not_one_run_is_refused_in_one_line(other: SpectrumResult, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        snapshots([snapshot(3), other])
    assert "\n" not in str(caught.value)


def test_nothing_and_one_are_no_trajectory() -> None:
    for few in ([], [snapshot(3)]):
        with pytest.raises(ValueError, match="at least two snapshots"):
            trajectory_rows(few)


def test_rows_hold_what_the_results_hold() -> None:
    results = run([6, 3])
    rows = trajectory_rows(results)
    assert [row["epoch"] for row in rows] == [3, 6]
    assert len({tuple(row) for row in rows}) == 1
    row, made = rows[1], results[0]
    for name, spectrum in made.spectra.items():
        for rank in range(RANKS):
            found = spectrum.eigenvalues[rank]
            key = f"{name}.lambda_{rank + 1}"
            assert [row[key], row[f"{key}.data_stderr"], row[f"{key}.converged"]] == [
                found.value,
                found.data_stderr,
                found.converged,
            ]
        assert spectrum.trace is not None
        assert row[f"{name}.trace"] == spectrum.trace.estimate
        assert row[f"{name}.trace.stderr"] == pytest.approx(np.hypot(spectrum.trace.stderr, spectrum.trace.data_stderr))
    assert row["hessian.lambda_min"] == made.spectra["hessian"].smallest_eigenvalues[0].value
    assert "ggn.lambda_min" not in row
    assert f"hessian.lambda_{RANKS + 1}" not in row
    assert row["spike1.derivative_square"] == made.activity["spike1"]["derivative_square"]
    assert [row["loss"], row["accuracy"], row["checkpoint"]] == [made.loss, made.accuracy, "run.epoch0006.pt"]


def test_rows_without_activity_or_with_some() -> None:
    first, second = run([3, 6])
    bare = dataclasses.replace(first, activity={"spike1": {"firing_rate": 0.1, "dead": 0.0}})
    rows = trajectory_rows([bare, second])
    assert math.isnan(rows[0]["spike1.derivative_square"])
    assert rows[1]["spike1.derivative_square"] > 0
    none = [dataclasses.replace(r, activity={}) for r in (first, second)]
    assert not [key for key in trajectory_rows(none)[0] if key.endswith("derivative_square")]


@pytest.mark.parametrize(
    ("stderr", "data", "both"),
    [(3.0, 4.0, 5.0), (math.nan, 4.0, 4.0), (3.0, math.nan, 3.0), (math.nan, math.nan, math.nan)],
)
def test_trace_error_adds_what_is_known(stderr: float, data: float, both: float) -> None:
    assert trace_error(Trace(1.0, stderr, (0.0, 2.0), 8, data)) == pytest.approx(both, nan_ok=True)


@given(lr=st.floats(0.01, 1), momentum=st.floats(0, 0.95), side=st.sampled_from([0.98, 1.02]))
@settings(max_examples=50)
def test_heavy_ball_diverges_above_the_limit_and_not_below(lr: float, momentum: float, side: float) -> None:
    curvature = side * stability_limit({"optimizer": "sgd", "lr": lr, "momentum": momentum})
    # w' = w - lr v', v' = momentum v + curvature w: PyTorch's SGD on a quadratic, one step as a matrix
    step = np.array([[1 - lr * curvature, -lr * momentum], [curvature, momentum]])
    assert (np.abs(np.linalg.eigvals(step)).max() > 1) == (side > 1)


def test_limit_of_the_default_momentum_and_of_other_optimizers() -> None:
    assert stability_limit({"optimizer": "sgd", "lr": 0.1}) == pytest.approx(38)
    for training in ({}, {"optimizer": "adam", "lr": 0.1}, {"optimizer": "sgd"}, {"optimizer": "sgd", "lr": 0.0}):
        assert math.isnan(stability_limit(training))
    assert math.isnan(stability_limit({"optimizer": "sgd", "lr": 0.1, "momentum": None}))
