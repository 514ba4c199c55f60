"""Tests of the networks: shapes, names, coding, pooling ties, and Hessians against the NumPy oracle."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jet_oracle
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikun.layer_statistics import observe
from ikun.layers import MaxPool
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.neurons import Neuron

Array = npt.NDArray[np.float64]

SMALL: dict[str, Any] = {"input_shape": (1, 4, 4), "classes": 2, "channels": 1, "norm": "none", "threshold": 0.5}


def build(seed: int = 0, gain: float = 1.0, **fields: Any) -> Network:
    """A float64 network in evaluation mode with random weights, norms and running statistics."""
    net = Network(Spec(**{**SMALL, **fields})).double().eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name:
                p.copy_(torch.rand(p.shape, generator=g, dtype=torch.float64) + (0.5 if name.endswith("weight") else 0))
            elif "logit" in name:
                p.copy_(torch.rand(p.shape, generator=g, dtype=torch.float64) - 0.2)
            else:
                fan = p[0].numel()
                p.copy_((torch.randn(p.shape, generator=g, dtype=torch.float64) + 0.2) * gain * (2 / fan) ** 0.5)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                m.running_mean.uniform_(-0.2, 0.2, generator=g)  # type: ignore[union-attr, operator]
                m.running_var.uniform_(0.2, 0.6, generator=g)  # type: ignore[union-attr, operator]
    return net


def lively(**fields: Any) -> Network:
    """The first of build's networks in which every layer fires, but not at every step."""
    for seed in range(100):
        net = build(seed, **fields)
        x, y = samples(net)
        if all(0.1 < s.firing_rate < 0.9 for s in observe(net, x, y, LOSSES["mse"])):
            return net
    raise AssertionError(f"no seed for {fields}")


