"""Tests of checkpoints: exact round trips, and refusal of damaged, foreign and hostile files."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
import pickle
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ikun import checkpoint as module
from ikun.checkpoint import (
    CHECKPOINT_SCHEMA,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_atomically,
    save_checkpoint,
    sha256,
)
from ikun.data.download import DataError
from ikun.data.spec import DataSpec
from ikun.networks import Network, Spec

SPEC = Spec(channels=2, timesteps=2, classes=3, input_shape=(1, 4, 4), neuron="plif")

TRAINING = {
    "init": "ikun", "alpha": 1.0, "optimizer": "adam", "lr": 0.1, "schedule": "none", "weight_decay": 0.0,
    "batch_size": 8, "seed": 1, "samples": 80, "epochs_run": 2, "failures": [],
}  # fmt: skip


def example(spec: Spec = SPEC, **fields: Any) -> Checkpoint:
    torch.manual_seed(0)
    net = Network(spec)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    whole: dict[str, Any] = {
        "network": spec,
        "data": DataSpec("digits", 100, 7, 20),
        "loss": "ce",
        "state": state,
        "training": TRAINING | {"failures": ["dead layer"], "best_epoch": 2},
        "history": [{"epoch": 1, "loss": math.nan, "layers": {"fc1": {"distance": 0.5}}}, {"epoch": 2, "loss": 1e-300}],
    }
    return Checkpoint(**{**whole, **fields})


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_checkpoint(example(), tmp_path / "good.pt")
    return tmp_path / "good.pt"


def values_of(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(path, weights_only=True)
    return values


def refused(path: Path) -> str:
    """The message with which `path` is refused: one line that begins with its name."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    assert caught.value.__cause__ is None
    return message.removeprefix(f"{path}: ")


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Let the process grow by `extra` bytes at most."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---------------------------------------------------------------- round trip
def test_round_trip_is_exact(good: Path) -> None:
    wanted, found = example(), load_checkpoint(good)
    assert (found.network, found.data, found.loss) == (wanted.network, wanted.data, wanted.loss)
    assert found.training == wanted.training
    assert math.isnan(found.history[0].pop("loss"))
    wanted.history[0].pop("loss")
    assert found.history == wanted.history
    assert list(found.state) == list(wanted.state)
    for name, tensor in wanted.state.items():
        assert found.state[name].dtype == tensor.dtype
        assert torch.equal(found.state[name], tensor), name
    again = good.with_name("again.pt")
    save_checkpoint(found, again)
    assert all(torch.equal(v, found.state[k]) for k, v in load_checkpoint(again).state.items())
    assert values_of(good)["schema"] == CHECKPOINT_SCHEMA == "ikun-hessian/checkpoint/1"
    assert values_of(good)["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__


def test_shipped_checkpoints_from_before_the_younger_fields_are_read() -> None:
    """They know nothing of depth and dropout, nor of the size of an image."""
    paths = sorted((Path(__file__).parents[2] / "checkpoints").glob("*.pt"))
    assert paths
    for path in paths:
        assert {"depth", "dropout"} & set(values_of(path)["network"]) == set()
        found = load_checkpoint(path)
        assert (found.network.depth, found.network.dropout, found.data.image_size) == (2, 0.0, None)
        assert found.build()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_special_bits_survive(tmp_path: Path) -> None:
    state = example().state
    state["fc1.weight"].view(-1)[:4] = torch.tensor([-0.0, 1e-45, 3.4028235e38, 0.1])
    save_checkpoint(example(state=state), tmp_path / "a.pt")
    found = load_checkpoint(tmp_path / "a.pt").state["fc1.weight"]
    assert torch.equal(found.view(torch.int32), state["fc1.weight"].view(torch.int32))


def test_views_are_stored_alone_and_channels_last_comes_back(tmp_path: Path) -> None:
    state = example().state
    state["fc1.weight"] = torch.cat([state["fc1.weight"], torch.zeros(10**6, 2)])[: len(state["fc1.weight"])]
    state["conv2.weight"] = state["conv2.weight"].contiguous(memory_format=torch.channels_last)
    save_checkpoint(example(state=state), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    found = load_checkpoint(tmp_path / "a.pt").state
    assert all(torch.equal(found[k], v) for k, v in state.items())


def test_build_rebuilds_the_network_in_evaluation_mode(good: Path) -> None:
    found = load_checkpoint(good)
    original = Network(SPEC)
    original.load_state_dict(example().state)
    x = torch.rand(5, 1, 4, 4)
    net = found.build()
    assert not net.training
    assert torch.equal(net(x), original.eval()(x))
    changed = found.build(surrogate="sigmoid:8", ties="last")
    assert (changed.spec.surrogate, changed.spec.ties) == ("sigmoid:8", "last")
    assert torch.equal(changed(x), net(x))
    relaxed = found.build(relaxed=True)(x)
    assert not torch.equal(relaxed, net(x))


def test_inputs_are_frozen_by_the_data_seed() -> None:
    images = torch.rand(3, 1, 4, 4)
    assert example().inputs(images) is images
    coded = example(dataclasses.replace(SPEC, coding="poisson", timesteps=40))
    first = coded.inputs(images)
    assert first.shape == (3, 40, 1, 4, 4)
    assert torch.equal(first, coded.inputs(images))
    assert float((first.mean(1) - images).abs().max()) < 0.4
    other = dataclasses.replace(coded, data=DataSpec("digits", 100, 8))
    assert not torch.equal(first, other.inputs(images))


def test_sha256_is_the_files(good: Path) -> None:
    assert sha256(good) == hashlib.sha256(good.read_bytes()).hexdigest()


# ---------------------------------------------------------------- writing
class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("disk full, say")


def test_a_failing_save_leaves_the_old_file_and_nothing_else(good: Path) -> None:
    before = good.read_bytes()
    with pytest.raises(RuntimeError, match="disk full"):
        save_atomically({"big": torch.zeros(1000), "bad": Unpicklable()}, good)
    assert good.read_bytes() == before
    assert [p.name for p in good.parent.iterdir()] == ["good.pt"]


def test_a_failing_rename_leaves_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = good.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(example(), good)
    assert good.read_bytes() == before
    assert len(list(good.parent.iterdir())) == 1


def test_the_name_appears_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen, original = tmp_path / "new" / "a.pt", [], torch.save

    def watch(values: Any, file: Any) -> None:
        original(values, file)
        seen.append(path.exists())

    monkeypatch.setattr(module.torch, "save", watch)
    save_checkpoint(example(), path)
    assert seen == [False]
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


# ---------------------------------------------------------------- data
def test_parts_are_disjoint_and_fixed() -> None:
    train, held = DataSpec("digits", 60, seed=3, held_out=20).parts()
    assert held is not None
    assert (len(train), len(held)) == (40, 20)
    whole = DataSpec("digits", 60, seed=3).load()
    assert torch.equal(torch.cat([train.images, held.images]), whole.images)
    assert torch.equal(torch.cat([train.labels, held.labels]), whole.labels)
    assert len({train.sha256, held.sha256, whole.sha256}) == 3
    assert train.sha256 == DataSpec("digits", 60, seed=3, held_out=20).load().sha256
    assert DataSpec("digits", 60).parts()[1] is None
    assert len(DataSpec("digits", 60, held_out=20).load("test")) == 360


def test_held_out_of_the_whole_set_is_a_random_part() -> None:
    train, held = DataSpec("digits", held_out=100).parts()
    assert held is not None
    assert (len(train), len(held)) == (1337, 100)
    in_order = DataSpec("digits").load()
    assert not torch.equal(held.images, in_order.images[-100:])


@pytest.mark.parametrize("held_out", [60, 61, 10**9])
def test_held_out_must_leave_something(held_out: int) -> None:
    with pytest.raises(DataError, match="leave none to train on"):
        DataSpec("digits", 60, held_out=held_out).parts()


def test_held_out_is_no_negative_number() -> None:
    with pytest.raises(DataError, match="-1 held-out samples: give 0 or more"):
        DataSpec("digits", 60, held_out=-1).parts()


# ---------------------------------------------------------------- refusals
def test_missing_files_empty_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nothing.pt")
    assert "not a regular file" in refused(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "truncated or not a .pt file" in refused(tmp_path / "empty.pt")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_truncated_checkpoints_are_refused(good: Path, share: float) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: int(len(content) * share)])
    assert "truncated" in refused(good)


@pytest.mark.parametrize("content", [b"hello\n", b"PK\x03\x04" + b"\0" * 50, b"\x80\x02.", b"\x89PNG\r\n" * 20, b"{}"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    assert "not a checkpoint" in refused(tmp_path / "a.pt")


def test_other_zip_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("hello.txt", "hello")
    assert "not a checkpoint" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (torch.zeros(3), "it holds a Tensor"),
        ([1, 2], "it holds a list"),
        (None, "it holds a NoneType"),
        ({}, "no schema"),
        ({"fc1.weight": torch.zeros(2, 2)}, "no schema"),
        ({"schema": 3}, "no schema"),
        ({"schema": "other"}, "no schema"),
        ({1: 2}, "no schema"),
        ({"schema": CHECKPOINT_SCHEMA}, "field 'network' is missing"),
    ],
)
def test_pt_files_of_others_are_refused(tmp_path: Path, values: Any, part: str) -> None:
    torch.save(values, tmp_path / "a.pt")
    assert part in refused(tmp_path / "a.pt")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, good: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "bomb.pt"
    torch.save({**values_of(good), "training": Bomb(ran)}, path)
    assert "need code to load" in refused(path)
    path.write_bytes(pickle.dumps(Bomb(ran)))
    assert "not a checkpoint that can be loaded safely" in refused(path)
    assert not ran.exists()
    pickle.loads(path.read_bytes())
    assert ran.exists()  # the bomb was a live one


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(Network(SPEC), tmp_path / "a.pt")
    assert "need code to load" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "schema", ["ikun-hessian/checkpoint/2", "ikun-hessian/checkpoint/99", "ikun-hessian/checkpoint/"]
)
def test_another_schema_asks_for_an_upgrade(good: Path, schema: str) -> None:
    torch.save({**values_of(good), "schema": schema}, good)
    assert "written by another version" in refused(good)


