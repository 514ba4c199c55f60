"""Tests of studies on networks of the user's own, with the user's own training function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_tools import Capture, fails

import cli
from hessian_tools.results.spectrum import load_spectrum
from ikun.initializers.catalog import initialize_module

NETS = """
import snntorch as snn
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 6), snn.RLeaky(beta=0.8, linear_features=6)
        self.out, self.end = nn.Linear(6, 3), snn.Leaky(beta=0.8)

    def forward(self, x):
        (spikes, mem), end = self.lif.init_rleaky(), self.end.init_leaky()
        outputs = []
        for _ in range(3):
            spikes, mem = self.lif(self.fc(x), spikes, mem)
            out, end = self.end(self.out(spikes), end)
            outputs.append(end)
        return torch.stack(outputs).mean(0)

def samples():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)

def train(net, *, lr, epochs, seed, report, path):
    print("their text")
    assert path.name == f"{path.stem}.pt" and seed == int(path.stem[-1])
    x, y = samples()
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        report(loss=loss, test_accuracy=0.5)
    return net.state_dict()
"""
STUDY = """
title = "Mine"
by = "init"
seeds = 1
figures = ["start"]
[own]
model = "nets.py:Net"
data = "nets.py:samples"
train = "nets.py:train"
loss = "ce"
[train]
epochs = 2
lr = 0.0
snapshots = 2
save-at-loss = [1000]
[vary]
init = ["ikun", "as_built"]
[[spectrum]]
operator = ["hessian"]
top = 1
smallest = 0
density = false
samples = 8
"""


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    Path("mine.toml").write_text(STUDY)


def study(*more: str) -> list[str]:
    return ["study", "mine.toml", "--jobs", "1", *more]


def test_a_study_trains_by_the_users_function_from_our_initializers(capsys: Capture) -> None:
    assert cli.run(study()) == 0
    said = capsys.readouterr()
    assert "their text" in said.err
    assert "their text" not in said.out
    scope: dict[str, Any] = {}
    exec(NETS, scope)
    x, _ = scope["samples"]()
    for init in ("ikun", "as_built"):
        runs = Path("study-mine/runs")
        weights = torch.load(runs / f"{init}-s0.pt")["state_dict"]
        torch.manual_seed(0)
        net = scope["Net"]()
        if init != "as_built":
            initialize_module(net, init, generator=torch.Generator().manual_seed(0), x=x, alpha=0.1)
        assert all(torch.equal(weights[name], t) for name, t in net.state_dict().items())  # lr is 0
        described = json.loads((runs / f"{init}-s0.train.json").read_text())
        assert (described["finished"], described["epochs_run"], described["training"]["lr"]) == (True, 2, 0.0)
        assert [layer["name"] for layer in described["start"]["layers"]] == ["lif", "end"]
        log = [json.loads(line) for line in (runs / f"{init}-s0.train.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in log] == [1, 2]
        saved = {p.name.removeprefix(f"{init}-s0.") for p in runs.glob(f"{init}-s0.*pt")}
        assert saved == {"pt", "loss1000.pt", "epoch0001.pt", "epoch0002.pt"}
        assert load_spectrum(runs / f"{init}-s0.spectrum.json").loss > 0
    assert Path("study-mine/figures/start.png").exists()
    assert cli.run(study()) == 0
    assert "2 done" in capsys.readouterr().out
    Path("nets.py").write_text(NETS + "# edited")
    fails(capsys, 2, "had another code", *study())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("lr, epochs", "epochs"), "run ikun-s0: train nets.py:train: got an unexpected keyword argument 'lr'"),
        (("return torch.stack(outputs)", "return undefined"), "name 'undefined' is not defined (nets.py, line"),
        (("return net.state_dict()", "return 3"), "train nets.py:train: returned a int: return nothing, the network,"),
        (("optimizer.step()", "optimizer.stop()"), "'SGD' object has no attribute 'stop' (nets.py, line"),
    ],
)  # fmt: skip
def test_mistakes_in_the_users_code_are_named_in_one_line(change: tuple[str, str], line: str, capsys: Capture) -> None:
    Path("nets.py").write_text(NETS.replace(*change))
    command = study("--set", "spectrum=false", "--set", "save-at-loss=[]")
    assert cli.run(command) in (1, 2)
    said = capsys.readouterr()
    assert line in said.err + said.out
    assert "Traceback" not in said.err + said.out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["own.timestep=4"], "[own] has no option 'timestep': did you mean 'timesteps'?"),
        (["init=xaver"], "init: no 'xaver': did you mean 'xavier'?"),
        (["spectrum.samples=99"], "--samples 99: give a number from 1 to 24"),
        (["spectrum.split=test"], "[spectrum] split: the samples are those of [own] data"),
        (["spectrum.top=9999"], "[spectrum] 9999 eigenvalues are more than the 93 parameters"),
        (["own.model=nets.py:Not"], "nets.py has no 'Not' (Net?)"),
    ],
)
def test_presets_that_do_not_fit_are_refused_before_training(changes: list[str], line: str, capsys: Capture) -> None:
    fails(capsys, 2, line, *study("--dry-run", *(part for change in changes for part in ("--set", change))))