def samples(net: Network, count: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x = torch.rand(count, *net.spec.input_shape, generator=g, dtype=torch.float64)
    return x, torch.arange(count) % net.spec.classes


# ---------------------------------------------------------------- shapes, names, counts
@pytest.mark.parametrize(("channels", "count"), [(128, 13_014_656), (16, 205_776)])
def test_parameter_count_is_the_papers(channels: int, count: int) -> None:
    with torch.device("meta"):
        net = Network(Spec(input_shape=(1, 28, 28), channels=channels))
    assert sum(p.numel() for p in net.parameters()) == count


def test_names_say_which_layer() -> None:
    csnn = Network(Spec(channels=2))
    assert [n for n, _ in csnn.named_children()] == [
        "conv1", "norm1", "spike1", "pool1", "conv2", "norm2", "spike2", "pool2", "flatten", "fc1", "spike3", "fc2",
        "spike4",
    ]  # fmt: skip
    weights = ["conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight", "norm2.weight", "norm2.bias"]
    assert [n for n, _ in csnn.named_parameters()] == [*weights, "fc1.weight", "fc2.weight"]
    mlp = Network(Spec(model="mlp", hidden=(5, 4), norm="bn", neuron="plif"))
    assert [n for n, _ in mlp.named_children()] == [
        "flatten", "fc1", "norm1", "spike1", "fc2", "norm2", "spike2", "fc3", "spike3",
    ]  # fmt: skip
    assert [s[0] for s in mlp.stages()] == ["fc1", "fc2", "fc3"]
    assert [(name, norm is None, spike) for name, _, norm, spike, _ in csnn.stages()] == [
        ("conv1", False, "spike1"),
        ("conv2", False, "spike2"),
        ("fc1", True, "spike3"),
        ("fc2", True, "spike4"),
    ]
    assert all(m.bias is None for m in csnn.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({"input_shape": (3, 9, 7), "channels": 4}, [(4, 3, 3, 3), (4, 4, 3, 3), (64, 8), (5, 64)]),
        ({"input_shape": (1, 4, 4), "channels": 2}, [(2, 1, 3, 3), (2, 2, 3, 3), (32, 2), (5, 32)]),
        ({"model": "mlp", "input_shape": (2, 3, 2), "hidden": (7, 6, 4)}, [(7, 12), (6, 7), (4, 6), (5, 4)]),
        ({"model": "mlp", "input_shape": (1, 1, 1), "hidden": ()}, [(5, 1)]),
    ],
)
@pytest.mark.parametrize("norm", ["none", "bn"])
@pytest.mark.parametrize("coded", [False, True])
def test_weights_and_outputs_have_their_shapes(
    fields: dict[str, Any], shapes: list[tuple[int, ...]], norm: str, coded: bool
) -> None:
    spec = Spec(**fields, norm=norm, classes=5, timesteps=3)
    net = Network(spec)
    assert [tuple(w.weight.shape) for _, w, *_ in net.stages()] == shapes
    x = torch.rand(6, *((3,) if coded else ()), *spec.input_shape)
    rates = net(x)
    assert rates.shape == (6, 5)
    assert set((rates * 3).round(decimals=4).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize("shape", [(4, 8), (4, 1, 8), (4, 3, 1, 8, 8), (4, 4, 1, 1, 8, 8)])
def test_input_of_another_rank_or_length_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input must be"):
        Network(Spec(channels=2, timesteps=4))(torch.rand(shape))


@pytest.mark.parametrize("neuron", ["if", "lif", "plif"])
@pytest.mark.parametrize("model", ["csnn", "mlp"])
@pytest.mark.parametrize("norm", ["none", "bn"])
def test_a_direct_image_is_the_same_image_at_every_step(model: str, norm: str, neuron: str) -> None:
    net = lively(model=model, norm=norm, neuron=neuron, input_shape=(1, 5, 6), channels=2, hidden=(9,), tau=1.3)
    x, y = samples(net, 6)
    repeated = x[:, None].expand(-1, net.spec.timesteps, *x.shape[1:])
    for training in (False, True):
        net.train(training)
        found = [torch.autograd.grad(LOSSES["mse"](net(i), y), list(net.parameters())) for i in (x, repeated)]
        torch.testing.assert_close(net(x), net(repeated), rtol=0, atol=0)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_samples_and_steps_do_not_leak_into_each_other() -> None:
    net = build(channels=2, norm="bn")
    x, _ = samples(net, 4)
    whole = net(x)
    for i in range(4):
        assert torch.equal(net(x[i : i + 1]), whole[i : i + 1])
    coded = torch.rand(4, 4, 1, 4, 4, dtype=torch.float64).round()
    one_at_a_time = torch.cat([net(coded[i : i + 1]) for i in range(4)])
    assert torch.equal(net(coded), one_at_a_time)


def test_time_runs_forward() -> None:
    """A pulse at the first step can drive later layers at all steps; one at the last step only then."""
    net = Network(Spec(model="mlp", input_shape=(1, 1, 1), hidden=(), classes=1, norm="none", timesteps=3))
    with torch.no_grad():
        net.fc1.weight.fill_(0.6)
    at = {n: torch.zeros(1, 3, 1, 1, 1) for n in ("early", "late")}
    at["early"][0, :2], at["late"][0, 2] = 1, 1
    assert net(at["early"]).item() == pytest.approx(1 / 3)  # .6, 1.2: fires at the second step
    assert net(at["late"]).item() == 0


# ---------------------------------------------------------------- max-pooling
@pytest.mark.parametrize("ties", ["first", "last"])
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (5, 4), (7, 9), (3, 2)])
def test_pool_values_are_torchs(ties: str, size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    for x in (torch.randn(2, 3, *size, generator=g), torch.randint(0, 2, (2, 3, *size), generator=g).float()):
        assert torch.equal(MaxPool(ties)(x), F.max_pool2d(x, 2))
    assert MaxPool(ties)(torch.rand(4, 2, 3, *size)).shape == (4, 2, 3, size[0] // 2, size[1] // 2)


@pytest.mark.parametrize(
    ("window", "first", "last"),
    [
        ([0, 0, 0, 0], 0, 3),
        ([1, 1, 1, 1], 0, 3),
        ([0, 1, 1, 0], 1, 2),
        ([0, 1, 0, 1], 1, 3),
        ([1, 0, 1, 0], 0, 2),
        ([0, 0, 1, 1], 2, 3),
        ([0, 0, 0, 1], 3, 3),
        ([2, 1, 1, 1], 0, 0),
        ([-1, -1, -2, -3], 0, 1),
        ([0, 3, 2, 3], 1, 3),
    ],
)
def test_tie_rule_selects_one_entry(window: list[int], first: int, last: int) -> None:
    for ties, chosen in (("first", first), ("last", last)):
        x = torch.tensor(window, dtype=torch.float64).reshape(1, 1, 2, 2).requires_grad_()
        (g,) = torch.autograd.grad(MaxPool(ties)(x).sum(), x)
        assert g.flatten().tolist() == [float(i == chosen) for i in range(4)], (ties, window)


@pytest.mark.parametrize("ties", ["first", "last"])
def test_tie_rule_in_every_window_of_odd_sizes(ties: str) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2, (2, 2, 5, 7), generator=g).double().requires_grad_()
    weight = torch.rand(2, 2, 2, 3, generator=g, dtype=torch.float64)
    (found,) = torch.autograd.grad((MaxPool(ties)(x) * weight).sum(), x)
    exact = np.zeros(x.shape)
    for n, c, i, j in np.ndindex(weight.shape):
        entries = [(2 * i + a, 2 * j + b) for a in (0, 1) for b in (0, 1)]
        values = [float(x[n, c, a, b].detach()) for a, b in entries]
        order = range(4) if ties == "first" else range(3, -1, -1)
        k = next(k for k in order if values[k] == max(values))
        exact[n, c, *entries[k]] += float(weight[n, c, i, j])
    np.testing.assert_array_equal(found, exact)


# ---------------------------------------------------------------- the description
@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"model": "vgg"}, "model must be one of csnn, mlp"),
        ({"norm": "ln"}, "norm"),
        ({"neuron": "adex"}, "neuron must be one of if, lif, plif"),
        ({"reset": "none"}, "reset"),
        ({"coding": "latency"}, "coding"),
        ({"ties": "random"}, "ties"),
        ({"surrogate": "arctan"}, "unknown surrogate"),
        ({"surrogate": "atan:0"}, "parameter"),
        ({"classes": 0}, "classes"),
        ({"channels": 5000}, "channels"),
        ({"timesteps": 0}, "timesteps"),
        ({"timesteps": 10**9}, "timesteps"),
        ({"input_shape": (8, 8)}, "input_shape"),
        ({"input_shape": (1, 8, 0)}, "input_shape"),
        ({"input_shape": (1, 3, 8)}, "too small"),
        ({"input_shape": (1, 8, 3)}, "too small"),
        ({"hidden": (5, 0)}, "hidden"),
        ({"hidden": (1,) * 1001}, "hidden"),
        ({"tau": 1.0}, "tau must exceed 1"),
        ({"tau": float("nan")}, "tau must exceed 1"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": 1.0, "v_reset": 1.0}, "threshold"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        Spec(**fields)
    assert "\n" not in str(caught.value)


def test_small_images_are_fine_for_the_mlp() -> None:
    assert Network(Spec(model="mlp", input_shape=(1, 1, 2)))(torch.rand(4, 1, 1, 2)).shape == (4, 10)


@pytest.mark.parametrize("fields", [{}, {"model": "mlp", "hidden": (3,), "relaxed": True, "tau": 3, "reset": "soft"}])
def test_description_round_trips_through_json(fields: dict[str, Any]) -> None:
    spec = Spec(**fields)
    assert Spec.from_dict(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("classes", "10"),
        ("classes", 10.0),
        ("classes", True),
        ("relaxed", 1),
        ("tau", "2"),
        ("tau", False),
        ("hidden", 128),
        ("hidden", [128.0]),
        ("hidden", [True]),
        ("input_shape", "188"),
        ("surrogate", None),
        ("timesteps", [4]),
    ],
)
def test_mistyped_fields_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Spec.from_dict({**dataclasses.asdict(Spec()), name: value})