Change = Callable[[dict[str, Any]], object]


def put(*path: str, value: Any) -> Change:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


def drop(*path: str) -> Change:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return change


W = "fc1.weight"  # [32, 2]
CHANGES: dict[str, tuple[Change, str]] = {
    "no network": (drop("network"), "'network' is missing"),
    "no state": (drop("state"), "'state' is missing"),
    "history no list": (put("history", value={}), "'history'"),
    "history of numbers": (put("history", value=[1, 2]), "'history' must hold"),
    "training no dict": (put("training", value=[]), "'training'"),
    "network field missing": (drop("network", "ties"), "ties"),
    "network field unknown": (put("network", "width", value=3), "width"),
    "network field mistyped": (put("network", "classes", value="10"), "classes must be int"),
    "network field of another type of key": (lambda v: v["network"].update({3: 4}), "checkpoint"),
    "unknown model": (put("network", "model", value="vgg"), "model must be one of"),
    "line break in a field": (put("network", "model", value="a\nb\r\x1cc"), "model must be one of"),
    "line break in a schema": (put("schema", value="ikun-hessian/checkpoint/9\n:-)"), "another version"),
    "line break in a weight's name": (put("state", "a\nb", value=torch.zeros(1)), "do not fit"),
    "unknown data": (put("data", "name", value="imagenet"), "known data set"),
    "data name a path": (put("data", "name", value="../../etc"), "known data set"),
    "data name a tensor": (put("data", "name", value=torch.zeros(2)), "known data set"),
    "data field unknown": (put("data", "url", value="http://x"), "'data'"),
    "data field missing": (drop("data", "seed"), "'data'"),
    "seed negative": (put("data", "seed", value=-1), "seed"),
    "seed a bool": (put("data", "seed", value=True), "seed"),
    "held_out no number": (put("data", "held_out", value=None), "held_out"),
    "subset a float": (put("data", "subset", value=1.5), "subset"),
    "unknown loss": (put("loss", value="hinge"), "unknown loss 'hinge'"),
    "loss no text": (put("loss", value=1), "'loss'"),
    "weight missing": (drop("state", W), f"do not fit the network described: {W}"),
    "weight unknown": (put("state", "fc9.weight", value=torch.zeros(1)), "do not fit the network described: fc9"),
    "weight no tensor": (put("state", W, value=[1.0]), "must map names to tensors"),
    "weight of another shape": (put("state", W, value=torch.zeros(2, 32)), "is torch.float32 [2, 32]"),
    "weight of another type": (put("state", W, value=torch.zeros(32, 2).double()), "torch.float64"),
    "weight NaN": (lambda v: v["state"][W].view(-1)[5].fill_(math.nan), f"'{W}' has NaN or infinite"),
    "weight infinite": (lambda v: v["state"][W].view(-1)[5].fill_(-math.inf), f"'{W}' has NaN or infinite"),
    "running variance NaN": (lambda v: v["state"]["norm1.running_var"].fill_(math.nan), "NaN or infinite"),
    "weight sparse": (put("state", W, value=torch.zeros(32, 2).to_sparse()), "need code"),
    "weight without data": (put("state", W, value=torch.zeros(32, 2, device="meta")), "need code"),
    "weight one repeated number": (put("state", W, value=torch.zeros(1).expand(32, 2)), "not stored in full"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_fields_are_refused(good: Path, name: str) -> None:
    change, part = CHANGES[name]
    values = copy.deepcopy(values_of(good))
    change(values)
    torch.save(values, good)
    assert part in refused(good)


HUGE: dict[str, dict[str, Any]] = {
    "csnn": {"channels": 4096, "input_shape": (4096, 4096, 4096), "classes": 100_000, "timesteps": 10_000},
    "mlp": {"model": "mlp", "hidden": (1_000_000,) * 20, "classes": 100_000},
    "mlp input": {"model": "mlp", "input_shape": (4096, 4096, 4096), "hidden": (1_000_000,)},
}


@pytest.mark.parametrize("name", HUGE)
def test_absurd_sizes_are_refused_without_memory(good: Path, name: str) -> None:
    values = values_of(good)
    values["network"] |= HUGE[name]
    torch.save(values, good)
    with memory_limit(500 * 2**20):
        assert "fit" in refused(good) or "the network has" in refused(good)


def test_absurd_weights_of_few_bytes_are_refused_without_memory(good: Path) -> None:
    """A tensor of stride 0 has any shape; looking at its entries would allocate 400 TB."""
    spec = Spec(model="mlp", input_shape=(1000, 1000, 100), hidden=(1_000_000,), classes=3, norm="none")
    with torch.device("meta"):
        state = {k: v.shape for k, v in Network(spec).state_dict().items()}
    values = values_of(good) | {"network": dataclasses.asdict(spec)}
    values["state"] = {k: torch.zeros(1).expand(shape) for k, shape in state.items()}
    torch.save(values, good)
    assert good.stat().st_size < 10_000
    with memory_limit(500 * 2**20):
        assert "not stored in full" in refused(good)


def test_every_byte_flip_is_refused_or_harmless(good: Path) -> None:
    """Damage in the middle of the file: a CheckpointError or a checkpoint, never another exception."""
    content = good.read_bytes()
    for i in range(0, len(content), len(content) // 60):
        good.write_bytes(content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :])
        with suppress(CheckpointError):
            load_checkpoint(good)
