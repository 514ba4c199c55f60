"""Tests of training: learning, determinism, resumption, schedules, optimizers, early stopping, failures and the log."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ikun.checkpoint import Checkpoint, CheckpointError, load_checkpoint, read_plain
from ikun.data.encoding import encode
from ikun.data.spec import DataSpec
from ikun.initializers.catalog import initialize
from ikun.layer_statistics import LayerStatistics
from ikun.networks import Network, Spec
from ikun.training import loop as training
from ikun.training.health import failures
from ikun.training.log import loss_path, run_paths, snapshot_path
from ikun.training.loop import Initialization, evaluate, learning_rate, start, train
from ikun.training.spec import TrainingSpec

ROOT = Path(__file__).parents[3]
NET = Spec(channels=3, timesteps=2)
MLP = Spec(model="mlp", hidden=(24,), timesteps=2)
DATA = DataSpec("digits", 96, 5)
RUN = TrainingSpec(alpha=0.1, epochs=4, batch_size=32, lr=5e-3)
LAYER_KEYS = {
    "firing_rate",
    "derivative_square",
    "derivative_square_by_step",
    "current_variance",
    "gradient_square",
    "distance",
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run.pt"


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_paths(out)["log"].read_text().splitlines()]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---------------------------------------------------------------- learning, and the log
LIF = Spec(model="mlp", hidden=(48,), neuron="lif")


@pytest.mark.parametrize(
    ("net", "loss", "share", "gain"),
    [(LIF, "mse", 0.6, 0.3), (LIF, "ce", 0.9, 0.3), (Spec(channels=4), "mse", 0.7, 0.03)],
)
def test_loss_falls_and_the_log_says_how(net: Spec, loss: str, share: float, gain: float, out: Path) -> None:
    spec = TrainingSpec(epochs=8, batch_size=16, loss=loss, lr=1e-2, schedule="none")
    found = train(net, DATA, spec, out)
    lines = log(out)
    assert lines[-1]["loss"] < share * lines[0]["loss"]
    assert lines[-1]["accuracy"] > lines[0]["accuracy"] + gain
    assert [line["epoch"] for line in lines] == list(range(1, 9))
    layers = [name for name, *_ in Network(net).stages()]
    for line in lines:
        assert {"epoch", "lr", "loss", "accuracy", "gradient_norm", "test_loss", "test_accuracy", "layers"} <= set(line)
        assert line["lr"] == spec.lr
        assert line["gradient_norm"] > 0
        assert list(line["layers"]) == layers
        for layer in line["layers"].values():
            assert set(layer) == LAYER_KEYS
            assert 0 <= layer["firing_rate"] <= 1
            assert 0 < layer["derivative_square"] <= 1
            assert layer["distance"] > 0
    assert found.history == lines
    assert not run_paths(out)["resume"].exists()
    assert sorted(p.name for p in out.parent.iterdir()) == ["run.pt", "run.train.json", "run.train.jsonl"]


def test_the_checkpoint_tells_everything(out: Path) -> None:
    returned = train(MLP, DATA, RUN, out)
    found = load_checkpoint(out)
    assert (found.network, found.data, found.loss) == (MLP, DATA, "mse")
    assert found.training | dataclasses.asdict(RUN) == found.training
    assert (found.training["epochs_run"], found.training["best_epoch"], found.training["samples"]) == (4, 4, 96)
    assert found.training["data_sha256"] == DATA.load().sha256
    assert found.history == returned.history == log(out)
    assert same(found.state, returned.state)
    loss, accuracy = evaluate(found.build(), DATA.load("test"), "mse")
    assert [loss, accuracy] == [found.history[-1]["test_loss"], found.history[-1]["test_accuracy"]]


def test_log_numbers_are_the_direct_ones(out: Path) -> None:
    """One epoch of one batch: loss, accuracy and gradient norm before the step; the rest after it."""
    spec = dataclasses.replace(RUN, epochs=1, batch_size=96)
    found = train(MLP, DATA, spec, out)
    data, net = DATA.load(), start(MLP, DATA.load(), spec)
    first = {k: v.clone() for k, v in net.state_dict().items()}
    rates = net.train()(data.images)
    loss = ((rates - torch.eye(10)[data.labels]) ** 2).mean()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None))
    line = found.history[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["accuracy"] == pytest.approx(float((rates.argmax(1) == data.labels).double().mean()), abs=2 / 96)
    assert line["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    trained = found.build()
    images = data.images.expand(-1, 1, 8, 8)
    for name in ("fc1", "fc2"):
        w = found.state[f"{name}.weight"]
        distance = float((w - first[f"{name}.weight"]).norm() / first[f"{name}.weight"].norm())
        assert line["layers"][name]["distance"] == pytest.approx(distance, rel=1e-5)
    assert line["layers"]["fc2"]["firing_rate"] == pytest.approx(trained(images).mean().item(), rel=1e-5)
    h = trained.norm1(trained.fc1(data.images.flatten(1)))  # type: ignore[operator]
    check_layer(line["layers"]["fc1"], trained, h.detach(), data.labels)
    test = DATA.load("test")
    rates = trained(test.images)
    assert line["test_loss"] == pytest.approx(((rates - torch.eye(10)[test.labels]) ** 2).mean().item(), rel=1e-4)
    assert line["test_accuracy"] == pytest.approx(float((rates.argmax(1) == test.labels).double().mean()), rel=1e-6)


def check_layer(said: dict[str, Any], net: Network, current: Tensor, labels: Tensor) -> None:
    """The first layer of MLP from its current [N, F], the same at both steps, by hand: IF, hard reset, atan:2."""
    leaf = current.expand(2, *current.shape).clone().requires_grad_()
    s = net.spike2(net.fc2(net.spike1(leaf)))  # type: ignore[operator]
    ((s.mean(0) - torch.eye(10)[labels]) ** 2).mean().backward()
    assert leaf.grad is not None
    first = current.double()
    second = torch.where(first >= 1, 0, first) + first
    squares = [float((1 / (1 + (math.pi * (h - 1)) ** 2)).square().mean()) for h in (first, second)]
    assert said["current_variance"] == pytest.approx(float(first.var(correction=0)), rel=1e-3)
    assert said["gradient_square"] == pytest.approx(float(leaf.grad.double().square().mean()), rel=1e-4)
    assert said["derivative_square_by_step"] == pytest.approx(squares, rel=1e-5)
    assert said["derivative_square"] == pytest.approx(sum(squares) / 2, rel=1e-5)


def test_evaluate_counts_samples_and_not_batches() -> None:
    data, net = DATA.load(), Network(MLP).train()
    whole = evaluate(net, data, "ce")
    assert evaluate(net, data, "ce", batch_size=25) == pytest.approx(whole, rel=1e-6)
    assert not net.training


def test_no_epochs_is_the_initialization(out: Path) -> None:
    found = train(NET, DATA, dataclasses.replace(RUN, epochs=0), out)
    assert found.history == []
    assert run_paths(out)["log"].read_text() == ""
    assert same(found.state, start(NET, DATA.load(), RUN).state_dict())


# ---------------------------------------------------------------- determinism
@pytest.mark.parametrize("net", [dataclasses.replace(NET, coding="poisson", neuron="plif"), MLP])
def test_two_runs_are_the_same_bits(net: Spec, tmp_path: Path) -> None:
    found = []
    for i in range(2):
        torch.manual_seed(i)
        np.random.seed(i)
        found.append(train(net, DATA, dataclasses.replace(RUN, epochs=2), tmp_path / f"{i}.pt"))
    assert same(found[0].state, found[1].state)
    assert found[0].history == found[1].history
    other = train(net, DATA, dataclasses.replace(RUN, epochs=2, seed=1), tmp_path / "2.pt")
    assert not same(found[0].state, other.state)


def test_streams_are_independent_of_each_other() -> None:
    keys = [(42, 0), (42, 1), (42, 0, 2), (42, 1, 2), (42, 0, 3), (42, 4), (0, 42), (43, 0)]
    draws = [tuple(torch.rand(3, generator=training.generator(*k)).tolist()) for k in keys]
    assert len(set(draws)) == len(keys)
    assert draws[2] == tuple(torch.rand(3, generator=training.generator(42, 0, 2)).tolist())


def test_start_is_the_named_initializer() -> None:
    data = DATA.load()
    for name in ("ikun", "xavier"):
        spec = dataclasses.replace(RUN, init=name, alpha=0.5)
        net = Network(NET)
        initialize(net, name, generator=training.generator(42, 0), x=data.images[:256], alpha=0.5)
        assert same(net.state_dict(), start(NET, data, spec).state_dict())


# ---------------------------------------------------------------- kill and resume
SCRIPT = """
import sys, time
from pathlib import Path
import torch
from ikun.checkpoint import DataSpec
from ikun.networks import Spec
from ikun.training.loop import TrainingSpec, train

