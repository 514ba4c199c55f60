"""Tests of hessian_tools.objective: means, batches in memory and streamed, modes and parameters."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objectives import spiking_network
from torch import Tensor, nn

from hessian_tools.analysis.flatness.worst_case import m_sharpness, sam_sharpness
from hessian_tools.analysis.operator_spectrum.pyhessian import pyhessian_trace
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.analysis.uncertainty.sample_curve import samples_curve
from hessian_tools.analysis.uncertainty.sampling_error import grouped
from hessian_tools.objective import Loss, Objective, Streamed, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn, hessian, linearize_hessian
from hessian_tools.perturbation import accuracy, mean_loss, outputs_at
from ikun.losses import LOSSES


def mse(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def toy(seed: int = 0, samples: int = 10) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, (torch.randn(samples, 3).double(), torch.randn(samples, 2).double())


@pytest.mark.parametrize("size", [1, 3, 7, 10, 100])
def test_value_and_gradient_do_not_depend_on_batches(size: int) -> None:
    model, data = toy()
    loss = mse(model(data[0]), data[1])
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    value, gradient = make_objective(model, mse, data, batch_size=size).value_and_gradient()
    assert value == pytest.approx(loss.item(), rel=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_duplicated_samples_change_nothing() -> None:
    model, (x, y) = toy()
    once = make_objective(model, mse, (x, y)).value_and_gradient()
    twice = make_objective(model, mse, (x.repeat(2, 1), y.repeat(2, 1)), batch_size=7).value_and_gradient()
    assert once[0] == pytest.approx(twice[0], rel=1e-14)
    torch.testing.assert_close(once[1], twice[1])


def test_split_and_flatten_are_inverse_and_missing_counts_as_zero() -> None:
    model, data = toy()
    objective = make_objective(model, mse, data)
    v = torch.randn(objective.size, dtype=torch.float64)
    assert torch.equal(objective.flatten(objective.split(v)), v)
    parts: list[Tensor | None] = list(objective.split(v))
    parts[1] = None
    assert torch.equal(objective.flatten(parts)[12:16], torch.zeros(4, dtype=torch.float64))
    assert objective.weights().shape == (objective.size,)


def test_the_users_model_is_left_alone() -> None:
    model, data = toy()
    model.train()
    before = [p.clone() for p in model.parameters()]
    objective = make_objective(model, mse, data, params="0.*", dtype=torch.float32)
    objective.value_and_gradient()
    assert model.training
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float64 for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert list(objective.parameters) == ["0.weight", "0.bias"]
    assert objective.dtype == torch.float32


def test_patterns_choose_parameters() -> None:
    model, data = toy()
    assert list(make_objective(model, mse, data, params="*.bias").parameters) == ["0.bias", "2.bias"]
    assert list(make_objective(model, mse, data, params="0.bias, 2.*").parameters) == ["0.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"no parameter matches 'conv\*': the model has 0.weight, 0.bias"):
        make_objective(model, mse, data, params="conv*")


def test_reset_runs_before_every_forward() -> None:
    class Counting(nn.Module):
        """A leaky neuron that forgets only when told to."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.state: Tensor | float = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.state = self.state + self.w * x
            return torch.as_tensor(self.state)

    def reset(model: nn.Module) -> None:
        model.state = 0.0  # type: ignore[assignment]

    x = torch.ones(4, 1, dtype=torch.float64)
    objective = make_objective(Counting(), mse, (x, 2 * x), batch_size=1, reset=reset)
    first, second = objective.value_and_gradient(), objective.value_and_gradient()
    assert first[0] == second[0] == 1.0
    assert torch.equal(first[1], second[1])


def test_bad_input() -> None:
    model, (x, y) = toy()
    with pytest.raises(ValueError, match="no samples"):
        make_objective(model, mse, (x[:0], y[:0]))
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'0\.weight' has NaN"):
        make_objective(model, mse, (x, y))


