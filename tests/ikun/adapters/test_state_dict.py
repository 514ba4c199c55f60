"""Tests of reading weights from the files of training scripts, and of refusing other files."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

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
    ],
)
def test_weights_are_found_where_scripts_put_them(loaded: dict[str, Any], tmp_path: Path) -> None:
    torch.save(loaded, tmp_path / "weights.pt")
    target = model()
    load_weights(target, read_weights(tmp_path / "weights.pt"))
    assert list(state_dict_of(loaded)) == list(WEIGHTS)
    assert all(torch.equal(t, WEIGHTS[name]) for name, t in target.state_dict().items())


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


@pytest.mark.parametrize("content", [model(), {"net": WEIGHTS, "args": Namespace()}, {"net": WEIGHTS, "x": Bomb()}])
def test_files_that_would_run_code_are_refused(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(
        AdapterError, match=r"would run code .*torch.save\(model.state_dict\(\), 'weights.pt'\)"
    ) as caught:
        read_weights(tmp_path / "weights.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


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
