"""Networks and losses that are not means over independent samples are refused, and those that are pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.checks import ObjectiveError, check
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import CurvatureOperator, fisher, ggn, hessian
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(3))
Y = torch.arange(24) % 3


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out


def changed(function: Callable[[Core, Tensor], Tensor]) -> nn.Module:
    class Changed(Core):
        def forward(self, x: Tensor) -> Tensor:
            return function(self, x)

    return Changed()


class OwnBatchNorm(nn.Module):
    """A BatchNorm written by hand, which no class name gives away."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.mean) / (self.variance + 1e-5).sqrt()
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def reference(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The Hessian in float64 by double backward of the model in evaluation mode, on all samples at once."""
    model = copy.deepcopy(model).double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss(model(X.double()), Y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True) for g in flat]
    pairs = [zip(row, parameters, strict=True) for row in rows]
    return torch.stack(
        [torch.cat([(torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in q]) for q in pairs]
    )


def objective(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, y: Tensor = Y, size: int = 24
) -> Objective:
    return make_objective(model, loss, (X, y), batch_size=size)


COUPLED = {
    "batch mean": changed(lambda m, x: Core.forward(m, x - x.mean(0))),
    "batch standard deviation": changed(lambda m, x: Core.forward(m, x) / (Core.forward(m, x).std() + 1e-6)),
    "contrast": changed(lambda m, x: Core.forward(m, x) - 0.5 * Core.forward(m, x).mean(0, keepdim=True)),
    "reversed": changed(lambda m, x: Core.forward(m, x).flip(0)),
    "rolled": changed(lambda m, x: Core.forward(m, x.roll(1, 0))),
    "sorted": changed(lambda m, x: Core.forward(m, x[x[:, 0].argsort()])),
    "running sum": changed(lambda m, x: Core.forward(m, x.cumsum(0))),
    "attention over samples": changed(lambda m, x: torch.softmax(x @ x.T, 1) @ Core.forward(m, x)),
    "count": changed(lambda m, x: Core.forward(m, x) * len(x)),
    "batch norm without statistics": nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("size", [24, 7])
def test_coupling_between_samples_is_refused(name: str, size: int) -> None:
    with pytest.raises(ObjectiveError, match="depends on"):
        objective(COUPLED[name], size=size)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (COUPLED["batch mean"], "the others"),  # the same in every order
        (changed(lambda m, x: Core.forward(m, x).flip(0) if len(x) > 8 else Core.forward(m, x)), "their order"),
    ],
)
def test_orders_and_smaller_groups_are_both_tried(model: nn.Module, what: str) -> None:
    """Of so few samples that no larger batch is compared with its parts."""
    with pytest.raises(ObjectiveError, match=f"depends on {what}"):
        make_objective(model, F.cross_entropy, (X[:12], Y[:12]))


@pytest.mark.parametrize("size", [None, 5, 24])
def test_coupling_in_large_batches_only_is_refused(size: int | None) -> None:
    model = changed(lambda m, x: Core.forward(m, x - (x.mean(0) if len(x) > 16 else 0)))
    with pytest.raises(ObjectiveError, match="depends on the others"):
        make_objective(model, F.cross_entropy, (X, Y), batch_size=size)


@pytest.mark.parametrize("large", [1e3, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_outputs_do_not_hide_coupling_of_others(large: float, dtype: torch.dtype) -> None:
    def beside(m: Core, x: Tensor, couple: float) -> Tensor:
        o = Core.forward(m, x)
        return torch.cat([o - couple * o.mean(0), torch.full_like(o[:, :1], large)], 1)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o[:, :3], y)

    with pytest.raises(ObjectiveError, match="depends on the others"):
        make_objective(changed(lambda m, x: beside(m, x, 1.0)), loss, (X, Y), dtype=dtype)
    made = make_objective(changed(lambda m, x: beside(m, x, 0.0)), loss, (X, Y), dtype=dtype, batch_size=7)
    wanted = reference(Core(), F.cross_entropy)
    assert (dense(hessian(made)) - wanted).norm() <= (1e-10 if dtype == torch.float64 else 1e-5) * wanted.norm()


def test_the_last_samples_count_too() -> None:
    x = X.clone()
    x[12:, 0] += 50
    with pytest.raises(ObjectiveError, match="depends on"):  # coupled only where the inputs are large
        make_objective(changed(lambda m, x: Core.forward(m, x) + (x[:, :1] > 20) * x.mean()), F.cross_entropy, (x, Y))


RANDOM = {
    "noise": changed(lambda m, x: Core.forward(m, x + 0.3 * torch.randn_like(x))),
    "small noise": changed(lambda m, x: Core.forward(m, x) * (1 + 1e-9 * torch.randn(1))),
    "dropout that is always on": changed(lambda m, x: Core.forward(m, F.dropout(x, 0.01, True))),
    "bernoulli": changed(lambda m, x: Core.forward(m, x * torch.bernoulli(torch.full_like(x, 0.9)))),
    "poisson": changed(lambda m, x: Core.forward(m, torch.poisson(x.abs()))),
    "permutation": changed(lambda m, x: Core.forward(m, x[:, torch.randperm(5)])),
    "only with gradients": changed(lambda m, x: Core.forward(m, F.dropout(x, 0.5, torch.is_grad_enabled()))),
    "seeded noise": changed(lambda m, x: (torch.manual_seed(0), Core.forward(m, x + torch.randn_like(x)))[1]),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_in_a_forward_are_refused_by_name(name: str) -> None:
    with pytest.raises(ObjectiveError, match=r"draws random numbers \(\w+"):
        objective(RANDOM[name])


def test_the_layer_that_draws_is_named() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(ObjectiveError, match=r"\(rand_like in '1' \(Noise\)\)"):
        objective(nn.Sequential(nn.Linear(5, 3), Noise()))


def test_random_numbers_of_numpy_and_counters_are_refused() -> None:
    calls = [0]

    def counted(model: Core, x: Tensor) -> Tensor:
        calls[0] += 1
        return Core.forward(model, x) * calls[0]

    with pytest.raises(ObjectiveError, match="two forward passes"):
        objective(changed(counted))


def test_a_forward_that_changes_its_weights_is_refused() -> None:
    def shrink(model: Core, x: Tensor) -> Tensor:
        with torch.no_grad():
            model.a.weight.mul_(1 - 2e-6)
        return Core.forward(model, x)

    with pytest.raises(ObjectiveError, match="changes the network's parameters"):
        objective(changed(shrink))


def test_a_forward_that_changes_its_weights_later_is_refused() -> None:
    calls = [0]

    def shrink(model: Core, x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 34:
            with torch.no_grad():
                model.a.weight.mul_(0.9)
        return Core.forward(model, x)

    o = objective(changed(shrink), size=1)
    calls[0] = 34
    with pytest.raises(ObjectiveError, match="changes the network's parameters"):
        o.value_and_gradient()


@pytest.mark.parametrize("change", [lambda x: x.clamp_(-1, 1), lambda x: x.div_(2), F.relu_])
def test_a_forward_that_writes_into_its_inputs_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    before = X.clone()
    with pytest.raises(ObjectiveError, match="changes its inputs in place"):
        objective(changed(lambda m, x: Core.forward(m, change(x))))
    assert torch.equal(X, before)


class Complex(nn.Module):
    """A network with complex numbers: as a parameter, as a constant, in a transform, or as the output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.b = kind, nn.Linear(5, 4), nn.Linear(4, 3)
        matrix = torch.randn(4, 4, dtype=torch.complex64)
        if kind == "parameter":
            self.matrix = nn.Parameter(matrix)
        elif kind == "constant":
            self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.real if x.is_complex() else x)
        if self.kind == "transform":
            h = torch.fft.fft(h).abs()
        elif self.kind in ("parameter", "constant"):
            h = (h.to(self.matrix.dtype) @ self.matrix).abs().to(h.dtype)
        out: Tensor = self.b(h)
        return torch.complex(out, out) if self.kind == "output" else out


