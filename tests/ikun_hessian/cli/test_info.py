"""Tests of the command info."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_tools import Capture

import cli
from ikun.checkpoint import Checkpoint, save_checkpoint
from ikun.data.spec import DataSpec
from ikun.networks import Network, Spec

NETWORKS = {
    "csnn": ["--model", "csnn", "--channels", "2", "--depth", "3", "--init", "delta_orthogonal"],
    "resnet": ["--model", "resnet", "--channels", "2", "--depth", "1", "--init", "lsuv", "--norm", "tdbn"],
    "rsnn": ["--model", "rsnn", "--hidden", "9", "--neuron", "lif", "--init", "gradient_stable", "--dropout", "0.3"],
}
LAYERS = {
    "csnn": ["conv1", "conv2", "conv3", "fc1", "fc2"],
    "resnet": ["conv1", "conv2", "conv3", "fc1"],
    "rsnn": ["fc1", "rec1", "fc2"],
}


@pytest.mark.parametrize("model", NETWORKS)
def test_every_layer_of_every_network_is_described(model: str, tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "a.pt")
    assert cli.run(["train", *NETWORKS[model], "--epochs", "1", "--subset", "100", "--out", path]) == 0
    capsys.readouterr()
    found = []
    for _ in range(2):
        assert cli.run(["info", path, "--json"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]  # nothing random, with dropout neither
    told = json.loads(found[0])
    assert told["initializer_passes"] > 0
    for state in ("initialization", "trained"):
        assert [s["name"] for s in told["layers"][state]] == LAYERS[model]
        assert all(len(s["derivative_square_by_step"]) == 4 for s in told["layers"][state])
    assert cli.run(["info", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    init = NETWORKS[model][NETWORKS[model].index("--init") + 1]
    assert f"{init} initializer (alpha {0.1 if init == 'ikun' else 1:g}), " in lines[3]
    assert max(len(line) for line in lines if path not in line) <= 80
    assert sum(line.split()[:1] == [LAYERS[model][0]] for line in lines) == 2


@pytest.mark.parametrize("coding", ["direct", "poisson"])
def test_sequences_too_long_for_the_memory_are_refused(
    coding: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ikun_hessian.jobs.device.half_of_the_memory", lambda device: 1.0)
    for steps, fits in ((20, True), (10_000, False)):
        spec = Spec(channels=2, timesteps=steps, coding=coding, norm="none")
        path = tmp_path / f"{steps}.pt"
        save_checkpoint(Checkpoint(spec, DataSpec(), "mse", Network(spec).state_dict(), {}, []), path)
        assert cli.run(["info", str(path)]) == (0 if fits else 2)
        said = capsys.readouterr().err
        assert said == "" if fits else said.startswith(f"error: {path}: T = 10000 needs about ")
        assert len(said.splitlines()) <= 1


@pytest.mark.parametrize("command", [["info"], ["spectrum", "--samples", "8"], ["flatness", "--samples", "8"]])
def test_labels_outside_the_networks_classes_are_refused(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    spec = Spec(channels=2, classes=3)
    save_checkpoint(Checkpoint(spec, DataSpec(), "mse", Network(spec).state_dict(), {}, []), tmp_path / "a.pt")
    assert cli.run([command[0], str(tmp_path / "a.pt"), *command[1:]]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "error: the network of this checkpoint has 3 classes, but the data digits have 10: "
        "the network was not trained on these data"
    )
