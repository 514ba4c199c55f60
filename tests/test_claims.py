"""Tests of benchmarks.claims on made-up runs whose drift, spread and costs are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import claims
from benchmarks.depth_signal import class_share

LAYERS = ("fc1", "fc2", "fc3")  # the last is the output layer


def write(
    folder: Path, study: str, seed: int, accuracy: float, told: dict[str, Any], lines: list[list[dict[str, Any]]]
) -> None:
    """A run of two epochs. lines [epoch][layer]: what the log has of it."""
    path = folder / study / "runs" / f"r{seed}.train.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = {"forward_passes": 10 + seed, "seconds": 0.5, "layers": [{"name": n, **told} for n in LAYERS]}
    training = {"init": "lsuv" if seed else "ikun", "seed": seed}
    path.write_text(
        json.dumps({"network": {"model": "mlp"}, "training": training, "start": start, "seconds": 4.0, "failures": []})
    )
    log = [
        {"epoch": i, "test_accuracy": accuracy, "layers": dict(zip(LAYERS, layers, strict=True))}
        for i, layers in enumerate(lines, 1)
    ]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven runs of which five learn. From the first epoch to the last E[f'^2] falls by 2 (fc1, fc2) and 8 (fc3), and
    the variance grows by 4 and 3 and, the more the better a run ends, by 9 and above in fc3."""
    for seed in range(7):
        accuracy = 0.4 + 0.09 * seed if seed < 2 else 0.8 + 0.02 * seed
        first = [(0.2, 1.0, [0.01, 0.2, 0.4]), (0.1, 5.0, [0.2, 0.2, 0.6]), (0.8, 1.0, [1, 1, 1])]
        last = [(0.1, 4.0, [0.1, 0.1, 0.15]), (0.05, 15.0, [0.1, 0.1, 0.15]), (0.1, 9.0 + seed, [1, 1, 1])]
        lines = [
            [{"derivative_square": d, "current_variance": v, "derivative_square_by_step": t} for d, v, t in layers]
            for layers in (first, last)
        ]
        write(tmp_path, "stationarity", seed, accuracy, {"derivative_square": 0.4}, lines)
        write(tmp_path, "initializers", seed, accuracy, {}, lines)
    return tmp_path


def test_variances_over_time_layers_and_training_are_computed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims.stationary(folder)
    head = "claim 8: mlp, 5 runs that learn, median (10% to 90%): "
    assert [line.removeprefix(head) for line in capsys.readouterr().out.splitlines()] == [
        "epoch 1: E[f'^2] in a hidden layer, largest over smallest t: 21.5 (3 to 40)",
        "epoch 1: E[f'^2] in a hidden layer, largest over smallest t, without t = 1: 2.5 (2 to 3)",
        "the last epoch: E[f'^2] in a hidden layer, largest over smallest t: 1.5 (1.5 to 1.5)",
        "the last epoch: E[f'^2] in a hidden layer, largest over smallest t, without t = 1: 1.5 (1.5 to 1.5)",
        "epoch 1: E[f'^2], largest over smallest hidden layer: 2 (2 to 2)",
        "the last epoch: E[f'^2], largest over smallest hidden layer: 2 (2 to 2)",
        "E[f'^2], last epoch over the first: hidden layers 0.5 (0.5 to 0.5), last layer 0.125 (0.125 to 0.125)",
        "epoch 1: current variance, largest over smallest hidden layer: 5 (5 to 5)",
        "the last epoch: current variance, largest over smallest hidden layer: 3.75 (3.75 to 3.75)",
        "current variance, last epoch over the first: hidden layers 3.5 (3 to 4), last layer 13 (11.4 to 14.6)",
    ]


def test_drift_is_correlated_with_accuracy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims.drift(folder)
    said = capsys.readouterr().out
    assert "claim 8: mlp: E[f'^2] of 10 of 10 hidden layers falls since epoch 1\n" in said
    assert "claim 8: mlp: hidden layers since initialization, 50%, 90%: [6. 8.]\n" in said
    assert "E[f'^2], mlp: tau of drift and final accuracy 0.00" in said  # alike in all runs: (2 * 2 * 8)^(1/3) each
    assert "E[f'^2], in between at the end, 2 runs: drift 3.17 3.17\n" in said
    assert "current variance, mlp: tau of drift and final accuracy 1.00" in said
    drifts = [(4 * 3 * (9 + seed)) ** (1 / 3) for seed in (0, 1)]
    assert f"current variance, in between at the end, 2 runs: drift {drifts[0]:.3g} {drifts[1]:.3g}\n" in said


def test_forward_passes_of_every_initializer_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims.costs(folder)
    assert capsys.readouterr().out.splitlines() == [
        "claim 10: ikun takes at most 10 forward passes in any study",
        "claim 10: ikun: 10 (10 to 10) forward passes, 0.500 s of a training of 4.0 s",
        "claim 10: lsuv: 13.5 (11 to 16) forward passes, 0.500 s of a training of 4.0 s",
    ]


def test_deep_networks_are_grouped_by_depth_and_their_gains_are_those_of_the_hidden_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "initialization" / "runs"
    folder.mkdir(parents=True)
    for seed in range(5):
        for init, accuracy in (("relay", 0.5 + 0.1 * seed), ("lsuv", 0.1 + 0.05 * seed)):
            layers = [
                {"current_variance": v, "gradient_square": g}
                for v, g in ((1.0, 8.0), (2.0, 4.0), (4.0, 2.0), (9.0, 9.0))
            ]
            told = {"network": {"model": "mlp", "neuron": "if", "hidden": [8, 8, 8]}, "start": {"layers": layers}}
            told["training"] = {"init": init, "seed": seed, "lr": 0.003}
            (folder / f"{init}{seed}.train.json").write_text(json.dumps(told))
            (folder / f"{init}{seed}.train.jsonl").write_text(
                json.dumps({"epoch": 1, "test_accuracy": accuracy}) + "\n"
            )
    claims.deep(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    head = "without a norm: initialization, mlp, if, depth 3, lr 0.003: "
    gains = "gain forward 4 (4 to 4), backward 4 (4 to 4)"
    assert lines[:3] == [
        f"{head}lsuv: accuracy 0.2 (0.1 to 0.3), 2 of 5 at chance; {gains}",
        f"{head}relay: accuracy 0.7 (0.5 to 0.9), 0 of 5 at chance; {gains}",
        f"{head}relay minus lsuv: 0.50 [0.40, 0.60]",
    ]


def test_the_share_between_classes_is_that_of_an_analysis_of_variance() -> None:
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), 400)
    noise, means = rng.normal(size=(4000, 3)), rng.normal(size=(10, 3))
    assert class_share(noise, labels) == pytest.approx(0, abs=0.003)
    assert class_share(means[labels], labels) == pytest.approx(1)
    expected = 2 * means.var(0).sum() / (2 * means.var(0).sum() + 3)
    assert class_share(noise + np.sqrt(2) * means[labels], labels) == pytest.approx(expected, abs=0.02)
    assert class_share(np.ones((4000, 3)), labels) == 0
