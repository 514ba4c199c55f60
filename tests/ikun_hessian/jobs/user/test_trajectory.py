"""Tests of --trajectory over snapshots of networks of the user's own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_tools import Capture, fails

import cli
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from ikun.adapters import adapt

NETS = """
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(4, 6), snn.RLeaky(beta=0.8, linear_features=6), nn.Linear(6, 3)

    def forward(self, x):
        spikes, mem = self.lif.init_rleaky()
        outputs = []
        for _ in range(3):
            spikes, mem = self.lif(self.fc(x), spikes, mem)
            outputs.append(self.out(spikes))
        return torch.stack(outputs).mean(0)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.spikes = layer.Conv2d(2, 2, 3, padding=1), neuron.LIFNode(tau=1.5)

    def forward(self, x):
        return x + self.spikes(self.conv(x))

def residual():
    net = nn.Sequential(layer.Conv2d(1, 2, 3), neuron.IFNode(), Block(), layer.Flatten(), layer.Linear(8, 3))
    functional.set_step_mode(net, "m")
    return net

def single():
    return nn.Sequential(nn.Linear(4, 6), neuron.IFNode(), nn.Linear(6, 3))

def flat():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(12, 4, generator=generator), torch.randint(0, 3, (12,), generator=generator)

def images():
    x, y = flat()
    return x.repeat(1, 4).view(-1, 1, 4, 4), y
"""
QUICK = ["--top", "2", "--smallest", "1", "--no-density", "--dtype", "float64", "--tol", "1e-6", "--loss", "ce"]


@pytest.mark.parametrize(
    ("model", "data", "steps"), [("Recurrent", "flat", None), ("residual", "images", 2), ("single", "flat", 3)]
)
def test_snapshots_are_drawn_in_their_order_until_the_code_changes(
    model: str, data: str, steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    scope: dict[str, Any] = {}
    exec(NETS, scope)
    torch.manual_seed(0)
    net, (x, y) = scope[model](), scope[data]()
    tops = []
    for name in ("late", "early", "middle"):  # not in the order of the alphabet
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn_like(p))
        torch.save({"state_dict": net.state_dict(), "comment": "x"}, f"{name}.pt")
        adapted = adapt(net, x, steps=steps)
        made = make_objective(adapted.model, F.cross_entropy, (x, y), dtype=torch.float64, reset=adapted.reset)
        tops.append(float(torch.linalg.eigvalsh(dense(hessian(made)))[-1]))
    torch.save(net.state_dict(), "again.pt")
    capsys.readouterr()
    command = ["spectrum", "late.pt", "early.pt", "middle.pt", "--model", f"nets.py:{model}", "--data"]
    command += [f"nets.py:{data}", *QUICK, *(["--timesteps", str(steps)] if steps else []), "--trajectory"]
    assert cli.run(command) == 0
    with Path("trajectory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["snapshot"], row["checkpoint"]) for row in rows] == [
        ("1", "late.pt"), ("2", "early.pt"), ("3", "middle.pt")
    ]  # fmt: skip
    assert [float(row["hessian.lambda_1"]) for row in rows] == pytest.approx(tops, rel=1e-5)
    assert Path("trajectory.png").exists()
    assert cli.run([*command, "--resume"]) == 0
    assert "unchanged" in capsys.readouterr().out
    if model == "single":
        torch.save({"state_dict": net.state_dict()}, "early.pt")
        fails(capsys, 2, "early.spectrum.json was made with other weights", *command, "--resume")
        Path("nets.py").write_text(NETS + "\n# edited\n")
        fails(capsys, 2, "late.spectrum.json was made with other code", *command, "--resume")
