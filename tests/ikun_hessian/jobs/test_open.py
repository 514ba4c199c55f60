"""Tests of opening checkpoints, valid and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_tools import FAST, SHIPPED, Capture, fails
from PIL import Image

import cli
from hessian_tools.chain.segments import bytes_per_sample
from hessian_tools.objective import Objective, Streamed, make_objective
from hessian_tools.operators.curvature import hessian
from ikun.data import image_folder
from ikun.data.spec import DataSpec
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.training.loop import train
from ikun.training.spec import TrainingSpec
from ikun_hessian.jobs.job import measured_on
from ikun_hessian.jobs.open import _cut, open_job


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


def loss_and_gradient(objective: Objective) -> tuple[float, torch.Tensor]:
    """Of the first batch, with respect to the first parameter."""
    (x, y), parameters = objective.batches[0], list(objective.parameters.values())
    for p in parameters:
        p.requires_grad_(True)
    loss = objective.loss(objective.outputs(x), y)
    return loss.item(), torch.autograd.grad(loss, parameters)[0]


def test_long_sequences_are_cut_where_a_batch_does_not_fit() -> None:
    workers = torch.get_num_threads()

    def cut(timesteps: int, asked: int | None, fitting: float) -> tuple[int, bool]:
        """Pretend that this many samples fit into a worker's memory."""
        net = Network(Spec(model="mlp", hidden=(50,), timesteps=timesteps))
        objective = make_objective(net, LOSSES["mse"], (torch.rand(300, 1, 8, 8), torch.arange(300) % 10))
        each = bytes_per_sample(objective) or 4 * 4 * 60 * timesteps
        return _cut(objective, asked, workers * fitting * each, None)

    assert cut(64, None, 20.5) == (20, False)
    assert cut(64, None, 0.9) == (3, True)  # 2 segments of 8 steps for each: a quarter of the sample
    assert cut(64, None, 0.1) == (1, True)
    assert cut(64, 50, 50.5) == (50, False)
    assert cut(64, 50, 49.5) == (50, True)
    assert cut(64, 400, 300.5) == (400, False)  # the 300 that there are
    assert cut(4, 50, 0.1) == (50, False)
    assert cut(4, None, 0.001) == (1, False)


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
