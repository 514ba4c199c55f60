"""Tests of opening checkpoints, valid and damaged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_tools import FAST, SHIPPED, Capture, fails
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cli
from hessian_tools.engine import programs
from hessian_tools.engine.product import least_bytes
from hessian_tools.objective import Objective, Streamed, make_objective
from hessian_tools.operators.curvature import hessian, product_bytes
from ikun.adapters.adapt_network import adapt
from ikun.data import image_folder
from ikun.data.spec import DataSpec
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.training.loop import train
from ikun.training.spec import TrainingSpec
from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import measured_on
from ikun_hessian.jobs.open import _batch_size, open_job


def damaged(folder: Path) -> dict[str, Path]:
    good = (SHIPPED / "digits-csnn-ikun.pt").read_bytes()
    files = {name: folder / f"{name}.pt" for name in ("empty", "truncated", "text", "foreign", "nan", "future")}
    files["empty"].write_bytes(b"")
    files["truncated"].write_bytes(good[: len(good) // 2])
    files["text"].write_text("hello")
    torch.save({"state_dict": {"w": torch.ones(2)}}, files["foreign"])
    values = torch.load(SHIPPED / "digits-csnn-ikun.pt", weights_only=True)
    torch.save({**values, "schema": "ikun-hessian/checkpoint/9"}, files["future"])
    values["state"]["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(values, files["nan"])
    return files


@pytest.mark.parametrize("command", ["spectrum", "info"])
def test_bad_checkpoints_are_refused(tmp_path: Path, capsys: Capture, command: str) -> None:
    expected = {
        "empty": "not a checkpoint that can be loaded safely",
        "truncated": "not a checkpoint that can be loaded safely",
        "text": "not a checkpoint that can be loaded safely",
        "foreign": "not a checkpoint of ikun-hessian",
        "nan": "NaN or infinite",
        "future": "another version",
    }
    for name, path in damaged(tmp_path).items():
        fails(capsys, 2, expected[name], command, str(path))
    fails(capsys, 2, "no such file", command, str(tmp_path / "missing.pt"))


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"schema": "ikun-hessian/checkpoint/1", "state": Evil()}, "evil.pt")
    fails(capsys, 2, "evil.pt: not a checkpoint that can be loaded safely", "spectrum", "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("init", ["ikun", "kaiming", "xavier"])
def test_shipped_checkpoints_are_what_their_readme_says(init: str) -> None:
    from ikun.checkpoint import load_checkpoint
    from ikun.training.loop import evaluate

    path = SHIPPED / f"digits-csnn-{init}.pt"
    assert path.stat().st_size < 1_000_000
    checkpoint = load_checkpoint(path)
    assert checkpoint.training["init"] == init
    assert evaluate(checkpoint.build(), checkpoint.data.load("test"), checkpoint.loss)[1] >= 0.95
    assert checkpoint.data.load().sha256 == checkpoint.training["data_sha256"]


def test_a_job_is_what_the_options_say(trained: Path) -> None:
    """Another slope leaves the loss as it is and changes only the gradient; provenance is JSON."""
    job = open_job(
        trained / "a.pt",
        samples="60",
        split="test",
        batch_size=16,
        params="fc*",
        surrogate="sigmoid:4",
        dtype="float64",
        memory=1.0,
        data_dir=None,
        device="cpu",
    )
    o = job.objective
    assert [len(y) for _, y in o.batches] == measured_on(o)["batches"] == [16, 16, 16, 12]
    assert list(o.parameters) == ["fc1.weight", "fc2.weight"]
    assert o.dtype == torch.float64
    assert json.loads(json.dumps(job.provenance)) == job.provenance
    assert job.provenance["data"]["split"] == "test"
    assert job.provenance["network"]["surrogate"] == "sigmoid:4"
    (loss, gradient), (other_loss, other_gradient) = (loss_and_gradient(x) for x in (o, job.another(2.0)))
    assert other_loss == loss
    assert not torch.allclose(other_gradient, gradient)
    torch.testing.assert_close(loss_and_gradient(job.another())[1], gradient)


@pytest.mark.parametrize("batch_size", [16, None])
def test_all_objectives_of_a_job_share_its_samples(trained: Path, batch_size: int | None) -> None:
    job = open_job(
        trained / "a.pt", samples="60", split="test", batch_size=batch_size, params="*", surrogate=None,
        dtype="float64", memory=1.0, data_dir=None, device="cpu",
    )  # fmt: skip
    for other in (job.another(), job.another(2.0), job.another(ties="last")):
        for (x, y), (other_x, other_y) in zip(job.objective.batches, other.batches, strict=True):
            assert other_x.data_ptr() == x.data_ptr()  # converted to float64 only once
            assert other_y.data_ptr() == y.data_ptr()


@pytest.mark.parametrize("surrogate", ["atan:2", "triangle:1", "sigmoid:4"])
@pytest.mark.parametrize("change", [{"steeper": 0.5}, {"steeper": 2.0}, {"ties": "last"}])
def test_a_variant_has_the_products_of_its_own_trace_without_being_traced(
    change: dict[str, Any], surrogate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_job(
        SHIPPED / "digits-csnn-ikun.pt", samples="30", split="train", batch_size=20, params="*", surrogate=surrogate,
        dtype="float64", memory=1.0, data_dir=None, device="cpu",
    )  # fmt: skip
    v = torch.randn(job.objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variant = job.another(**change)
    own = hessian(dataclasses.replace(variant, programs={})) @ v
    by_autograd = hessian(dataclasses.replace(variant, programs={}, traces=False)) @ v
    monkeypatch.setattr(programs, "_trace", None)
    shared = hessian(variant) @ v
    assert torch.equal(shared, own)
    torch.testing.assert_close(shared, by_autograd, rtol=1e-9, atol=1e-12 * float(own.abs().max()))
    assert not torch.allclose(shared, hessian(job.objective) @ v, rtol=1e-2)


def test_products_that_do_not_fit_a_variant_are_not_shared() -> None:
    job = open_job(
        SHIPPED / "digits-csnn-ikun.pt", samples="30", split="train", batch_size=20, params="*", surrogate=None,
        dtype="float64", memory=1.0, data_dir=None, device="cpu",
    )  # fmt: skip
    for change in ({"steeper": 2.0}, {"ties": "last"}):
        variant = dataclasses.replace(job.another(**change), programs={})
        programs.share_programs(job.objective, variant, lambda text: text)
        assert not variant.programs
    programs.share_programs(job.objective, variant, lambda text: text.replace('"first"', '"last"'))
    assert variant.programs


def loss_and_gradient(objective: Objective) -> tuple[float, torch.Tensor]:
    """Of the first batch, with respect to the first parameter."""
    (x, y), parameters = objective.batches[0], list(objective.parameters.values())
    for p in parameters:
        p.requires_grad_(True)
    loss = objective.loss(objective.outputs(x), y)
    return loss.item(), torch.autograd.grad(loss, parameters)[0]


def test_batches_are_as_large_as_fits_and_of_about_the_same_size() -> None:
    def sizes(timesteps: int, asked: int | None, fitting: float, workers: int = 1) -> list[int]:
        """Pretend that this many samples fit into a worker's memory."""
        net = Network(Spec(model="mlp", hidden=(50,), timesteps=timesteps))
        objective = make_objective(net, LOSSES["mse"], (torch.rand(300, 1, 8, 8), torch.arange(300) % 10), check=False)
        once, each = product_bytes(objective)
        memory = 4 * workers * (once + fitting * each)
        return objective.rebatched(_batch_size(objective, asked, (once, each), memory, workers, None)).sizes

    assert sizes(64, None, 20.5) == [20] * 15
    assert sizes(64, None, 29.5) == [28] * 10 + [20]
    assert sizes(64, None, 0.9) == [1] * 300
    assert sizes(64, 50, 49.5) == [50] * 6
    assert sizes(4, None, 1e4) == [300]
    assert sizes(4, None, 1e4, workers=2) == [150] * 2
    assert sizes(64, 400, 300.5) == [300]


