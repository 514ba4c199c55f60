"""Tests of the command train."""

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


def test_train_and_info_report_a_start_beyond_the_surrogates_reach(tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "a.pt")
    short = ["--model", "mlp", "--hidden", "16", "--norm", "none", "--subset", "64", "--epochs", "1", "--out", path]
    assert cli.run(["train", *short, "--init", "ikun", "--alpha", "1", "--gain", "300"]) == 0
    said, told = "! overdriven layer: spike1 (fc1) starts with current variance ", capsys.readouterr()
    assert [line.endswith("threshold^2; lower --alpha") for line in told.err.splitlines() if said in line] == [True]
    assert said in told.out
    assert cli.run(["info", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ikun initializer (alpha 1, gain 300), " in lines[3]
    assert any(line.startswith(said) for line in lines)
    assert lines[-1] == "f'(x) = (a/2) / (1 + (pi a x / 2)^2) at x = h - threshold, a = 2."
    assert cli.run(["spectrum", path, "--top", "1", "--no-density", "--full"]) == 0
    assert "ikun initializer (alpha 1, gain 300)," in capsys.readouterr().out
    assert cli.run(["train", *short, "--init", "kaiming", "--force"]) == 0
    assert "overdriven" not in "".join(capsys.readouterr())


def test_what_is_said_of_weights_kept_by_early_stopping_is_of_their_epoch(tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "a.pt")
    short = ["--model", "mlp", "--hidden", "16", "--norm", "none", "--subset", "100", "--epochs", "9", "--seed", "1"]
    options = ["--held-out", "20", "--patience", "2", "--lr", "0.3", "--schedule", "none", "--batch-size", "20"]
    assert cli.run(["train", *short, *options, "--out", path]) == 0
    log = [json.loads(line) for line in (tmp_path / "a.train.jsonl").read_text().splitlines()]
    best = min(log, key=lambda line: line["held_out_loss"])
    assert best["epoch"] == len(log) - 2
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"epoch {best['epoch']}, kept of {len(log)}: train loss {best['loss']:.4g}")
    assert cli.run(["info", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"weights of epoch {best['epoch']}, the best or the last finite one" in lines
    assert f"train accuracy {best['accuracy']:.1%}, test accuracy {best['test_accuracy']:.1%}" in lines
    assert cli.run(["spectrum", path, "--top", "1", "--no-density", "--full"]) == 0
    assert f"{len(log)} epochs, weights of epoch {best['epoch']}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "xaviar"], "--init: no 'xaviar': did you mean 'xavier'?"),
        (["--surrogate", "atan:x"], "'x' is not a number"),
        (["--surrogate", "stairs"], "--surrogate: no 'stairs'"),
        (["--data", "mnist"], "--data: no 'mnist'"),
        (["--model", "vgg"], "--model: no 'vgg': choose one of csnn, mlp"),
        (["--lr", "-1"], "lr, alpha and gain must be positive"),
        (["--tau", "1"], "tau must exceed 1"),
        (["--subset", "99999"], "a subset of 99999"),
        (["--hidden", "a,b"], "--hidden 'a,b'"),
        (["--epochs", "few"], "'few' is not a valid integer"),
        (["--resume"], "no interrupted run to resume"),
        (["--held-out", "5000"], "leaves no training samples"),
        (["--depth", "0"], "depth must lie between 1 and 200"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1"),
        (["--timesteps", "0"], "timesteps must lie between 1"),
        (["--save-at-loss", "0"], "save_at_loss must be positive"),
        (["--save-at-loss", ".1", "--save-at-loss", "0.1"], "save_at_loss has the same number twice"),
        (["--data", "spike-times", "--model", "rsnn", "--timesteps", "3"], "the network 3: give --timesteps "),
        (["--data", "spike-times", "--model", "csnn"], "this csnn needs at least"),
        (["--model", "rsnn", "--coding", "spikes"], "set --coding to direct or poisson"),
        (["--data", "fashion-mnist", "--data-dir", "/dev/null"], "/dev/null is not a folder"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, capsys: Capture, options: list[str], message: str) -> None:
    fails(capsys, 2, message, "train", *options, "--out", str(tmp_path / "x.pt"))
    assert list(tmp_path.iterdir()) == []


MODEL_OPTIONS = {
    "csnn": ["--depth", "4", "--norm", "tdbn", "--dropout", "0.1"],
    "mlp": ["--hidden", "20,20,20,20,20", "--norm", "tdbn"],
    "resnet": ["--depth", "1", "--norm", "tdbn"],
    "rsnn": ["--data", "spike-times", "--hidden", "12", "--neuron", "lif"],
}


@pytest.mark.parametrize("model", MODEL_OPTIONS)
def test_every_model_is_trained_told_about_and_analysed(model: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x.pt"
    small = ["--channels", "3", "--subset", "60", "--batch-size", "20", "--epochs", "2", "--save-at-loss", "9"]
    options = ["--model", model, *MODEL_OPTIONS[model], *small, "--init", "kaiming", "--out", str(out)]
    assert cli.run(["train", *options]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.loss9.pt", "x.pt", "x.train.json", "x.train.jsonl"]
    assert cli.run(["info", str(out)]) == 0
    assert f"\n{model}, " in capsys.readouterr().out
    few = ["--top", "2", "--smallest", "1", "--samples", "20", "--no-density", "--operator", "ggn"]
    assert cli.run(["spectrum", str(tmp_path / "x.loss9.pt"), *few]) == 0
    assert (tmp_path / "x.loss9.spectrum.json").exists()


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
