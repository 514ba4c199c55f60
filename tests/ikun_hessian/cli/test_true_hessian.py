"""Tests of `spectrum --operator true`: the Hessian of the smoothed loss itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_tools import KILL, ROOT, Capture, fails

import cli
import ikun_hessian as ih
from hessian_tools.results.true_hessian import load_true_hessian

QUICK = ["--operator", "true", "--samples", "24", "--draws", "1000", "--top", "2", "--smallest", "1", "--seed", "3"]
NETWORK = '''
import torch
from torch import nn

class Net(nn.Module):
    """Recurrent, float32 spikes of torch.heaviside, without a surrogate and without gradients."""
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(3, 4)
        self.back = nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, 2)

    @torch.no_grad()
    def forward(self, x):
        v = s = torch.zeros(len(x), 4)
        total = torch.zeros(len(x), 2)
        for t in range(4):
            v = 0.8 * v * (1 - s) + self.inputs(x) + self.back(s)
            if float(v.abs().max()) > 50:  # reads a value, so it cannot be traced
                v = v.clamp(-50, 50)
            s = torch.heaviside(v - 0.3, torch.zeros(()))
            total = total + self.out(s)
        return total / 4

def build():
    torch.manual_seed(1)
    return Net()

def samples():
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    return x, (x.sum(1) > 1.5).long()
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A network of the user's own that has a forward pass only, and the options that open it."""
    import torch

    (tmp_path / "heaviside_net.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    import heaviside_net

    torch.save(heaviside_net.build().state_dict(), tmp_path / "own.pt")
    options = ["--model", "heaviside_net:build", "--data", "heaviside_net:samples", "--loss", "ce"]
    return [str(tmp_path / "own.pt"), *options]


def test_true_alone_leaves_a_result_of_its_own(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["spectrum", str(analysed / "a.pt"), *QUICK, "-o", str(tmp_path), "--params", "fc2*"]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 12
    assert all(len(line) <= 80 for line in out.splitlines())
    for text in ("smoothed loss", "at noise 0.1", "lambda_max", "or more", "trace", "standard error (draws)"):
        assert text in out
    assert {p.name for p in tmp_path.iterdir()} == {f"a.true.{ending}" for ending in ("json", "png", "pdf")}
    result = load_true_hessian(tmp_path / "a.true.json")
    assert result.settings["draws"] == 1000
    assert result.seed == 3
    assert result.data["samples"] == 24
    assert result.network["surrogate"] == "atan:2"
    assert sum(result.passes.values()) <= 1000
    # kept with --resume, refused with other settings, shown in full, as JSON and in one line
    written = (tmp_path / "a.true.json").read_bytes()
    assert cli.run([*command, "--resume", "--full"]) == 0
    full = capsys.readouterr().out
    assert (tmp_path / "a.true.json").read_bytes() == written
    for text in ("(unchanged)", "no surrogate is in it", "is unbiased for its own", "95% interval", "forward passes"):
        assert text in " ".join(full.split())
    assert all(len(line) <= 80 for line in full.splitlines() if not line.startswith("files"))
    fails(capsys, 2, "was made with noise 0.1; now 0.2.", *command, "--noise", "0.2")
    assert cli.run([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "ikun-hessian/true-hessian/1"
    assert cli.run([*command, "--resume", "--brief"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    # the same numbers in Python
    report = ih.load(tmp_path / "a.true.json")
    assert isinstance(report, ih.TrueHessian)
    options = {"params": "fc2*", "draws": 1000, "top": 2, "smallest": 1, "seed": 3}
    again = ih.true_hessian(str(analysed / "a.pt"), samples=24, progress=False, **options)
    assert again.trace == report.trace
    assert again.result.eigenvalues == report.result.eigenvalues


def test_true_beside_another_operator_measures_its_eigenvectors(
    analysed: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = ["spectrum", str(analysed / "a.pt"), *QUICK, "--operator", "ggn", "-o", str(tmp_path), "--no-density"]
    assert cli.run([*command, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["schema"] == "ikun-hessian/spectrum/1"
    assert list(first["spectra"]) == ["ggn"]
    assert first["settings"]["draws"] == 8
    assert [(d["operator"], d["rank"]) for d in second["directions"]] == [("ggn", 1), ("ggn", 2)]
    assert second["settings"]["operators"] == ["ggn"]
    assert {p.name.split(".")[1] for p in tmp_path.iterdir()} == {"spectrum", "true"}
    assert cli.run([*command, "--resume", "--full"]) == 0
    assert "curvature along the eigenvectors of other operators" in capsys.readouterr().out
    # other commands leave the file alone
    assert cli.run(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 0


def test_a_network_without_any_derivative(own: list[str], tmp_path: Path, capsys: Capture) -> None:
    command = [
        "spectrum",
        *own,
        "--operator",
        "true",
        "--noise",
        "0.5",
        "--draws",
        "1500",
        "--top",
        "2",
        "--smallest",
        "1",
    ]
    assert cli.run([*command, "-o", str(tmp_path / "out")]) == 0
    result = load_true_hessian(tmp_path / "out" / "own.true.json")
    assert len(result.eigenvalues) == 2
    assert result.trace.stderr > 0
    assert result.eigenvalues[0].form.value > 0
    assert "lambda_max" in capsys.readouterr().out


def test_derivatives_are_needed_beside_another_operator(own: list[str], tmp_path: Path, capsys: Capture) -> None:
    both = ["--operator", "true", "--operator", "ggn", "-o", str(tmp_path / "both")]
    fails(capsys, 2, "the outputs depend on no parameter", "spectrum", *own, *both)


def test_a_surrogate_that_cannot_be_differentiated_twice_is_enough(tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(h)
            return (h > 0).to(h)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            return g / (1 + ctx.saved_tensors[0].abs()) ** 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(Spike.apply(self.first(x)))
            return out

    torch.manual_seed(0)
    data = torch.rand(16, 3), torch.arange(16) % 2
    with pytest.raises(ValueError):
        ih.analyze(Net(), data, "ce", progress=False)
    report = ih.true_hessian(Net(), data, "ce", noise=0.5, draws=800, top=1, smallest=0, progress=False)
    assert report.trace.stderr > 0
    assert len(report.result.eigenvalues) == 1


def test_wrong_options_are_one_line(analysed: Path, capsys: Capture) -> None:
    path = str(analysed / "a.pt")
    fails(capsys, 2, "draws must be at least 400 for operator true, not 8", "spectrum", path, *QUICK, "--draws", "8")
    fails(capsys, 2, "noise must be a positive number", "spectrum", path, *QUICK, "--noise", "0")
    fails(
        capsys,
        2,
        "--trajectory needs another operator",
        "spectrum",
        path,
        str(analysed / "b.pt"),
        *QUICK,
        "--trajectory",
    )
    fails(capsys, 2, "--time is for other operators", "spectrum", path, *QUICK, "--time", "5m")
    fails(capsys, 2, "--per-layer needs another operator", "spectrum", path, *QUICK, "--per-layer")
    fails(capsys, 2, "unknown operator tru:", "spectrum", path, "--operator", "tru")
    with pytest.raises(ValueError, match="analysis of its own"):
        ih.analyze(path, operators=("true",))


def test_a_killed_run_resumes_with_the_same_numbers(analysed: Path, tmp_path: Path) -> None:
    command = ["spectrum", str(analysed / "a.pt"), *QUICK, "--params", "fc2*"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert cli.run([*command, "-q", "-o", str(whole)]) == 0
    script = KILL.format(phase="projection", call=5, signal="SIGKILL")
    run = [sys.executable, "-c", script, *command, "-o", str(part)]
    killed = subprocess.run(run, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (part / "a.true.resume").exists()
    assert cli.run([*command, "-q", "-o", str(part), "--resume"]) == 0
    one, other = (json.loads((folder / "a.true.json").read_text()) for folder in (whole, part))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert not list(part.glob("*.resume*"))
