"""Tests of networks from NIR graphs against ours, a loop in NumPy, and an export of Norse."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapted_networks import X, Y, products
from node_oracle import compare
from torch import Tensor

from hessian_tools.objective import make_objective
from ikun.adapters import AdapterError, adapt
from ikun.adapters.libraries import nir as nir_files
from ikun.adapters.libraries.nir import from_nir, read_nir
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.surrogates import Surrogate, spike

nir = pytest.importorskip("nir")

RNG = np.random.default_rng(0)
STEPS, DT = 4, 0.001


def atan(x: Tensor) -> Tensor:
    return spike(x, Surrogate.parse("atan:2"))


FACTS: dict[str, Any] = {"dt": DT, "spike": atan, "reset": "hard"}


def full(n: int, value: float) -> Any:
    return np.full(n, float(value))


def lif(n: int, **more: Any) -> Any:
    return nir.LIF(tau=full(n, 2 * DT), r=full(n, 1), v_leak=full(n, 0), v_threshold=full(n, 1), **more)


def weights(*shape: int) -> Any:
    return np.abs(RNG.standard_normal(shape)).astype(np.float32)


def graph_of(*nodes: Any, inputs: Any = (5,), outputs: Any = (3,)) -> Any:
    whole = {"input": nir.Input({"input": np.array(inputs)}), **{f"n{i}": node for i, node in enumerate(nodes)}}
    whole["output"] = nir.Output({"output": np.array(outputs)})
    names = list(whole)
    return nir.NIRGraph(whole, list(itertools.pairwise(names)))


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("kind", ["lif", "if"])
def test_neurons_agree_with_ours(kind: str, reset: str, tmp_path: Path) -> None:
    w1, w2 = (weights(8, 5), weights(3, 8)) if kind == "lif" else (weights(8, 5) / 5, weights(3, 8) / 8)

    def layer(n: int) -> Any:
        return lif(n) if kind == "lif" else nir.IF(r=full(n, 1 / DT), v_threshold=full(n, 1))

    nir.write(tmp_path / "net.nir", graph_of(nir.Linear(w1), layer(8), nir.Linear(w2), layer(3)))
    network = read_nir(tmp_path / "net.nir", **{**FACTS, "reset": reset})
    ours = Network(
        Spec(
            model="mlp",
            input_shape=(1, 1, 5),
            hidden=(8,),
            classes=3,
            norm="none",
            neuron=kind,
            reset=reset,
            timesteps=STEPS,
        )
    )
    for p, w in zip(ours.parameters(), (w1, w2), strict=True):
        p.data.copy_(torch.from_numpy(w))
    adapted = adapt(network, X, steps=STEPS, time_first=True)
    found = make_objective(adapted.model, LOSSES["mse"], (X, Y), dtype=torch.float64, reset=adapted.reset)
    expected = make_objective(ours, LOSSES["mse"], (X.view(6, 1, 1, 5), Y), dtype=torch.float64)
    assert list(found.parameters) == ["n0.weight", "n2.weight"]
    assert 0.05 < found.outputs(X.double()).mean() < 0.95
    torch.testing.assert_close(products(found), products(expected), rtol=1e-10, atol=1e-13)


def test_synapses_and_leaky_readout_agree_with_a_loop() -> None:
    n, m, w = 5, 3, weights(3, 5)
    cuba = nir.CubaLIF(
        tau_syn=full(n, 3 * DT),
        tau_mem=full(n, 4 * DT),
        r=full(n, 2),
        v_leak=full(n, 0.1),
        v_threshold=full(n, 0.3),
        v_reset=full(n, -0.2),
        w_in=full(n, 1.5),
    )
    graph = graph_of(cuba, nir.Affine(w, full(m, 0.5)), nir.LI(tau=full(m, 5 * DT), r=full(m, 1), v_leak=full(m, 0)))
    found = from_nir(graph, **FACTS)(X.expand(STEPS, -1, -1))
    x, i, v, out = X.numpy(), np.zeros((6, n)), np.full((6, n), 0.1), np.zeros((6, m))
    series = []
    for _ in range(STEPS):
        i = i + (1.5 * x - i) / 3
        v = v + (0.1 - v + 2 * i) / 4
        s = (v > 0.3).astype(float)
        v = v * (1 - s) - 0.2 * s
        out = out + (s @ w.T + 0.5 - out) / 5
        series.append(out)
    assert 0.1 < s.mean() < 0.9
    np.testing.assert_allclose(found.detach().numpy(), np.stack(series), rtol=1e-5)


def test_a_spike_needs_more_than_the_threshold() -> None:
    network = from_nir(
        graph_of(nir.IF(r=full(3, 1), v_threshold=full(3, 1)), inputs=(3,)), dt=1.0, spike=atan, reset="hard"
    )
    assert network(torch.tensor([[[0.5, 1.0, 1.5]]])).tolist() == [[[0, 0, 1]]]


def test_networks_of_images_agree_with_ours() -> None:
    kernel = RNG.standard_normal((2, 1, 3, 3)).astype(np.float32)
    convolution = nir.Conv2d((6, 6), kernel, 1, (1, 1), 1, 1, full(2, 0.1))
    pool = {"kernel_size": np.array([2, 2]), "stride": np.array([2, 2]), "padding": np.array([0, 0])}
    nodes = [convolution, nir.SumPool2d(**pool), nir.AvgPool2d(kernel_size=np.array([3, 3]), **_rest(pool))]
    flat = nir.Flatten({"input": np.array([2, 1, 1])}, 0, -1)
    graph = graph_of(*nodes, flat, inputs=(1, 6, 6), outputs=(2,))
    x = torch.rand(2, 4, 1, 6, 6)
    inner = F.conv2d(x.flatten(0, 1), torch.from_numpy(kernel), torch.full((2,), 0.1), padding=1)
    expected = F.avg_pool2d(4 * F.avg_pool2d(inner, 2), 3).flatten(1).unflatten(0, (2, 4))
    torch.testing.assert_close(from_nir(graph, dt=DT)(x), expected)


def _rest(pool: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pool.items() if name != "kernel_size"}


def test_branches_are_summed() -> None:
    w1, w2 = weights(3, 5), weights(3, 5)
    nodes = {
        "input": nir.Input({"input": np.array([5])}),
        "a.x": nir.Linear(w1),
        "b": nir.Linear(w2),
        "output": nir.Output({"output": np.array([3])}),
    }
    edges = [("input", "a.x"), ("input", "b"), ("a.x", "output"), ("b", "output")]
    network = from_nir(nir.NIRGraph(nodes, edges), dt=DT)
    torch.testing.assert_close(network(X[None])[0], X @ torch.from_numpy(w1 + w2).T)
    assert list(network.state_dict()) == ["a_x.weight", "b.weight"]


def test_an_export_of_norse_agrees_with_its_network() -> None:
    norse = pytest.importorskip("norse.torch")
    torch.manual_seed(0)
    rate = torch.tensor(500.0)
    parts = [
        torch.nn.Linear(5, 8),
        norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=rate, method="tanh", alpha=2.0)),
    ]
    theirs = norse.SequentialState(*parts)
    with torch.no_grad():
        parts[0].weight.abs_().mul_(4)
    layer, neuron = parts
    p = neuron.p
    node = nir.LIF(
        tau=full(8, 1 / float(p.tau_mem_inv)),
        r=full(8, 1),
        v_leak=full(8, float(p.v_leak)),
        v_threshold=full(8, float(p.v_th)),
        v_reset=full(8, float(p.v_reset)),
    )
    graph = graph_of(nir.Affine(layer.weight.detach().numpy(), layer.bias.detach().numpy()), node, outputs=(8,))
    mine = from_nir(graph, dt=DT, spike=lambda x: spike(x, Surrogate.parse("tanh:2")), reset="hard")
    pair = adapt(theirs, X, steps=STEPS), adapt(mine, X, steps=STEPS, time_first=True)
    y = torch.randint(0, 8, (6,), generator=torch.Generator().manual_seed(0))
    one, other = (
        products(make_objective(a.model, LOSSES["mse"], (X, y), dtype=torch.float64, reset=a.reset)) for a in pair
    )
    assert one.norm() > 0
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, r"a NIR graph does not define dt, spike, reset: give dt=, spike=, reset="),
        ({"dt": DT, "spike": atan}, r"does not define reset: give reset="),
        ({**FACTS, "dt": -1.0}, "dt=-1.0 is not positive"),
        ({**FACTS, "reset": "none"}, "reset='none' is not one of hard, soft"),
    ],
)
def test_missing_facts_of_a_graph_are_asked_for(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        from_nir(graph_of(nir.Linear(weights(3, 5)), lif(3)), **facts)


def test_recurrent_connections_read_the_step_before() -> None:
    """Two layers with recurrent weights of their own, and feedback from the second to the first."""
    w = {name: weights(4, 4 if name != "in" else 5) for name in ("in", "self", "up", "down")}
    for name, factor in (("self", -0.3), ("down", -0.6), ("up", 0.3), ("in", 0.5)):
        w[name] *= factor
    bias = full(4, 0.2)
    nodes = {
        "input": nir.Input({"input": np.array([5])}),
        "in": nir.Linear(w["in"]),
        "a": nir.IF(r=full(4, 1), v_threshold=full(4, 1)),
        "self": nir.Affine(w["self"], bias),
        "up": nir.Linear(w["up"]),
        "b": nir.IF(r=full(4, 1), v_threshold=full(4, 1)),
        "down": nir.Linear(w["down"]),
        "output": nir.Output({"output": np.array([4])}),
    }
    edges = [
        ("input", "in"), ("in", "a"), ("a", "self"), ("self", "a"), ("a", "up"), ("up", "b"), ("b", "down"),
        ("down", "a"), ("b", "output"),
    ]  # fmt: skip
    network = from_nir(nir.NIRGraph(nodes, edges), dt=1.0, spike=atan, reset="soft")
    found = network(X.expand(STEPS, -1, -1))
    x = X.numpy()
    a = b = u = v = np.zeros((6, 4))
    series = []
    for _ in range(STEPS):
        u = u + x @ w["in"].T + a @ w["self"].T + bias + b @ w["down"].T
        a = (u > 1).astype(float)
        u = u - a
        v = v + a @ w["up"].T
        b = (v > 1).astype(float)
        v = v - b
        series.append(b)
    assert 0.05 < np.mean(series) < 0.95
    np.testing.assert_array_equal(found.detach().numpy(), np.stack(series))
    compare(network, X, torch.arange(6) % 4, time_first=True, rates=(0.01, 0.99))


def test_graphs_that_cannot_be_built_are_refused() -> None:
    nodes = {
        "input": nir.Input({"input": np.array([5])}),
        "to": nir.Linear(weights(5, 5)),
        "back": nir.Linear(weights(5, 5)),
        "output": nir.Output({"output": np.array([5])}),
    }
    edges = [("input", "to"), ("to", "back"), ("back", "to"), ("to", "output")]
    with pytest.raises(AdapterError, match="a recurrent connection without spiking neurons: "):
        from_nir(nir.NIRGraph(nodes, edges), **FACTS)
    with pytest.raises(AdapterError, match="node 'n0': Delay is not supported"):
        from_nir(graph_of(nir.Delay(full(5, 1)), outputs=(5,)), **FACTS)


def test_files_that_are_not_nir_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        read_nir(tmp_path / "none.nir", **FACTS)
    (tmp_path / "text.nir").write_text("not a graph")
    with pytest.raises(AdapterError, match=r"text.nir: not a NIR file, or a damaged one"):
        read_nir(tmp_path / "text.nir", **FACTS)


def test_reading_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nir"
    path.write_bytes(b"")
    monkeypatch.setattr(nir_files, "_READING", "while True: pass")
    with pytest.raises(ValueError, match=r"more than 0\.5 s"):
        nir_files.try_reading(path, seconds=0.5)
    monkeypatch.setattr(nir_files, "_READING", "import sys; sys.exit('it claims 9 bytes')")
    with pytest.raises(AdapterError, match=r"a\.nir: not a NIR file, or a damaged one \(it claims 9 bytes\)"):
        read_nir(path, **FACTS)
