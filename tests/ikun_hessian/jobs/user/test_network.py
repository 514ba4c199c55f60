"""Tests of networks of other libraries on the command line: their spectra, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyhessian
import pytest
import torch
import torch.nn.functional as F
from command_tools import SHIPPED, Capture, fails
from torch import Tensor, nn

import cli
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from hessian_tools.results.spectrum import SpectrumResult, load_spectrum
from ikun.adapters import adapt
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.smoothed_operator import smoothed
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.open import open_job

QUICK = [
    "--full",
    "--top",
    "2",
    "--smallest",
    "1",
    "--no-density",
    "--dtype",
    "float64",
    "--tol",
    "1e-7",
    "--batch-size",
    "16",
]
IMAGES = """
    import torch
    from torch import nn

    def images():
        generator = torch.Generator().manual_seed(0)
        return torch.rand(20, 1, 8, 8, generator=generator), torch.randint(0, 10, (20,), generator=generator)
"""
PLAIN = """
    import torch
    from torch import nn

    def mlp():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))

    def cnn():
        layers = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout()
        return nn.Sequential(*layers, nn.Linear(3, 3))

    def samples():
        generator = torch.Generator().manual_seed(0)
        return torch.rand(24, 1, 3, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)
"""
SPIKING = """
    import torch
    from torch import nn

    class Box(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            return (v >= 0).to(v.dtype)

        @staticmethod
        def backward(ctx, g):
            (v,) = ctx.saved_tensors
            return g / (1 + (3.14159 * v.detach()) ** 2)

    class Neuron(nn.Module):
        def __init__(self):
            super().__init__()
            self.surrogate_function = Box.apply
            self.v = 0.0

        def forward(self, x):
            self.v = self.v + x
            s = self.surrogate_function(self.v - 1)
            self.v = self.v * (1 - s)
            return s

    def build():
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), Neuron(), nn.Linear(6, 3), Neuron())
        with torch.no_grad():
            for layer in (net[1], net[3]):
                layer.weight.abs_()
        return net

    def clear(net):
        for module in net.modules():
            if hasattr(module, "v"):
                module.v = 0.0

    def samples():
        generator = torch.Generator().manual_seed(0)
        return torch.rand(24, 1, 3, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)
"""


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their functions are in nets.py (a path: modules of that name are cached from test to test)."""
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "nets.py") -> dict[str, Any]:
    """The file of the user's functions, and what is in it."""
    Path(name).write_text(textwrap.dedent(text))
    scope: dict[str, Any] = {}
    exec(compile(textwrap.dedent(text), name, "exec"), scope)
    return scope


def own(model: str = "build", data: str = "samples", loss: str | None = None, *more: str) -> list[str]:
    chosen = ["--loss", loss] if loss else []
    return ["--model", f"nets.py:{model}", "--data", f"nets.py:{data}", *chosen, *more]


def analysed(*arguments: str) -> SpectrumResult:
    assert cli.run(["spectrum", "theirs.pt", *QUICK, *arguments]) == 0
    return load_spectrum("theirs.spectrum.json")


def values(result: SpectrumResult, kind: str = "hessian") -> list[float]:
    s = result.spectra[kind]
    return [p.value for p in (*s.eigenvalues, *s.smallest_eigenvalues)]


def close(found: list[float], expected: list[float]) -> None:
    assert np.abs(np.array(found) - expected).max() < 1e-5 * np.abs(expected).max()


# ---------------------------------------------------------------- spiking libraries
PAPER = (
    IMAGES
    + """
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def build():
        blocks = []
        def spiking():
            return neuron.IFNode(surrogate_function=surrogate.ATan(2.0))
        for inputs in (1, 3):
            blocks += [layer.Conv2d(inputs, 3, 3, padding=1, bias=False), layer.BatchNorm2d(3), spiking()]
            blocks += [layer.MaxPool2d(2, 2)]
        blocks += [layer.Flatten(), layer.Linear(12, 48, bias=False), spiking()]
        net = nn.Sequential(*blocks, layer.Linear(48, 10, bias=False), spiking())
        functional.set_step_mode(net, "m")
        return net
"""
)


