"""Tests of samples with several inputs, and of losses with tensors of their own, on the command line's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_tools import Capture, fails
from torch import Tensor

from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.open import open_job
from ikun_hessian.jobs.user.samples import read_samples

TEXT = """
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import Dataset

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, a, b, mask=None):
        return self.out(torch.tanh(self.a(a)) * torch.tanh(self.b(b)))

class Pair(Two):
    def forward(self, pair):
        return super().forward(*pair)

class Logits(Two):
    def forward(self, a, b):
        return {"logits": super().forward(a, b), "hidden": None}

class Coupled(Two):
    def forward(self, a, b):
        return super().forward(a, b - b.mean(0))

def parts():
    g = torch.Generator().manual_seed(0)
    return torch.randn(20, 4, generator=g), torch.randn(20, 3, generator=g), torch.randint(0, 3, (20,), generator=g)

def pairs():
    a, b, y = parts()
    return (a, b), y

def record():
    a, b, y = parts()
    return {"a": a, "b": b}, y

def labelled():
    a, b, y = parts()
    return {"a": a.numpy(), "b": b.numpy(), "labels": y.numpy()}

def batches():
    a, b, y = parts()
    for i in range(0, 20, 6):
        yield {"a": a[i : i + 6], "b": b[i : i + 6], "mask": None, "labels": y[i : i + 6]}

class Rows(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        a, b, y = parts()
        return {"a": a[i], "b": b[i], "label": int(y[i])}

class Tuples(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        a, b, y = parts()
        return (a[i], b[i]), int(y[i])

def uneven():
    a, b, y = parts()
    return {"a": a, "b": b[:7]}, y

def changing():
    a, b, y = parts()
    yield {"a": a[:4], "b": b[:4]}, y[:4]
    yield {"a": a[4:], "b": b[4:, :2]}, y[4:]

def other():
    a, b, y = parts()
    yield {"a": a[:4], "b": b[:4]}, y[:4]
    yield (a[4:], b[4:]), y[4:]

def nothing():
    return {"a": parts()[0]}

def broken():
    a, b, y = parts()
    return (a, b / 0), y

def hot():
    a, b, y = parts()
    return (a, b), F.one_hot(y, 3).float()

positive = torch.tensor([0.5, 2.0, 3.0])
criterion = nn.BCEWithLogitsLoss(pos_weight=positive)

def weighted(outputs, targets):
    return criterion(outputs, targets)

scripted = torch.jit.script(nn.BCEWithLogitsLoss(pos_weight=positive))

def mixing(outputs, targets):
    return (outputs @ torch.eye(3) - targets).square().mean()

def casting(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs.float(), targets.float(), pos_weight=positive)
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(TEXT)
    scope: dict[str, Any] = {}
    exec(compile(TEXT, "nets.py", "exec"), scope)
    torch.manual_seed(0)
    torch.save(scope["Two"]().state_dict(), "theirs.pt")
    return scope


def opened(model: str, data: str, loss: str = "ce", dtype: str = "float64", **facts: Any) -> Any:
    given: dict[str, Any] = {"split": "train", "batch_size": 8, "params": "*", "surrogate": None, "memory": 1.0}
    own = Own(f"nets.py:{model}", f"nets.py:{data}", loss, **facts)
    return open_job(Path("theirs.pt"), own=own, samples="all", dtype=dtype, data_dir=None, device="cpu", **given)


def expected(theirs: dict[str, Any], loss: Any) -> Tensor:
    net = theirs["Two"]()
    net.load_state_dict(torch.load("theirs.pt"))
    a, b, y = theirs["parts"]()
    p = list(net.double().parameters())
    value = loss(net(a.double(), b.double()), y)
    g = torch.cat([t.flatten() for t in torch.autograd.grad(value, p, create_graph=True)])
    rows = [torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True, allow_unused=True) for e in g]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


@pytest.mark.parametrize(
    ("model", "data"),
    [
        *(("Two", data) for data in ("pairs", "record", "labelled", "batches", "Rows", "Tuples")),
        ("Pair", "pairs"),
        ("Logits", "record"),
    ],
)
def test_several_inputs_in_any_form(theirs: dict[str, Any], model: str, data: str) -> None:
    job = opened(model, data)
    assert job.objective.samples == 20
    torch.testing.assert_close(dense(hessian(job.objective)), expected(theirs, F.cross_entropy), rtol=1e-9, atol=1e-12)


def test_the_hash_covers_every_input(theirs: dict[str, Any]) -> None:
    first = opened("Two", "record").provenance["data"]["sha256"]
    Path("nets.py").write_text(TEXT.replace('{"a": a, "b": b}, y\n', '{"a": a, "b": b + 1}, y\n'))
    assert opened("Two", "batches").provenance["data"]["sha256"] == first


def test_several_inputs_that_cannot_be_used_are_refused(theirs: dict[str, Any], capsys: Capture) -> None:
    for data, message in {
        "uneven": "has inputs [20, 4], [7, 3] and targets [20]",
        "changing": "inputs have shapes ['a'] [4] float32, ['b'] [3] float32 and ['a'] [4] float32, ['b'] [2] float32",
        "other": "inputs have shapes",
        "nothing": "returned a dict, but (inputs, targets)",
        "broken": "NaN or infinite values",
    }.items():
        fails(capsys, 2, message, "spectrum", "theirs.pt", "--model", "nets.py:Two", "--data", f"nets.py:{data}")
    coupled = ["--model", "nets.py:Coupled", "--data", "nets.py:record", "--loss", "ce"]
    fails(capsys, 2, "the output of a sample depends on the others", "spectrum", "theirs.pt", *coupled)
    timed = ["--model", "nets.py:Two", "--data", "nets.py:record", "--timesteps", "3"]
    fails(capsys, 2, "--timesteps needs inputs that are one tensor", "spectrum", "theirs.pt", *timed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", ["weighted", "scripted", "mixing", "casting"])
def test_a_loss_with_tensors_of_its_own(theirs: dict[str, Any], loss: str, dtype: str) -> None:
    job = opened("Two", "hot", f"nets.py:{loss}", dtype)
    positive = theirs["positive"].double()

    def wide(outputs: Tensor, y: Tensor) -> Tensor:
        hot = F.one_hot(y, 3).double()
        if loss == "mixing":
            return (outputs - hot).square().mean()
        return F.binary_cross_entropy_with_logits(outputs, hot, pos_weight=positive)

    tolerance = 1e-9 if dtype == "float64" and loss != "casting" else 1e-5
    torch.testing.assert_close(
        dense(hessian(job.objective)).double(), expected(theirs, wide), rtol=tolerance, atol=tolerance
    )


def test_any_object_with_a_length_and_samples_by_index_is_a_data_set(tmp_path: Path) -> None:
    """As those of tonic, which are not torch's."""
    (tmp_path / "indexed.py").write_text(
        "import numpy as np\n"
        "class Data:\n"
        "    def __len__(self): return 5\n"
        "    def __getitem__(self, i): return np.full((2, 3), i, np.float32), i % 2\n"
    )
    x, y = read_samples(f"{tmp_path}/indexed.py:Data", "4", 1.0)
    assert x[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert y.tolist() == [0, 1, 0, 1]
