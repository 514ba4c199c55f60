"""The phases of an analysis, kept on disk, so that an interrupted one goes on behind its last product.

PATH holds the results of the finished phases, PATH.journal the products of the one under way. A phase that was
interrupted is simply run again: it is deterministic (every phase draws from a generator of its own), so it asks for the
same products, takes those that the journal has, and ends with the same arrays, bit for bit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor

from hessian_tools.distributed import Group
from hessian_tools.operators import Operator
from hessian_tools.results import write_atomically

Op = TypeVar("Op", bound=Operator)

# A record of the journal: head (format; CRC-32 of the phase's name, of the block's dtype and shape, of the block),
# CRC-32 of head and product, product row by row.
_HEAD = struct.Struct("<4s3I")
_CHECK = struct.Struct("<I")
_FORMAT = b"hvp1"
_SYNC = 5.0  # seconds between two fsyncs: a kill loses nothing that was flushed, a power cut at most so much


class ResumeError(ValueError):
    """A state that cannot be resumed: one line that names the file and says why."""


class Phases:
    """Runs phases by name, or takes their results from `path`; None keeps nothing.

    key: what the results depend on, as named plain values; a state with another key is refused (ResumeError, naming
    what differs), and so is a damaged one. group: processes that run the phases together; only rank 0 reads and writes.
    A file that cannot be read or written raises OSError with its name, and the state stays as it was.
    """

    def __init__(
        self, path: Path | None = None, key: Mapping[str, Any] | None = None, group: Group | None = None
    ) -> None:
        self.path = path
        self.products = 0
        self._key = {name: json.dumps(value, sort_keys=True) for name, value in (key or {}).items()}
        self._group = group
        self._first = group is None or group.rank == 0
        self._done: dict[str, Any] = {}
        if path is not None:
            data = path.read_bytes() if self._first and path.exists() else None
            data = data if group is None else group.broadcast(data)
            self._done = {} if data is None else _read(path, data, self._key)

    def run(self, name: str, op: Op, compute: Callable[[Op], dict[str, Any]]) -> dict[str, Any]:
        """compute(op), a dict of tensors and plain values, or what it returned before the interruption.

        compute is handed an operator that acts as `op` and remembers its products on disk; it must be deterministic.
        The products of the phase are added to `products`, those taken from the disk too (as they are to op's own).
        """
        if name not in self._done:
            before = op.products
            if self.path is None:
                value = compute(op)
            else:
                if self._first and not self.path.exists():
                    _journal(self.path).unlink(missing_ok=True)  # of an analysis that was given up
                    self._save(self.path)
                with _opened(_journal(self.path)) if self._first else contextlib.nullcontext() as file:
                    value = compute(cast(Op, _Journaled(op, name, file, self._group)))
            self._done[name] = {"value": value, "products": op.products - before}
            if self._first and self.path is not None:
                # in this order: what a kill between the two leaves in the journal carries a finished phase's name
                self._save(self.path)
                _journal(self.path).unlink(missing_ok=True)
        self.products += self._done[name]["products"]
        result: dict[str, Any] = self._done[name]["value"]
        return result

    def _save(self, path: Path) -> None:
        data = io.BytesIO()  # torch.save hides the error of a file that it cannot write
        torch.save({"key": self._key, "done": self._done}, data)
        with _naming(path):
            write_atomically(path, lambda file: file.write(data.getbuffer()))

    @staticmethod
    def remove(path: Path) -> None:
        """Forget the analysis kept at `path`, if any."""
        path.unlink(missing_ok=True)
        _journal(path).unlink(missing_ok=True)


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")


def _read(path: Path, data: bytes, key: Mapping[str, str]) -> dict[str, Any]:
    """The finished phases in the bytes of a state."""

    def here(storage: Any, location: str) -> Any:  # a rank's tensors on its own GPU
        return storage.cuda() if location != "cpu" and torch.cuda.is_available() else storage

    try:
        state = torch.load(io.BytesIO(data), map_location=here, weights_only=True)
        known, done = dict(state["key"]), dict(state["done"])
    except Exception:  # torch.load raises many kinds on damaged files
        raise ResumeError(f"{path}: not the state of an interrupted analysis: start anew with --force") from None
    if changed := [name for name in {**key, **known} if key.get(name) != known.get(name)]:
        raise ResumeError(
            f"{path}: the {' and the '.join(changed)} changed since the analysis was interrupted: put that back as it "
            "was, or start anew with --force"
        )
    return done


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
        self._synced = time.monotonic()

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
        head, start = self._head(block), file.tell()
        product = torch.empty(block.shape, dtype=block.dtype)
        data = _bytes(product)
        with _naming(file.name):
            raw, check = file.read(_HEAD.size), file.read(_CHECK.size)
            whole = file.readinto(data) == len(data)
            if not whole or check != _CHECK.pack(crc32(data, crc32(raw))) or _HEAD.unpack(raw)[:3] != head[:3]:
                file.truncate(start)
                return None
        if raw != _HEAD.pack(*head):
            return ResumeError(
                f"{file.name}: this machine does not repeat the interrupted analysis bit for bit (another processor, "
                "device or number of threads): resume where it began, or start anew with --force"
            )
        return product

    def _append(self, block: Tensor, image: Tensor, file: io.BufferedRandom) -> None:
        head, product = _HEAD.pack(*self._head(block)), _bytes(image)
        with _naming(file.name):
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


@contextlib.contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """An OSError names this file, where that of a full disk names none and that of a folder a temporary one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _bytes(block: Tensor) -> memoryview:
    """Row by row; those of the tensor itself where it lies so on the CPU."""
    return block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