def test_the_papers_network_has_the_spectrum_of_ours(capsys: Capture) -> None:
    """Trained for two steps in SpikingJelly, saved as its users do, opened by its names and prefixes."""
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    theirs = write(PAPER)
    torch.manual_seed(3)
    net = theirs["build"]()
    x, y = theirs["images"]()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5) if p.dim() > 1 else p.add_(0.3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        LOSSES["mse"](net(x.repeat(4, 1, 1, 1, 1)).mean(0), y).backward()
        optimizer.step()
        functional.reset_net(net)
    torch.save({"net": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 2}, "theirs.pt")
    result = analysed(*own("build", "images", None, "--timesteps", "4"))
    spec = Spec(channels=3)

    def of(described: Spec) -> Any:
        ours = Network(described)
        ours.load_state_dict(dict(zip(ours.state_dict(), net.state_dict().values(), strict=True)))
        return make_objective(ours, LOSSES["mse"], (x, y), dtype=torch.float64, batch_size=16)

    def objective(surrogate: str, ties: str = "first") -> Any:
        return of(dataclasses.replace(spec, surrogate=surrogate, ties=ties))

    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in result.settings.items()}
    steeper = {"slope x 1/2": objective("atan:1"), "slope x 2": objective("atan:4")}
    steeper["ties reversed"] = objective("atan:2", "last")
    expected = spectrum(objective("atan:2"), SpectrumSettings(**settings), variants=steeper)
    assert result.loss == pytest.approx(expected.loss, rel=1e-12)
    assert result.accuracy == expected.accuracy
    for kind in ("hessian", "ggn"):
        close(values(result, kind), values(expected, kind))
    assert list(result.sensitivity) == list(steeper)
    close(list(result.sensitivity.values()), list(expected.sensitivity.values()))
    for kind in ("relaxed", "smoothed"):
        arguments = [*own("build", "images", None, "--timesteps", "4"), "--operator", kind, "--force"]
        mine = objective("atan:2")
        settings |= {"operators": (kind,)}
        relaxed = dataclasses.replace(spec, relaxed=True)
        expected = spectrum(mine, SpectrumSettings(**settings), relaxed=of(relaxed), smoothed=smoothed)
        close(values(analysed(*arguments), kind), values(expected, kind))
    screen = " ".join(capsys.readouterr().out.split())
    assert "spikingjelly, IFNode neurons, hard reset, BatchNorm in evaluation mode" in screen
    assert "T = 4, one call for all steps, readout: mean of the spikes" in screen
    assert "ATan(alpha=2.0, spiking=True): exact" in screen
    network = result.network
    assert (network["timesteps"], network["readout"], network["norm"]) == (4, "mean", "bn")
    assert [s["kind"] for s in network["surrogates"]] == ["exact"] * 4
    assert set(result.activity) == {"2", "6", "10", "12"}
    job = opened("nets.py:build", "nets.py:images", timesteps=4, surrogate="sigmoid:4")
    assert job.provenance["network"]["surrogate"] == "sigmoid:4"
    assert job.threshold == 1.0


def spectrum_of(job: Any) -> list[float]:
    """All eigenvalues, largest first."""
    found: list[float] = torch.linalg.eigvalsh(dense(hessian(job.objective))).flip(0).tolist()
    return found


def opened(model: str, data: str, surrogate: str | None = None, **facts: Any) -> Any:
    return open_job(
        Path("theirs.pt"),
        own=Own(model, data, **facts),
        samples="all",
        split="train",
        batch_size=8,
        params="*",
        surrogate=surrogate,
        dtype="float64",
        memory=1.0,
        data_dir=None,
        device="cpu",
    )


SNN = (
    PLAIN
    + """
    import snntorch as snn

    class build(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(12, 6), snn.Leaky(beta=0.9)
            self.fc2, self.lif2 = nn.Linear(6, 3), snn.Leaky(beta=0.9)
            with torch.no_grad():
                self.fc1.weight.abs_()
                self.fc2.weight.abs_()

        def forward(self, x):
            one, two = self.lif1.init_leaky(), self.lif2.init_leaky()
            spikes, membranes = [], []
            for _ in range(5):
                s, one = self.lif1(self.fc1(x.flatten(1)), one)
                s, two = self.lif2(self.fc2(s), two)
                spikes.append(s)
                membranes.append(two)
            return torch.stack(spikes), torch.stack(membranes)
"""
)
NORSE = (
    PLAIN
    + """
    import norse.torch as norse

    def build():
        p = norse.LIFParameters()
        net = norse.SequentialState(nn.Flatten(), nn.Linear(12, 6), norse.LIFCell(p), nn.Linear(6, 3), norse.LIFCell(p))
        with torch.no_grad():
            for layer in (net[1], net[3]):
                layer.weight.abs_().mul_(30)
        return net
"""
)


@pytest.mark.parametrize(
    ("library", "text", "steps", "more"),
    [("snntorch", SNN, None, {"output": "membrane", "readout": "max"}), ("norse", NORSE, 6, {})],
)
def test_networks_of_other_libraries_are_analysed_end_to_end(
    library: str, text: str, steps: int | None, more: dict[str, Any]
) -> None:
    """Against the dense Hessian of what `adapt` makes (which its own tests hold against the equations)."""
    pytest.importorskip("snntorch" if library == "snntorch" else "norse.torch")
    theirs = write(text)
    torch.manual_seed(0)
    net = theirs["build"]()
    torch.save({"model_state_dict": net.state_dict()}, "theirs.pt")
    job = opened("nets.py:build", "nets.py:samples", loss="ce", timesteps=steps, **more)
    x, y = theirs["samples"]()
    adapted = adapt(net, x, steps=steps, **more)
    objective = make_objective(adapted.model, F.cross_entropy, (x, y), dtype=torch.float64, reset=adapted.reset)
    exact = torch.linalg.eigvalsh(dense(hessian(objective))).flip(0).tolist()
    assert abs(exact[0]) > 1e-6
    close(spectrum_of(job), exact)
    network = job.provenance["network"]
    assert (network["library"], network["timesteps"]) == (library, steps or 5)
    assert network["readout"] == more.get("readout", "mean")
    assert [activity["firing_rate"] > 0 for activity in job.provenance["activity"].values()] == [True, True]