def test_a_device_without_float64_is_refused_in_one_line() -> None:
    model, data = toy()
    with pytest.raises(ValueError, match=r"^device mps has no float64, in which .* are computed: use the cpu$"):
        make_objective(model, mse, data, device="mps")


def test_rebatched_keeps_order() -> None:
    model, (x, y) = toy()
    objective = make_objective(model, mse, (x, y), batch_size=4).rebatched(3)
    assert [len(t) for _, t in objective.batches] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([b for b, _ in objective.batches]), x)
    assert sum(w for _, w in objective.weighted_batches()) == pytest.approx(1)


# --- streamed batches

SAMPLES = 24


class CountingInputs:
    """Inputs that count how many of their batches are still held in memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.read: list[int] = []  # samples of every read
        self.alive = self.peak = 0
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        memory = self.x[index].numpy()  # a copy, which torch.from_numpy keeps alive as long as any view of it
        with self.lock:
            self.read.append(len(index))
            self.alive += 1
            self.peak = max(self.peak, self.alive)
        weakref.finalize(memory, self._freed)
        return torch.from_numpy(memory)

    def _freed(self) -> None:
        with self.lock:
            self.alive -= 1

    def reset(self) -> None:
        self.read, self.peak = [], self.alive


def smooth() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def unknown_layer() -> nn.Module:
    """One that goes through autograd."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.SELU(), nn.Linear(6, 3)).double()


def spiking(timesteps: int = 4, coded: bool = False) -> nn.Module:
    spec = {"input_shape": (1, 4, 4), "hidden": (6,), "norm": "none", "timesteps": timesteps}
    return spiking_network(1, 1.0, coding="spikes" if coded else "direct", **spec).double()


def pair(
    model: nn.Module, size: int = 5, shape: tuple[int, ...] = (1, 4, 4)
) -> tuple[Objective, Objective, CountingInputs]:
    """(in memory, streamed, its inputs), with a ragged last batch."""
    draw = torch.Generator().manual_seed(3)
    x = torch.rand(SAMPLES, *shape, generator=draw, dtype=torch.float64).round(decimals=2)
    y = torch.randint(0, 3, (SAMPLES,), generator=draw)
    inputs = CountingInputs(x)
    made = (make_objective(model, LOSSES["mse"], data, batch_size=size, check=False) for data in ((x, y), (inputs, y)))
    return *made, inputs  # type: ignore[return-value]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, list | tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[call-overload]
    return bool(a == b)


