"""The phases of an analysis, kept on disk, so that an interrupted one goes on behind its last product.

PATH says what the results depend on; PATH.1, PATH.2, ... hold those of the finished phases in their order, each written
once and read only when its phase comes up again; PATH.journal holds the products of the phase under way. Without PATH
the others mean nothing. A phase that was interrupted is simply run again: it is deterministic (every phase draws from a
generator of its own), so it asks for the same products, takes those that the journal has, and ends with the same
arrays, bit for bit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor

from hessian_tools.io.files import naming, write_atomically
from hessian_tools.operators.base import Composed, Operator
from hessian_tools.runtime.distributed import Group

Op = TypeVar("Op", bound=Operator)
_State = tuple[str, int, float, dict[str, Any]]  # of a phase: name, products, seconds, value
# A record of the journal: head (format; CRC-32 of the phase's name, of the block's dtype and shape, of the block;
# seconds since the phase began), CRC-32 of head and product, product row by row.
_HEAD = struct.Struct("<4s3Id")
_CHECK = struct.Struct("<I")
_FORMAT = b"hvp2"
_WHOLE = 0x2144DF1C  # the CRC-32 of anything with its CRC-32 behind
_SYNC = 5.0  # seconds between two fsyncs: a kill loses nothing that was flushed, a power cut at most so much


class ResumeError(ValueError):
    """A state that cannot be resumed: one line that names the file and says why."""


class Phases:
    """Runs phases one behind another, or takes their results from `path`; None keeps nothing.

    key: what the results depend on, as named plain values; a state with another key is refused (ResumeError, naming
    what differs), and so is a damaged one. group: processes that run the phases together; only rank 0 reads and writes.
    The phases of an analysis come in the same order every time, each analysis takes Phases of its own.
    A file that cannot be read or written raises OSError with its name, and the state stays as it was.
    products: with the operators, in all phases so far. seconds: that interrupted processes took for what was read from
    the disk, up to their last product.
    """

    def __init__(
        self, path: Path | None = None, key: Mapping[str, Any] | None = None, group: Group | None = None
    ) -> None:
        self.path = path
        self.products = 0
        self.seconds = 0.0
        self._key = {name: json.dumps(value, sort_keys=True) for name, value in (key or {}).items()}
        self._group = group
        self._first = group is None or group.rank == 0
        self._number = 0  # of the phase in the order of the analysis
        if path is not None and (state := self._load(path)):
            known = state[-1]
            if changed := [name for name in {**self._key, **known} if self._key.get(name) != known.get(name)]:
                raise ResumeError(
                    f"{path}: the {' and the '.join(changed)} changed since the analysis was interrupted: put that "
                    "back as it was, or start anew with --force"
                )

    def run(self, name: str, op: Op, compute: Callable[[Op], dict[str, Any]]) -> dict[str, Any]:
        """compute(op), a dict of tensors and plain values, or what it returned before the interruption.

        compute is handed an operator that acts as `op` and remembers its products on disk; it must be deterministic.
        The products of the phase are added to `products`, those taken from the disk too (as they are to op's own).
        """
        before, path = op.products, self.path
        if path is None:
            value = compute(op)
            self.products += op.products - before
            return value
        self._number += 1
        file = _beside(path, self._number)
        if self._first and not path.exists():
            _discard(path)  # what is left of an analysis that was given up
            _save(path, "", 0, 0.0, self._key)
        if done := self._load(file):
            found, products, seconds, value = done
            if found != name:
                raise ResumeError(f"{file}: holds the phase '{found}', not '{name}': start anew with --force")
        else:
            with _opened(_beside(path, "journal")) if self._first else contextlib.nullcontext() as journal:
                journaled = _Journaled(op, name, journal, self._group)
                value = compute(cast(Op, journaled))
            products, seconds = op.products - before, journaled.earlier
            if self._first:
                # in this order: what a kill between the two leaves in the journal carries a finished phase's name
                _save(file, name, products, journaled.seconds(), value)
                _beside(path, "journal").unlink(missing_ok=True)
        self.products += products
        self.seconds += seconds
        return value

    def keep(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A phase that needs no operator: compute(), or what it returned before the interruption."""
        idle = Composed(1, torch.float64, torch.device("cpu"), lambda v: v)
        return self.run(name, idle, lambda _: compute())

    def _load(self, path: Path) -> _State | None:
        """What _save wrote, on every rank; None if there is no such file."""
        there = self._first and path.exists()
        if self._group is None:
            return _read(path, path.open("rb")) if there else None
        data = self._group.broadcast(path.read_bytes() if there else None)
        return None if data is None else _read(path, io.BytesIO(data))

    @staticmethod
    def remove(path: Path) -> None:
        """Forget the analysis kept at `path`, if any."""
        path.unlink(missing_ok=True)
        _discard(path)


def _beside(path: Path, ending: object) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def _discard(path: Path) -> None:
    """Remove all files of an analysis but PATH, those of writes that were killed too."""
    name = re.escape(path.name)
    form = re.compile(rf"{name}\.([1-9][0-9]*|journal)|\.{name}(\.[1-9][0-9]*)?\.[0-9a-f]{{32}}\.part")
    for file in filter(form.fullmatch, os.listdir(path.parent) if path.parent.is_dir() else []):
        path.with_name(file).unlink(missing_ok=True)


class _Summed:
    """A file, written only, and the CRC-32 of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self._write, self.flush, self.sum = file.write, file.flush, 0

    def write(self, data: Any) -> int:
        self.sum = crc32(data, self.sum)
        return self._write(data)


def _save(path: Path, name: str, products: int, seconds: float, value: dict[str, Any]) -> None:
    def write(file: IO[bytes]) -> None:
        summed = _Summed(file)
        try:
            state = {"name": name, "products": products, "seconds": seconds, "value": value}
            torch.save(state, cast(IO[bytes], summed))
        except RuntimeError as error:  # torch's own hides what stopped a write: a full disk, Ctrl-C
            raise (error.__context__ or error) from None
        file.write(_CHECK.pack(summed.sum))

    write_atomically(path, write)


def _read(path: Path, file: IO[bytes]) -> _State:
    """What _save wrote."""

    def here(storage: Any, location: str) -> Any:  # a rank's tensors on its own GPU
        return storage.cuda() if location != "cpu" and torch.cuda.is_available() else storage

    with file, naming(path):
        check = 0
        while chunk := file.read(2**20):
            check = crc32(chunk, check)
        if check != _WHOLE:  # torch.load alone would take most damaged files
            raise ResumeError(f"{path}: not the state of an interrupted analysis: start anew with --force")
        file.seek(0)
        state = torch.load(file, map_location=here, weights_only=True)
        return state["name"], state["products"], state.get("seconds", 0.0), state["value"]


class _Journaled(Operator):
    """`op`, its products appended to a journal; as long as the journal has them already, they are taken from it.

    Everything else is op's own, the count of products and batch_forms among it: one call of that is a phase, of which
    nothing can be kept.
    """

    def __init__(self, op: Operator, name: str, file: io.BufferedRandom | None, group: Group | None) -> None:
        self._op = op
        self._phase = crc32(name.encode())
        self._file = file  # None on all ranks but the first
        self._group = group
        self._replaying = True
        self.earlier = 0.0  # seconds that interrupted processes took for what the journal has
        self._began = self._synced = time.monotonic()

    def seconds(self) -> float:
        """Since the phase began, those of interrupted processes among them."""
        return self.earlier + time.monotonic() - self._began

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    @property
    def products(self) -> int:
        return self._op.products

    @products.setter
    def products(self, count: int) -> None:
        self._op.products = count

    def _apply(self, block: Tensor) -> Tensor:
        if self._replaying:
            found = self._next(block, self._file) if self._file is not None else None
            found = found if self._group is None else self._group.broadcast(found)
            if isinstance(found, ResumeError):
                raise found
            if found is not None:
                return found.to(self.device)
            self._replaying = False
        # row by row in memory of torch's own, as it will be read: layout and alignment may change the last bit of a sum
        image = self._op._apply(block).clone(memory_format=torch.contiguous_format)
        if self._file is not None:
            self._append(block, image, self._file)
        return image

    def _head(self, block: Tensor) -> tuple[bytes, int, int, int]:
        return _FORMAT, self._phase, crc32(f"{block.dtype} {list(block.shape)}".encode()), crc32(_bytes(block))

    def _next(self, block: Tensor, file: io.BufferedRandom) -> Tensor | ResumeError | None:
        """The next product of the journal; None at its end, where what is no whole record is cut off."""
        expected, start = self._head(block), file.tell()
        product = torch.empty(block.shape, dtype=block.dtype)
        data = _bytes(product)
        with naming(file.name):
            raw, check = file.read(_HEAD.size), file.read(_CHECK.size)
            whole = file.readinto(data) == len(data)
            found = _HEAD.unpack(raw) if whole and check == _CHECK.pack(crc32(data, crc32(raw))) else ()
            if found[:3] != expected[:3]:
                file.truncate(start)
                return None
        if found[:4] != expected:
            return ResumeError(
                f"{file.name}: this machine does not repeat the interrupted analysis bit for bit (another processor, "
                "device or number of threads): resume where it began, or start anew with --force"
            )
        self.earlier = found[4]
        return product

    def _append(self, block: Tensor, image: Tensor, file: io.BufferedRandom) -> None:
        head, product = _HEAD.pack(*self._head(block), self.seconds()), _bytes(image)
        with naming(file.name):
            file.write(head + _CHECK.pack(crc32(product, crc32(head))))
            file.write(product)
            file.flush()
            if time.monotonic() - self._synced > _SYNC:
                os.fsync(file.fileno())
                self._synced = time.monotonic()


@contextlib.contextmanager
def _opened(journal: Path) -> Iterator[io.BufferedRandom]:
    """The journal from its beginning; written at its end."""
    file = journal.open("a+b")
    file.seek(0)
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # every record was flushed: what is left is a part of one
            file.close()


def _bytes(block: Tensor) -> memoryview:
    """Row by row; those of the tensor itself where it lies so on the CPU."""
    return block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