def test_a_nir_file_needs_options_for_what_it_lacks(capsys: Capture) -> None:
    nir = pytest.importorskip("nir")
    rng = np.random.default_rng(0)
    w1, w2 = (np.abs(rng.standard_normal(s)).astype(np.float32) for s in ((6, 12), (3, 6)))

    def lif(n: int) -> Any:
        tau, one, zero = np.full(n, 0.002), np.ones(n), np.zeros(n)
        return nir.LIF(tau=tau, r=one, v_leak=zero, v_threshold=one)

    flat = nir.Flatten({"input": np.array([1, 3, 4])}, 0, -1)
    nodes: dict[str, Any] = {"input": nir.Input({"input": np.array([1, 3, 4])}), "flat": flat}
    nodes |= {"fc1": nir.Linear(w1 / 4), "lif1": lif(6), "fc2": nir.Linear(w2), "lif2": lif(3)}
    nodes["output"] = nir.Output({"output": np.array([3])})
    names = list(nodes)
    nir.write("theirs.nir", nir.NIRGraph(nodes, list(itertools.pairwise(names))))
    theirs = write(PLAIN)
    data = ["--data", "nets.py:samples", "--timesteps", "4"]
    fails(
        capsys,
        2,
        "does not define time steps: give --timesteps, --dt, --surrogate and --reset",
        "spectrum",
        "theirs.nir",
        *data[:2],
    )
    message = "does not define dt, spike, reset: give --dt, --surrogate NAME:P, --reset"
    fails(capsys, 2, message, "spectrum", "theirs.nir", *data)
    facts = [*data, "--dt", "0.001", "--reset", "hard", "--surrogate", "atan:2"]
    fails(capsys, 2, "leave out --model", "spectrum", "theirs.nir", *facts, "--model", "nets.py:mlp")
    assert cli.run(["spectrum", "theirs.nir", *facts, *QUICK]) == 0
    result = load_spectrum("theirs.spectrum.json")
    ours = Network(Spec("mlp", input_shape=(1, 3, 4), hidden=(6,), classes=3, norm="none", neuron="lif"))
    for p, w in zip(ours.parameters(), (w1 / 4, w2), strict=True):
        p.data.copy_(torch.from_numpy(w))
    expected = make_objective(ours, LOSSES["mse"], theirs["samples"](), dtype=torch.float64)
    exact = torch.linalg.eigvalsh(dense(hessian(expected))).flip(0).tolist()
    close(values(result), [*exact[:2], exact[-1]])
    n = result.network
    assert (n["reset"], n["surrogate"], n["neuron"], n["dt"]) == ("hard", "atan:2", "LIF", 0.001)
    assert set(result.sensitivity) == {"slope x 1/2", "slope x 2"}


# ---------------------------------------------------------------- plain torch
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_plain_networks_agree_with_curvlinops_and_pyhessian(name: str) -> None:
    theirs = write(PLAIN)
    torch.manual_seed(0)
    net = theirs[name]()
    torch.save({f"_orig_mod.{k}": v for k, v in net.state_dict().items()}, "theirs.pt")
    found = spectrum_of(opened(f"nets.py:{name}", "nets.py:samples", loss="ce"))
    x, y = theirs["samples"]()
    net = net.double().eval()
    parameters = dict(net.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])

    def loss(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in parameters.values()])
        named = {k: v.view_as(p) for (k, p), v in zip(parameters.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, named, x.double()), y)

    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).flip(0).tolist()
    close(found, exact)
    whole = pyhessian.hessian(net, nn.CrossEntropyLoss(), data=(x.double(), y), cuda=False)
    torch.manual_seed(0)
    assert found[0] == pytest.approx(whole.eigenvalues(maxIter=2000, tol=1e-12)[0][0], rel=1e-5)
    curvlinops = pytest.importorskip("curvlinops")
    args = net, nn.CrossEntropyLoss(), list(net.parameters()), [(x.double(), y)]
    matrix = curvlinops.HessianLinearOperator(*args) @ torch.eye(len(flat), dtype=torch.float64)
    close(found, np.linalg.eigvalsh(matrix.numpy())[::-1].tolist())


LOSSES_TEXT = (
    PLAIN
    + """
    import torch.nn.functional as F

    def smooth(outputs, targets):
        return F.cross_entropy(outputs, targets, label_smoothing=0.1)

    def summed(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")

    def each(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none")

    def number(outputs, targets):
        return 1.0

    def detached(outputs, targets):
        return F.cross_entropy(outputs.detach(), targets)

    def broken(outputs, targets):
        return outputs @ targets

    def single(outputs, targets):
        return F.cross_entropy(outputs, targets, weight=torch.ones(4))

    def endless(outputs, targets):
        return outputs.sum() / 0
"""
)


