"""Checkpoint an analysis to disk so that an interrupted run resumes after its last operator product.

An analysis with the state path PATH uses these files:

- PATH records the settings that the results depend on. Without it the other files are ignored.
- PATH.1, PATH.2, ... hold the results of the finished phases in order. Each file is written once.
- PATH.journal holds the products of the current phase.

An interrupted phase is run again from its beginning. Every phase is deterministic, as it draws from its own random
generator, so it asks for the same products. Those in the journal are read instead of computed, and the result is
bit-identical to that of an uninterrupted run.
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
_State = tuple[str, int, float, dict[str, Any]]  # name of the phase, products, seconds, value
# A journal record is a head, the CRC-32 of head and product, and the product in row-major order. The head holds the
# format, three CRC-32 values (phase name, dtype and shape of the block, block), and the seconds since the phase began.
_HEAD = struct.Struct("<4s3Id")
_CHECK = struct.Struct("<I")
_FORMAT = b"hvp2"
_WHOLE = 0x2144DF1C  # the CRC-32 of any data followed by its own CRC-32
_SYNC = 5.0  # seconds between two fsyncs, the most that a power cut loses; a killed process loses nothing


class ResumeError(ValueError):
    """A saved state cannot be resumed. The message is one line that names the file and the reason."""


class Phases:
    """Run the phases of an analysis in sequence, or read their results from disk.

    An analysis must run the same phases in the same order every time, and needs its own `Phases` object.

    Args:
        path: The state path. None saves nothing.
        key: The settings that the results depend on, as plain values by name.
        group: Processes that run the phases together. Only rank 0 reads and writes files.

    Attributes:
        path: The state path, or None.
        products: Number of operator products in all phases so far, including those read from disk.
        seconds: Time that interrupted processes spent on what was read from disk, up to their last product.

    Raises:
        ResumeError: If the saved state is damaged or belongs to other settings. The message names the settings.
        OSError: If a file cannot be read or written. Its `filename` is that file, and the saved state is unchanged.
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
        self._number = 0  # number of the current phase
        if path is not None and (state := self._load(path)):
            known = state[-1]
            if changed := [name for name in {**self._key, **known} if self._key.get(name) != known.get(name)]:
                raise ResumeError(
                    f"{path}: the {' and the '.join(changed)} changed since the interrupted run. Restore the old "
                    f"values to resume, or discard the state {path} and start again."
                )

    def run(self, name: str, op: Op, compute: Callable[[Op], dict[str, Any]]) -> dict[str, Any]:
        """Return compute(op), or the value it returned before an interruption.

        Args:
            name: Name of the phase.
            op: The operator.
            compute: A deterministic function that returns a dict of tensors and plain values. It is called with an
                operator that acts as `op` and saves its products to disk.

        Returns:
            The value of `compute`. The products of the phase are added to `products`, and also to `op.products` where
            they are read from the journal.

        Raises:
            ResumeError: If the saved state is damaged or belongs to another phase, or if this machine does not
                reproduce the vectors of the interrupted run bit for bit.
            OSError: If a file cannot be read or written.
        """
        before, path = op.products, self.path
        if path is None:
            value = compute(op)
            self.products += op.products - before
            return value
        self._number += 1
        file = _beside(path, self._number)
        if self._first and not path.exists():
            _discard(path)  # files of an abandoned analysis
            _save(path, "", 0, 0.0, self._key)
        if done := self._load(file):
            found, products, seconds, value = done
            if found != name:
                raise ResumeError(
                    f"{file}: holds the phase '{found}', not '{name}'. Discard the state {path} and start again."
                )
        else:
            with _opened(_beside(path, "journal")) if self._first else contextlib.nullcontext() as journal:
                journaled = _Journaled(op, name, journal, self._group)
                value = compute(cast(Op, journaled))
            products, seconds = op.products - before, journaled.earlier
            if self._first:
                # In this order: if the process is killed in between, the journal names a phase that is finished.
                _save(file, name, products, journaled.seconds(), value)
                _beside(path, "journal").unlink(missing_ok=True)
        self.products += products
        self.seconds += seconds
        return value

    def keep(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a phase that needs no operator: return compute(), or its value before an interruption."""
        idle = Composed(1, torch.float64, torch.device("cpu"), lambda v: v)
        return self.run(name, idle, lambda _: compute())

    def _load(self, path: Path) -> _State | None:
        """Return on every rank what _save wrote to `path`, or None if the file does not exist."""
        there = self._first and path.exists()
        if there and not path.is_file():  # opening a pipe would wait for ever
            raise ResumeError(f"{path}: not a regular file. Remove it and start again.")
        if self._group is None:
            return _read(path, path.open("rb")) if there else None
        data = self._group.broadcast(path.read_bytes() if there else None)
        return None if data is None else _read(path, io.BytesIO(data))

    @staticmethod
    def remove(path: Path) -> None:
        """Delete the saved state of the analysis at `path`, if there is one."""
        path.unlink(missing_ok=True)
        _discard(path)


def _beside(path: Path, ending: object) -> Path:
    """Return PATH.ENDING."""
    return path.with_name(f"{path.name}.{ending}")


def _discard(path: Path) -> None:
    """Delete all files of an analysis except PATH, and the temporary files of killed writes."""
    name = re.escape(path.name)
    form = re.compile(rf"{name}\.([1-9][0-9]*|journal)|\.{name}(\.[1-9][0-9]*)?\.[0-9a-f]{{32}}\.part")
    for file in filter(form.fullmatch, os.listdir(path.parent) if path.parent.is_dir() else []):
        path.with_name(file).unlink(missing_ok=True)


class _Summed:
    """A write-only file that accumulates the CRC-32 of its contents."""

    def __init__(self, file: IO[bytes]) -> None:
        self._write, self.flush, self.sum = file.write, file.flush, 0

    def write(self, data: Any) -> int:
        self.sum = crc32(data, self.sum)
        return self._write(data)


def _save(path: Path, name: str, products: int, seconds: float, value: dict[str, Any]) -> None:
    """Write the state of a phase atomically, followed by its CRC-32."""

    def write(file: IO[bytes]) -> None:
        summed = _Summed(file)
        try:
            state = {"name": name, "products": products, "seconds": seconds, "value": value}
            torch.save(state, cast(IO[bytes], summed))
        except RuntimeError as error:  # it hides the cause of a failed write, such as a full disk or Ctrl-C
            raise (error.__context__ or error) from None
        file.write(_CHECK.pack(summed.sum))

    write_atomically(path, write)


def _read(path: Path, file: IO[bytes]) -> _State:
    """Read what _save wrote. Raises ResumeError if the file is damaged."""

    def here(storage: Any, location: str) -> Any:  # put the tensors on the GPU of this rank
        return storage.cuda() if location != "cpu" and torch.cuda.is_available() else storage

    with file, naming(path):
        check = 0
        while chunk := file.read(2**20):
            check = crc32(chunk, check)
        if check != _WHOLE:  # torch.load accepts most damaged files
            raise ResumeError(f"{path}: damaged, or not the state of an analysis. Discard the state and start again.")
        file.seek(0)
        state = torch.load(file, map_location=here, weights_only=True)
        return state["name"], state["products"], state.get("seconds", 0.0), state["value"]


class _Journaled(Operator):
    """Acts as `op`, and appends its products to a journal. Products that the journal contains already are read from it.

    Other attributes are those of `op`, including `products` and `batch_forms`. A call of `batch_forms` is not
    journaled, so it must be a phase of its own.
    """

    def __init__(self, op: Operator, name: str, file: io.BufferedRandom | None, group: Group | None) -> None:
        self._op = op
        self._phase = crc32(name.encode())
        self._file = file  # None on every rank but rank 0
        self._group = group
        self._replaying = True
        self.earlier = 0.0  # seconds that interrupted processes spent on the products read from the journal
        self._began = self._synced = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds since the phase began, including those of interrupted processes."""
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
        # Row-major in new memory, as when it is read: layout and alignment can change the last bit of a sum.
        image = self._op._apply(block).clone(memory_format=torch.contiguous_format)
        if self._file is not None:
            self._append(block, image, self._file)
        return image

    def _head(self, block: Tensor) -> tuple[bytes, int, int, int]:
        """Return the record head of a block, without the time."""
        return _FORMAT, self._phase, crc32(f"{block.dtype} {list(block.shape)}".encode()), crc32(_bytes(block))

    def _next(self, block: Tensor, file: io.BufferedRandom) -> Tensor | ResumeError | None:
        """Return the next product of the journal. At its end return None, after an incomplete record is cut off."""
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
                f"{file.name}: this machine does not reproduce the interrupted run bit for bit (another processor, "
                "device or number of threads). Resume on the original machine, or discard the state and start again."
            )
        self.earlier = found[4]
        return product

    def _append(self, block: Tensor, image: Tensor, file: io.BufferedRandom) -> None:
        """Append a product to the journal."""
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
    """Open the journal for reading from its beginning and appending at its end."""
    if journal.exists() and not journal.is_file():
        raise ResumeError(f"{journal}: not a regular file. Remove it and start again.")
    file = journal.open("a+b")
    file.seek(0)
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # all complete records are flushed already
            file.close()


def _bytes(block: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, without a copy if it is contiguous on the CPU."""
    return block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
