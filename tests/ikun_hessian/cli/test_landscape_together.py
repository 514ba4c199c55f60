"""Tests of `landscape` for several networks in one figure, surfaces, and the path of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_tools import Capture, fails
from torch.nn import functional as F

import cli
from hessian_tools.io.json import load_result
from hessian_tools.results.training_path import TRAINING_PATH_SCHEMA, TrainingPath
from ikun.checkpoint import load_checkpoint
from ikun.losses import LOSSES

QUICK = ["--samples", "40", "--plane-points", "3"]
NETS = """
import torch
from torch import nn
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(30, 6, generator=g), torch.arange(30) % 3
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three snapshots of a run; the last one has the weights of a.pt."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--channels", "2", "--epochs", "3", "--snapshots", "3", "--subset", "120", "--lr", "0.01"]
    assert cli.run(["train", *options, "--out", str(folder / "a.pt")]) == 0
    return folder


def path_of(file: Path) -> TrainingPath:
    return load_result(file, TrainingPath, TRAINING_PATH_SCHEMA)


def test_several_networks_are_drawn_together(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    part = [str(trained / "a.pt"), str(trained / "b.pt"), *QUICK, "--points", "5", "--directions", "random1"]
    part += ["--plane", "random1,random2", "--out", str(tmp_path), "--tag", "x", "--surface", "--full"]
    assert cli.run(["landscape", *part]) == 0
    ends = ("landscapes.x.png", "landscapes.x.pdf", "landscapes.x.surface.png", "landscapes.x.surface.pdf")
    assert all((tmp_path / end).stat().st_size > 10_000 for end in ends)
    assert (tmp_path / "a.x.landscape.surface.png").exists()
    screen = capsys.readouterr().out
    assert f"files       {tmp_path}/landscapes.x.{{png,pdf,surface.png,surface.pdf}}" in screen
    assert "a.x.landscape.{json,png,pdf,surface.png,surface.pdf}" in screen


def test_the_path_of_a_run_has_the_losses_of_its_snapshots(run: Path, tmp_path: Path, capsys: Capture) -> None:
    names = [*sorted(run.glob("a.epoch*.pt"), reverse=True), run / "a.pt"]  # in any order
    part = ["landscape", "--trajectory", *map(str, names), *QUICK, "--out", str(tmp_path)]
    assert cli.run(part) == 0
    screen = capsys.readouterr().out
    assert not [line for line in screen.splitlines() if len(line) > 80 and not line.startswith(("files", "checkpoint"))]
    found = path_of(tmp_path / "a.trajectory.json")
    assert [s.epoch for s in found.snapshots] == [1, 2, 3]
    assert [s.name for s in found.snapshots] == ["a.epoch0001.pt", "a.epoch0002.pt", "a.pt"]
    weights = []
    for s in found.snapshots:
        opened = load_checkpoint(run / s.name)
        net = opened.build().eval()
        data = opened.samples()
        x, y = opened.inputs(data.images[:40]), data.labels[:40]
        with torch.no_grad():
            assert s.loss == pytest.approx(float(LOSSES[opened.loss](net(x), y)), rel=1e-5)
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]).double().numpy())
    w = np.stack(weights)
    _, sizes, rows = np.linalg.svd(w - w.mean(0), full_matrices=False)
    assert found.explained == pytest.approx(sizes[:2] ** 2 / (sizes**2).sum(), rel=1e-6)
    places = (w - w[-1]) @ (rows[:2] * np.sign(rows[:2] @ (w[0] - w[-1]))[:, None]).T
    assert np.array([s.position for s in found.snapshots]) == pytest.approx(places, abs=1e-6)
    assert np.shape(found.relaxed_loss) == (3, 3)
    before = (tmp_path / "a.trajectory.json").read_bytes()
    assert cli.run([*part, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before)
    assert (tmp_path / "a.trajectory.png").exists()
    assert cli.run([*part, "--resume", "--brief"]) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'a.pt'}: 3 snapshots, pc1 ")
    assert cli.run([*part, "--force", "-q", "--no-caption"]) == 0
    assert capsys.readouterr() == ("", "")
    fails(capsys, 2, "made with points 3; now 4", *part, "--plane-points", "4")
    fails(capsys, 2, "made with directions pc1, pc2; now top1, gradient", *part, "--plane", "top1,gradient")
    fails(
        capsys, 2, "at least three snapshots", *part[:2], *map(str, names[:2]), *part[-7:], "--tag", "few"
    )  # a.pt is the first


def test_the_path_of_a_users_network_keeps_the_order_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    scope: dict[str, Any] = {}
    exec(NETS, scope)
    net, (x, y) = scope["net"](), scope["data"]()
    losses = []
    for name in ("late", "early", "middle"):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn_like(p))
        torch.save(net.state_dict(), f"{name}.pt")
        losses.append(float(F.cross_entropy(net(x).detach().double(), y)))
    part = ["landscape", "late.pt", "early.pt", "middle.pt", "--trajectory", "--model", "nets.py:net"]
    part += ["--data", "nets.py:data", "--loss", "ce", "--plane-points", "3"]
    assert cli.run(part) == 0
    found = path_of(Path("middle.trajectory.json"))
    assert [(s.name, s.epoch) for s in found.snapshots] == [("late.pt", None), ("early.pt", None), ("middle.pt", None)]
    assert [s.loss for s in found.snapshots] == pytest.approx(losses, rel=1e-5)
    torch.save(net.state_dict(), "early.pt")
    fails(capsys, 2, "was made with other snapshots", *part, "--resume")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--directions", "top1"], "--directions has no meaning with --trajectory"),
        (["--range", "0.1"], "--range has no meaning with --trajectory"),
        (["--no-planes"], "--no-planes has no meaning"),
        (["--plane", "top1,top2", "--plane", "top1,gradient"], "one plane"),
        (["--plane", "pc1,top1"], "come in one pair"),
        (["--plane-points", "2"], "at least 3"),
    ],
)
def test_bad_options_of_a_path_are_refused(run: Path, capsys: Capture, options: list[str], message: str) -> None:
    fails(capsys, 2, message, "landscape", "--trajectory", str(run / "a.pt"), *options)


def test_snapshots_of_two_runs_are_refused(run: Path, trained: Path, tmp_path: Path, capsys: Capture) -> None:
    part = [str(run / "a.epoch0001.pt"), str(run / "a.epoch0002.pt"), str(trained / "b.pt")]
    fails(capsys, 2, "not one run", "landscape", "--trajectory", *part, *QUICK, "--out", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