def test_a_user_loss_is_used(capsys: Capture) -> None:
    theirs = write(LOSSES_TEXT)
    torch.manual_seed(0)
    net = theirs["mlp"]()
    torch.save(net.state_dict(), "theirs.pt")
    job = opened("nets.py:mlp", "nets.py:samples", loss="nets.py:smooth")
    x, y = theirs["samples"]()
    expected = F.cross_entropy(net.double()(x.double()), y, label_smoothing=0.1)
    assert job.objective.value_and_gradient()[0] == pytest.approx(float(expected), rel=1e-12)
    assert job.provenance["data"]["loss"] == "nets.py:smooth"
    for loss, message in {
        "summed": "not a mean over samples",
        "each": "the loss returns a Tensor of shape [8]: it must return a tensor with one number",
        "number": "the loss returns a float: it must return a tensor with one number",
        "detached": "torch finds no gradient with respect to the outputs",
        "broken": "nets.py, line 34)",
        "single": "in double precision: RuntimeError: weight tensor should be defined",
        "endless": "returned ",
    }.items():
        fails(capsys, 2, message, "spectrum", "theirs.pt", *own("mlp", "samples", f"nets.py:{loss}"))
    fails(capsys, 2, "give mse, ce, tet, or module:function", "spectrum", "theirs.pt", *own("mlp", "samples", "bce"))


# ---------------------------------------------------------------- their data
DATA_TEXT = (
    PLAIN
    + """
    import numpy as np
    import random
    from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

    def arrays():
        x, y = samples()
        return x.numpy(), y.int().numpy()

    def dataset():
        return TensorDataset(*samples())

    def loader():
        return DataLoader(dataset(), batch_size=5)

    def generator():
        x, y = samples()
        for i in range(0, 24, 7):
            yield x[i : i + 7], y[i : i + 7]

    class Singles(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, i):
            x, y = samples()
            return x[i], int(y[i])

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(*samples()))

    def shuffled():
        order = np.random.permutation(24), torch.randperm(24)
        random.random()
        return DataLoader(dataset(), batch_size=5, shuffle=True)

    def forever():
        while True:
            yield samples()

    def nothing():
        return None

    def one():
        return samples()[0]

    def table():
        return {"x": 1}

    def empty():
        return []

    def odd():
        return [samples()[0]]

    def triples():
        yield (*samples(), 1)

    def ragged():
        return samples()[0], samples()[1][:5]

    def mixed():
        x, y = samples()
        yield x, y
        yield x[:, :, :2], y

    def regression():
        return samples()[0], torch.rand(24)

    def beyond():
        return samples()[0], samples()[1] + 1

    def negative():
        return samples()[0], samples()[1] - 1

    def infinite():
        return samples()[0] / 0, samples()[1]

    def images():
        return torch.rand(24, 5), samples()[1]

    def raises():
        x = {}
        return x["train"]
"""
)


@pytest.fixture
def plain() -> dict[str, Any]:
    theirs = write(DATA_TEXT)
    torch.manual_seed(0)
    torch.save(theirs["mlp"]().state_dict(), "theirs.pt")
    return theirs


@pytest.mark.parametrize("name", ["arrays", "dataset", "loader", "generator", "Singles", "Stream"])
def test_samples_in_any_form_give_the_same_result(plain: dict[str, Any], name: str) -> None:
    plainly = opened("nets.py:mlp", "nets.py:samples", loss="ce")
    job = opened("nets.py:mlp", f"nets.py:{name}", loss="ce")
    assert job.objective.value_and_gradient()[0] == plainly.objective.value_and_gradient()[0]
    if name != "arrays":  # whose labels are of another kind
        assert job.provenance["data"]["sha256"] == plainly.provenance["data"]["sha256"]


def test_shuffled_samples_are_the_same_every_time(plain: dict[str, Any]) -> None:
    first, second = (opened("nets.py:mlp", "nets.py:shuffled").provenance["data"]["sha256"] for _ in range(2))
    assert first == second != opened("nets.py:mlp", "nets.py:samples").provenance["data"]["sha256"]


def test_data_that_cannot_be_used_are_refused(plain: dict[str, Any], capsys: Capture) -> None:
    for name, message in {
        "nothing": "returned a NoneType, but (inputs, targets), a data set of such samples, or batches of them",
        "one": "returned Tensor [24, 1, 3, 4] of float32",
        "table": "returned a dict",
        "empty": "returned no samples",
        "odd": "batch 1 is Tensor [24, 1, 3, 4] of float32, but (inputs [N, ...], targets [N, ...]), or a dict with",
        "triples": "batch 1 is a tuple of 3",
        "ragged": "has inputs [24, 1, 3, 4] and targets [5]",
        "mixed": "inputs have shapes [1, 3, 4] float32 and [1, 2, 4] float32",
        "regression": "--loss mse needs labels [N] of whole numbers, not Tensor [24] of float32",
        "beyond": "labels must be from 0 to 2 for 3 outputs, but some are 3",
        "negative": "labels must be from 0 to 2 for 3 outputs, but some are -1",
        "infinite": "NaN or infinite values",
        "images": "the network fails on inputs of shape [3, 5]",
        "raises": "--data nets.py:raises: KeyError: 'train' (nets.py, line 99)",
        "missing": "nets.py has no 'missing'",
    }.items():
        fails(capsys, 2, message, "spectrum", "theirs.pt", *own("mlp", name))
    forever = own("mlp", "forever", None, "--memory", "0.0001")
    fails(capsys, 2, "of samples: give --samples, or more --memory", "spectrum", "theirs.pt", *forever)
    fails(
        capsys,
        2,
        "--samples 25: give a number from 1 to 24, or all",
        "spectrum",
        "theirs.pt",
        *own("mlp"),
        "--samples",
        "25",
    )
    fails(capsys, 2, "--samples 0: give a number, or all", "spectrum", "theirs.pt", *own("mlp"), "--samples", "0")
    fails(capsys, 2, "--data module:function is needed", "spectrum", "theirs.pt", "--model", "nets.py:mlp")
    fails(
        capsys,
        2,
        "--split and --data-dir are for checkpoints of ikun-hessian: use --data",
        "spectrum",
        "theirs.pt",
        *own("mlp"),
        "--split",
        "test",
    )


