"""Losses over time, time-first batches and padded sequences, as the options of the command line say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_tools import Capture, fails
from torch import Tensor, nn

import cli
from hessian_tools.analysis.operator_spectrum.step_traces import step_forms
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from hessian_tools.results.spectrum import load_spectrum
from ikun_hessian.jobs.job import Job, Own
from ikun_hessian.jobs.open import open_job
from ikun_hessian.jobs.user.code import forget

TEXT = """
import torch
import torch.nn.functional as F
from torch import nn

from ikun.losses import time_first

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.back, self.out = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h, steps = x.new_zeros(len(x), 4), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t]) + self.back(h))
            steps.append(self.out(h))
        return torch.stack(steps)

def spiking():
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    cells = [neuron.LIFNode(surrogate_function=surrogate.ATan()) for _ in range(2)]
    net = nn.Sequential(layer.Linear(5, 6), cells[0], layer.Linear(6, 3), cells[1])
    with torch.no_grad():
        for fc in (net[0], net[2]):
            fc.weight.abs_().mul_(4)
    functional.set_step_mode(net, "m")
    return net

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 3))

def parts():
    g = torch.Generator().manual_seed(0)
    return torch.rand(10, 4, 5, generator=g), torch.randint(0, 3, (10,), generator=g)

def batches(x):
    y = parts()[1]
    return [(x[part].transpose(0, 1), y[part]) for part in torch.arange(10).split(4)]

def real():
    return batches(parts()[0])

def counts():
    return batches((parts()[0] * 3).to(torch.uint8))

def events():
    return batches(parts()[0] > 0.5)

LENGTHS = torch.tensor([4, 1, 3, 2, 4, 2, 1, 3, 4, 2])

def padded():
    x, y = parts()
    return {"x": x, "lengths": LENGTHS, "labels": y}

def padded_first():
    x, y = parts()
    mask = torch.arange(4) < LENGTHS[:, None]
    return [((x[part].transpose(0, 1), mask[part].T), y[part]) for part in torch.arange(10).split(4)]

def empty():
    x, y = parts()
    return (x, LENGTHS - 1), y

def curve():
    return parts()[0], torch.rand(10, 4, 3, generator=torch.Generator().manual_seed(1))

@time_first
def mine(outputs, labels):
    return torch.stack([F.cross_entropy(step, labels) for step in outputs]).mean()

def unmarked(outputs, labels):
    return torch.stack([F.cross_entropy(step, labels) for step in outputs]).mean()
"""


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of the user's file, whose network is saved."""
    monkeypatch.chdir(tmp_path)
    forget()
    Path("nets.py").write_text(TEXT)
    scope: dict[str, Any] = {}
    exec(compile(TEXT, "nets.py", "exec"), scope)
    torch.manual_seed(0)
    for name, build in (("Net", scope["Net"]), ("flat", scope["flat"])):
        torch.save(build().state_dict(), f"{name}.pt")
    return scope


def matrix(model: str, data: str, **options: Any) -> Tensor:
    """The Hessian of what the options open."""
    return dense(hessian(opened(model, data, **options).objective))


def opened(model: str, data: str, **options: Any) -> Job:
    return open_job(
        Path(f"{model}.pt"),
        own=Own(f"nets.py:{model}", f"nets.py:{data}", **options),
        samples="all",
        split="train",
        batch_size=4,
        params="*",
        surrogate=None,
        dtype="float64",
        memory=1.0,
        data_dir=None,
        device="cpu",
    )


def oracle(net: nn.Module, value: Callable[[Callable[..., Tensor]], Tensor]) -> Tensor:
    """The Hessian of value(forward), row by row, by a double backward of the user's own network in float64."""
    net = net.double()
    parameters = list(net.parameters())
    g = torch.autograd.grad(value(net), parameters, create_graph=True)
    flat = torch.cat([t.reshape(-1) for t in g])
    rows = [torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True) for part in flat]
    zeros = [torch.zeros_like(p) for p in parameters]
    return torch.stack(
        [torch.cat([(z if t is None else t).reshape(-1) for t, z in zip(row, zeros, strict=True)]) for row in rows]
    )


