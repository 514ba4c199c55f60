"""Tests of the monitor: right numbers, and a training that does not notice it."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ikun_hessian as ih
from hessian_tools import dense, ggn, make_objective
from ikun.networks import Network, Spec
from ikun_hessian.api.monitor import METRICS

X = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))


class SNN(nn.Module):
    """A SpikingJelly network whose state is not reset after the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        pytest.importorskip("spikingjelly")
        from spikingjelly.activation_based import functional, layer, neuron, surrogate

        torch.manual_seed(0)
        node = neuron.LIFNode(surrogate_function=surrogate.ATan())
        self.net = nn.Sequential(layer.Linear(6, 8), layer.BatchNorm1d(8), node, layer.Linear(8, 3))
        functional.set_step_mode(self.net, "m")
        self.clear = functional.reset_net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def run(net: nn.Module, monitor: ih.Monitor | None, steps: int = 5) -> list[Tensor]:
    """Train with shuffled batches and dropout; every generator takes part. The state is reset after the monitor."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    spiking = isinstance(net, SNN)
    for _ in range(steps):
        chosen = torch.randperm(40)[:16].roll(int(np.random.randint(16)) + random.randrange(16))
        out = net(X[chosen].repeat(3, 1, 1)).mean(0) if spiking else net(X[chosen])
        optimizer.zero_grad()
        F.cross_entropy(out, Y[chosen]).backward()
        if monitor is not None:
            before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            monitor(net)
            assert all(
                torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True) if p.grad is not None
            )
            assert all(module.training for module in net.modules())
        optimizer.step()
        if isinstance(net, SNN):
            net.clear(net)
    return [t.clone() for t in net.state_dict().values()] + [torch.rand(3), torch.tensor(np.random.rand(3))]


@pytest.mark.parametrize("kind", [plain, SNN])
def test_training_does_not_notice_the_monitor(kind: Any) -> None:
    options: dict[str, Any] = {"timesteps": 3} if kind is SNN else {}
    monitor = ih.Monitor((X, Y), "ce", every=2, samples=20, metrics=(*METRICS, "critical_sharpness"), **options)
    with_it, without = run(kind(), monitor), run(kind(), None)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert [row["step"] for row in monitor.history] == [0, 2, 4]
    assert all(np.isfinite(list(row.values())).all() for row in monitor.history)


@pytest.mark.parametrize("kind", [plain, SNN])
def test_the_numbers_are_those_of_a_fresh_copy(kind: Any) -> None:
    """After some steps of training, as a monitor that sees the network for the first time, and by dense algebra."""
    options: dict[str, Any] = {"timesteps": 3} if kind is SNN else {}
    net, kept = kind(), ih.Monitor((X, Y), "ce", **options)
    run(net, kept, 3)
    found, fresh = kept.measure(net, 3), ih.Monitor((X, Y), "ce", **options).measure(net, 3)
    for name in ("loss", "gradient_norm", "sharpness", "lambda_max"):
        assert found[name] == pytest.approx(fresh[name], rel=2e-3), name
    exact = ih.analyze(net, (X, Y), "ce", top=1, smallest=0, operators="ggn", tol=1e-6, progress=False, **options)
    assert found["loss"] == pytest.approx(exact.loss, rel=1e-6)
    assert found["lambda_max"] == pytest.approx(exact.ggn.lambda_max, rel=0.01)
    assert found["gradient_norm"] == pytest.approx(exact.result.gradient_norm, rel=1e-5)


def test_the_numbers_are_right() -> None:
    net = plain().double()
    found = ih.Monitor((X.double(), Y), "ce", probes=400, dtype="float64").measure(net, 0)
    objective = make_objective(net, F.cross_entropy, (X.double(), Y))
    matrix = dense(ggn(objective))
    assert found["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=0.01)
    assert found["trace"] == pytest.approx(float(matrix.trace()), rel=0.05)
    net.eval()
    gradients = torch.autograd.grad(F.cross_entropy(net(X.double()), Y), list(net.parameters()))
    assert found["gradient_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-9)
    monitor = ih.Monitor((X.double(), Y), "ce", draws=400, metrics=("sharpness",), dtype="float64")
    w, losses = [p.detach().clone() for p in net.parameters()], []
    generator = torch.Generator().manual_seed(5)
    for _ in range(400):
        for p, value in zip(net.parameters(), w, strict=True):
            p.data = value + 0.1 * value.abs() * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        losses.append(float(F.cross_entropy(net(X.double()), Y).detach()) - found["loss"])
    for p, value in zip(net.parameters(), w, strict=True):
        p.data = value
    error = float(np.std(losses)) / 20
    assert abs(monitor.measure(net, 0)["sharpness"] - np.mean(losses)) < 4 * error


def test_numbers_are_logged_by_name_and_step() -> None:
    logged: list[tuple[str, float, int]] = []
    monitor = ih.Monitor((X, Y), "ce", every=3, log=lambda *args: logged.append(args), metrics=("gradient_norm",))
    net = plain()
    assert [monitor(net, step) is None for step in (10, 11, 12, 13)] == [False, True, True, False]
    assert [(name, step) for name, _, step in logged] == [
        ("curvature/loss", 10),
        ("curvature/gradient_norm", 10),
        ("curvature/loss", 13),
        ("curvature/gradient_norm", 13),
    ]
    assert len(monitor.to_pandas()) == 2
    assert len(monitor.plot().axes) == 2
    assert repr(monitor).startswith("Monitor of gradient_norm every 3 calls: step 13, loss ")


def test_a_changed_slope_and_frozen_layers_are_seen() -> None:
    net = SNN()
    monitor = ih.Monitor((X, Y), "ce", timesteps=3, metrics=("gradient_norm",))
    before = monitor.measure(net, 0)["gradient_norm"]
    node = net.net[2]
    node.surrogate_function.alpha = 8.0
    after = monitor.measure(net, 1)["gradient_norm"]
    assert after == ih.Monitor((X, Y), "ce", timesteps=3, metrics=("gradient_norm",)).measure(net, 1)["gradient_norm"]
    assert after != before
    net.net[0].weight.requires_grad_(False)
    assert monitor.measure(net, 2)["gradient_norm"] < after


def test_a_diverged_network_gives_nan() -> None:
    net = plain()
    monitor = ih.Monitor((X, Y), "ce")
    monitor.measure(net, 0)
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    assert np.isnan(monitor.measure(net, 1)["lambda_max"])
    assert np.isfinite(monitor.measure(plain(), 2)["lambda_max"])


def test_autocast_no_grad_and_our_own_networks() -> None:
    net = Network(Spec("mlp", (1, 2, 3), classes=3, hidden=(5,), timesteps=2))
    monitor = ih.Monitor((X.view(40, 1, 2, 3), Y), "mse", metrics=("lambda_max",))
    first = monitor.measure(net, 0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        second = monitor.measure(net, 1)
        assert torch.is_autocast_enabled("cpu")
    assert second["loss"] == first["loss"]
    assert second["lambda_max"] == pytest.approx(first["lambda_max"], rel=0.02)


def test_many_calls_keep_no_more_tensors() -> None:
    def live() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is Tensor and o.layout == torch.strided]
        storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in tensors}
        return sum(storages.values())

    net = SNN()
    monitor = ih.Monitor((X, Y), "ce", timesteps=3)
    for step in range(2):
        monitor.measure(net, step)
    sizes = []
    for step in range(2, 14):
        monitor.measure(net, step)
        sizes.append(live())
    assert min(sizes[6:]) <= max(sizes[:6]), sizes  # what other tests left may come and go


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"metrics": ("lambda",)}, "unknown metric lambda: choose from lambda_max"),
        ({"operator": "relaxed"}, "operator must be ggn, hessian or fisher"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ih.Monitor((X, Y), "ce", **options)


def test_what_cannot_be_measured_is_said_at_the_first_call() -> None:
    with pytest.raises(ValueError, match="loss='cee': give 'ce'"):
        ih.Monitor((X, Y), "cee")(plain())
    with pytest.raises(ValueError, match="give timesteps="):
        ih.Monitor((X, Y), "ce")(SNN())
    with pytest.raises(TypeError, match="no option 'timestep': did you mean 'timesteps'"):
        ih.Monitor((X, Y), "ce", timestep=3)


def test_lightning() -> None:
    try:
        import pytorch_lightning as lightning
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        pytest.skip(f"Lightning cannot be imported: {error}")
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.05)

    def train(*callbacks: object) -> list[Tensor]:
        torch.manual_seed(2)
        module = Module()
        trainer = lightning.Trainer(
            max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True))
        assert module._trainer is trainer
        return [t.clone() for t in module.state_dict().values()]

    logged: list[tuple[str, float, int]] = []
    whole = ih.Monitor((X, Y), "ce", every=2, log=lambda *args: logged.append(args))
    part = ih.Monitor((X, Y), "ce", every=3)
    with_it, without = train(whole.callback(), part.callback(lambda module: module.net)), train()
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert [row["step"] for row in whole.history] == [1, 3, 5]
    assert [row["step"] for row in part.history] == [1, 4]
    assert len(logged) == 3 * (1 + len(METRICS))
    assert whole.history[0] == pytest.approx(part.history[0], rel=1e-4)