# ---------------------------------------------------------------- their models
MODELS_TEXT = (
    PLAIN
    + """
    class OwnError(Exception):
        pass

    def raises():
        raise OwnError("no weights\\nhere")

    def leaves():
        raise SystemExit(3)

    def number():
        return 5

    def wants(x):
        return x

    def other():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))

    class Fails(nn.Sequential):
        def forward(self, x):
            raise OwnError("inside")

    class Wrong(nn.Sequential):
        def forward(self, x):
            return x.no_such_thing()

    def fails():
        return Fails(*mlp())

    def wrong():
        return Wrong(*mlp())

    constant = 3
"""
)


def test_models_that_cannot_be_used_are_refused(capsys: Capture) -> None:
    theirs = write(MODELS_TEXT)
    torch.save(theirs["mlp"]().state_dict(), "theirs.pt")
    Path("breaks.py").write_text("x = 1\ny = nothing\n")
    Path("wants.py").write_text("import no_such_module\n")
    Path("syntax.py").write_text("x = (\n")
    for model, message in {
        "nets.py:raises": "--model nets.py:raises: OwnError: no weights here (nets.py, line 20)",
        "nets.py:leaves": "SystemExit: 3",
        "nets.py:number": "returned a int, but a torch.nn.Module is needed",
        "nets.py:wants": "TypeError: wants() missing 1 required positional argument: 'x'",
        "nets.py:other": "other shapes: 1.weight [6, 12] for [5, 12], 1.bias [6] for [5], 3.weight [3, 6] for [3, 5]",
        "nets.py:fails": "OwnError: inside (nets.py, line 36)",
        "nets.py:wrong": "'Tensor' object has no attribute 'no_such_thing' (nets.py, line 40)",
        "nets.py:constant": "'constant' is a int, not a function",
        "nets.py:mpl": "nets.py has no 'mpl' (mlp?)",
        "nets.py": "give module:function, or path/to/file.py:function",
        "nets:": "give module:function, or path/to/file.py:function",
        "gone.py:build": "gone.py: no such file",
        "no_such_module_here:build": "no module 'no_such_module_here' in",
        "json.no_such:build": "no module 'json.no_such' in",
        "breaks.py:build": "NameError: name 'nothing' is not defined (breaks.py, line 2)",
        "wants.py:build": "ModuleNotFoundError: No module named 'no_such_module' (wants.py, line 1)",
        "syntax.py:build": "(syntax.py, line 1)",
    }.items():
        data = ["--data", "nets.py:samples"]
        fails(capsys, 2, message, "spectrum", "theirs.pt", "--model", model, *data)


