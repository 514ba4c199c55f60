"""Tests of reading .pt files as data: the tensors are those of torch.load, and objects of other types stay inert."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_tools.io.torch_archive import ArchiveError, CodeError, Foreign, read_archive

HOW: list[dict[str, Any]] = [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}]
HOW += [{"_use_new_zipfile_serialization": False, "pickle_protocol": protocol} for protocol in (3, 4, 5)]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES += [torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn]


@pytest.mark.parametrize("how", HOW)
def test_tensors_are_those_of_torch_load(how: dict[str, Any], tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    values = {str(kind): torch.ones(3).to(kind) for kind in DTYPES}
    values |= {"turned": base.t(), "part": base[1:, ::2], "wide": torch.ones(1).expand(5), "scalar": torch.tensor(2.0)}
    values |= {"empty": torch.zeros(0, 3), "parameter": nn.Parameter(torch.ones(2)), "base": base}
    torch.save(values, tmp_path / "a.pt", **how)
    found = read_archive(tmp_path / "a.pt")
    assert list(found) == list(values)
    for name, t in values.items():
        assert (type(found[name]), found[name].dtype, found[name].stride()) == (Tensor, t.dtype, t.stride()), name
        assert torch.equal(
            found[name].double() if "float8" in name else found[name], t.double() if "float8" in name else t
        )
    assert found["turned"].data_ptr() == found["base"].data_ptr()


@pytest.mark.parametrize("how", HOW)
def test_plain_values_come_out_as_they_are(how: dict[str, Any], tmp_path: Path) -> None:
    values = {
        "a": [1, -1, 300, 70_000, -(2**40), 2**80, 0.5, None, True, False, "\u00e9"],
        3: (),
        "b": ((1,), (1, 2), (1, 2, 3, 4)),
    }
    torch.save(values | {"o": OrderedDict(x=1), "kind": torch.float16}, tmp_path / "a.pt", **how)
    assert read_archive(tmp_path / "a.pt") == values | {"o": {"x": 1}, "kind": torch.float16}
    torch.save({"size": torch.Size([2]), "device": torch.device("cuda:1")}, tmp_path / "a.pt", **how)
    assert read_archive(tmp_path / "a.pt") == {"size": (2,), "device": "cuda:1"}


class Settings(dict[str, Any]):
    """A dict with attributes."""


class Armed(Settings):
    """An object whose every way to be restored fails the test."""

    def __reduce__(self) -> Any:
        return exploding, (1,), {"extra": 1}, iter([1]), iter([("lr", 0.1)])


def exploding(*_: Any) -> Any:
    raise AssertionError("code from a file was run")


@pytest.mark.parametrize("how", HOW)
def test_objects_of_other_types_stay_inert(how: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"a": Namespace(x=1), "b": Settings(lr=[0.1]), "c": Armed(), "d": {1}}, tmp_path / "a.pt", **how)
    found = read_archive(tmp_path / "a.pt", foreign=True)
    assert type(found["a"]) is type(found["d"]) is Foreign
    assert (found["a"].name, found["d"].name) == ("argparse.Namespace", "builtins.set")
    assert (found["b"], found["c"]) == ({"lr": [0.1]}, {"lr": 0.1})
    with pytest.raises(CodeError, match=r"need code to load \(argparse\.Namespace\)$"):
        read_archive(tmp_path / "a.pt")


def test_tensors_of_other_kinds_are_foreign_too(tmp_path: Path) -> None:
    torch.save({"s": torch.eye(2).to_sparse(), "m": torch.zeros(2, device="meta")}, tmp_path / "a.pt")
    found = read_archive(tmp_path / "a.pt", foreign=True)
    assert {name: type(value) for name, value in found.items()} == {"s": Foreign, "m": Foreign}
    torch.save({"c": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "a.pt")
    with pytest.raises(ArchiveError, match="conjugation or negation is pending"):
        read_archive(tmp_path / "a.pt", foreign=True)


def test_every_prefix_of_an_old_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(5), "n": Namespace()}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert read_archive(path, foreign=True)["w"].tolist() == [1.0] * 5
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ArchiveError):
            read_archive(path, foreign=True)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ArchiveError, match="too short or too long"):
        read_archive(path, foreign=True)
