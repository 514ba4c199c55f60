"""Tests of a study's robustness step against the evaluation of the training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hessian_tools.analysis.robustness import RobustnessSettings
from hessian_tools.seeding import stream
from ikun.checkpoint import load_checkpoint
from ikun.data.corruptions import corrupted
from ikun.training.loop import evaluate
from ikun_hessian.jobs.analyses.robustness import analyse_robustness, robustness_settings
from ikun_hessian.jobs.open import open_job
from ikun_hessian.jobs.options import ROBUSTNESS
from ikun_hessian.jobs.schema import read_options

WHERE = {"memory": 1.0, "data_dir": None, "device": "cpu"}


def settings_of(options: dict[str, Any]) -> tuple[RobustnessSettings, dict[str, Any]]:
    return robustness_settings(**read_options(ROBUSTNESS, options))


def test_accuracies_are_those_of_the_network(trained: Path) -> None:
    path = trained / "a.pt"
    options = {"corruptions": ["gaussian_noise", "occlusion"], "severities": [1, 5], "noise": [0.5, 5.0], "draws": 8}
    settings, opening = settings_of(options)
    found = analyse_robustness(open_job(path, **opening, **WHERE), settings, None)
    checkpoint = load_checkpoint(path)
    network, data = checkpoint.build(), checkpoint.data.load("test")
    assert found.accuracy == checkpoint.history[-1]["test_accuracy"]
    assert found.data["samples"] == len(data)
    for kind in ("gaussian_noise", "occlusion"):
        for severity in (1, 5):
            images = corrupted(data.images[:], kind, severity, stream(0, severity))
            _, accuracy = evaluate(network, dataclasses.replace(data, images=images), checkpoint.loss)
            assert found.disturbed[kind][str(severity)].value == accuracy
    assert set(found.disturbed["weight_noise"]) == {"0.5", "5"}
    few, opening = settings_of({**options, "samples": 50})
    assert analyse_robustness(open_job(path, **opening, **WHERE), few, None).data["samples"] == 50


def test_weight_noise_can_be_measured_without_corruptions(trained: Path) -> None:
    settings, opening = settings_of({"corruptions": [], "noise": [0.2], "draws": 4})
    found = analyse_robustness(open_job(trained / "a.pt", **opening, **WHERE), settings, None)
    assert set(found.disturbed) == {"weight_noise"}


def test_severities_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="severities must be whole numbers from 1 to 5"):
        settings_of({"severities": [0]})


def test_defaults_are_those_of_the_library() -> None:
    assert settings_of({})[0] == RobustnessSettings()