def test_the_working_directory_is_importable_and_standard_output_stays_clean(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    theirs = write(
        PLAIN
        + """
    print("this goes to standard error")
""",
        f"nets_{id(capsys)}.py",
    )
    torch.save(theirs["mlp"]().state_dict(), "theirs.pt")
    module = f"nets_{id(capsys)}"
    capsys.readouterr()
    names = ["--model", f"{module}:mlp", "--data", f"{module}:samples", "--loss", "ce"]
    assert cli.run(["spectrum", "theirs.pt", *names, *QUICK, "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["network"]["model"] == f"{module}:mlp"
    assert (result["network"]["library"], result["network"]["surrogate"], result["sensitivity"]) == ("none", None, {})
    assert not any("2-jet" in text for text in result["warnings"])
    assert "this goes to standard error" in said.err


def test_files_and_options_that_do_not_fit_are_refused(plain: dict[str, Any], capsys: Capture) -> None:
    fails(capsys, 2, "for a network of your own give --model module:function", "spectrum", "theirs.pt")
    shipped = str(SHIPPED / "digits-csnn-ikun.pt")
    fails(capsys, 2, "--timesteps: only for networks of your own", "spectrum", shipped, "--timesteps", "4")
    fails(capsys, 2, "--time-first and --batch-first: only for", "flatness", shipped, "--batch-first")
    fails(capsys, 2, "--dt is only for .nir files", "landscape", "theirs.pt", *own("mlp"), "--dt", "1")
    fails(
        capsys, 2, "has no surrogate that can be replaced", "spectrum", "theirs.pt", *own("mlp"), "--surrogate", "atan"
    )
    fails(capsys, 2, "--sequences needs --timesteps", "spectrum", "theirs.pt", *own("mlp"), "--sequences")
    relaxed = ["--operator", "relaxed"]
    fails(
        capsys,
        2,
        "the network has no relaxed form: it has no spiking neurons of a library",
        "spectrum",
        "theirs.pt",
        *own("mlp"),
        *relaxed,
    )
    smoothed_only = ["--operator", "smoothed"]
    fails(
        capsys,
        2,
        "operator smoothed needs a network with spiking",
        "spectrum",
        "theirs.pt",
        *own("mlp"),
        *smoothed_only,
    )
    fails(capsys, 2, "the network has no spiking neurons", "info", "theirs.pt", *own("mlp"))
    fails(capsys, 2, "missing.pt: no such file", "spectrum", "missing.pt", *own("mlp"))
    torch.save({"net": {"1.weigth": torch.ones(6, 12)}}, "named.pt")
    fails(capsys, 2, "missing 1.weight (1.weigth?), 1.bias", "spectrum", "named.pt", *own("mlp"))


def test_an_opaque_surrogate_is_refused_and_replaced(capsys: Capture) -> None:
    theirs = write(SPIKING)
    torch.manual_seed(0)
    net = theirs["build"]()
    torch.save(net.state_dict(), "theirs.pt")
    spiking = own("build", "samples", None, "--timesteps", "4")
    message = "surrogate Box ('2.surrogate_function'): its derivative is cut off from the graph"
    fails(capsys, 2, message, "spectrum", "theirs.pt", *spiking)
    fails(capsys, 2, "give --replace-surrogate NAME:P", "spectrum", "theirs.pt", *spiking)
    replaced = [*spiking, "--replace-surrogate", "atan:2"]
    fails(capsys, 2, "(give --reset, a function of the model", "spectrum", "theirs.pt", *replaced)
    replaced += ["--reset", "nets.py:clear"]
    fails(capsys, 2, "unknown surrogate 'arctan'", "spectrum", "theirs.pt", *spiking, "--replace-surrogate", "arctan")
    both = [*replaced, "--surrogate", "atan"]
    fails(capsys, 2, "leave out --replace-surrogate", "spectrum", "theirs.pt", *both)
    result = analysed(*replaced)
    x, _ = theirs["samples"]()
    n = result.network
    assert (n["surrogate"], n["trained_surrogate"], n["replacement"]) == ("atan:2", "Box", "atan:2")
    assert [(s["kind"], s["replaced"]) for s in n["surrogates"]] == [("opaque", True)] * 2
    assert "replaced by atan:2" in " ".join(capsys.readouterr().out.split())
    adapted = _with_atan(theirs, net, x)
    exact = torch.linalg.eigvalsh(adapted).flip(0).tolist()
    close(values(result), [*exact[:2], exact[-1]])
    fails(
        capsys,
        2,
        "made with surrogate atan:2; now tanh:2",
        "spectrum",
        "theirs.pt",
        *QUICK,
        *spiking,
        *_reset("tanh:2"),
    )


def _reset(surrogate: str) -> list[str]:
    return ["--reset", "nets.py:clear", "--replace-surrogate", surrogate, "--resume"]


def _with_atan(theirs: dict[str, Any], net: nn.Module, x: Tensor) -> Tensor:
    """The dense Hessian with the arctangent's 2-jet written out, every step of time by hand."""
    from ikun.surrogates import Surrogate, spike

    net = net.double()
    y = theirs["samples"]()[1]
    parameters = dict(net.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def loss(w: Tensor) -> Tensor:
        w1, b1, w2, b2 = (v.view_as(p) for v, p in zip(w.split(sizes), parameters.values(), strict=True))
        v1, v2, rates = torch.zeros(24, 6).double(), torch.zeros(24, 3).double(), torch.zeros(24, 3).double()
        for _ in range(4):
            v1 = v1 + x.double().flatten(1) @ w1.T + b1
            s1 = spike(v1 - 1, Surrogate.parse("atan:2"))
            v1 = v1 * (1 - s1)
            v2 = v2 + s1 @ w2.T + b2
            s2 = spike(v2 - 1, Surrogate.parse("atan:2"))
            v2 = v2 * (1 - s2)
            rates = rates + s2 / 4
        return LOSSES["mse"](rates, y)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    return torch.autograd.functional.hessian(loss, flat)


def test_flatness_calibration_and_landscape_run_on_a_user_network(capsys: Capture) -> None:
    theirs = write(SPIKING)
    torch.manual_seed(0)
    torch.save(theirs["build"]().state_dict(), "theirs.pt")
    spiking = [*own("build", "samples", None, "--timesteps", "4"), "--reset", "nets.py:clear"]
    spiking += ["--surrogate", "atan:2", "--draws", "4", "--samples", "12", "--full"]
    assert cli.run(["flatness", "theirs.pt", *spiking, "--calibrate", "--noise", "0.4"]) == 0
    screen = capsys.readouterr().out
    assert "plain torch, Neuron neurons" in screen
    assert json.loads(Path("theirs.flatness.json").read_text())["network"]["surrogate"] == "atan:2"
    found = json.loads(Path("theirs.calibration.json").read_text())["calibration"]
    assert "ggn" in found["predictions"]
    short = ["--directions", "gradient,random1", "--points", "5", "--no-planes"]
    assert cli.run(["landscape", "theirs.pt", *spiking[:-5], *short]) == 0
    drawn = json.loads(Path("theirs.landscape.json").read_text())
    assert "no relaxed form" in drawn["refused"]["relaxed network"]
    assert drawn["network"]["library"] == "none"


def test_info_shows_the_neurons_of_a_user_network(capsys: Capture) -> None:
    pytest.importorskip("spikingjelly.activation_based.functional")
    theirs = write(PAPER)
    torch.manual_seed(3)
    net = theirs["build"]()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5) if p.dim() > 1 else p.add_(0.3)
    torch.save(net.state_dict(), "theirs.pt")
    arguments = [*own("build", "images", None), "--timesteps", "4"]
    assert cli.run(["info", "theirs.pt", *arguments]) == 0
    screen = capsys.readouterr().out
    assert "spikingjelly, IFNode neurons, surrogate ATan(alpha=2.0, spiking=True)" in screen
    rows = [line.split() for line in screen.splitlines()]
    table = {row[0]: row[1:] for row in rows if row and row[0] in ("2", "6", "10", "12")}
    assert len(table) == 4
    assert table["2"][4:] == ["-", "-"]
    assert all("-" not in row for name, row in table.items() if name != "2")
    assert cli.run(["info", "theirs.pt", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["layers"]] == ["2", "6", "10", "12"]
    assert told["layers"][0]["derivative_square"] > 0
    assert told["nodes"] == {"2": "", "6": "", "10": "", "12": ""}


# ---------------------------------------------------------------- targets, events and time
TARGETS_TEXT = (
    PLAIN
    + """
    import torch.nn.functional as F

    def hot():
        x, y = samples()
        return x, F.one_hot(y, 3).float()

    def hot_int():
        x, y = samples()
        return x, F.one_hot(y, 3)

    def regression():
        x, y = samples()
        return x, x.flatten(1)[:, :3]

    def wrong():
        x, y = samples()
        return x, torch.rand(24, 2)

    def odd_rows():
        x, y = samples()
        return x, torch.rand(24, 3) * 5

    def sorted_samples():
        x, y = samples()
        return x, y.sort().values

    def flat():
        return nn.Sequential(mlp(), nn.Linear(3, 1), nn.Flatten(0))

    def numbers():
        x, y = samples()
        return x, x.flatten(1)[:, 0]

    def column():
        x, y = samples()
        return x, x.flatten(1)[:, :1]

    def weighted(outputs, targets):
        return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 1.0, 4.0]).to(outputs))

    def ignoring(outputs, targets):
        return F.cross_entropy(outputs, targets, ignore_index=2)
"""
)


def test_targets_of_the_outputs_shape_are_accepted(capsys: Capture) -> None:
    theirs = write(TARGETS_TEXT)
    torch.manual_seed(0)
    net = theirs["mlp"]()
    torch.save(net.state_dict(), "theirs.pt")

    def exact(y: Tensor, loss: Any = F.mse_loss) -> list[float]:
        model = net.double()
        parameters = list(model.parameters())
        value = loss(model(theirs["samples"]()[0].double()), y)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, create_graph=True)])
        rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat]
        matrix = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
        return torch.linalg.eigvalsh(matrix).flip(0).tolist()

    labels = spectrum_of(opened("nets.py:mlp", "nets.py:samples", loss="mse"))
    for name in ("hot", "hot_int"):
        close(spectrum_of(opened("nets.py:mlp", f"nets.py:{name}", loss="mse")), labels)
    close(labels, exact(theirs["hot"]()[1].double()))
    close(
        spectrum_of(opened("nets.py:mlp", "nets.py:regression", loss="mse")), exact(theirs["regression"]()[1].double())
    )
    close(
        spectrum_of(opened("nets.py:mlp", "nets.py:hot", loss="ce")),
        exact(theirs["samples"]()[1], F.cross_entropy),
    )
    for data, loss, message in (
        ("wrong", "mse", "targets of the outputs' shape [24, 3]"),
        ("odd_rows", "ce", "rows are probabilities"),
        ("sorted_samples", "nets.py:weighted", "the loss is not a mean over samples"),
        ("sorted_samples", "nets.py:ignoring", "the loss is not a mean over samples"),
    ):
        fails(capsys, 2, message, "spectrum", "theirs.pt", *own("mlp", data, loss))


