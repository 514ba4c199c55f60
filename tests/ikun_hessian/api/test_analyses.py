"""Tests of the Python functions: the numbers of the command line, for networks, samples and losses of any kind."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_tools import SHIPPED
from result_tools import numbers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cli
import ikun_hessian as ih
from ikun_hessian.api.spectrum import Analysis

QUICK: dict[str, Any] = {"top": 2, "smallest": 1, "trace_probes": 4, "progress": False}
NETS = """
    import torch
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    from torch import nn

    def build():
        net = nn.Sequential(layer.Linear(12, 6), neuron.IFNode(surrogate_function=surrogate.ATan()), layer.Linear(6, 3))
        functional.set_step_mode(net, "m")
        return net

    def samples():
        generator = torch.Generator().manual_seed(0)
        return torch.rand(24, 12, generator=generator), torch.randint(0, 3, (24,), generator=generator)
"""


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def samples(count: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 5, generator=generator), torch.randint(0, 3, (count,), generator=generator)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return ih.analyze(mlp(), samples(), "ce", **QUICK)


def test_both_roads_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spikingjelly")
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(textwrap.dedent(NETS))
    scope: dict[str, Any] = {}
    exec(compile(textwrap.dedent(NETS), "nets.py", "exec"), scope)
    torch.manual_seed(3)
    net = scope["build"]()
    torch.save(net.state_dict(), "net.pt")
    own = ["--model", "nets.py:build", "--data", "nets.py:samples", "--loss", "ce", "--timesteps", "3"]
    assert cli.run(["spectrum", "net.pt", *own, "--no-density", "--top", "2", "--smallest", "1"]) == 0
    here = ih.analyze(net, scope["samples"](), loss=nn.CrossEntropyLoss(), timesteps=3, top=2, smallest=1)
    here.save("here")
    theirs, ours = numbers(Path("net.spectrum.json")), numbers(Path("here.spectrum.json"))
    assert theirs["data"].pop("sha256") == ours["data"].pop("sha256")
    named = {key: (theirs.pop(key), ours.pop(key)) for key in ("checkpoint", "data", "network")}
    assert ours == theirs
    assert named["data"][1] == {"name": "tensors", "split": "", "loss": "CrossEntropyLoss", "samples": 24, "classes": 3}
    differing = {key for key, value in named["network"][0].items() if value != named["network"][1][key]}
    assert differing <= {"model", "code"}
    with pytest.raises(ValueError, match=r"the network needs the number of time steps T: give timesteps="):
        ih.analyze(net, scope["samples"](), "ce")


def test_a_checkpoint_gives_the_numbers_of_the_command_line(tmp_path: Path) -> None:
    path = SHIPPED / "digits-csnn-kaiming.pt"
    options = ["--samples", "16", "--no-density", "--top", "2", "--smallest", "0", "--operator", "ggn"]
    assert cli.run(["spectrum", str(path), *options, "--out", str(tmp_path)]) == 0
    ih.analyze(path, samples=16, top=2, smallest=0, operators="ggn").save(tmp_path / "here")
    assert numbers(tmp_path / f"{path.stem}.spectrum.json") == numbers(tmp_path / "here.spectrum.json")


def test_arrays_and_errors(analysis: Analysis) -> None:
    first = analysis.result.spectra["hessian"].eigenvalues
    h = analysis.hessian
    assert h.eigenvalues.tolist() == [e.value for e in first]
    assert h.residual.tolist() == [e.residual for e in first]
    np.testing.assert_equal(h.stderr, [e.data_stderr for e in first])
    assert h.converged.all()
    assert h.smallest[0] < 0 < h.lambda_max
    trace = analysis.result.spectra["ggn"].trace
    assert trace is not None
    assert (analysis.ggn.trace, analysis.ggn.trace_ci95) == (trace.estimate, trace.ci95)
    assert list(analysis.operators) == ["hessian", "ggn"]
    with pytest.raises(AttributeError, match=r"no attribute 'fisher'; measured: hessian, ggn"):
        analysis.fisher  # noqa: B018


def test_the_numbers_are_those_of_autograd() -> None:
    net, (x, y) = mlp().double(), samples()
    found = ih.analyze(net, (x.double(), y), F.cross_entropy, dtype="float64", tol=1e-8, **QUICK)
    net.eval()
    names = [name for name, _ in net.named_parameters()]

    def loss(*weights: Tensor) -> Tensor:
        outputs = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x.double(),))
        return F.cross_entropy(outputs, y)

    weights = tuple(net.parameters())
    blocks = torch.autograd.functional.hessian(loss, weights)
    rows = [torch.cat([b.reshape(w.numel(), -1) for b in row], 1) for w, row in zip(weights, blocks, strict=True)]
    exact = torch.linalg.eigvalsh(torch.cat(rows))
    np.testing.assert_allclose(found.hessian.eigenvalues, exact.flip(0)[:2].numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.hessian.smallest, exact[:1].numpy(), rtol=1e-5)
    assert found.loss == pytest.approx(float(loss(*weights).detach()), rel=1e-12)


def test_data_sets_and_loaders_give_the_samples(analysis: Analysis) -> None:
    x, y = samples()
    for data in (TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=7), [(x[:9], y[:9]), (x[9:], y[9:])]):
        found = ih.analyze(mlp(), data, "cross_entropy", **QUICK)
        assert found.hessian.eigenvalues.tolist() == analysis.hessian.eigenvalues.tolist()
    shuffled = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    first, second = (ih.analyze(mlp(), shuffled, "ce", samples=9, **QUICK).result.data["sha256"] for _ in range(2))
    assert first == second


def test_nothing_of_the_users_changes() -> None:
    net = mlp()
    net.train()
    F.cross_entropy(net(samples()[0]), samples()[1]).backward()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate(), torch.backends.cudnn.benchmark
    ih.analyze(net, DataLoader(TensorDataset(*samples()), shuffle=True), "ce", **QUICK)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True) if p.grad is not None)
    assert all(module.training for module in net.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_equal(np.random.get_state(), states[1])
    assert (random.getstate(), torch.backends.cudnn.benchmark) == states[2:]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, "ce"), {}, "data= is needed"),
        ((samples(), None), {}, "loss= is needed: give 'ce'"),
        ((samples(), "entropy"), {}, "loss='entropy': give 'ce'"),
        ((samples(), "ce"), {"samples": 21}, "samples=21: give a number from 1 to 20"),
        ((samples(), "ce"), {"reset": "hard"}, "reset='hard': give a function"),
        ((samples(), lambda o, y: o.sum()), {}, "not a mean over samples"),
        (((samples()[0], samples()[0]), "ce"), {}, r"loss='ce' needs labels \[N\]"),
        ((samples(), "tet"), {}, r"loss='tet' needs outputs \[N, T, K\].*give readout='none'"),
        ((samples(), "ce"), {"top": 0}, "top must be at least 1"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ih.analyze(mlp(), *arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_network_with_a_loop_of_its_own_needs_no_steps() -> None:
    snntorch = pytest.importorskip("snntorch")

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spike = nn.Linear(8, 3), snntorch.Leaky(beta=0.9)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            memory, spikes, memories = self.spike.init_leaky(), [], []
            for _ in range(4):
                spike, memory = self.spike(self.layer(x), memory)
                spikes.append(spike)
                memories.append(memory)
            return torch.stack(spikes), torch.stack(memories)

    x, y = torch.rand(12, 8), torch.arange(12) % 3
    with pytest.raises(ValueError, match=r"runs through time by itself: leave out timesteps="):
        ih.analyze(Loop(), (x, y), "ce", timesteps=5, output="membrane")


def test_an_unknown_option_and_an_unknown_model() -> None:
    with pytest.raises(TypeError, match=r"no option 'timestep': did you mean 'timesteps'\?"):
        ih.analyze(mlp(), samples(), "ce", timestep=4)
    with pytest.raises(ValueError, match=r"the model is a int, but a torch.nn.Module"):
        ih.analyze(3, samples(), "ce")


def test_other_libraries_are_recognized() -> None:
    x, y = samples()
    snntorch = pytest.importorskip("snntorch")
    net = nn.Sequential(nn.Linear(5, 6), snntorch.Leaky(0.9, init_hidden=True), nn.Linear(6, 3))
    found = ih.analyze(net, (x, y), "ce", timesteps=3, **QUICK)
    assert (found.result.network["library"], found.result.network["timesteps"]) == ("snntorch", 3)
    sequences = torch.rand(20, 4, 5)
    assert ih.analyze(net, (sequences, y), "ce", sequences=True, **QUICK).result.network["timesteps"] == 4


def test_nir_graphs() -> None:
    nir = pytest.importorskip("nir")
    torch.manual_seed(0)
    weight, ones = torch.rand(3, 5).numpy(), np.ones(3)
    graph = nir.NIRGraph.from_list(nir.Affine(weight, np.zeros(3)), nir.IF(r=ones, v_threshold=ones))
    found = ih.analyze(graph, samples(), "mse", timesteps=4, dt=1.0, surrogate="atan:2", reset="hard", **QUICK)
    assert found.result.network["timesteps"] == 4
    with pytest.raises(ValueError, match="does not define"):
        ih.analyze(graph, samples(), "mse", timesteps=4)


def test_flatness_and_landscape() -> None:
    flat = ih.flatness(mlp(), samples(), "ce", draws=4, probes=4, progress=False)
    assert flat["ggn trace"].value > 0
    lines = ih.landscape(
        mlp(), samples(), "ce", directions=("top1",), planes=(), points=5, accuracy=True, progress=False
    )
    assert lines.lines["top1"].loss[2] == pytest.approx(flat.result.loss)


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, ikun_hessian; print({'torch', 'numpy', 'scipy', 'click'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
