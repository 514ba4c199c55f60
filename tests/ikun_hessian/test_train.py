"""The command train end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_tools import Capture, fails

import cli


def test_train_leaves_a_checkpoint_its_log_and_snapshots(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "a.train.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2]
    assert {"loss", "accuracy", "test_accuracy", "gradient_norm", "layers", "failures"} <= set(log[0])
    assert {"firing_rate", "derivative_square", "distance", "current_variance"} < set(log[0]["layers"]["conv1"])
    assert (trained / "a.epoch0002.pt").exists()
    assert not list(trained.glob("*.resume"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "xaviar"], "init must be one of ikun"),
        (["--surrogate", "atan:x"], "'x' is not a number"),
        (["--surrogate", "stairs"], "unknown surrogate 'stairs'"),
        (["--data", "mnist"], "unknown data set 'mnist'"),
        (["--model", "vgg"], "model must be one of csnn, mlp"),
        (["--lr", "-1"], "lr and alpha must be positive"),
        (["--tau", "1"], "tau must exceed 1"),
        (["--subset", "99999"], "a subset of 99999"),
        (["--hidden", "a,b"], "--hidden 'a,b'"),
        (["--epochs", "few"], "'few' is not a valid integer"),
        (["--resume"], "no interrupted run to resume"),
        (["--held-out", "5000"], "leaves nothing"),
        (["--data", "fashion-mnist", "--data-dir", "/dev/null"], "/dev/null is not a folder"),
    ],
)
def test_bad_training_options(tmp_path: Path, capsys: Capture, options: list[str], message: str) -> None:
    fails(capsys, 2, message, "train", *options, "--out", str(tmp_path / "x.pt"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_by_train(trained: Path, capsys: Capture) -> None:
    fails(capsys, 2, "exists: choose another --out", "train", "--out", str(trained / "a.pt"))


def test_diverged_training_keeps_finite_weights_and_fails(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x.pt"
    options = [
        "--norm",
        "none",
        "--optimizer",
        "sgd",
        "--lr",
        "1e20",
        "--weight-decay",
        "1e20",
        "--epochs",
        "3",
        "--subset",
        "100",
        "--channels",
        "2",
    ]
    assert cli.run(["train", *options, "--out", str(out)]) == 1
    assert "diverged" in capsys.readouterr().err
    assert cli.run(["info", str(out)]) == 0
