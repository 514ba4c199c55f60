"""Tests of one network of the study of generalization, against `ikun.train` and dense matrices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from generalization_tools import TINY, planned

import hessian_tools as ht
import ikun
from hessian_tools.io.json import ResultError
from ikun.losses import LOSSES
from ikun.training.loop import start
from ikun_hessian.experiments.generalization.measures import NAMES, PRIMARY
from ikun_hessian.experiments.generalization.network import NetworkUnit, trained_and_measured
from ikun_hessian.experiments.generalization.result import END, MATCHED, NetworkResult, load_network
from ikun_hessian.experiments.study.runner import run_unit


def unit_in(folder: Path, text: str = TINY) -> NetworkUnit:
    (folder / "out" / "runs").mkdir(parents=True)
    unit = next(u for u in planned(folder, text).units if isinstance(u, NetworkUnit) and u.training.optimizer == "adam")
    settings = replace(unit.settings, threshold=0.0935)
    return replace(unit, settings=settings, training=replace(unit.training, lr=0.02, epochs=3))


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> NetworkUnit:
    return unit_in(tmp_path_factory.mktemp("unit"))


@pytest.fixture(scope="module")
def result(unit: NetworkUnit) -> NetworkResult:
    return trained_and_measured(unit)


@pytest.fixture(scope="module")
def checkpoint(unit: NetworkUnit, tmp_path_factory: pytest.TempPathFactory) -> ikun.Checkpoint:
    return ikun.train(unit.network, unit.data, unit.training, tmp_path_factory.mktemp("train") / "net.pt")


def test_the_network_is_that_of_train(unit: NetworkUnit, result: NetworkResult, checkpoint: ikun.Checkpoint) -> None:
    end = result.moments[END]
    last = checkpoint.history[-1]
    assert (end.epoch, end.test_loss, end.test_accuracy) == (3, last["test_loss"], last["test_accuracy"])
    weights = torch.cat([w.double().reshape(-1) for w in checkpoint.state.values()])
    begun = torch.cat(
        [p.detach().double().reshape(-1) for p in start(unit.network, unit.data.load(), unit.training).parameters()]
    )
    assert end.measures["weight norm"] == pytest.approx(float(weights.norm()), rel=1e-7)
    assert end.measures["distance from initialization"] == pytest.approx(float((weights - begun).norm()), rel=1e-7)
    assert result.num_parameters == len(weights)
    assert result.test_samples == 360


def test_the_curvature_is_that_of_dense_matrices(
    unit: NetworkUnit, result: NetworkResult, checkpoint: ikun.Checkpoint
) -> None:
    net = ikun.Network(checkpoint.network)
    net.load_state_dict(checkpoint.state)
    data = unit.data.load()
    objective = ht.make_objective(net.eval(), LOSSES["mse"], (data.images[:40], data.labels[:40]))
    found = result.moments[END].measures
    rows = [p.detach().double().norm(dim=1, keepdim=True).expand_as(p).reshape(-1) for p in net.parameters()]
    d = torch.cat(rows).numpy()
    for name, op in (("ggn", ht.ggn(objective)), ("hessian", ht.hessian(objective))):
        a = ht.dense(op).numpy()
        for kind, matrix in (("", a), (" scaled", d[:, None] * a * d)):
            assert found[f"{name} lambda_max{kind}"] == pytest.approx(float(np.linalg.eigvalsh(matrix)[-1]), rel=1e-2)
            spread = np.linalg.norm(matrix - np.diag(np.diag(matrix)))
            assert abs(found[f"{name} trace{kind}"] - np.trace(matrix)) < 4 * math.sqrt(2 / 10) * spread
    assert found["SAM sharpness"] == pytest.approx(
        ht.sam_sharpness(objective, 0.01 * float(objective.weights().norm())).value, rel=1e-6
    )


def test_the_matched_moment_is_the_first_epoch_at_the_threshold(unit: NetworkUnit, result: NetworkResult) -> None:
    losses = []
    for epochs in (1, 2, 3):
        shorter = replace(unit, training=replace(unit.training, epochs=epochs))
        losses.append(trained_and_measured(shorter).moments[END].train_loss)
    assert losses[-1] == result.moments[END].train_loss
    first = next((i for i, loss in enumerate(losses, 1) if loss <= unit.settings.threshold), None)
    assert first == 2, losses
    assert result.moments[MATCHED].epoch == first
    never = trained_and_measured(replace(unit, settings=replace(unit.settings, threshold=1e-9)))
    assert list(never.moments) == [END]
    assert never.moments[END].train_loss == result.moments[END].train_loss  # measuring does not change the training


def test_all_measures_exist_and_the_slow_ones_only_at_the_matched_moment(result: NetworkResult) -> None:
    for at in result.moments.values():
        assert tuple(at.measures) == NAMES
    assert math.isfinite(result.moments[MATCHED].measures["true along GGN"])
    assert math.isfinite(result.moments[MATCHED].measures[PRIMARY])
    assert math.isnan(result.moments[END].measures["true along GGN"])


def test_a_network_is_reproducible_and_survives_its_file(unit: NetworkUnit, result: NetworkResult) -> None:
    assert run_unit(unit) == ""
    assert unit.done()
    found = load_network(unit.path)
    same = {"seconds": {}, "versions": {}}
    assert repr(replace(found, **same)) == repr(replace(result, **same))  # repr: NaN equals NaN
    assert unit.path.stat().st_size < 8000


def test_a_diverged_network_is_a_result_without_moments(tmp_path: Path) -> None:
    unit = unit_in(tmp_path)
    unit = replace(unit, training=replace(unit.training, optimizer="sgd", lr=1e30, weight_decay=1e30))
    found = trained_and_measured(unit)
    assert found.diverged
    assert not found.moments


def test_a_failure_is_kept_and_tried_again(tmp_path: Path) -> None:
    unit = unit_in(tmp_path)
    broken = replace(unit, network=dataclasses.replace(unit.network, input_shape=(1, 5, 5)))
    assert "network: " in run_unit(broken)
    assert unit.failure.exists()
    assert not unit.done()
    assert run_unit(unit) == ""
    assert not unit.failure.exists()


def test_a_damaged_result_is_not_done(unit: NetworkUnit, tmp_path: Path) -> None:
    moved = replace(unit, runs=tmp_path)
    moved.path.write_text('{"schema": "ikun-hessian/generalization/1"}')
    assert not moved.done()
    with pytest.raises(ResultError, match=moved.name):
        load_network(moved.path)