torch.set_num_threads(1)
wait = lambda done, total, note: time.sleep(300 if done == 7 else 0)
train({net!r}, {data!r}, {spec!r}, Path(sys.argv[1]), progress=wait)
"""

HELD = dataclasses.replace(DATA, held_out=16)  # 80 to train on: batches of 32, 32 and 16
LONG = dataclasses.replace(RUN, patience=3, snapshots=2, weight_decay=1e-4)
COUNTED = dataclasses.replace(NET, coding="poisson", neuron="plif")


def interrupt(at: int) -> Callable[[int, int, str], None]:
    def die(done: int, total: int, note: str) -> None:
        if done == at:
            raise KeyboardInterrupt

    return die


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run.pt"
    return train(COUNTED, HELD, LONG, out), out


def check_same_run(found: Checkpoint, out: Path, whole: tuple[Checkpoint, Path]) -> None:
    assert same(found.state, whole[0].state)
    assert (found.history, found.training) == (whole[0].history, whole[0].training)
    assert run_paths(out)["log"].read_bytes() == run_paths(whole[1])["log"].read_bytes()
    for ours, theirs in ((out, whole[1]), *((snapshot_path(out, e), snapshot_path(whole[1], e)) for e in (2, 4))):
        assert ours.read_bytes() == theirs.read_bytes()
    assert not run_paths(out)["resume"].exists()


def test_interrupted_twice_is_uninterrupted_bit_for_bit(out: Path, whole: tuple[Checkpoint, Path]) -> None:
    """In the middle of the second epoch, then of the third, then between the log's line and the state."""
    for resume, at, epochs in ((False, 5, 1), (True, 8, 2)):
        with pytest.raises(KeyboardInterrupt):
            train(COUNTED, HELD, LONG, out, resume=resume, progress=interrupt(at))
        assert not out.exists()
        assert len(log(out)) == read_plain(run_paths(out)["resume"])["epoch"] == epochs
        torch.rand(at)
    with run_paths(out)["log"].open("a") as file:
        file.write('{"epoch": 3}\n{"epo')
    check_same_run(train(COUNTED, HELD, LONG, out, resume=True), out, whole)