def test_missing_and_unknown_fields_are_refused() -> None:
    whole = dataclasses.asdict(Spec())
    with pytest.raises(ValueError, match="width"):
        Spec.from_dict({**whole, "width": 3})
    with pytest.raises(ValueError, match="ties"):
        Spec.from_dict({k: v for k, v in whole.items() if k != "ties"})
    with pytest.raises(ValueError, match="tau"):
        Spec.from_dict({**whole, "tau": 0.5})


# ---------------------------------------------------------------- losses
def test_losses_are_their_formulas() -> None:
    g = torch.Generator().manual_seed(0)
    rates, labels = torch.rand(5, 3, generator=g, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    target = np.eye(3)[labels.numpy()]
    r = rates.numpy()
    assert float(LOSSES["mse"](rates, labels)) == pytest.approx(np.mean((r - target) ** 2), rel=1e-12)
    log = r - np.log(np.exp(r).sum(1, keepdims=True))
    assert float(LOSSES["ce"](rates, labels)) == pytest.approx(-np.mean((log * target).sum(1)), rel=1e-12)


# ---------------------------------------------------------------- the Hessian against the oracle
def described(net: Network) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """The layers of `net` for the oracle, from its specification only."""
    spec = net.spec
    layers: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []  # the layers in front of a branch
    recurrent: dict[str, str] = {}
    name, _, number = spec.surrogate.partition(":")
    state = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    for child in net._modules:
        if child.startswith(("conv", "fc")):
            layers.append({"kind": "conv" if child.startswith("conv") else "linear", "weight": f"{child}.weight"})
        elif child.startswith("norm"):
            statistics = {"mean": state[f"{child}.running_mean"], "var": state[f"{child}.running_var"]}
            layers.append({"kind": "norm", "weight": f"{child}.weight", "bias": f"{child}.bias", **statistics})
        elif child.startswith("pool"):
            layers.append({"kind": "pool", "ties": spec.ties})
        elif child == "flatten":
            layers.append({"kind": "flatten"})
        elif child.startswith("rec"):
            recurrent = {"recurrent": f"{child}.weight"}
        elif child.startswith("branch"):
            before, layers = layers, []
        elif child.startswith("add"):
            layers = [*before, {"kind": "residual", "layers": layers}]
        else:
            rates = {
                "if": {"decay": 1.0, "gain": 1.0},
                "lif": {"decay": 1 - 1 / spec.tau, "gain": 1 / spec.tau},
                "plif": {"logit": f"{child}.logit"},
            }[spec.neuron]
            layer = {"kind": "neuron", "threshold": spec.threshold, "v_reset": spec.v_reset, "reset": spec.reset}
            layer |= {"detach_reset": spec.detach_reset, "spike": jet_oracle.surrogate(name, float(number))}
            if spec.relaxed:
                layer["primitive"] = jet_oracle.primitive(name, float(number))
            layers.append(layer | rates | recurrent)
            recurrent = {}
    return layers, {n: p.detach().numpy() for n, p in net.named_parameters()}


def dense(net: Network, loss: str) -> tuple[float, Array, Array]:
    """(loss, gradient, Hessian) by double backward."""
    x, y = samples(net)
    parameters = list(net.parameters())
    value = LOSSES[loss](net(x), y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    hessian = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
    return value.item(), gradient.detach().numpy(), hessian.numpy()


def check(net: Network, loss: str) -> None:
    layers, params = described(net)
    x, y = samples(net)
    value, gradient, hessian = dense(net, loss)
    exact = jet_oracle.hessian(layers, params, x.numpy(), y.numpy(), timesteps=net.spec.timesteps, loss=loss)
    assert value == pytest.approx(exact[0], rel=1e-12)
    assert np.linalg.norm(exact[2]) > 1e-3
    np.testing.assert_allclose(gradient, exact[1], rtol=0, atol=1e-10 * np.abs(exact[1]).max())
    assert np.linalg.norm(hessian - exact[2]) <= 1e-10 * np.linalg.norm(exact[2])
    assert np.linalg.norm(hessian - hessian.T) <= 1e-12 * np.linalg.norm(hessian)


CASES = [
    (kind, reset, detach, norm, ("first", "last")[i % 2], ("mse", "ce")[i // 2 % 2])
    for i, (kind, reset, detach, norm) in enumerate(
        (k, r, d, n) for n in ("none", "bn") for k in ("if", "lif", "plif") for r in ("hard", "soft") for d in (0, 1)
    )
]


@pytest.mark.parametrize(("kind", "reset", "detach", "norm", "ties", "loss"), CASES)
def test_surrogate_hessian_is_the_oracles(kind: str, reset: str, detach: int, norm: str, ties: str, loss: str) -> None:
    """A CSNN of four spiking layers and two pools, T = 4, in float64; every entry."""
    fields = {"neuron": kind, "reset": reset, "detach_reset": bool(detach), "norm": norm, "ties": ties}
    check(lively(**fields, tau=1.5, v_reset=-0.1), loss)


OTHERS = [
    {"model": "resnet", "depth": 1, "norm": "none", "neuron": "if", "reset": "hard", "ties": "first"},
    {"model": "resnet", "depth": 2, "norm": "tdbn", "neuron": "plif", "reset": "soft", "ties": "last", "tau": 1.3},
    {"model": "rsnn", "hidden": (4,), "norm": "none", "neuron": "lif", "reset": "hard", "tau": 1.3},
    {"model": "rsnn", "hidden": (3, 3), "norm": "bn", "neuron": "plif", "reset": "soft", "tau": 1.3},
    {"model": "rsnn", "hidden": (4,), "norm": "none", "neuron": "if", "reset": "hard", "detach_reset": True},
]


@pytest.mark.parametrize("index", range(len(OTHERS)))
def test_residual_and_recurrent_hessians_are_the_oracles(index: int) -> None:
    """Every entry; the recurrent ones too."""
    net = lively(**OTHERS[index], input_shape=(1, 4, 4) if "resnet" in OTHERS[index].values() else (1, 2, 2))
    check(net, ("mse", "ce")[index % 2])
    if net.spec.model == "rsnn":
        names = [n for n, p in net.named_parameters() for _ in range(p.numel())]
        hessian = dense(net, "mse")[2]
        assert np.abs(hessian[np.array(names) == "rec1.weight"]).max() > 1e-4


def test_the_hessian_of_a_resnet_that_pools_sums_is_the_oracles() -> None:
    """Sixteen pixels a side: the pooling between the blocks chooses among 0, 1 and 2. Random directions."""
    net = lively(model="resnet", depth=2, norm="bn", input_shape=(1, 16, 16), ties="last", timesteps=2)
    layers, params = described(net)
    x, y = samples(net)
    u, v = np.random.default_rng(0).standard_normal((2, 3, sum(p.size for p in params.values())))
    _, slope, exact = jet_oracle.bilinear(layers, params, x.numpy(), y.numpy(), u, v, timesteps=2, loss="mse")
    _, gradient, hessian = dense(net, "mse")
    np.testing.assert_allclose(u @ gradient, slope, rtol=1e-10, atol=1e-12)
    assert np.linalg.norm(u @ hessian @ v.T - exact) <= 1e-10 * np.linalg.norm(exact)


@pytest.mark.parametrize("surrogate", ["sigmoid:4", "erf:2", "fast_sigmoid:5", "triangle:1.5", "gaussian:0.6"])
def test_the_hessian_with_other_surrogates_is_the_oracles(surrogate: str) -> None:
    check(lively(surrogate=surrogate, norm="bn", neuron="lif", tau=1.4), "mse")


@pytest.mark.parametrize("ties", ["first", "last"])
def test_the_hessian_of_a_wider_network_agrees_along_random_directions(ties: str) -> None:
    """Two channels in and between, odd sizes, many ties: P = 222, 6 x 6 directions."""
    net = lively(channels=2, input_shape=(2, 5, 7), norm="bn", ties=ties, reset="soft")
    x, y = samples(net)
    layers, params = described(net)
    u, v = np.random.default_rng(0).standard_normal((2, 6, sum(p.size for p in params.values())))
    value, slope, exact = jet_oracle.bilinear(layers, params, x.numpy(), y.numpy(), u, v, timesteps=4, loss="mse")
    found = dense(net, "mse")
    assert found[0] == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(u @ found[1], slope, rtol=1e-10, atol=1e-12)
    assert np.linalg.norm(u @ found[2] @ v.T - exact) <= 1e-10 * np.linalg.norm(exact)


def test_the_tie_rule_matters_to_the_hessian() -> None:
    first, last = (dense(build(seed=3, channels=2, ties=ties), "mse") for ties in ("first", "last"))
    assert first[0] == last[0]
    assert np.linalg.norm(first[2] - last[2]) > 1e-2 * np.linalg.norm(first[2])


@pytest.mark.parametrize("model", ["csnn", "mlp"])
def test_relaxed_hessian_is_the_oracles_and_finite_differences(model: str) -> None:
    net = build(model=model, relaxed=True, surrogate="sigmoid:3", neuron="plif", hidden=(5, 4), norm="bn")
    check(net, "ce")
    x, y = samples(net)
    _, _, hessian = dense(net, "ce")
    parameters = list(net.parameters())
    v = torch.randn(len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step, gradients = 1e-5, []
    start = nn.utils.parameters_to_vector(parameters).detach().clone()
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * step * v, parameters)
        g = torch.autograd.grad(LOSSES["ce"](net(x), y), parameters)
        gradients.append(torch.cat([q.flatten() for q in g]))
    difference = (gradients[0] - gradients[1]) / (2 * step)
    np.testing.assert_allclose(difference, hessian @ v.numpy(), atol=1e-6 * float(difference.abs().max()))


def test_forward_over_reverse_gives_the_same_product() -> None:
    net = build(norm="bn", neuron="plif", channels=2)
    x, y = samples(net)
    names, values = zip(*net.named_parameters(), strict=True)
    values = tuple(v.detach() for v in values)

    def gradient(*weights: Tensor) -> tuple[Tensor, ...]:
        def value(*w: Tensor) -> Tensor:
            return LOSSES["mse"](torch.func.functional_call(net, dict(zip(names, w, strict=True)), (x,)), y)

        return torch.func.grad(value, argnums=tuple(range(len(names))))(*weights)  # type: ignore[no-any-return]

    g = torch.Generator().manual_seed(4)
    v = tuple(torch.randn(w.shape, dtype=torch.float64, generator=g) for w in values)
    product = torch.func.jvp(gradient, values, v)[1]
    exact = dense(net, "mse")[2] @ torch.cat([q.flatten() for q in v]).numpy()
    found = torch.cat([q.flatten() for q in product])
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12 * np.abs(exact).max())


def test_modules_are_the_documented_kinds() -> None:
    net = Network(Spec(channels=2, threshold=0.8, v_reset=-0.2, reset="soft", detach_reset=True, surrogate="erf:3"))
    for m in net.modules():
        if isinstance(m, Neuron):
            d = m.dynamics
            assert (d.threshold, d.v_reset, d.reset, d.detach_reset, str(d.surrogate)) == (
                0.8,
                -0.2,
                "soft",
                True,
                "erf:3",
            )
