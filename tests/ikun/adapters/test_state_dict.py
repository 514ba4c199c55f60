"""Tests of reading weights from the files of training scripts, and of refusing other files."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ikun.adapters import AdapterError, load_weights, read_weights, state_dict_of


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


WEIGHTS = model(1).state_dict()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in WEIGHTS.items()}


@pytest.mark.parametrize(
    "loaded",
    [
        WEIGHTS,
        {"net": WEIGHTS, "optimizer": {"lr": 0.1}, "epoch": 3},
        {"model": WEIGHTS},
        {"state_dict": WEIGHTS},
        {"model_state_dict": WEIGHTS},
        prefixed("module."),
        prefixed("_orig_mod."),
        {"net": prefixed("module._orig_mod."), "max_test_acc": 0.9},
        prefixed("_orig_mod.module."),
        {"state_dict": {"model": prefixed("module.module.")}},
        {"checkpoint": {"model": WEIGHTS}},
        {"checkpoint": {"model": {"state_dict": WEIGHTS}}, "epoch": 3},
        {"last": {"state_dict": prefixed("module."), "optimizer": {"state": {}, "param_groups": []}}, "best": 0.9},
    ],
)
def test_weights_are_found_where_scripts_put_them(loaded: dict[str, Any], tmp_path: Path) -> None:
    torch.save(loaded, tmp_path / "weights.pt")
    target = model()
    load_weights(target, read_weights(tmp_path / "weights.pt"))
    assert list(state_dict_of(loaded)) == list(WEIGHTS)
    assert all(torch.equal(t, WEIGHTS[name]) for name, t in target.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {"checkpoint": {"net": w}}])
def test_numbers_and_texts_beside_the_weights_are_ignored_and_said(wrap: Any) -> None:
    said: list[str] = []
    loaded = wrap({**WEIGHTS, "epoch": 3, "accuracy": 0.5, "best": None})
    assert state_dict_of(loaded, said.append) == WEIGHTS
    assert said == ["ignored what is not a tensor beside the weights: epoch, accuracy, best"]


def test_several_sets_under_unknown_keys_are_refused() -> None:
    with pytest.raises(AdapterError, match="several sets of weights, under first, second"):
        state_dict_of({"first": {"model": WEIGHTS}, "second": {"model": model(2).state_dict()}})


def test_a_layer_that_is_called_module_keeps_its_name() -> None:
    target = nn.Module()
    target.module = nn.Linear(3, 2)
    other = nn.Linear(3, 2).state_dict()
    load_weights(target, state_dict_of({f"module.{name}": t for name, t in other.items()}))
    assert torch.equal(target.module.weight, other["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weights": "0.weight"}, r"missing 0.weight \(0.weights\?\); unexpected 0.weights$"),
        ({"0.bias": None}, r"unexpected|missing 0.bias$"),
        ({"extra": torch.ones(1)}, "unexpected extra$"),
        ({"2.weight": torch.ones(4, 2)}, r"other shapes: 2.weight \[4, 2\] for \[2, 4\]$"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    weights = dict(WEIGHTS)
    for name, value in change.items():
        if isinstance(value, str):
            weights[name] = weights.pop(value)
        elif value is None:
            del weights[name]
        else:
            weights[name] = value
    target = model()
    before = [p.clone() for p in target.parameters()]
    with pytest.raises(AdapterError, match=message) as caught:
        load_weights(target, weights)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))


def test_many_names_are_cut_short() -> None:
    with pytest.raises(AdapterError, match=r"missing 0.weight, 0.bias, 1.weight and 6 more; unexpected a$"):
        load_weights(model(), {"a": torch.ones(1)})


@pytest.mark.parametrize("loaded", [{}, {"epoch": 3}, [1, 2], {"net": {"lr": 0.1}}, 3.0])
def test_files_without_weights_are_refused(loaded: Any, tmp_path: Path) -> None:
    torch.save(loaded, tmp_path / "weights.pt")
    with pytest.raises(AdapterError, match=r"weights.pt: no weights found"):
        read_weights(tmp_path / "weights.pt")


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


class AttributeDict(dict[str, Any]):
    """A dict with attributes, as Lightning saves its hyperparameters."""


class Armed(AttributeDict):
    """An object whose every way to be restored fails the test."""

    def __init__(self) -> None:
        self["lr"] = 0.1
        self.extra = 1

    def __reduce__(self) -> Any:
        return exploding, (1,), {"extra": 1}, iter([1]), iter([("lr", 0.1)])

    def __setstate__(self, state: Any) -> None:
        exploding()


def exploding(*_: Any) -> Any:
    Path("exploded").touch()
    raise AssertionError("code from a file was run")


@dataclass
class Config:
    lr: float = 0.1


BESIDE = {
    "namespace": Namespace(lr=0.1, device=torch.device("cpu"), shape=torch.Size([2]), dtype=torch.float16),
    "attributes": AttributeDict(lr=0.1),
    "config": Config(),
    "path": Path("runs"),
    "number": np.float64(0.9),
    "array": np.ones((2, 3)),
    "words": np.array(["a", "b"], dtype=object),
    "set": {1, 2},
    "frozen": frozenset({"a"}),
    "default": defaultdict(list, {"a": [1]}),
    "counts": Counter({"a": 3}),
    "date": datetime(2024, 1, 2),
    "complex": 1j,
    "bytes": b"a",
    "function": os.system,
    "class": nn.Linear,
    "network": model(),
    "sparse": torch.eye(3).to_sparse(),
    "keys": {(1, 2): 3, Path("a"): 4, 2**70: 5},
    "bomb": Bomb(),
    "armed": Armed(),
    "rng": torch.get_rng_state(),
    "optimizer_states": [torch.optim.Adam(model().parameters()).state_dict()],
}


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}])
def test_weights_that_are_arrays_are_read(wrap: Any, tmp_path: Path) -> None:
    weights = {name: t.numpy() for name, t in model().state_dict().items()}
    torch.save(wrap(weights), tmp_path / "a.pt")
    target = model()
    torch.nn.init.zeros_(next(target.parameters()))
    load_weights(target, read_weights(tmp_path / "a.pt"))
    assert all(np.array_equal(t.numpy(), weights[name]) for name, t in target.state_dict().items())


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
@pytest.mark.parametrize("name", [*BESIDE, "all"])
def test_objects_beside_the_weights_run_no_code(
    how: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = BESIDE if name == "all" else {name: BESIDE[name]}
    torch.save({**beside, "state_dict": prefixed("model."), "epoch": 3}, tmp_path / "a.ckpt", **how)
    target = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(target, read_weights(tmp_path / "a.ckpt"))
    assert all(torch.equal(t, WEIGHTS[key]) for key, t in target.state_dict().items())
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [model(), {"net": model()}, {"net": {"model": model()}}, Bomb(), {"model": Bomb()}])
def test_whole_models_are_refused(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(AdapterError, match=r"whole object .*torch.save\(model.state_dict\(\), ") as caught:
        read_weights(tmp_path / "weights.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- prefixes
def taken(loaded: dict[str, Any], target: nn.Module | None = None) -> tuple[nn.Module, list[str]]:
    """Load weights. Returns the network and the lines that were said."""
    said: list[str] = []
    target = model() if target is None else target
    load_weights(target, state_dict_of(loaded, said.append), said.append)
    return target, said


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.", "model.module.", "module.model.", "model._orig_mod.", "a.b.c.", "model.module._orig_mod.net."],
)
def test_prefixes_are_ignored(prefix: str) -> None:
    target, said = taken({"state_dict": prefixed(prefix)})
    assert all(torch.equal(t, WEIGHTS[name]) for name, t in target.state_dict().items())
    assert said == []


def test_module_inside_a_name_is_ignored() -> None:
    weights = {name.replace("0.", "0.module."): t for name, t in WEIGHTS.items()}
    assert torch.equal(taken({"net": weights})[0].state_dict()["0.weight"], WEIGHTS["0.weight"])


def test_a_network_inside_another_takes_the_weights_of_the_inner_one() -> None:
    outer = nn.Module()
    outer.net = model()
    for loaded in (WEIGHTS, prefixed("net."), prefixed("model.net."), prefixed("model.")):
        outer.net.load_state_dict(model().state_dict())
        taken(loaded, outer)
        assert torch.equal(outer.net[0].weight, WEIGHTS["0.weight"])


@pytest.mark.parametrize("prefixes", [("student.", "teacher."), ("model.", "net.")])
def test_two_sets_of_weights_that_fit_are_refused(prefixes: tuple[str, str]) -> None:
    both = {**prefixed(prefixes[0]), **prefixed(prefixes[1])}
    with pytest.raises(AdapterError, match=f"begin with {prefixes[0]}, {prefixes[1]}: save only one"):
        taken(both)
    with pytest.raises(AdapterError, match="under net, model: save only one"):
        taken({"net": WEIGHTS, "model": WEIGHTS})


@pytest.mark.parametrize("key", ["model_ema", "ema", "state_dict_ema"])
def test_a_moving_average_is_used_only_if_there_is_nothing_else_and_is_said(key: str) -> None:
    average = {name: t + 1 for name, t in WEIGHTS.items()}
    target, said = taken({"model": WEIGHTS, key: {"module": average}})
    assert torch.equal(target.state_dict()["0.weight"], WEIGHTS["0.weight"])
    assert said == [f"used the weights under model, not their moving average under {key}"]
    target, said = taken({key: average, "epoch": 3})
    assert torch.equal(target.state_dict()["0.weight"], average["0.weight"])
    assert said == [f"used the moving average of the weights, under {key}: there are no others"]
    target, said = taken({**{f"ema_model.{name}": t for name, t in average.items()}, **prefixed("model.")})
    assert torch.equal(target.state_dict()["0.weight"], WEIGHTS["0.weight"])
    assert said == ["used the weights model.*, not their moving average ema_model.*"]


def test_the_average_of_torch_is_read() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model(1))
    target, said = taken({"model_ema": averaged.state_dict()})
    assert torch.equal(target.state_dict()["0.weight"], WEIGHTS["0.weight"])
    assert any("n_averaged" in line for line in said)


def test_the_only_dict_of_tensors_is_found_under_any_key() -> None:
    assert torch.equal(taken({"snn": WEIGHTS, "args": {"a": 1}})[0].state_dict()["0.weight"], WEIGHTS["0.weight"])
    with pytest.raises(AdapterError, match="several sets of weights, under a, b"):
        taken({"a": WEIGHTS, "b": WEIGHTS})


# ---------------------------------------------------------------- entries that are not weights
class Neuron(nn.Module):
    def __init__(self, buffer: Tensor | None = None, name: str = "mem") -> None:
        super().__init__()
        self.v = None
        if buffer is not None:
            self.register_buffer(name, buffer)


def spiking(buffer: Tensor | None = None, name: str = "mem") -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), Neuron(buffer, name))


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("name", ["1.mem", "1.v", "1.total_ops", "total_params", "0.total_ops"])
def test_state_of_neurons_and_counters_are_dropped_and_said(name: str, prefix: str) -> None:
    weights = {**spiking().state_dict(), name: torch.zeros(128, 4)}
    target, said = taken({prefix + key: t for key, t in weights.items()}, spiking())
    assert torch.equal(target[0].weight, weights["0.weight"])
    assert said == [
        f"ignored entries of the file that are not weights of the model: {prefix * (prefix != 'module.')}{name}"
    ]


@pytest.mark.parametrize("name", ["loss.weight", "criterion.pos_weight", "train_acc.total", "val_metrics.f1.tp"])
def test_losses_and_metrics_beside_the_network_are_dropped_and_said(name: str) -> None:
    said = taken({"state_dict": {**prefixed("model."), name: torch.ones(2)}})[1]
    assert said == [f"ignored entries of the file that are not weights of the model: {name}"]


@pytest.mark.parametrize("name", ["head.weight", "model.3.weight", "model.0.v", "model.9.mem", "model.loss.weight"])
def test_layers_that_the_network_lacks_are_refused(name: str) -> None:
    with pytest.raises(AdapterError, match=f"unexpected {name}$"):
        taken({"state_dict": {**prefixed("model."), name: torch.ones(2)}})


def test_state_of_neurons_that_the_network_has_need_not_be_in_the_file() -> None:
    for weights in (spiking().state_dict(), spiking(torch.zeros(128, 4)).state_dict()):
        said = taken(weights, target := spiking(torch.zeros(0)))[1]
        assert (target[1].mem.shape, said) == ((0,), ["the state of neurons is not taken from the file: 1.mem"])
    with pytest.raises(AdapterError, match=r"missing 1\.v$"):  # could be a constant
        taken(spiking().state_dict(), nn.Sequential(nn.Linear(3, 4), NamedV()))


class NamedV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", torch.ones(4))


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": 2}

    def set_extra_state(self, state: Any) -> None: ...


def test_extra_state_is_dropped_and_said_unless_the_network_needs_it() -> None:
    said = taken({**WEIGHTS, "0._extra_state": {"a": 1}})[1]
    assert said == ["ignored the extra state of modules: 0._extra_state"]
    with pytest.raises(AdapterError, match=r"extra state that is not a tensor are not supported: 0\._extra_state"):
        taken(WEIGHTS, nn.Sequential(Extra(3, 4)))


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"lazy layers \(0.weight, 0.bias\): run it on a batch"):
        taken(WEIGHTS, nn.Sequential(nn.LazyLinear(4)))


def test_tied_weights_need_to_be_in_the_file_once() -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    weights = tied().state_dict()
    short = {name: t for name, t in weights.items() if name != "0.weight"}
    assert torch.equal(taken(short, target := tied())[0].state_dict()["0.weight"], weights["1.weight"])
    assert target[0].weight is target[1].weight
    with pytest.raises(AdapterError, match=r"0.weight, 1.weight share one tensor in the model, but not in the file"):
        taken({**weights, "0.weight": torch.zeros(3, 3)}, tied())


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_real_numbers_are_refused(kind: torch.dtype) -> None:
    with pytest.raises(AdapterError, match=r"not real numbers: 0.weight \("):
        taken({**WEIGHTS, "0.weight": WEIGHTS["0.weight"].to(kind)})


def test_weights_beyond_the_range_of_the_network_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"NaN or infinite weights: 0\.weight"):
        taken({**WEIGHTS, "0.weight": torch.full((4, 3), 1e300, dtype=torch.float64)})


# ---------------------------------------------------------------- safetensors
def test_safetensors_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(fuzz.safetensors_file(prefixed("model.")))
    target, _ = taken(read_weights(tmp_path / "a.safetensors"))
    assert all(torch.equal(t, WEIGHTS[name]) for name, t in target.state_dict().items())


def header(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    text = json.dumps({"w": entry}).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 16


@pytest.mark.parametrize(
    "data",
    [
        header(data_offsets=[0, 12]),
        header(data_offsets=[4, 20]),
        header(data_offsets=[-16, 0]),
        header(shape=[2, 2, 2]),
        header(shape=[-2, -2]),
        header(shape=[True, 4]),
        header(shape=[0, 2**70]),
        header(shape=[1] * 1000 + [4]),
        header(dtype="F4"),
        header(dtype=["F32"]),
        header() + b"\0",
        header()[:-1],
        struct.pack("<Q", 10**9) + b"{" + b" " * 100,
        struct.pack("<Q", 4 * 10**6) + b'{"a":' + b"[" * (4 * 10**6),
        struct.pack("<Q", 2) + b"{]",
    ],
)
def test_damaged_safetensors_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(header())
    assert read_weights(tmp_path / "a.safetensors")["w"].tolist() == [[0, 0], [0, 0]]
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(AdapterError) as caught:
        read_weights(tmp_path / "a.safetensors")
    fuzz.one_line(str(caught.value), tmp_path / "a.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:300])
    for name in ("text", "empty", "cut"):
        with pytest.raises(AdapterError, match=f"{name}.pt: not a file of torch.save, or a damaged one"):
            read_weights(tmp_path / f"{name}.pt")
    with pytest.raises(AdapterError):
        read_weights(tmp_path / "pickle.pt")
    with pytest.raises(AdapterError):
        read_weights(tmp_path)
    with pytest.raises(AdapterError, match="a whole model"):
        state_dict_of(model())
