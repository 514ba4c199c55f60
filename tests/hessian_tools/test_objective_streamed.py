"""Batches that are read when they are used: the same numbers as from memory, and few of them alive at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.analysis.flatness.worst_case import m_sharpness, sam_sharpness
from hessian_tools.analysis.pyhessian import pyhessian_trace
from hessian_tools.analysis.sample_curve import samples_curve
from hessian_tools.analysis.sampling_error import grouped
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.chain import segments
from hessian_tools.objective import Objective, Streamed, make_objective
from hessian_tools.operators import curvature as operators
from hessian_tools.operators.curvature import _linearize_hessian, ggn, hessian
from hessian_tools.perturbation import accuracy, mean_loss, outputs_at
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

N = 24


class Counting:
    """Inputs of which it knows how many tensors are alive, whoever holds their memory."""

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


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def unknown_layer() -> nn.Module:
    """One that goes through autograd."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.SELU(), nn.Linear(6, 3)).double()


def spiking(timesteps: int = 4, coded: bool = False) -> nn.Module:
    torch.manual_seed(1)
    coding = "spikes" if coded else "direct"
    return Network(Spec("mlp", (1, 4, 4), 3, hidden=(6,), norm="none", timesteps=timesteps, coding=coding)).double()


def pair(model: nn.Module, size: int = 5, shape: tuple[int, ...] = (1, 4, 4)) -> tuple[Objective, Objective, Counting]:
    """(in memory, streamed, its inputs), with a ragged last batch."""
    draw = torch.Generator().manual_seed(3)
    x = torch.rand(N, *shape, generator=draw, dtype=torch.float64).round(decimals=2)
    y = torch.randint(0, 3, (N,), generator=draw)
    inputs = Counting(x)
    made = (make_objective(model, LOSSES["mse"], data, batch_size=size) for data in ((x, y), (inputs, y)))
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


@pytest.mark.parametrize("model", [plain, unknown_layer, spiking])
@pytest.mark.parametrize("name", MEASURES)
def test_the_same_as_from_memory(name: str, model: Callable[[], nn.Module]) -> None:
    inside, streamed, _ = pair(model())
    assert same(MEASURES[name](inside), MEASURES[name](streamed))


def test_the_same_in_segments_of_time() -> None:
    inside, streamed = (replace(o, segmentation=segments) for o in pair(spiking(20, True), 5, (20, 1, 4, 4))[:2])
    for name in ("hessian", "ggn, kept", "value and gradient", "outputs"):
        assert same(MEASURES[name](inside), MEASURES[name](streamed))


def test_a_whole_spectrum_is_the_same() -> None:
    inside, streamed, _ = pair(plain())
    settings = SpectrumSettings(top=2, smallest=1, steps=8, probes=2)
    first, second = (replace(spectrum(o, settings), seconds=0.0) for o in (inside, streamed))
    assert repr(first) == repr(second)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("model", [plain, unknown_layer, spiking])
def test_no_more_batches_alive_than_threads_and_one(model: Callable[[], nn.Module], threads: int) -> None:
    _, o, inputs = pair(model(), size=2)
    assert isinstance(o.batches, Streamed)
    for name in ("value and gradient", "hessian", "outputs"):
        inputs.reset()
        MEASURES[name](o)
        assert sum(inputs.read) >= N
        assert max(inputs.read) == 2
        assert 1 <= inputs.peak <= threads + 1, name
        assert inputs.alive == 0


@pytest.mark.parametrize("segmented", [False, True])
def test_kept_batches_count_what_was_read_and_are_read_once(segmented: bool) -> None:
    """A segment's product keeps nothing but its inputs, that of a plain network its layers' inputs too."""
    _, o, inputs = pair(spiking(20, True), 2, (20, 1, 4, 4)) if segmented else pair(plain(), 2)
    o = replace(o, segmentation=segments if segmented else None)
    size = o.batches[0][0].nbytes if segmented else operators._measured(o, o.batches[0], _linearize_hessian)[1]
    assert size >= 2 * 16 * 8
    op = hessian(o, memory=3.5 * size)
    first = op @ vector(o)
    assert inputs.alive == 3
    inputs.reset()
    assert torch.equal(op @ vector(o), first)
    assert inputs.read.count(2) == N // 2 - 3
    assert inputs.peak == 3 + 1 + segmented  # whether a model runs in segments is tried on one sample


def test_nothing_is_read_for_what_is_known() -> None:
    inside, o, inputs = pair(plain())
    known = [(p.samples, p.sizes, p.targets, [*p.batch_weights().items()], p.rebatched(7).sizes) for p in (inside, o)]
    assert same(*known)
    assert known[0][1] == [5, 5, 5, 5, 4]
    assert len(o.batches[1:3]) == 2
    assert inputs.read == []
    o.first_inputs(3)
    assert inputs.read == [3]


def test_dtype_and_refusals() -> None:
    _, o, inputs = pair(plain())
    single = make_objective(o.model, o.loss, (inputs, torch.zeros(N, dtype=torch.int64)), dtype=torch.float32)
    assert single.batches[0][0].dtype == torch.float32
    with pytest.raises(ValueError, match="24 inputs but 23 targets"):
        make_objective(o.model, o.loss, (inputs, torch.zeros(N - 1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="no samples"):
        make_objective(o.model, o.loss, (Counting(torch.zeros(0, 1, 4, 4)), torch.zeros(0, dtype=torch.int64)))
