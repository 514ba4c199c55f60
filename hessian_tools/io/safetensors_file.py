"""Read .safetensors files: eight bytes with the length of a header, the header as JSON, then the raw tensors.

The format is simple enough to be checked and read here, so the package safetensors is not needed.
"""

from __future__ import annotations

import json
import math
import sys
from typing import IO, Any

import torch
from torch import Tensor

from hessian_tools.io.inert_pickle import ArchiveError

MOST_HEADER = 2**22  # bytes of the header, about 40,000 tensors
MOST_DIMENSIONS = 64
_NAMES = "F64 float64 F32 float32 F16 float16 BF16 bfloat16 I64 int64 I32 int32 I16 int16 I8 int8 U8 uint8 BOOL bool"
_NAMES += " C64 complex64 U16 uint16 U32 uint32 U64 uint64 F8_E4M3 float8_e4m3fn F8_E5M2 float8_e5m2"
_DTYPES = {a: getattr(torch, b) for a, b in zip(_NAMES.split()[::2], _NAMES.split()[1::2], strict=True)}


def is_safetensors(head: bytes, size: int) -> bool:
    """Return whether a file of `size` bytes that starts with the nine bytes `head` can be a .safetensors file."""
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def read_safetensors(file: IO[bytes], size: int) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file.

    Args:
        file: The open file.
        size: Its size in bytes.

    Returns:
        The tensors by name.

    Raises:
        ArchiveError: If the file is damaged. The tensors must fill it without gaps and without overlaps, as the format
            demands, so that the memory is bounded by the size of the file.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER:
        raise ArchiveError(f"a .safetensors file with a header of more than {MOST_HEADER:,} bytes")
    if sys.byteorder != "little":
        raise ArchiveError("safetensors files cannot be read on a big-endian machine")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = sorted(
            ((*each["data_offsets"], _DTYPES[each["dtype"]], each["shape"], name) for name, each in header.items()),
            key=lambda entry: entry[:2],
        )
        found, place = {}, 0
        for start, end, dtype, shape, name in entries:
            sizes = [start, end, *shape]
            if len(shape) > MOST_DIMENSIONS or any(type(n) is not int or not 0 <= n <= size for n in sizes):
                raise ValueError
            if start != place or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError
            place = end
            found[name] = (start, end, dtype, shape)
        if place != size - 8 - length:
            raise ValueError
        tensors = {}
        for name in header:  # in the order of the header
            start, end, dtype, shape = found[name]
            file.seek(8 + length + start)
            raw = bytearray(file.read(end - start))
            tensors[name] = (
                torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)
            )
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError, OverflowError) as error:
        raise ArchiveError("a damaged .safetensors file") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises if a key occurs twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("duplicate keys")
    return found