class Deep(torch.nn.Module):
    """Forty layers: more of them can be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(20, 20) for _ in range(40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_sample_that_does_not_fit_is_cut_or_refused_in_one_line() -> None:
    objective = make_objective(Deep(), LOSSES["ce"], (torch.rand(3, 500, 20), torch.arange(3)), check=False)
    objective = dataclasses.replace(objective, loss=lambda o, y: LOSSES["ce"](o.mean(1), y))
    size = product_bytes(objective)
    least = least_bytes(objective)
    assert 0 < least < 0.7 * sum(size)
    assert _batch_size(objective, None, size, 1.1 * least, 1, None) == 1
    with pytest.raises(
        UsageError, match=r"one sample needs about .* GiB .* --memory .*: give more --memory"
    ) as refused:
        _batch_size(objective, None, size, 0.9 * least, 1, None)
    assert "\n" not in str(refused.value)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time, those of a KiB or less aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.live: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (s := t.untyped_storage()).nbytes() > 1024 and s._cdata not in inside:
                self.live.append((StorageWeakRef(s), s.nbytes()))
        self.live = [(ref, size) for ref, size in self.live if not ref.expired()]
        self.bytes = max(self.bytes, sum(size for _, size in self.live))
        return out


def own_network() -> Objective:
    torch.manual_seed(0)
    net = Network(Spec(input_shape=(1, 8, 8), channels=4, classes=3, timesteps=256))
    batch = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    return make_objective(net, LOSSES["mse"], batch, dtype=torch.float64, check=False)


def multi_step_network() -> Objective:
    """SpikingJelly's modules, which take all steps at once."""
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    torch.manual_seed(0)

    def lif() -> torch.nn.Module:
        return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan())

    net = torch.nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), layer.BatchNorm2d(4), lif(), layer.MaxPool2d(2, 2), layer.Flatten(),
        layer.Linear(64, 3), lif(),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    x, y = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    adapted = adapt(net, x[:2], steps=16)  # more take long to check
    return make_objective(adapted.model, LOSSES["mse"], (x, y), dtype=torch.float64, reset=adapted.reset, check=False)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("build", [own_network, multi_step_network])
