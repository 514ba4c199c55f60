"""Traced products against double backward, for everything that a network may consist of."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_networks import NETWORKS, Case, Net, objective_of
from sampled import sampled
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hessian_tools.engine import programs, resizing
from hessian_tools.engine.linearized import Linearized
from hessian_tools.engine.product import linearize_traced
from hessian_tools.engine.trace import Program
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators import curvature
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import OPERATORS

ORACLES: dict[str, Callable[[Objective, Any], Callable[[Tensor], Tensor]]] = {
    "hessian": curvature._autograd_hessian,
    "ggn": curvature._autograd_ggn,
    "fisher": curvature._autograd_fisher,
}


def error_of(objective: Objective, kind: str) -> float:
    """Largest difference of two traced products from those of double backward, relative to them."""
    batch = objective.batches[0]
    found = linearize_traced(objective, batch, kind)
    assert isinstance(found, Linearized), found
    oracle = ORACLES[kind](objective, batch)
    generator = torch.Generator().manual_seed(1)
    vectors = [
        torch.randn(objective.size, dtype=torch.float64, generator=generator).to(objective.dtype) for _ in range(2)
    ]
    pairs = [(found(v), oracle(v)) for v in vectors]
    scale = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / (scale or 1.0)


@pytest.mark.parametrize("name", sampled(NETWORKS, 3))
def test_products_are_those_of_double_backward(name: str) -> None:
    case = NETWORKS[name]
    objective = objective_of(case)
    errors = {kind: error_of(objective, kind) for kind in ORACLES}
    assert max(errors.values()) <= case.tol, errors


@pytest.mark.parametrize("name", ["conv_bn", "encoder", "gru_cell", "slices", "repeat_bn"])
@pytest.mark.parametrize(("samples", "dtype", "tol"), [(1, torch.float64, 1e-10), (5, torch.float32, 1e-4)])
def test_one_sample_and_single_precision(name: str, samples: int, dtype: torch.dtype, tol: float) -> None:
    objective = objective_of(NETWORKS[name], samples, dtype)
    assert max(error_of(objective, kind) for kind in ORACLES) <= tol


def test_inputs_may_be_strided_and_batches_ragged() -> None:
    objective = objective_of(NETWORKS["conv_bn"], 7)
    (x, y) = objective.batches[0]
    strided = replace(objective, batches=((x.transpose(2, 3).contiguous().transpose(2, 3), y),))
    assert not strided.batches[0][0].is_contiguous()
    for kind, operator in OPERATORS.items():
        expected = dense(operator(objective, 1e9))
        torch.testing.assert_close(dense(operator(strided, 1e9)), expected, rtol=1e-10, atol=1e-13)
        ragged = operator(objective.rebatched(3), 1e9)
        torch.testing.assert_close(dense(ragged), expected, rtol=1e-10, atol=1e-13, msg=kind)


def plain_networks() -> dict[str, Callable[[], nn.Module]]:
    """Networks of images of 5 x 6 pixels."""
    shape = nn.Flatten(), nn.Linear(2 * 3 * 3, 4)
    return {
        "stride": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), *shape),
        "dilation, groups, norms": lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=2, dilation=2), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5),
            nn.Conv2d(4, 2, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(2, affine=False), nn.ReLU(), *shape,
        ),
        "norms before and after": lambda: nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(30), nn.Sequential(nn.Linear(30, 6), nn.BatchNorm1d(6), nn.GELU()),
            nn.Identity(), nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False), nn.Sigmoid(),
        ),
        "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.LayerNorm(4)),
        "circular padding": lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(60, 4)
        ),
        "norm over positions": lambda: nn.Sequential(
            nn.Flatten(2), nn.Linear(30, 4), nn.BatchNorm1d(1), nn.Flatten()
        ),
        "weight norm": lambda: nn.Sequential(
            nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(30, 4))
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", plain_networks())
def test_products_agree_for_images(name: str) -> None:
    torch.manual_seed(0)
    model = plain_networks()[name]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_()  # type: ignore[union-attr, operator]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    data = torch.randn(7, 1, 5, 6, dtype=torch.float64), torch.arange(7) % 4
    objective = make_objective(model.double(), F.cross_entropy, data)
    assert max(error_of(objective, kind) for kind in ORACLES) < 1e-12


def test_a_loss_without_a_gradient_gives_zero() -> None:
    objective = replace(objective_of(NETWORKS["conv_bn"]), loss=lambda o, y: torch.zeros(()).double())
    for memory in (1.0, 1e9):
        product = linearize_traced(objective, objective.batches[0], "hessian", memory)
        assert isinstance(product, Linearized)
        assert product(torch.ones(objective.size).double()).abs().max() == 0


# ---------------------------------------------------------------- networks that change tensors in place
def test_a_norm_is_not_folded_into_weights_whose_output_was_changed() -> None:
    """The changed output is read by a second norm, which double backward would refuse for a later change."""

    def run(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        y += torch.tanh(y.detach()) + 1
        y[:, 1] += 2
        out: Tensor = s.head(
            torch.tanh(F.batch_norm(input=y, running_mean=s.n.running_mean, running_var=s.n.running_var))
        )
        return out

    parts = {"conv": nn.Conv2d(2, 4, 3), "n": nn.BatchNorm2d(4, affine=False), "head": NETWORKS["conv_bn"].build()[-1]}
    case = Case(lambda: Net(run, **parts), (2, 6, 6))
    objective = objective_of(case)
    assert max(error_of(objective, kind) for kind in ORACLES) <= 1e-10


class Stateful(nn.Module):
    """Counts its calls, fills a cache, changes its buffers, and holds a tensor outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))
        self.calls, self.cache = 0, {}
        self.held = torch.rand(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.last.copy_(self.a.weight.detach().sum(1))
        scale = self.cache.setdefault(len(x), torch.arange(6, dtype=x.dtype) / 6)
        out: Tensor = self.b(torch.tanh(self.a(x) * scale + self.held + self.last))
        return out


def test_tracing_leaves_no_trace_in_the_model() -> None:
    objective = objective_of(Case(Stateful, (5,)))
    assert max(error_of(objective, kind) for kind in ORACLES) <= 1e-10
    model: Any = objective.model
    for t in [*model.cache.values(), *model.state_dict().values(), model.held]:
        assert type(t) in (Tensor, nn.Parameter)
    seen = float(model.seen)
    found = linearize_traced(objective, objective.batches[0], "hessian")
    assert isinstance(found, Linearized)
    found(torch.ones(objective.size, dtype=objective.dtype))
    assert float(model.seen) == seen  # a replay does not write into the buffers


def test_weights_are_read_anew_for_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[Any] = []
    real = programs.trace_product
    monkeypatch.setattr(programs, "trace_product", lambda *args: (traces.append(args[3].shape), real(*args))[1])
    objective = objective_of(NETWORKS["conv_bn"])
    for shift in (0.0, 0.1):
        with torch.no_grad():
            for p in objective.parameters.values():
                p.add_(shift)
        assert max(error_of(objective, kind) for kind in ORACLES) <= 1e-10
    assert len(traces) == 2  # of the Hessian, and of what has first derivatives only


# ---------------------------------------------------------------- networks that cannot be traced
def _branch(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    if y.abs().mean() > 0:
        y = y * 2
    out: Tensor = torch.tanh(y)
    return out


class Aliased(nn.Module):
    """Holds a parameter in a list, where tracing would take it for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)
        self.weights = [self.a.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weights[0], self.a.bias))


def net(run: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(run, a=nn.Linear(5, 3))


UNTRACEABLE = {
    "branches on the value of a tensor": net(_branch),
    "or uses it as a Python number": net(lambda s, x: torch.tanh(s.a(x) * float(x.max()))),
    "uses NumPy": net(lambda s, x: torch.tanh(s.a(x) * torch.from_numpy(x.numpy()).mean())),
    "reads the memory of a tensor": net(lambda s, x: torch.tanh(s.a(x)) * (x.data_ptr() != 0)),
    "'a.weight' through a list": Aliased,
    "a scripted module": lambda: torch.jit.script(nn.Sequential(nn.Linear(5, 3), nn.Tanh())),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("words", UNTRACEABLE)
def test_networks_that_cannot_be_traced_use_autograd_and_say_why(words: str) -> None:
    objective = objective_of(Case(UNTRACEABLE[words], (5,)))
    for kind, operator in OPERATORS.items():
        op = operator(objective, 1e9)
        assert (op.path, op.reason) == ("", "")
        v = torch.ones(objective.size, dtype=objective.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = op @ v
        torch.testing.assert_close(found, ORACLES[kind](objective, objective.batches[0])(v), rtol=1e-12, atol=1e-15)
        assert op.path == "autograd"
        assert words in op.reason
        assert "\n" not in op.reason


def test_the_reason_names_the_line_of_the_network() -> None:
    found = linearize_traced(
        objective_of(Case(net(_branch), (5,))), objective_of(Case(net(_branch), (5,))).batches[0], "ggn"
    )
    line = _branch.__code__.co_firstlineno + 2
    assert isinstance(found, str)
    assert found.endswith(f"(test_product.py:{line})")


def test_random_networks_are_not_traced() -> None:
    objective = objective_of(Case(net(lambda s, x: torch.tanh(s.a(x) + torch.randn(3, dtype=x.dtype))), (5,)))
    found = linearize_traced(objective, objective.batches[0], "hessian")
    assert found == "the forward pass draws random numbers (aten.randn.default)"


def test_values_that_become_numbers_without_a_branch_are_traced() -> None:
    """The number is read anew at other weights."""
    objective = objective_of(Case(net(lambda s, x: torch.tanh(s.a(x) * s.a.weight.sum().item())), (5,)))
    for _ in range(2):
        assert max(error_of(objective, kind) for kind in ORACLES) <= 1e-10
        with torch.no_grad():
            objective.parameters["a.weight"].add_(0.1)


def test_compiled_modules_are_traced_as_they_were_written() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    x, y = torch.randn(4, 5), torch.arange(4) % 3
    plain, compiled = (make_objective(m, F.cross_entropy, (x, y)) for m in (build(), torch.compile(build())))
    op = OPERATORS["hessian"](compiled, 1e9)
    torch.testing.assert_close(dense(op), dense(OPERATORS["hessian"](plain, 1e9)))
    assert op.path == "traced"


# ---------------------------------------------------------------- memory, threads
def _storages() -> dict[int, int]:
    gc.collect()
    found = (t for t in gc.get_objects() if isinstance(t, Tensor) and t.layout == torch.strided)
    tensors = (t for t in found if not isinstance(t, FakeTensor))  # those of a trace have no memory
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("name", sampled(["conv_gn", "conv_bn", "encoder", "LSTM0", "out_map"], 2))
@pytest.mark.parametrize("kind", ORACLES)
def test_the_counted_memory_is_what_is_freed(name: str, kind: str) -> None:
    objective = objective_of(NETWORKS[name], 16)
    linearize_traced(objective, objective.batches[0], kind)  # the trace is kept by the objective
    before = _storages()
    found = linearize_traced(objective, objective.batches[0], kind)
    assert isinstance(found, Linearized)
    held = sum(size for key, size in _storages().items() if key not in before)
    assert held == found.nbytes > 0


@pytest.mark.parametrize("path", ["traced", "autograd"])
def test_a_deleted_operator_frees_what_it_kept(path: str) -> None:
    case = NETWORKS["conv_gn"] if path == "traced" else Case(net(_branch), (5,))
    objective = objective_of(case, 6).rebatched(2)
    op = OPERATORS["hessian"](objective, 1e9)
    v = torch.ones(objective.size, dtype=objective.dtype)
    op @ v
    assert op.path == path
    assert len(op._kept) == 3
    kept = [weakref.ref(product) for product in op._kept.values()]
    del op
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.5, 2.5])
def test_operators_keep_no_more_than_the_memory_they_may_use(share: float) -> None:
    objective = objective_of(NETWORKS["conv_gn"], 6).rebatched(2)
    v = torch.ones(objective.size, dtype=objective.dtype)
    expected = OPERATORS["hessian"](objective, 1e9) @ v
    found = linearize_traced(objective, objective.batches[0], "hessian")
    assert isinstance(found, Linearized)
    memory = share * found.nbytes
    before = _storages()
    op = OPERATORS["hessian"](objective, memory)
    torch.testing.assert_close(op @ v, expected, rtol=1e-12, atol=1e-14)
    held = sum(size for key, size in _storages().items() if key not in before)
    assert held <= memory


@pytest.mark.parametrize("kind", ORACLES)
def test_products_are_the_same_bits_in_other_operators_and_in_threads(kind: str) -> None:
    objective = objective_of(NETWORKS["conv_bn"], 7).rebatched(2)
    block = torch.randn(objective.size, 3, dtype=objective.dtype, generator=torch.Generator().manual_seed(3))
    first = OPERATORS[kind](objective, 1e9) @ block
    again = objective_of(NETWORKS["conv_bn"], 7).rebatched(2)
    assert torch.equal(OPERATORS[kind](again, 1e9) @ block, first)
    torch.set_num_threads(2)
    try:
        for memory in (1e9, 0.0):
            assert torch.equal(OPERATORS[kind](again, memory) @ block, first)
    finally:
        torch.set_num_threads(1)


def test_a_network_is_traced_once_per_shape_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[Any] = []
    real = programs.trace_product
    monkeypatch.setattr(programs, "trace_product", lambda *args: (traces.append(args[3].shape), real(*args))[1])
    objective = objective_of(NETWORKS["repeat_bn"], 7).rebatched(2)
    v = torch.ones(objective.size, dtype=objective.dtype)
    for kind in ("ggn", "fisher", "ggn"):
        OPERATORS[kind](objective, 1e9) @ v
    assert [shape[0] for shape in traces] == [resizing.SAMPLES]
    assert objective.sizes == [2, 2, 2, 1]


def test_a_number_that_counts_a_part_of_the_samples_is_traced_for_each_batch_size() -> None:
    """Half of the samples is not a multiple of all samples."""

    def run(s: Any, x: Tensor) -> Tensor:
        half = len(x) // 2
        out: Tensor = torch.tanh(s.a(torch.cat([x[:half], x[half:]])))
        return out

    objective = objective_of(Case(net(run), (5,)), 7)
    for size in (7, 4, 1):
        assert max(error_of(objective.rebatched(size), kind) for kind in ORACLES) <= 1e-10
    assert [p.samples for p in objective.programs.values() if isinstance(p, Program)] == [0] * 6


def test_a_network_that_knows_its_batch_size_is_traced_for_it() -> None:
    objective = objective_of(Case(net(lambda s, x: torch.tanh(s.a(x.view(4, 5)))), (5,)), 4)
    assert max(error_of(objective, kind) for kind in ORACLES) <= 1e-10


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_batch_sizes_that_are_sizes_of_the_network_are_kept_apart(samples: int) -> None:
    """Two channels, five features, T = 5."""

    def run(s: Any, x: Tensor) -> Tensor:
        steps = x.unflatten(1, (5, 1)).transpose(0, 1)  # [T, N, 1]
        y = s.a(steps.flatten(0, 1).expand(5 * len(x), 5)).unflatten(0, (5, len(x)))
        out: Tensor = torch.tanh(y).mean(0)
        return out

    objective = objective_of(Case(net(run), (5,)), samples)
    assert max(error_of(objective, kind) for kind in ORACLES) <= 1e-10
    assert all(p.samples == samples for p in objective.programs.values() if isinstance(p, Program) and p.samples)


def test_a_trace_that_fails_for_other_numbers_of_samples_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Twelve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(torch.tanh(self.one(x)) + torch.zeros(12, 1))
            return y

    torch.manual_seed(0)
    data = torch.randn(12, 4).double(), torch.arange(12) % 3
    objective = make_objective(Twelve().double(), F.cross_entropy, data, check=False)
    op = curvature.hessian(objective)
    op @ torch.ones(objective.size, dtype=torch.float64)
    assert op.path == "traced"
    assert [r for r in caplog.records if "fake_tensor" in r.name] == []


def test_an_lstm_in_float32_has_the_products_of_float64() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 5, 8), torch.arange(20) % 3

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.out = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.out(self.layers(x)[0][:, -1])
            return found

    net = Last()
    narrow = make_objective(net, F.cross_entropy, (x, y))
    wide = make_objective(copy.deepcopy(net).double(), F.cross_entropy, (x.double(), y))
    v = torch.randn(narrow.size, dtype=torch.float64)
    for kind in ("hessian", "ggn"):
        found, expected = (curvature.OPERATORS[kind](o, 2**30) @ v for o in (narrow, wide))
        assert torch.linalg.vector_norm(found - expected) < 1e-5 * torch.linalg.vector_norm(expected)