def test_outputs_of_one_axis_have_numbers_as_targets() -> None:
    theirs = write(TARGETS_TEXT)
    torch.manual_seed(0)
    net = theirs["flat"]()
    torch.save(net.state_dict(), "theirs.pt")
    x, y = theirs["numbers"]()
    matrix = dense(hessian(make_objective(net, F.mse_loss, (x, y), dtype=torch.float64)))
    wanted = torch.linalg.eigvalsh(matrix).flip(0).tolist()
    for name in ("numbers", "column"):
        close(spectrum_of(opened("nets.py:flat", f"nets.py:{name}", loss="mse")), wanted)


PIXELS_TEXT = """
    import torch
    from torch import nn

    def pixels():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))

    def image():
        g = torch.Generator().manual_seed(0)
        return torch.randn(12, 1, 4, 5, generator=g), torch.randint(0, 3, (12, 4, 5), generator=g)

    def image_bytes():
        x, y = image()
        return x, y.to(torch.uint8)

    def image_shares():
        x, y = image()
        return x, nn.functional.one_hot(y, 3).movedim(-1, 1).float()

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, x):
            return self.out(self.words(x).tanh()).movedim(-1, 1)

    def text():
        x = torch.randint(0, 7, (10, 6), generator=torch.Generator().manual_seed(1))
        return x[:, :-1], x[:, 1:]

    def one_each():
        return image()[0], torch.arange(12) % 3

    def other_size():
        return image()[0], image()[1][:, 1:]

    def beyond():
        return image()[0], image()[1] + 1

    def no_shares():
        return image()[0], torch.rand(12, 3, 4, 5)
"""