def test_products_of_long_sequences_stay_within_the_memory(build: Callable[[], Objective]) -> None:
    """With enough memory for three samples at a time, and for one in segments."""
    objective = build()
    v = torch.ones(objective.size, dtype=torch.float64)
    expected = hessian(objective) @ v
    size = product_bytes(objective)
    for memory, samples in ((12 * sum(size), 3), (1.3 * least_bytes(objective), 1)):
        count = _batch_size(objective, None, size, memory, 1, None)
        cut = dataclasses.replace(objective.rebatched(count), batch_memory=memory / 4)
        op = hessian(cut, memory / 2)
        with Peak() as peak:
            found = op @ v
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert peak.bytes <= memory
        assert count == samples


@pytest.fixture
def from_folder(tmp_path: Path) -> Path:
    """A checkpoint trained on a folder of images, in the same folder."""
    for split, each in (("train", 10), ("test", 2)):
        for name, shade in (("dark", 60), ("light", 180)):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(each):
                pixels = torch.randint(shade - 50, shade + 50, (9, 8, 3), generator=torch.Generator().manual_seed(k))
                Image.fromarray(pixels.byte().numpy()).save(tmp_path / split / name / f"{k}.png")
    data = DataSpec("image-folder", held_out=2, image_size=8)
    spec = TrainingSpec("kaiming", epochs=1, batch_size=8, lr=0.01)
    network = Spec("mlp", (3, 8, 8), 2, hidden=(5,), timesteps=3)
    train(network, data, spec, tmp_path / "a.pt", data_dir=tmp_path)
    return tmp_path / "a.pt"


def opened(path: Path, memory: float, samples: str = "all", split: str = "train") -> Objective:
    return open_job(
        path,
        samples=samples,
        split=split,
        batch_size=5,
        params="*",
        surrogate=None,
        dtype="float64",
        memory=memory,
        data_dir=path.parent,
        device="cpu",
    ).objective


def test_images_on_disk_are_read_once_if_they_fit_and_streamed_if_not(from_folder: Path) -> None:
    bound = 8 * 18 * 3 * 8 * 8 * 4 / 2**30  # GiB of which an eighth holds the 18 training samples
    inside, streamed = opened(from_folder, bound * 1.01), opened(from_folder, bound * 0.99)
    assert not isinstance(inside.batches, Streamed)
    assert isinstance(streamed.batches, Streamed)
    assert inside.sizes == streamed.sizes == measured_on(streamed)["batches"] == [5, 5, 5, 3]
    (loss, gradient), (other_loss, other_gradient) = (o.value_and_gradient() for o in (inside, streamed))
    assert (loss, gradient.tolist()) == (other_loss, other_gradient.tolist())
    v = torch.ones(inside.size, dtype=torch.float64)
    assert torch.equal(hessian(inside) @ v, hessian(streamed, memory=0) @ v)
    few = opened(from_folder, bound * 0.1, samples="7")
    assert few.sizes == [5, 2]
    assert torch.equal(few.batches[0][0], inside.batches[0][0])
    assert opened(from_folder, 1.0, split="test").sizes == [4]


def test_only_the_samples_asked_for_are_decoded(from_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    decoded = image_folder.decoded
    monkeypatch.setattr(image_folder, "decoded", lambda path, size: (found.append(path), decoded(path, size))[1])
    opened(from_folder, 1.0, samples="4")
    assert len(found) == 4


def test_commands_run_on_a_folder_of_images(from_folder: Path, capsys: Capture) -> None:
    folder = ("--data-dir", str(from_folder.parent))
    assert cli.run(["spectrum", str(from_folder), *folder, *FAST[:-2]]) == 0
    assert cli.run(["info", str(from_folder), *folder]) == 0
    capsys.readouterr()
    fails(capsys, 2, "give it as --data-dir", "info", str(from_folder))
    for path in (from_folder.parent / "train/dark").iterdir():
        path.write_bytes(b"")
    fails(capsys, 2, "cannot decode", "spectrum", str(from_folder), *folder, "--force")
