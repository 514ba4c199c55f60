"""Checkpoints, good and bad, as the commands open them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_tools import SHIPPED, Capture, fails

from hessian_tools.objective import Objective, make_objective
from hessian_tools.segments import bytes_per_sample
from ikun.networks import LOSSES, Network, Spec
from ikun_hessian.opening import _cut, measured_on, open_job


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
def test_bad_checkpoints(tmp_path: Path, capsys: Capture, command: str) -> None:
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
    from ikun.training import evaluate

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
        """Where so many samples fit into what a worker has."""
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