@pytest.mark.parametrize(
    ("net", "data"), [("pixels", "image"), ("pixels", "image_bytes"), ("pixels", "image_shares"), ("Words", "text")]
)
def test_cross_entropy_takes_a_label_for_every_pixel_or_step(net: str, data: str) -> None:
    theirs = write(PIXELS_TEXT)
    torch.manual_seed(0)
    model = theirs[net]()
    torch.save(model.state_dict(), "theirs.pt")
    x, y = theirs[data]()
    x = x.double() if x.is_floating_point() else x
    y = y.double() if y.is_floating_point() else y.long()
    model = model.double()
    parameters = list(model.parameters())
    value = F.cross_entropy(model(x), y)
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat]
    wanted = torch.linalg.eigvalsh(torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])).flip(0)
    job = opened(f"nets.py:{net}", f"nets.py:{data}", loss="ce")
    assert job.objective.value_and_gradient()[0] == pytest.approx(float(value.detach()), rel=1e-6)
    close(spectrum_of(job), wanted.tolist())


def test_a_network_in_place_of_a_function_is_named(capsys: Capture) -> None:
    theirs = write(PIXELS_TEXT + "\n    made = pixels()\n")
    torch.save(theirs["pixels"]().state_dict(), "theirs.pt")
    fails(capsys, 2, "nets.py:made: it is a network: give", "spectrum", "theirs.pt", *own("made", "image", "ce"))


def test_labels_that_do_not_fit_the_pixels_are_refused(capsys: Capture) -> None:
    theirs = write(PIXELS_TEXT)
    torch.save(theirs["pixels"]().state_dict(), "theirs.pt")
    for data, loss, message in (
        ("one_each", "ce", "--loss ce needs outputs [N, K], or labels [12, 4, 5], but those of the network are [N, 3"),
        ("other_size", "ce", "--loss ce needs labels [12, 4, 5] of whole numbers, not Tensor [12, 3, 5] of int64"),
        ("beyond", "ce", "labels must be from 0 to 2 for 3 outputs, but some are 3"),
        ("no_shares", "ce", "rows are probabilities"),
        ("image", "mse", "--loss mse needs labels [N] of whole numbers, not Tensor [12, 4, 5] of int64"),
    ):
        fails(capsys, 2, message, "spectrum", "theirs.pt", *own("pixels", data, loss))


TIME_TEXT = """
    import torch
    from torch import nn
    from ikun.surrogates import Surrogate, spike

    class Spiking(nn.Module):
        def __init__(self):
            super().__init__()
            self.surrogate_function = lambda v: spike(v, Surrogate.parse("atan:2"))

        def forward(self, x):
            v, out = torch.zeros_like(x[0]), []
            for current in x:
                v = 0.5 * v + current
                s = self.surrogate_function(v - 1.0)
                v = v - s
                out.append(s)
            return torch.stack(out)

    def build():
        return nn.Sequential(nn.Linear(5, 6), Spiking(), nn.Linear(6, 3))

    def events():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 3, (12, 4, 5), generator=generator, dtype=torch.uint8), torch.arange(12) % 3

    def floats():
        x, y = events()
        return x.float(), y
"""


def test_samples_taken_for_time_and_event_inputs(capsys: Capture) -> None:
    theirs = write(TIME_TEXT)
    torch.save(theirs["build"]().state_dict(), "theirs.pt")
    time = ["--timesteps", "4", "--sequences"]
    message = "takes samples for time steps: give --time-first"
    fails(capsys, 2, message, "spectrum", "theirs.pt", *own("build", "events", "ce", *time))
    facts: dict[str, Any] = {"loss": "ce", "timesteps": 4, "sequences": True, "time_first": True}
    events, floats = (spectrum_of(opened("nets.py:build", f"nets.py:{n}", **facts)) for n in ("events", "floats"))
    close(events, floats)