def vector(o: Objective) -> Tensor:
    return torch.randn(o.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def outputs(o: Objective) -> list[Tensor]:
    return list(outputs_at(o, lambda k: o.weights() * (1 + k / 10), range(4)))


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(7)


MEASURES: dict[str, Callable[[Objective], object]] = {
    "value and gradient": lambda o: o.value_and_gradient(),
    "hessian": lambda o: hessian(o, memory=0) @ vector(o),
    "ggn, kept": lambda o: ggn(o) @ vector(o),
    "forms of groups": lambda o: hessian(grouped(o, stream())).batch_forms(vector(o)[:, None]),
    "outputs": outputs,
    "accuracy and loss": lambda o: [f(o, outputs(o)[0]) for f in (accuracy, mean_loss)],
    "sam": lambda o: repr((sam_sharpness(o, 0.1), m_sharpness(o, 0.1, 7))),
    "batches": lambda o: list(o.rebatched(7).batches),
    "batches of others": lambda o: list(
        grouped(o, stream()).regrouped([torch.tensor([5, 2]), torch.tensor([9])]).batches
    ),
    "first inputs": lambda o: o.first_inputs(3),
    "samples": lambda o: [
        repr(p) for p in samples_curve(o, [3, 12], 2, operator=hessian, seed=0, top=1, trace_probes=2)
    ],
    "pyhessian": lambda o: pyhessian_trace(o, seed=0, max_iterations=3),
}


@pytest.mark.parametrize("model", [smooth, unknown_layer, spiking])
@pytest.mark.parametrize("name", MEASURES)
def test_streamed_batches_give_the_numbers_of_batches_in_memory(name: str, model: Callable[[], nn.Module]) -> None:
    inside, streamed, _ = pair(model())
    assert same(MEASURES[name](inside), MEASURES[name](streamed))


def test_streamed_batches_give_the_same_in_segments() -> None:
    inside, streamed = (replace(o, batch_memory=1.0) for o in pair(spiking(20, True), 5, (20, 1, 4, 4))[:2])
    for name in ("hessian", "ggn, kept", "value and gradient", "outputs"):
        assert same(MEASURES[name](inside), MEASURES[name](streamed))


def test_streamed_batches_give_the_same_spectrum() -> None:
    inside, streamed, _ = pair(smooth())
    settings = SpectrumSettings(top=2, smallest=1, steps=8, probes=2)
    first, second = (replace(spectrum(o, settings), seconds=0.0) for o in (inside, streamed))
    assert repr(first) == repr(second)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("model", [smooth, unknown_layer, spiking])
def test_no_more_streamed_batches_are_alive_than_threads_and_one(model: Callable[[], nn.Module], threads: int) -> None:
    _, o, inputs = pair(model(), size=2)
    assert isinstance(o.batches, Streamed)
    for name in ("value and gradient", "hessian", "outputs"):
        inputs.reset()
        MEASURES[name](o)
        assert sum(inputs.read) >= SAMPLES
        assert max(inputs.read) == 2
        assert 1 <= inputs.peak <= threads + 1, name
        assert inputs.alive == 0


@pytest.mark.parametrize("segmented", [False, True])
def test_kept_batches_count_their_inputs_and_are_read_once(segmented: bool) -> None:
    """A product in segments keeps nothing but its inputs."""
    _, o, inputs = pair(spiking(20, True), 2, (20, 1, 4, 4)) if segmented else pair(smooth(), 2)
    o = replace(o, batch_memory=1.0 if segmented else 0.0)
    size = o.batches[0][0].nbytes if segmented else linearize_hessian(o, o.batches[0]).nbytes
    assert size >= 2 * 16 * 8
    op = hessian(o, memory=3.5 * size)
    first = op @ vector(o)
    assert inputs.alive == 3
    inputs.reset()
    assert torch.equal(op @ vector(o), first)
    assert inputs.read.count(2) == SAMPLES // 2 - 3
    assert inputs.peak == 3 + 1


def test_shapes_and_weights_are_known_without_reading_inputs() -> None:
    inside, o, inputs = pair(smooth())
    known = [(p.samples, p.sizes, p.targets, [*p.batch_weights().items()], p.rebatched(7).sizes) for p in (inside, o)]
    assert same(*known)
    assert known[0][1] == [5, 5, 5, 5, 4]
    assert len(o.batches[1:3]) == 2
    assert inputs.read == []
    o.first_inputs(3)
    assert inputs.read == [3]


def test_streamed_inputs_are_cast_and_mismatches_refused() -> None:
    _, o, inputs = pair(smooth())
    single = make_objective(o.model, o.loss, (inputs, torch.zeros(SAMPLES, dtype=torch.int64)), dtype=torch.float32)
    assert single.batches[0][0].dtype == torch.float32
    with pytest.raises(ValueError, match="24 inputs but 23 targets"):
        make_objective(o.model, o.loss, (inputs, torch.zeros(SAMPLES - 1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="no samples"):
        make_objective(o.model, o.loss, (CountingInputs(torch.zeros(0, 1, 4, 4)), torch.zeros(0, dtype=torch.int64)))


# ---------------------------------------------------------------- contexts, lengths and empty parameters
def dense_reference(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]], loss: Loss) -> Tensor:
    """The Hessian of the mean loss in float64, sample by sample."""
    model = copy.deepcopy(model).double().eval()
    parameters = [p for p in model.parameters() if p.numel()]
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(y))]
    losses = [loss(model(x.double() if x.is_floating_point() else x), y) for x, y in samples]
    gradient = torch.autograd.grad(torch.stack(losses).mean(), parameters, create_graph=True)
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in torch.cat([g.reshape(-1) for g in gradient])]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [False, True])
def test_curvature_inside_contexts_without_gradients(context: Callable[[], Any], inside: bool) -> None:
    """The gradient was 0 and the Hessian failed there. With `inside`, the model and the data are made there too."""

    def made() -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(12, 5), torch.arange(12) % 3

    model, x, y = made()
    wanted = dense_reference(model, [(x, y)], F.cross_entropy)
    slope = make_objective(model, F.cross_entropy, (x, y), dtype=torch.float64).value_and_gradient()[1]
    with context():
        model, x, y = made() if inside else (model, x, y)
        objective = make_objective(model, F.cross_entropy, (x, y), dtype=torch.float64, batch_size=5)
        assert (objective.value_and_gradient()[1] - slope).norm() <= 1e-12 * slope.norm()
        assert slope.norm() > 0.01
        for factory in (hessian, ggn):
            op = factory(objective)
            assert (dense(op) - dense(op).T).abs().max() < 1e-12
        assert (dense(hessian(objective)) - wanted).norm() <= 1e-12 * wanted.norm()
        settings = SpectrumSettings(top=1, smallest=1, density=False)
        found = spectrum(objective, settings).spectra["hessian"].eigenvalues[0]
        assert abs(found.value - float(torch.linalg.eigvalsh(wanted)[-1])) <= found.residual + 1e-12