@pytest.mark.parametrize(
    ("kind", "words"),
    [("parameter", "parameter 'matrix' is complex"), ("input", "inputs are complex"), ("output", "complex64 tensor")],
)
def test_complex_numbers_are_refused_in_words(kind: str, words: str) -> None:
    x = X.to(torch.complex64) if kind == "input" else X
    with pytest.raises(ObjectiveError, match=words):
        make_objective(Complex(kind), F.cross_entropy, (x, Y))


@pytest.mark.parametrize("kind", ["constant", "transform", "parameter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_outputs_of_complex_insides_have_their_hessian(kind: str, dtype: torch.dtype) -> None:
    model = Complex(kind)
    made = make_objective(model, F.cross_entropy, (X, Y), dtype=dtype, params="a.*,b.*", batch_size=7)
    if kind == "parameter":
        model.matrix.requires_grad_(False)
    wanted = reference(model, F.cross_entropy)
    tolerance = 1e-6 if kind in ("constant", "parameter") or dtype == torch.float32 else 1e-10
    assert (dense(hessian(made)) - wanted).norm() <= tolerance * wanted.norm()


def test_a_model_that_differentiates_in_its_forward_pass_is_checked() -> None:
    def potential(model: Core, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(Core.forward(model, x).square().sum(), x, create_graph=True)
        return slope[:, :3]

    make_objective(changed(potential), F.cross_entropy, (X, Y))
    with pytest.raises(ObjectiveError, match="depends on the others"):
        make_objective(changed(lambda m, x: potential(m, x - x.mean(0))), F.cross_entropy, (X, Y))


class StochasticDepth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(len(x), 1).bernoulli_(0.8) / 0.8 if self.training else x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(1, 3, 2, dropout=0.5, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.r(x[:, :, None])[0][:, -1])
        return out


EVALUATED = {
    "functional dropout": changed(lambda m, x: Core.forward(m, F.dropout(x, 0.5, m.training))),
    "stochastic depth": nn.Sequential(nn.Linear(5, 4), StochasticDepth(), nn.Tanh(), nn.Linear(4, 3)),
    "rrelu": nn.Sequential(nn.Linear(5, 4), nn.RReLU(), nn.Linear(4, 3)),
    "dropout in an LSTM": Recurrent(),
    "own batch norm": nn.Sequential(nn.Linear(5, 4), OwnBatchNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "spectral norm": nn.Sequential(nn.Linear(5, 4), torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
}


@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.parametrize("size", [24, 7])
def test_everything_is_evaluated(name: str, size: int) -> None:
    """In training mode each of these draws numbers, couples samples or iterates; the Hessian is the evaluated one."""
    torch.manual_seed(0)
    model = EVALUATED[name].train()
    found = dense(hessian(make_objective(model, F.cross_entropy, (X, Y), batch_size=size, dtype=torch.float64)))
    expected = reference(model, F.cross_entropy)
    assert (found - expected).norm() <= 1e-10 * expected.norm()


WEIGHTS = torch.tensor([0.1, 1.0, 5.0])
PADDED = torch.where(torch.arange(24) < 20, Y, -100)
LOSSES_THAT_ARE_NO_MEANS = {
    "class weights": (lambda o, y: F.cross_entropy(o, y, WEIGHTS.to(o)), Y),
    "class weights, sorted": (lambda o, y: F.cross_entropy(o, y, WEIGHTS.to(o)), Y.sort().values),
    "ignored padding": (lambda o, y: F.cross_entropy(o, y), PADDED),
    "sum": (lambda o, y: F.cross_entropy(o, y, reduction="sum"), Y),
    "tiny sum": (lambda o, y: F.cross_entropy(o, y, reduction="sum") * 1e-12, Y),
    "broadcast": (lambda o, y: F.mse_loss(o[:, 0], y[:, None].to(o)), Y),
    "largest": (lambda o, y: F.cross_entropy(o, y, reduction="none").max(), Y),
    "median": (lambda o, y: F.cross_entropy(o, y, reduction="none").median(), Y),
    "root": (lambda o, y: F.mse_loss(o, F.one_hot(y, 3).to(o)).sqrt(), Y),
}


@pytest.mark.parametrize("name", LOSSES_THAT_ARE_NO_MEANS)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_losses_that_are_no_means_are_refused(name: str) -> None:
    loss, y = LOSSES_THAT_ARE_NO_MEANS[name]
    with pytest.raises(ObjectiveError, match="not a mean over samples"):
        objective(Core(), loss, y)


def test_a_silent_network_does_not_hide_class_weights() -> None:
    model = Core()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loss, y = LOSSES_THAT_ARE_NO_MEANS["class weights"]
    with pytest.raises(ObjectiveError, match="not a mean over samples"):
        objective(model, loss, y)


def test_losses_that_change_targets_or_keep_state_are_refused() -> None:
    def changing(o: Tensor, y: Tensor) -> Tensor:
        y.fill_(0)
        return F.cross_entropy(o, y)

    calls = [0]

    def counting(o: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return F.cross_entropy(o, y) * calls[0]

    before = Y.clone()
    with pytest.raises(ObjectiveError, match="changes its targets"):
        objective(Core(), changing)
    assert torch.equal(Y, before)
    with pytest.raises(ObjectiveError, match="keeps state"):
        objective(Core(), counting)


MEANS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "cross-entropy": (F.cross_entropy, Y),
    "mean square on one-hot": (LOSSES["mse"], Y),
    "regression": (lambda o, y: (o - y).square().mean(), torch.randn(24, 3)),
    "label smoothing": (lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1), Y),
    "probabilities": (F.cross_entropy, torch.softmax(torch.randn(24, 3), 1)),
    "binary": (lambda o, y: F.binary_cross_entropy(torch.sigmoid(o[:, 0]), (y > 0).to(o)), Y),
    "poisson": (lambda o, y: F.poisson_nll_loss(o[:, 0], y.to(o)), Y),
    "huber": (lambda o, y: F.huber_loss(o[:, 0], y.to(o)), Y),
    "margin": (lambda o, y: F.multi_margin_loss(o, y), Y),
    "with a constant": (lambda o, y: F.cross_entropy(o, y) + 3, Y),
    "tiny": (lambda o, y: F.cross_entropy(o, y) * 1e-12, Y),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_over_samples_pass(name: str, dtype: torch.dtype) -> None:
    loss, y = MEANS[name]
    made = make_objective(Core(), loss, (X, y), batch_size=7, dtype=dtype)
    check(made)  # twice changes nothing


@pytest.mark.parametrize("spec", [{}, {"model": "mlp"}, {"model": "rsnn"}, {"model": "resnet"}, {"norm": "none"}])
def test_our_networks_pass(spec: dict[str, str]) -> None:
    torch.manual_seed(0)
    size = {"channels": 3, "hidden": (6, 5), "timesteps": 3, "neuron": "lif"}
    net = Network(Spec(**{"input_shape": (1, 8, 8), "classes": 10, **size, **spec}))  # type: ignore[arg-type]
    make_objective(net, LOSSES["mse"], (torch.rand(9, 1, 8, 8), torch.arange(9)), batch_size=4)


# ---------------------------------------------------------------- half precision
class Mixed(nn.Module):
    """A network whose forward pass runs under autocast, or converts to half precision by hand."""

    def __init__(self, kind: torch.dtype, by_hand: bool) -> None:
        super().__init__()
        self.fc, self.kind, self.by_hand = nn.Linear(3, 2), kind, by_hand

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            return F.linear(x.to(self.kind), self.fc.weight.to(self.kind)).float()
        with torch.autocast("cpu", self.kind):
            return F.linear(x, self.fc.weight).float()


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_forward_pass_in_half_precision_is_refused(kind: torch.dtype, by_hand: bool) -> None:
    data = torch.randn(6, 3), torch.randint(2, (6,))
    with pytest.raises(ObjectiveError, match=f"forward pass computes in {str(kind).removeprefix('torch.')}"):
        make_objective(Mixed(kind, by_hand), F.cross_entropy, data)


@pytest.mark.parametrize("kind", HALF)
def test_parameters_in_half_precision_are_refused_and_convert(kind: torch.dtype) -> None:
    data = torch.randn(6, 3), torch.randint(2, (6,))
    model = nn.Linear(3, 2).to(kind)
    with pytest.raises(ObjectiveError, match=f"parameters are {str(kind).removeprefix('torch.')}"):
        make_objective(model, F.cross_entropy, data)
    wide = make_objective(model, F.cross_entropy, data, dtype=torch.float64)
    assert dense(hessian(wide)).isfinite().all()


def test_products_inside_autocast_are_refused() -> None:
    objective = make_objective(nn.Linear(3, 2), F.cross_entropy, (torch.randn(6, 3), torch.randint(2, (6,))))
    op, v = hessian(objective), torch.randn(objective.size, 1)
    exact = op @ v
    with torch.autocast("cpu", torch.bfloat16):
        for compute in (lambda: op @ v, lambda: op.batch_forms(v), objective.value_and_gradient):
            with pytest.raises(ObjectiveError, match=r"torch.autocast is on \(bfloat16\)"):
                compute()
    assert (op @ v).equal(exact)


# ---------------------------------------------------------------- objectives made by hand
def by_hand(model: nn.Module, calls: list[int]) -> Objective:
    """An objective without `make_objective`, whose loss counts its calls."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(targets))
        return F.cross_entropy(outputs, targets)

    batches = ((torch.randn(9, 3), torch.randint(2, (9,))),)
    return Objective(model, loss, batches, dict(model.named_parameters()))


@pytest.mark.parametrize("factory", [hessian, ggn, fisher])
def test_a_bare_operator_checks_its_objective(factory: Callable[[Objective], CurvatureOperator]) -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(ObjectiveError, match="depends on the others"):
        factory(by_hand(Centred(3, 2), []))


def test_an_objective_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Objective] = []
    monkeypatch.setattr(
        "hessian_tools.objective.check_objective", lambda objective, derivatives: checked.append(objective)
    )
    objective = by_hand(nn.Linear(3, 2), [])
    for factory in (hessian, hessian, ggn):
        factory(objective)
    ggn(objective.rebatched(4))
    assert [id(each) for each in checked] == [id(objective)]
    for wanted, count in ((True, 2), (False, 2)):
        made = make_objective(nn.Linear(3, 2), F.cross_entropy, [*objective.batches], batch_size=4, check=wanted)
        hessian(made)
        assert len(checked) == count


def test_an_objective_made_by_hand_has_the_same_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    objective = by_hand(model, [])
    objective = replace(objective, batches=tuple((x.double(), y) for x, y in objective.batches))
    made = make_objective(model, F.cross_entropy, [*objective.batches])
    torch.testing.assert_close(dense(hessian(objective)), dense(hessian(made)))