def test_a_run_killed_in_its_first_epoch_is_resumed(out: Path) -> None:
    """From its beginning; with its own options only."""
    with pytest.raises(KeyboardInterrupt):
        train(MLP, DATA, RUN, out, progress=interrupt(2))
    with pytest.raises(CheckpointError, match="had lr "):
        train(MLP, DATA, dataclasses.replace(RUN, lr=1e-2), out, resume=True)
    found = train(MLP, DATA, RUN, out, resume=True)
    assert same(found.state, train(MLP, DATA, RUN, out).state)
    assert len(found.history) == len(log(out)) == 4


def test_a_run_killed_in_the_middle_of_an_epoch_resumes_bit_for_bit(out: Path, whole: tuple[Checkpoint, Path]) -> None:
    """Another process, in its third epoch when the log has two lines."""
    code = SCRIPT.format(net=COUNTED, data=HELD, spec=LONG)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process, end = subprocess.Popen([sys.executable, "-c", code, str(out)], env=environment), time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < end:
            if run_paths(out)["resume"].is_file() and read_plain(run_paths(out)["resume"])["epoch"] == 2:
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert len(log(out)) == 2
    check_same_run(train(COUNTED, HELD, LONG, out, resume=True), out, whole)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("lr", {"spec": dataclasses.replace(RUN, lr=1e-2)}),
        ("epochs", {"spec": dataclasses.replace(RUN, epochs=5)}),
        ("seed", {"spec": dataclasses.replace(RUN, seed=1)}),
        ("subset", {"data": dataclasses.replace(DATA, subset=95)}),
        ("surrogate", {"net": dataclasses.replace(MLP, surrogate="atan:3")}),
        ("hidden", {"net": dataclasses.replace(MLP, hidden=(25,))}),
    ],
)
def test_resume_with_other_options_is_refused(part: str, changes: dict[str, Any], out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(MLP, DATA, RUN, out, progress=interrupt(4))
    before = run_paths(out)["resume"].read_bytes()
    options: dict[str, Any] = {"net": MLP, "data": DATA, "spec": RUN, **changes}
    with pytest.raises(CheckpointError, match=f"had {part} ") as caught:
        train(*options.values(), out, resume=True)
    assert len(str(caught.value).splitlines()) == 1
    assert run_paths(out)["resume"].read_bytes() == before
    assert len(log(out)) == 1


def test_a_pipe_as_state_is_refused(out: Path) -> None:
    os.mkfifo(run_paths(out)["resume"])
    with pytest.raises(CheckpointError, match="not a regular file: remove it"):
        train(MLP, DATA, RUN, out, resume=True)


def test_nothing_to_resume_is_said(out: Path) -> None:
    with pytest.raises(CheckpointError, match="no interrupted run to resume"):
        train(MLP, DATA, RUN, out, resume=True)
    train(MLP, DATA, dataclasses.replace(RUN, epochs=0), out)
    run_paths(out)["resume"].write_bytes(out.read_bytes())
    with pytest.raises(CheckpointError, match="not the state of an interrupted run"):
        train(MLP, DATA, RUN, out, resume=True)


# ---------------------------------------------------------------- schedules, snapshots, early stopping
def test_schedules_are_their_closed_forms(out: Path) -> None:
    for epochs in (1, 6, 64):
        for epoch in range(epochs):
            cosine, step, none = (
                learning_rate(TrainingSpec(lr=0.4, epochs=epochs, schedule=s), epoch)
                for s in ("cosine", "step", "none")
            )
            assert cosine == pytest.approx(0.2 * (1 + math.cos(math.pi * epoch / epochs)), rel=1e-12)
            assert step == pytest.approx(0.4 * 10.0 ** -sum(epoch >= epochs * k / 3 for k in (1, 2)), rel=1e-12)
            assert none == 0.4
    spec = dataclasses.replace(RUN, epochs=3, schedule="step")
    train(MLP, dataclasses.replace(DATA, subset=32), spec, out)
    assert [line["lr"] for line in log(out)] == pytest.approx([5e-3, 5e-4, 5e-5])


@pytest.mark.parametrize(
    ("epochs", "count", "expected"), [(4, 2, [2, 4]), (3, 3, [1, 2, 3]), (2, 5, [1, 2]), (3, 0, [])]
)
def test_snapshots_are_whole_checkpoints(epochs: int, count: int, expected: list[int], out: Path) -> None:
    spec = dataclasses.replace(RUN, epochs=epochs, snapshots=count)
    found = train(MLP, dataclasses.replace(DATA, subset=40), spec, out)
    names = [snapshot_path(out, e).name for e in expected]
    assert sorted(p.name for p in out.parent.glob("run.epoch*")) == names
    for epoch in expected:
        snapshot = load_checkpoint(snapshot_path(out, epoch))
        assert len(snapshot.history) == snapshot.training["epochs_run"] == epoch
        assert snapshot.build()(torch.rand(2, 1, 8, 8)).shape == (2, 10)
        assert same(snapshot.state, found.state) == (epoch == epochs)


def test_early_stopping_keeps_the_best_weights(out: Path) -> None:
    """A learning rate that ruins the network: the held-out loss is best early, and that epoch's weights are kept."""
    spec = TrainingSpec(epochs=12, batch_size=20, lr=0.3, schedule="none", patience=2, snapshots=12)
    found = train(MLP, HELD, spec, out)
    losses = [line["held_out_loss"] for line in found.history]
    best = int(np.argmin(losses)) + 1
    assert len(losses) < 12
    assert len(losses) == best + 2
    assert (found.training["best_epoch"], found.training["epochs_run"]) == (best, len(losses))
    assert same(found.state, load_checkpoint(snapshot_path(out, best)).state)
    assert found.kept == load_checkpoint(out).kept == found.history[best - 1]
    held = HELD.parts()[1]
    assert held is not None
    assert evaluate(found.build(), held, "mse")[0] == min(losses)
    assert all("held_out_accuracy" in line for line in log(out))


def test_early_stopping_counts_epochs_without_a_better_loss() -> None:
    net = Network(MLP)
    state: dict[str, Any] = {"best": None, "stopped": False}
    spec = TrainingSpec(patience=2)
    for epoch, loss in enumerate([3.0, 2.0, 2.5, 1.0, 1.0, 1.5], 1):
        assert not state["stopped"]
        with torch.no_grad():
            net.fc1.weight.fill_(epoch)
        training._early_stop(state, {"epoch": epoch, "held_out_loss": loss}, net, spec)
    assert state["stopped"]
    assert (state["best"]["epoch"], state["best"]["loss"]) == (4, 1.0)
    assert float(state["best"]["network"]["fc1.weight"][0, 0]) == 4


def test_patience_without_held_out_samples_is_refused(out: Path) -> None:
    with pytest.raises(ValueError, match="held-out"):
        train(MLP, DATA, dataclasses.replace(RUN, patience=2), out)
    assert not list(out.parent.iterdir())


# ---------------------------------------------------------------- optimizers
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimizer_is_the_update_by_hand(name: str, decay: float) -> None:
    """Two steps in float64: SGD with momentum .9, Adam with .9, .999, 1e-8; L2 weight decay in the gradient."""
    net = Network(dataclasses.replace(MLP, norm="none")).double()
    optimizer = training.make_optimizer(net, TrainingSpec(optimizer=name, lr=0.01, weight_decay=decay))
    w = {k: v.detach().numpy().copy() for k, v in net.named_parameters()}
    m, v = ({k: np.zeros_like(q) for k, q in w.items()} for _ in range(2))
    data = DATA.load()
    for step in (1, 2):
        optimizer.zero_grad()
        ((net(data.images.double()) - torch.eye(10)[data.labels].double()) ** 2).mean().backward()
        for k, p in net.named_parameters():
            assert p.grad is not None
            g = p.grad.numpy() + decay * w[k]
            if name == "sgd":
                m[k] = 0.9 * m[k] + g
                w[k] = w[k] - 0.01 * m[k]
            else:
                m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
                w[k] = w[k] - 0.01 * (m[k] / (1 - 0.9**step)) / (np.sqrt(v[k] / (1 - 0.999**step)) + 1e-8)
        optimizer.step()
        for k, p in net.named_parameters():
            np.testing.assert_allclose(p.detach(), w[k], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_one_step_of_train_is_the_update_by_hand(name: str, out: Path) -> None:
    spec = TrainingSpec(optimizer=name, lr=0.05, weight_decay=0.01, epochs=1, batch_size=96)
    found = train(MLP, DATA, spec, out)
    data, net = DATA.load(), start(MLP, DATA.load(), spec)
    ((net.train()(data.images) - torch.eye(10)[data.labels]) ** 2).mean().backward()
    for k, p in net.named_parameters():
        assert p.grad is not None
        g = p.grad + 0.01 * p.detach()
        step = 0.05 * (g if name == "sgd" else g / (g.abs() + 1e-8))
        large = p.grad.abs() > 1e-5  # where Adam's first step, the sign of g, does not hang on round-off
        assert float(large.double().mean()) > 0.1
        torch.testing.assert_close(found.state[k][large], (p.detach() - step)[large], rtol=1e-3, atol=1e-6)


def test_every_sample_once_an_epoch_in_a_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: a last batch of one sample is dropped."""
    data, spec = DATA.load(), dataclasses.replace(RUN, batch_size=20)
    net = start(MLP, data, spec)
    seen: list[Tensor] = []
    original = encode

    def watch(images: Tensor, *rest: Any) -> Tensor:
        seen.append(images)
        return original(images, *rest)

    monkeypatch.setattr(training, "encode", watch)
    orders = []
    for epoch in (0, 1, 0):
        seen.clear()
        list(training.train_epoch(net, training.make_optimizer(net, spec), data, spec, epoch))
        assert [len(s) for s in seen] == [20, 20, 20, 20, 16]
        orders.append(torch.cat(seen).flatten(1))
    flat = data.images.flatten(1)
    assert sorted(map(tuple, orders[0].tolist())) == sorted(map(tuple, flat.tolist()))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], flat)
    assert torch.equal(orders[0], orders[2])
    assert training._cuts(41, 20) == [(0, 20), (20, 40)]
    assert training._cuts(42, 20) == [(0, 20), (20, 40), (40, 42)]
    assert training._cuts(1, 20) == [(0, 1)]


# ---------------------------------------------------------------- failures
def layer(i: int, **fields: float) -> LayerStatistics:
    values = {"dead": 0.0, "saturated": 0.0, "gradient_square": 1e-6, **fields}
    return LayerStatistics(
        f"fc{i}", f"spike{i}", 5, 5, 1, 1, 0.1, 0.2, values["dead"], values["saturated"], 1, values["gradient_square"]
    )


HEALTHY = {"loss": 0.1, "gradient_norm": 1.0}


@pytest.mark.parametrize(
    ("line", "layers", "expected"),
    [
        ({}, [{}, {}], None),
        ({}, [{"dead": 0.98}, {"saturated": 0.98}], None),
        ({}, [{}, {"dead": 0.99}], "dead layer: 99% of spike2 (fc2) never fires"),
        ({}, [{"saturated": 1.0}, {}], "saturated layer: 100% of spike1 (fc1) always fires"),
        ({"gradient_norm": 2e4}, [{}, {}], "exploding gradient: norm 2.0e+04"),
        ({}, [{"gradient_square": 1e3}, {}], "exploding gradient: norm 1.0e+00, first to last layer 1.0e+09"),
        ({"gradient_norm": 1e-11}, [{}, {}], "vanishing gradient: norm 1.0e-11"),
        ({}, [{"gradient_square": 1e-15}, {}], "vanishing gradient: norm 1.0e+00, first to last layer 1.0e-09"),
        ({}, [{"gradient_square": 0.0}, {"gradient_square": 0.0}], None),
        ({"loss": math.nan}, [{}, {}], "NaN: the loss is not finite"),
        ({"loss": math.inf}, [{}, {"dead": 1.0}], "NaN: the loss is not finite"),
    ],
)
def test_failures_have_names(line: dict[str, float], layers: list[dict[str, float]], expected: str | None) -> None:
    observed = tuple(layer(i, **fields) for i, fields in enumerate(layers, 1))
    found = failures(HEALTHY | line, observed, Network(MLP))
    assert len(found) == (expected is not None)
    if expected is not None:
        assert found[0].startswith(expected)


@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_a_current_far_beyond_the_threshold_is_reported_before_the_first_epoch(
    threshold: float, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the second layer are set so that the variance of its current is known, on either side of 10."""
    spec, told = dataclasses.replace(PLAIN, threshold=threshold), list[str]()
    run, data = dataclasses.replace(RUN, init="kaiming", epochs=1), DATA.parts()[0]
    variance = training._observe(training.start(spec, data, run).eval(), run, data)[1].current_variance
    for wanted in (9.9, 10.1):
        factor = math.sqrt(wanted * threshold**2 / variance)
        with monkeypatch.context() as patch:
            scaled(patch, lambda net, factor=factor: net.fc2.weight.mul_(factor))
            found = train(spec, DATA, run, out, report=told.append)
        named = [f for f in found.training["failures"] if f.startswith("overdriven")]
        assert named == told
        assert json.loads(run_paths(out)["run"].read_text())["failures"] == found.training["failures"]
    assert told == ["overdriven layer: spike2 (fc2) starts with current variance 10.1 threshold^2"]


def test_weights_that_are_not_finite_are_named() -> None:
    net = Network(MLP)
    with torch.no_grad():
        net.fc2.weight[0, 0] = math.inf
    assert failures(HEALTHY, (layer(1), layer(2)), net) == ["NaN: fc2.weight is not finite"]


def scaled(monkeypatch: pytest.MonkeyPatch, change: Callable[[Network], object]) -> None:
    """Let training start from a network that `change` has spoilt."""
    original = training.initialized

    def spoilt(*arguments: Any) -> Initialization:
        begun = original(*arguments)
        with torch.no_grad():
            change(begun.network)
        return begun

    monkeypatch.setattr(training, "initialized", spoilt)


PLAIN = dataclasses.replace(MLP, norm="none")


@pytest.mark.parametrize(
    ("change", "loss", "expected"),
    [
        (lambda net: net.fc1.weight.abs_().neg_(), "mse", "dead layer: 100% of spike1 (fc1) never fires"),
        (lambda net: net.fc2.weight.fill_(50.0), "mse", "saturated layer: 100% of spike2 (fc2) always fires"),
        (lambda net: net.fc2.weight.mul_(1e12), "mse", "vanishing gradient"),
    ],
)
def test_a_spoilt_network_is_recognized(
    change: Callable[[Network], object], loss: str, expected: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch, change)
    spec = TrainingSpec(epochs=1, batch_size=96, lr=1e-9, loss=loss)
    found = train(PLAIN, DATA, spec, out)
    assert any(f.startswith(expected) for f in log(out)[0]["failures"])
    assert any(f.startswith(expected) for f in found.training["failures"])


def test_a_healthy_run_reports_none(out: Path) -> None:
    assert train(MLP, DATA, RUN, out).training["failures"] == []


@pytest.mark.parametrize("norm", ["none", "bn"])
def test_a_network_that_never_fires_comes_to_its_end(norm: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silence(net: Network) -> None:
        for p in net.parameters():
            p.copy_(-p.abs())

    scaled(monkeypatch, silence)
    spec = dataclasses.replace(RUN, epochs=6, lr=1e-9, loss="ce", patience=2, save_at_loss=(0.01,))
    found = train(dataclasses.replace(MLP, norm=norm), HELD, spec, out)
    assert [line["loss"] for line in log(out)] == pytest.approx([math.log(10)] * 3, rel=1e-6)
    assert any(f == "dead layer: 100% of spike2 (fc2) never fires" for f in found.training["failures"])
    assert (found.training["epochs_run"], found.training["best_epoch"]) == (3, 1)
    assert json.loads(run_paths(out)["run"].read_text())["finished"] is True
    assert load_checkpoint(out).build()(torch.rand(3, 1, 8, 8)).abs().max() == 0


def diverge(monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int = 1) -> None:
    """Spoil one weight after `batch` of `epoch`."""
    original = training.train_epoch

    def spoilt(net: Network, *rest: Any) -> Any:
        for i, done in enumerate(original(net, *rest)):
            if i == batch and rest[-1] == epoch:
                with torch.no_grad():
                    net.fc1.weight[0, 0] = math.nan
            yield done

    monkeypatch.setattr(training, "train_epoch", spoilt)


def test_nan_ends_the_run_with_the_last_finite_weights(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(MLP, DATA, dataclasses.replace(RUN, schedule="none", snapshots=4), out.with_name("whole.pt"))
    assert whole.training["failures"] == []
    diverge(monkeypatch, 2)
    found = train(MLP, DATA, dataclasses.replace(RUN, schedule="none"), out)
    assert any(f.startswith("NaN: fc1.weight") for f in found.training["failures"])
    assert (found.training["epochs_run"], found.training["best_epoch"]) == (3, 2)
    assert json.loads(run_paths(out)["run"].read_text())["best_epoch"] == 2
    assert found.kept == found.history[1]
    assert same(found.state, load_checkpoint(snapshot_path(out.with_name("whole.pt"), 2)).state)
    loaded = load_checkpoint(out)
    assert same(loaded.state, found.state)
    lines = log(out)  # strict JSON: NaN is null
    assert len(lines) == 3
    assert lines[2]["layers"]["fc1"]["distance"] is None
    assert "NaN" not in run_paths(out)["log"].read_text().replace('"NaN:', "")


def test_a_diverged_run_is_described(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch spoils the weights, so that the epoch's loss is finite: its weights are not kept all the same."""
    diverge(monkeypatch, 1, batch=2)
    found = train(MLP, DATA, dataclasses.replace(RUN, lr=5e-2, snapshots=4, save_at_loss=(0.1,)), out)
    (first, second) = (line["loss"] for line in log(out))
    assert first > 0.1 > second
    assert found.training["saved_at_loss"] == {}
    assert sorted(p.name for p in out.parent.glob("*.pt")) == ["run.epoch0001.pt", "run.pt"]
    said = json.loads(run_paths(out)["run"].read_text())
    assert (said["finished"], said["epochs_run"], said["saved_at_loss"]) == (True, 2, {})
    assert said["failures"] == found.training["failures"] == ["NaN: fc1.weight is not finite"]


def test_nan_with_early_stopping_keeps_the_best(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge(monkeypatch, 2)
    found = train(MLP, HELD, dataclasses.replace(RUN, schedule="none", patience=4), out)
    losses = [line["held_out_loss"] for line in found.history[:2]]
    assert found.training["best_epoch"] == int(np.argmin(losses)) + 1
    assert all(torch.isfinite(v).all() for v in found.state.values())
    held = HELD.parts()[1]
    assert held is not None
    assert evaluate(found.build(), held, "mse")[0] == min(losses)


# ---------------------------------------------------------------- the specification
@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"init": "he"}, "init must be one of ikun"),
        ({"law": "exact"}, "law"),
        ({"loss": "hinge"}, "loss"),
        ({"optimizer": "lamb"}, "optimizer must be one of adam, sgd"),
        ({"schedule": "linear"}, "schedule"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"alpha": -1.0}, "alpha"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"epochs": -1}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"patience": -1}, "patience"),
        ({"snapshots": -1}, "snapshots"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_refused_by_name(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        TrainingSpec(**fields)


def test_checkpoint_of_train_is_a_checkpoint(out: Path) -> None:
    assert isinstance(train(MLP, DATA, dataclasses.replace(RUN, epochs=0), out), Checkpoint)


# ---------------------------------------------------------------- at a loss; the description
AT_LOSS = dataclasses.replace(RUN, epochs=6, lr=5e-2, save_at_loss=(10.0, 0.17, 1e-9))


def test_weights_of_the_first_epoch_at_a_loss_are_saved(out: Path) -> None:
    found = train(MLP, DATA, AT_LOSS, out)
    losses = [line["loss"] for line in log(out)]
    (first,) = [i for i, x in enumerate(losses, 1) if x <= 0.17][:1]
    assert 1 < first < 6
    assert found.training["saved_at_loss"] == {"10": 1, "0.17": first}
    assert not loss_path(out, 1e-9).exists()
    for loss, epoch in ((10.0, 1), (0.17, first)):
        saved = load_checkpoint(loss_path(out, loss))
        assert saved.training["epochs_run"] == epoch
        assert len(saved.history) == epoch
        assert not same(saved.state, found.state)
    assert loss_path(out, 0.17).name == "run.loss0.17.pt"


def test_a_resumed_run_saves_the_same_weights_at_a_loss(out: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    train(MLP, DATA, AT_LOSS, whole)
    with pytest.raises(KeyboardInterrupt):
        train(MLP, DATA, AT_LOSS, out, progress=interrupt(7))
    train(MLP, DATA, AT_LOSS, out, resume=True)
    for loss in (10.0, 0.17):
        assert loss_path(out, loss).read_bytes() == loss_path(whole, loss).read_bytes()
    assert out.read_bytes() == whole.read_bytes()


def test_another_runs_weights_at_a_loss_do_not_stay(out: Path) -> None:
    loss_path(out, 1e-9).write_text("of another run")
    train(MLP, DATA, dataclasses.replace(AT_LOSS, epochs=1), out)
    assert not loss_path(out, 1e-9).exists()


def test_a_run_is_described(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(MLP, DATA, dataclasses.replace(RUN, init="lsuv"), out, progress=interrupt(4))
    path = run_paths(out)["run"]
    begun = json.loads(path.read_text())
    assert begun["schema"] == "ikun-hessian/train/1"
    assert begun["finished"] is False
    found = train(MLP, DATA, dataclasses.replace(RUN, init="lsuv"), out, resume=True)
    ended = json.loads(path.read_text())
    assert ended["finished"] is True
    assert ended["epochs_run"] == RUN.epochs
    assert ended["seconds"] > 0
    assert ended["failures"] == found.training["failures"]
    assert ended["network"] == json.loads(json.dumps(dataclasses.asdict(MLP)))
    assert ended["start"] == begun["start"]
    assert ended["start"]["forward_passes"] > 0
    assert [layer["name"] for layer in ended["start"]["layers"]] == ["fc1", "fc2"]


@pytest.mark.parametrize(
    ("fields", "part"), [({"save_at_loss": (0.0,)}, "positive"), ({"save_at_loss": (0.1, 0.1)}, "twice")]
)
def test_losses_that_cannot_be_saved_at_are_refused(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        TrainingSpec(**fields)


def test_dropout_is_drawn_from_the_seed_and_the_epoch(out: Path, tmp_path: Path) -> None:
    net = dataclasses.replace(MLP, dropout=0.3)
    whole = train(net, DATA, RUN, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(net, DATA, RUN, out, progress=interrupt(7))
    assert same(train(net, DATA, RUN, out, resume=True).state, whole.state)
    assert not same(train(MLP, DATA, RUN, tmp_path / "none.pt").state, whole.state)


def test_the_start_is_described_with_norms_by_the_batch(out: Path) -> None:
    train(MLP, DATA, dataclasses.replace(RUN, epochs=0), out)
    said = json.loads(run_paths(out)["run"].read_text())
    assert (said["finished"], said["epochs_run"], said["best_epoch"], said["failures"]) == (True, 0, 0, [])
    net, data = start(MLP, DATA.load(), RUN), DATA.load()
    w = net.fc1.weight.detach().double().numpy()  # type: ignore[union-attr]
    h = data.images.flatten(1).double().numpy() @ w.T
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
    fired = [h >= 1, np.where(h >= 1, 0, h) + h >= 1]
    first, second = said["start"]["layers"]
    assert first["current_variance"] == pytest.approx(h.var(), rel=1e-3)
    assert first["firing_rate"] == pytest.approx(np.mean(fired), abs=2e-4)
    assert first["input_square"] == pytest.approx(float(data.images.double().square().mean()), rel=1e-5)
    assert (first["forward_gain"], second["forward_gain"]) == (None, pytest.approx(second["current_variance"], rel=0.1))
    assert len(first["derivative_square_by_step"]) == 2


@pytest.mark.parametrize(("schedule", "decay"), [("cosine", 0.0), ("step", 0.01)])
def test_weights_at_a_loss_are_saved_under_early_stopping_schedules_and_decay(
    schedule: str, decay: float, out: Path
) -> None:
    """The weights at a loss are those of their epoch, the final ones those of the best."""
    spec = TrainingSpec(epochs=12, batch_size=20, lr=0.3, patience=2, snapshots=12, save_at_loss=(0.1,))
    spec = dataclasses.replace(spec, schedule=schedule, weight_decay=decay)
    found = train(MLP, HELD, spec, out)
    epoch = found.training["saved_at_loss"]["0.1"]
    assert epoch == next(line["epoch"] for line in found.history if line["loss"] <= 0.1)
    saved = load_checkpoint(loss_path(out, 0.1))
    assert same(saved.state, load_checkpoint(snapshot_path(out, epoch)).state)
    assert (saved.training["best_epoch"], saved.training["epochs_run"]) == (epoch, epoch)
    best = found.training["best_epoch"]
    assert same(found.state, load_checkpoint(snapshot_path(out, best)).state)
    assert best != epoch
    assert json.loads(run_paths(out)["run"].read_text())["best_epoch"] == best


def test_a_state_of_an_older_version_is_resumed(out: Path, tmp_path: Path) -> None:
    """It has none of the younger settings, which mean their defaults, and nothing of the start."""
    whole = train(MLP, DATA, RUN, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(MLP, DATA, RUN, out, progress=interrupt(7))
    state = read_plain(run_paths(out)["resume"])
    for part, name in (
        ("network", "depth"),
        ("network", "dropout"),
        ("training", "save_at_loss"),
        ("data", "image_size"),
    ):
        del state["settings"][part][name]
    for name in ("saved_at_loss", "seconds", "start"):
        del state[name]
    torch.save(state, run_paths(out)["resume"])
    with pytest.raises(CheckpointError, match="had depth 2, not 3"):
        train(dataclasses.replace(MLP, depth=3), DATA, RUN, out, resume=True)
    assert same(train(MLP, DATA, RUN, out, resume=True).state, whole.state)
    state["settings"]["training"] = None
    torch.save(state, run_paths(out)["resume"])
    with pytest.raises(CheckpointError, match="not the state of an interrupted run"):
        train(MLP, DATA, RUN, out, resume=True)


def test_spike_trains_are_trained_on_as_they_are(out: Path) -> None:
    data = DataSpec("spike-times", 64)
    found = data.load()
    assert found.timesteps is not None
    net = Spec(model="rsnn", input_shape=found.input_shape, classes=found.classes, hidden=(16,), coding="spikes",
               timesteps=found.timesteps, neuron="lif")  # fmt: skip
    spec = TrainingSpec(init="kaiming", epochs=2, batch_size=32, lr=1e-2)
    assert len(train(net, data, spec, out).history) == 2
    assert list(log(out)[0]["layers"]) == ["fc1", "rec1", "fc2"]
    assert len(log(out)[0]["layers"]["rec1"]["derivative_square_by_step"]) == found.timesteps
    with pytest.raises(ValueError, match=f"timesteps={found.timesteps}"):
        train(dataclasses.replace(net, timesteps=3), data, spec, out.with_name("other.pt"))