class Words(nn.Module):
    """A network for sequences of any length, with one output per sample or per word."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.each = nn.Embedding(7, 3), nn.Linear(3, 7), each

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        out: Tensor = self.b(h if self.each else h.mean(1))
        return out


def by_word(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean()


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("size", [None, 5])
def test_batches_of_different_lengths(each: bool, size: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(7, (n, length), generator=generator) for n, length in ((8, 5), (12, 3), (6, 5))]
    data = [(x, x if each else x[:, 0]) for x in inputs]
    loss = by_word if each else F.cross_entropy
    model = Words(each)
    wanted = dense_reference(model, data, loss)
    objective = make_objective(model, loss, data, dtype=torch.float64, batch_size=size)
    assert (dense(hessian(objective)) - wanted).norm() <= 1e-12 * wanted.norm()
    parts = torch.randperm(26, generator=generator).split(7)
    regrouped = objective.regrouped(parts)
    assert regrouped.samples == 26
    assert sum(regrouped.parts) == len(regrouped.batches) > len(parts)
    assert (dense(hessian(regrouped)) - wanted).norm() <= 1e-12 * wanted.norm()
    v = torch.randn(objective.size, 1, dtype=torch.float64, generator=generator)
    (forms,), counts = hessian(regrouped).batch_forms(v)
    assert counts.tolist() == [len(part) for part in parts]
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(y))]
    for part, form in zip(parts, forms, strict=True):
        own = dense_reference(model, [samples[i] for i in part], loss)
        assert float((form - v.T @ own @ v).abs()) <= 1e-12
    found = spectrum(objective, SpectrumSettings(top=1, smallest=0, density=False)).spectra["hessian"].eigenvalues[0]
    assert abs(found.value - float(torch.linalg.eigvalsh(wanted)[-1])) <= found.residual + 1e-12
    assert found.data_stderr > 0 or found.data_stderr_least > 0


def test_parameters_without_entries_are_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    model.none = nn.Parameter(torch.zeros(0, 3))
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    objective = make_objective(model, F.cross_entropy, (x, y))
    assert list(objective.parameters) == ["weight", "bias"]
    wanted = dense_reference(model, [(x, y)], F.cross_entropy)
    found = spectrum(objective, SpectrumSettings(top=1, smallest=0)).spectra["hessian"].eigenvalues[0]
    assert abs(found.value - float(torch.linalg.eigvalsh(wanted)[-1])) <= found.residual
