"""Tests that NumPy arrays in .pt files are read as the numbers that they are, and as nothing else."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hessian_tools.io.torch_archive import ArchiveError, CodeError, Foreign, read_archive

GRID = np.arange(12.0).reshape(3, 4)
ARRAYS = {
    "double": GRID,
    "single": GRID.astype("f4"),
    "half": GRID.astype("f2"),
    "columns first": np.asfortranarray(GRID),
    "transposed": GRID.T,
    "slice": GRID[:, ::2],
    "whole": np.arange(5),
    "bytes": np.arange(250, 256, dtype=np.uint8),
    "mask": np.array([True, False]),
    "complex": GRID.astype("c8"),
    "empty": np.zeros((0, 3)),
    "scalar": np.array(3.5),
    "negative zero": np.array([-0.0, np.nan, np.inf]),
}
OTHERS = {
    "big endian": GRID.astype(">f8"),
    "objects": np.array([None, 1], dtype=object),
    "words": np.array(["a"]),
    "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "record": np.zeros(2, dtype=[("a", "f4")]),
    "unsigned": np.arange(3, dtype=np.uint32),
}
HOWS: list[dict[str, Any]] = [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}]
HOWS.append({"pickle_protocol": 5})


@pytest.mark.parametrize("how", HOWS)
def test_arrays_become_tensors(how: dict[str, Any], tmp_path: Path) -> None:
    torch.save({**ARRAYS, "again": ARRAYS["single"]}, tmp_path / "a.pt", **how)
    found = read_archive(tmp_path / "a.pt", foreign=True)
    for name, array in ARRAYS.items():
        assert isinstance(found[name], Tensor), name
        assert found[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(found[name].numpy(), array)
    assert found["again"].data_ptr() == found["single"].data_ptr()
    with pytest.raises(CodeError, match="numpy"):
        read_archive(tmp_path / "a.pt")


@pytest.mark.parametrize("how", HOWS)
def test_arrays_that_torch_has_no_type_for_are_inert(how: dict[str, Any], tmp_path: Path) -> None:
    torch.save(OTHERS, tmp_path / "a.pt", **how)
    found = read_archive(tmp_path / "a.pt", foreign=True)
    assert all(type(value) is Foreign for value in found.values()), found


class _Forged:
    """Pickles as an array with a state of one's choice."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        rebuild, arguments, _ = np.zeros(1).__reduce__()  # type: ignore[misc]
        return rebuild, arguments, self.state


@pytest.mark.parametrize("shape", [(3,), (2**40,), (2**31, 2**31, 2)])
def test_an_array_that_claims_more_than_its_bytes_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save({"a": _Forged((1, shape, np.dtype("f8"), False, b"\0" * 16))}, tmp_path / "a.pt")
    with pytest.raises(ArchiveError, match="damaged"):
        read_archive(tmp_path / "a.pt", foreign=True)


@pytest.mark.parametrize(
    "state", [(1, (-1,), np.dtype("f8"), False, b""), (1, 2, 3), None, (1, [1], np.dtype("f8"), 0, b"12345678"), {}]
)
def test_an_array_with_another_state_is_inert(state: Any, tmp_path: Path) -> None:
    torch.save({"a": _Forged(state)}, tmp_path / "a.pt")
    assert type(read_archive(tmp_path / "a.pt", foreign=True)["a"]) is Foreign


def test_arrays_with_the_same_bytes_share_them(tmp_path: Path) -> None:
    raw = b"\xff" * 2**20
    many = [_Forged((1, (2**17,), np.dtype("f8"), False, raw)) for _ in range(500)]
    torch.save({"a": many}, tmp_path / "a.pt", pickle_protocol=4)
    assert (tmp_path / "a.pt").stat().st_size < 2**21
    tracemalloc.start()
    found = read_archive(tmp_path / "a.pt", foreign=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({t.data_ptr() for t in found["a"]}) == 1
    assert peak < 2**24