def same(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-10 * float(expected.abs().max())
    assert expected.abs().max() > 1e-4


def saved(theirs: dict[str, Any], name: str) -> nn.Module:
    net: nn.Module = theirs[name]()
    net.load_state_dict(torch.load(f"{name}.pt"))
    return net


def every_step(outputs: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy at every step of outputs [T, N, K]."""
    return torch.stack([-torch.log_softmax(o, 1)[torch.arange(len(o)), labels].mean() for o in outputs]).mean()


def tet_by_hand(outputs: Tensor, labels: Tensor, weight: float = 0.05) -> Tensor:
    return (1 - weight) * every_step(outputs, labels) + weight * ((outputs - 1) ** 2).mean()


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        ("tet", tet_by_hand),
        ("tet:0.5", lambda o, y: tet_by_hand(o, y, 0.5)),
        ("nets.py:mine", every_step),
        ("snntorch.functional:ce_rate_loss", every_step),
        ("snntorch.functional:ce_count_loss", lambda o, y: F.cross_entropy(o.sum(0), y)),
    ],
)
def test_losses_over_time(theirs: dict[str, Any], loss: str, by_hand: Callable[..., Tensor]) -> None:
    """A loss for time-first outputs says so, or is of snnTorch."""
    if loss.startswith("snntorch"):
        pytest.importorskip("snntorch")
    x, y = theirs["parts"]()
    expected = oracle(saved(theirs, "Net"), lambda f: by_hand(f(x.double()), y))
    same(matrix("Net", "parts", loss=loss, readout="none"), expected)
    same(matrix("Net", "real", loss=loss, readout="none", time_first_data=True), expected)


@pytest.mark.parametrize("options", [{"readout": "mean", "loss": "ce"}, {"readout": "none", "loss": "nets.py:mine"}])
def test_traces_per_step(theirs: dict[str, Any], options: dict[str, Any]) -> None:
    """Against the dense GGN of each step, of a network that returns [T, N, K]. The loss of a step is the same in both:
    either the loss is of one step, or it is a mean over steps."""
    x, _ = theirs["parts"]()
    net = saved(theirs, "Net").double()
    weights = list(net.parameters())

    def outputs(*new: Tensor) -> Tensor:
        named = dict(zip(dict(net.named_parameters()), new, strict=True))
        found: Tensor = torch.func.functional_call(net, named, (x.double(),))
        return found

    parts = torch.autograd.functional.jacobian(outputs, tuple(weights))
    j = torch.cat([part.flatten(3) for part in parts], 3)  # [T, N, K, P]
    p = outputs(*weights).softmax(2)
    h = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    g = torch.einsum("tnkp,tnkl,tnlq->tpq", j, h, j) / 10
    objective = opened("Net", "parts", **options).another(over_time=True)
    found = step_forms(objective, 5, torch.Generator().manual_seed(0))
    draws = torch.randint(0, 2, (5, len(g[0])), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    v = 2.0 * draws.double() - 1
    torch.testing.assert_close(found["forms"], torch.einsum("ip,tpq,iq->it", v, g, v), rtol=1e-9, atol=1e-12)


def test_a_regression_over_time(theirs: dict[str, Any]) -> None:
    x, y = theirs["curve"]()
    expected = oracle(saved(theirs, "Net"), lambda f: (f(x.double()).transpose(0, 1) - y).square().mean())
    same(matrix("Net", "curve", loss="mse", readout="none"), expected)


@pytest.mark.parametrize("data", ["real", "counts", "events"])
@pytest.mark.parametrize("readout", ["none", "mean"])
def test_time_first_frames_of_any_dtype(theirs: dict[str, Any], data: str, readout: str) -> None:
    """A SpikingJelly network on batches [T, N, ...] of real numbers, uint8 and booleans."""
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    torch.manual_seed(0)
    net = theirs["spiking"]()
    torch.save(net.state_dict(), "spiking.pt")
    frames = torch.cat([x for x, _ in theirs[data]()], 1).double()
    y = theirs["parts"]()[1]

    def value(f: Callable[..., Tensor]) -> Tensor:
        functional.reset_net(net)
        spikes = f(frames)
        assert 0.05 < spikes.mean() < 0.95
        return tet_by_hand(spikes, y) if readout == "none" else F.cross_entropy(spikes.mean(0), y)

    loss = "tet" if readout == "none" else "ce"
    options = {"timesteps": 4, "sequences": True, "time_first_data": True}
    same(matrix("spiking", data, loss=loss, readout=readout, **options), oracle(net, value))


@pytest.mark.parametrize(("data", "valid"), [("padded", "lengths"), ("padded_first", "1")])
@pytest.mark.parametrize("model", ["Net", "spiking"])
def test_padded_sequences(theirs: dict[str, Any], data: str, valid: str, model: str) -> None:
    """Every sequence by itself, without its padding."""
    x, y = theirs["parts"]()
    if model == "spiking":
        functional = pytest.importorskip("spikingjelly.activation_based.functional")
        torch.manual_seed(0)
        torch.save(theirs["spiking"]().state_dict(), "spiking.pt")
    net = saved(theirs, model)

    def value(f: Callable[..., Tensor]) -> Tensor:
        rows = []
        for i, length in enumerate(theirs["LENGTHS"].tolist()):
            part = x[i : i + 1, :length].double()
            if model == "spiking":
                functional.reset_net(net)
                part = part.transpose(0, 1)
            rows.append(f(part)[:, 0].mean(0))
        return F.cross_entropy(torch.stack(rows), y)

    options = {"timesteps": 4, "sequences": True} if model == "spiking" else {}
    first = data == "padded_first"
    same(matrix(model, data, loss="ce", valid=valid, time_first_data=first, **options), oracle(net, value))


def own(model: str, data: str, *more: str) -> list[str]:
    return ["spectrum", f"{model}.pt", "--model", f"nets.py:{model}", "--data", f"nets.py:{data}", *more]


def test_the_command_says_what_the_loss_gets(theirs: dict[str, Any], capsys: Capture) -> None:
    quick = ["--top", "1", "--smallest", "0", "--no-density", "--dtype", "float64", "--tol", "1e-9", "--full"]
    arguments = ["--loss", "tet", "--readout", "none", "--time-first-data", "--operator", "hessian"]
    assert cli.run([*own("Net", "real", *arguments), *quick]) == 0
    x, y = theirs["parts"]()
    net = saved(theirs, "Net")
    expected = oracle(net, lambda f: tet_by_hand(f(x.double()), y))
    result = load_spectrum("Net.spectrum.json")
    found = result.spectra["hessian"].eigenvalues[0].value
    assert found == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-9)
    assert result.accuracy == float((net(x.double()).mean(0).argmax(1) == y).double().mean())
    screen = " ".join(capsys.readouterr().out.split())
    assert "T = 4, run by the network itself, readout: none (the loss gets all steps) of the spikes" in screen
    assert cli.run([*own("Net", "padded", "--loss", "ce", "--valid", "lengths", "--force"), *quick]) == 0
    assert "readout: mean of the spikes, valid steps: lengths" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (
            "--loss tet needs outputs [N, T, K], but those of the network are [N, 3]: give --readout none",
            ("Net", "parts", "--loss", "tet", "--readout", "sum"),
        ),
        (
            "--readout none needs outputs over time",
            ("flat", "parts", "--readout", "none"),
        ),
        (
            "if the first axis is time, give --readout",
            ("Net", "parts"),
        ),
        (
            "--loss ce needs one output per sample: with --readout none give tet",
            ("Net", "parts", "--loss", "ce", "--readout", "none"),
        ),
        (
            "but those of the network are [N, 4, 3]: give targets of that shape",
            ("Net", "parts", "--readout", "none"),
        ),
        (
            "--loss tet:2: the weight of the square error must be from 0 to 1",
            ("Net", "parts", "--loss", "tet:2", "--readout", "none"),
        ),
        (
            "on outputs [8, 4, 3], the samples first: ValueError",
            ("Net", "parts", "--loss", "nets.py:unmarked", "--readout", "none"),
        ),
        (
            "--loss snntorch.functional:ce_rate_loss needs the outputs over time: give --readout none",
            ("Net", "parts", "--loss", "snntorch.functional:ce_rate_loss", "--readout", "sum"),
        ),
        (
            "--valid mask is not a tensor of the inputs, which are x, lengths",
            ("Net", "padded", "--valid", "mask"),
        ),
        (
            "--valid: sample 1 has no valid step",
            ("Net", "empty", "--valid", "1"),
        ),
        (
            "--valid needs inputs that are a dict or a tuple",
            ("Net", "parts", "--valid", "1"),
        ),
        (
            "--valid selects the steps of a readout: with --readout none the loss",
            ("Net", "padded", "--valid", "lengths", "--readout", "none"),
        ),
        (
            "traces per time step need a network that returns outputs over time, [T, N, K]",
            ("flat", "parts", "--per-step"),
        ),
        (
            "traces per time step are not defined for padded sequences: leave out --valid",
            ("Net", "padded", "--valid", "lengths", "--readout", "last", "--per-step"),
        ),
        (
            "has inputs [10, 4, 5] and targets [10], but [T, N, ...] and [N] are needed",
            ("Net", "parts", "--time-first-data"),
        ),
    ],
)
def test_refusals(message: str, arguments: tuple[str, ...], capsys: Capture) -> None:
    if "snntorch" in message:
        pytest.importorskip("snntorch")
    fails(capsys, 2, message, *own(*arguments))


def test_time_first_batches_need_their_option(capsys: Capture) -> None:
    text = TEXT.replace("torch.arange(10).split(4)", "torch.arange(10).split(5)")
    Path("nets.py").write_text(text)
    message = "batch 1 has inputs [4, 5, 5] for 5 targets: if the first axis is time, give --time-first-data"
    fails(capsys, 2, message, *own("Net", "real", "--readout", "sum"))
