"""Tests of deep, residual and recurrent networks, tdBN and dropout.

Forward passes are compared with plain loops in NumPy, products with double backward and finite differences.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from objectives import plainly
from sampled import sampled
from torch import Tensor, nn

from hessian_tools.engine.linearized import Linearized
from hessian_tools.engine.product import linearize_traced
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators import curvature as operators
from ikun.layer_statistics import observe
from ikun.layers import Dropout
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

Array = npt.NDArray[np.float64]
MODELS: dict[str, dict[str, Any]] = {
    "deep csnn": {"model": "csnn", "depth": 4},
    "resnet": {"model": "resnet", "depth": 2},
    "resnet, pooled between blocks": {"model": "resnet", "depth": 2, "input_shape": (1, 16, 16)},
    "resnet of one block": {"model": "resnet", "depth": 1, "input_shape": (2, 5, 6)},
    "deep mlp": {"model": "mlp", "hidden": (7, 6, 5, 6, 7)},
    "rsnn": {"model": "rsnn", "hidden": (8, 6)},
}


def network(seed: int = 0, **fields: Any) -> Network:
    """In float64 and evaluation mode, with random weights and norms, such that every layer fires, but not always."""
    spec = Spec(**{"input_shape": (1, 8, 8), "classes": 3, "channels": 3, "timesteps": 3, "threshold": 0.6, **fields})
    for attempt in range(50):
        torch.manual_seed(50 * seed + attempt)
        net = Network(spec).double().eval()
        for m in net.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                m.weight.data.mul_(2).add_(0.1 / m.weight[0].numel() ** 0.5)
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
                m.running_var.uniform_(0.1, 0.3)  # type: ignore[union-attr, operator]
                m.weight.data.mul_(torch.rand_like(m.weight) + 0.5)
                m.bias.data.uniform_(0, 0.3)
        if all(0.02 < s.firing_rate < 0.98 for s in observe(net, *data(net), LOSSES["mse"])):
            return net
    raise AssertionError(f"no seed for {fields}")


def data(net: Network, count: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.rand(count, *net.spec.input_shape, generator=g, dtype=torch.float64)
    return x, torch.arange(count) % net.spec.classes


def job(net: Network, loss: str = "mse") -> Objective:
    return make_objective(net, LOSSES[loss], data(net))


# ---------------------------------------------------------------- forward
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["none", "bn", "tdbn"])
def test_fast_forward_has_the_same_spikes_and_gradients(name: str, norm: str) -> None:
    net = network(**MODELS[name], norm=norm, dropout=0.2)
    x, y = data(net)
    plain, fast = net(x, plain=True), net(x)
    assert torch.equal(plain, fast)
    assert plain.std() > 0
    parameters = list(net.parameters())
    for a, b in zip(
        torch.autograd.grad(LOSSES["mse"](plain, y), parameters),
        torch.autograd.grad(LOSSES["mse"](fast, y), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def fire(currents: Array, feedback: Array | None = None, threshold: float = 0.6) -> Array:
    """Spikes [T, ...] of integrate-and-fire neurons with hard reset to 0."""
    v, s, out = np.zeros_like(currents[0]), np.zeros_like(currents[0]), []
    for current in currents:
        h = v + current + (0 if feedback is None else s @ feedback.T)
        s = (h >= threshold).astype(float)
        v = h * (1 - s)
        out.append(s)
    return np.stack(out)


def conv(x: Array, w: Array) -> Array:
    """x [T, N, C, H, W]; 3 x 3 with a border of zeros."""
    padded = np.pad(x, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[-2:]
    patches = np.stack(
        [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)], 3
    )  # [T, N, C, 9, H, W]
    return np.einsum("tnckhw,ock->tnohw", patches, w.reshape(*w.shape[:2], 9))


def pool(x: Array) -> Array:
    return np.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).max(0)


def weights(net: Network) -> dict[str, Array]:
    return {name.removesuffix(".weight"): p.detach().numpy() for name, p in net.named_parameters()}


def test_resnet_adds_the_blocks_spikes_to_their_input() -> None:
    net = network(**MODELS["resnet, pooled between blocks"], norm="none")
    w, (x, _) = weights(net), data(net)
    s = pool(fire(conv(np.stack([x.numpy()] * 3), w["conv1"])))
    for i in (2, 4):
        s = s + fire(conv(fire(conv(s, w[f"conv{i}"])), w[f"conv{i + 1}"]))
        s = pool(s) if i == 2 else s
    assert s.max() > 1
    out = fire(s.reshape(*s.shape[:2], -1) @ w["fc1"].T)
    np.testing.assert_array_equal(out.mean(0), net(x).detach().numpy())


def test_a_recurrent_layer_hears_its_last_spikes() -> None:
    net = network(**MODELS["rsnn"], norm="none")
    w, (x, _) = weights(net), data(net)
    s = np.stack([x.flatten(1).numpy()] * 3)
    for i in (1, 2):
        s = fire(s @ w[f"fc{i}"].T, w[f"rec{i}"])
    out = fire(s @ w["fc3"].T)
    np.testing.assert_array_equal(out.mean(0), net(x).detach().numpy())
    net.rec1.weight.data.zero_()  # type: ignore[union-attr, operator]
    assert not np.array_equal(out.mean(0), net(x).detach().numpy())


def test_names_and_stages_follow_the_layers() -> None:
    assert [name for name, *_ in network(**MODELS["deep csnn"]).stages()] == [
        *(f"conv{i}" for i in range(1, 5)),
        "fc1",
        "fc2",
    ]
    stages = [(name, neuron) for name, _, _, neuron, _ in network(**MODELS["rsnn"]).stages()]
    assert stages == [("fc1", "spike1"), ("rec1", "spike1"), ("fc2", "spike2"), ("rec2", "spike2"), ("fc3", "spike3")]


# ---------------------------------------------------------------- tdBN and dropout
def test_tdbn_starts_at_the_threshold_and_by_sqrt_2_less_where_branches_are_added() -> None:
    net = Network(Spec(model="resnet", norm="tdbn", threshold=0.7, depth=1, channels=2))
    found = [float(m.weight.detach()[0]) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    np.testing.assert_allclose(found, [0.7, 0.7, 0.7 / 2**0.5], rtol=1e-6)


def test_dropout_drops_a_unit_at_all_steps_or_at_none() -> None:
    torch.manual_seed(0)
    drop = Dropout(0.3).train()
    x = torch.rand(4, 50, 20) + 0.5
    y = drop(x)
    kept = y != 0
    assert bool((kept == kept[0]).all())
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    assert abs(float(kept.double().mean()) - 0.7) < 0.06
    assert torch.equal(drop.eval()(x), x)


# ---------------------------------------------------------------- products
def check_product(objective: Objective, kind: str, memory: float = math.inf) -> None:
    """Compare traced products with double backward of the network in plain torch."""
    product = linearize_traced(objective, objective.batches[0], kind, memory)
    assert isinstance(product, Linearized)
    assert memory == math.inf or product.nbytes == 0
    exact = getattr(operators, f"_autograd_{kind}")(plainly(objective), objective.batches[0])
    for seed in range(2):
        v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        here, there = product(v), exact(v)
        assert there.norm() > 1e-6
        assert (here - there).norm() < 1e-10 * there.norm()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["none", "tdbn"])
@pytest.mark.parametrize("kind", sampled(["hessian", "ggn", "fisher"], 3))
def test_products_are_those_of_double_backward(name: str, norm: str, kind: str) -> None:
    objective = job(network(**MODELS[name], norm=norm, dropout=0.1), "ce" if norm == "none" else "mse")
    check_product(objective, kind)


@pytest.mark.parametrize("params", ["conv5*,fc1*", "conv4*", "conv3*,conv4*"])
def test_products_of_only_a_resnets_last_layers_agree(params: str) -> None:
    """The first of them is after, inside or before a branch."""
    net = network(**MODELS["resnet"])
    check_product(make_objective(net, LOSSES["mse"], data(net), params=params), "hessian")


@pytest.mark.parametrize("coded", sampled([False, True], 2))
@pytest.mark.parametrize("name", [name for name in MODELS if "resnet" in name or name == "rsnn"])
def test_products_in_segments_agree(name: str, coded: bool) -> None:
    net = network(**MODELS[name], timesteps=5, neuron="plif", tau=1.3)
    x, y = data(net)
    if coded:
        g = torch.Generator().manual_seed(4)
        x = torch.bernoulli(x[:, None].expand(-1, 5, *x.shape[1:]), generator=g)
    objective = make_objective(net, LOSSES["mse"], (x, y))
    for kind in ("hessian", "ggn", "fisher"):
        check_product(objective, kind, memory=1.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_resnets_block_of_vectors_agrees(threads: int) -> None:
    """Side by side in threads: what one pass leaves for itself is not another's."""
    op = operators.hessian(job(network(**MODELS["resnet"])))
    v = torch.randn(op.shape[0], 6, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = op @ v
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(block, torch.stack([op @ c for c in v.unbind(1)], 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["rsnn", "resnet of one block"])
def test_the_relaxed_networks_hessian_is_that_of_finite_differences(name: str) -> None:
    fields = {**MODELS[name], "input_shape": (1, 3, 3)} if name != "rsnn" else MODELS[name]  # too small to pool
    net = network(**fields, norm="none")
    relaxed = Network(replace(net.spec, relaxed=True)).double().eval()
    relaxed.load_state_dict(net.state_dict())
    objective = job(relaxed)
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = objective.weights()

    def gradient(step: float) -> Tensor:
        for p, part in zip(objective.parameters.values(), objective.split(flat + step * v), strict=True):
            p.data.copy_(part)
        found = objective.value_and_gradient()[1]
        for p, part in zip(objective.parameters.values(), objective.split(flat), strict=True):
            p.data.copy_(part)
        return found

    e = 1e-5
    difference = (gradient(e) - gradient(-e)) / (2 * e)
    product = operators.hessian(objective) @ v
    assert (product - difference).norm() < 1e-6 * product.norm()


def test_statistics_of_a_recurrent_layer_count_both_inputs() -> None:
    net = network(**MODELS["rsnn"], norm="none")
    found = {s.name: s for s in observe(net, *data(net), LOSSES["mse"])}
    w, (x, _) = weights(net), data(net)
    currents = np.stack([x.flatten(1).numpy() @ w["fc1"].T] * 3)
    s = fire(currents, w["rec1"])
    before = np.concatenate([0 * s[:1], s[:-1]])
    total, v, squares = currents + before @ w["rec1"].T, np.zeros_like(s[0]), []
    for t in range(3):
        h = v + total[t]
        v = h * (1 - s[t])
        squares.append(((1 / (1 + (np.pi * (h - 0.6)) ** 2)) ** 2).mean())
    for name in ("fc1", "rec1"):
        assert found[name].neuron == "spike1"
        assert found[name].current_variance == pytest.approx(total.var(ddof=1), rel=1e-10)
        assert found[name].firing_rate == pytest.approx(s.mean(), rel=1e-6)
        assert found[name].derivative_square_by_step == pytest.approx(squares, rel=1e-10)
    assert found["rec1"].input_square == pytest.approx(before.mean(), rel=1e-10)
    assert (found["rec1"].fan_in, found["rec1"].fan_out) == (8, 8)


# ---------------------------------------------------------------- bad descriptions
@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"depth": 0}, "depth must lie between 1 and 200"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"model": "rsnn", "hidden": ()}, "the rsnn needs at least one hidden layer"),
        ({"dropout": float("nan")}, "dropout"),
        ({"depth": 1, "input_shape": (1, 1, 8)}, "at least 2 x 2 pixels"),
        ({"norm": "layer"}, "norm must be one of none, bn, tdbn"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Spec(**fields)


def test_descriptions_from_before_these_networks_are_read() -> None:
    old = {k: v for k, v in asdict(Spec()).items() if k not in ("depth", "dropout")}
    assert Spec.from_dict(old) == Spec()
