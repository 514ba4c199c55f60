"""Interpret pickles without importing or calling anything that they name.

A pickle is a program that names functions and classes, calls them and sets the state of the results. Here every name
becomes an inert `Foreign` object. Calls, new objects and states only produce or keep further `Foreign` objects, so a
pickle cannot run code. Plain values and containers are built as usual.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

MOST_STEPS = 10_000_000  # opcodes of a pickle; a log of 1,000 epochs with 40 layers takes 2 million
LONGEST_NAME = 200  # characters of the name of a class or function
# Number of argument bytes after each opcode of the protocols 2 to 5. Opcodes that no pickler writes are missing.
# -1, -4 and -8: preceded by a length of that many bytes; -2: two lines of text.
_BEHIND = {
    **dict.fromkeys(b"RbasueNt()]}.Q01\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94", 0),
    **dict.fromkeys(b"Kqh\x80", 1),
    b"M"[0]: 2,
    **dict.fromkeys(b"Jrj", 4),
    **dict.fromkeys(b"G\x95", 8),
    **dict.fromkeys(b"UC\x8a\x8c", -1),
    **dict.fromkeys(b"XTB", -4),
    **dict.fromkeys(b"\x8d\x8e\x96", -8),
    b"c"[0]: -2,
}
_STOP = b"."[0]
_DAMAGED = "damaged, or not written by torch.save"


class ArchiveError(ValueError):
    """A file cannot be read. The message is a short reason without the name of the file."""


class CodeError(ArchiveError):
    """The file contains an object that is neither a tensor nor a plain value."""


class Foreign:
    """Stands for a class or function that a pickle names, for what it returns, or for an object of it.

    Attributes:
        name: The full name, such as "argparse.Namespace", without unprintable characters.
        content: The items that were set, for a mapping such as an AttributeDict; otherwise None.
    """

    __slots__ = ("content", "name")

    def __init__(self, name: str) -> None:
        self.name = "".join(c if c.isprintable() else "?" for c in name)
        self.content: dict[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"<{self.name}>"


def operations(data: bytes, place: int) -> Iterator[tuple[int, Any, int]]:
    """Yield each opcode of a pickle with its argument and the position after it, up to and including STOP.

    Args:
        data: Bytes that contain the pickle.
        place: Where it starts.

    Raises:
        ArchiveError: If it is cut off, or has opcodes that no pickler writes, or more than MOST_STEPS of them.
    """
    size = len(data)
    for _ in range(MOST_STEPS):
        behind = _BEHIND.get(data[place]) if place < size else None
        if behind is None:
            raise ArchiveError(_DAMAGED)
        opcode = data[place]
        argument: Any = None
        place += 1
        if behind > 0:
            argument = data[place : place + behind]
            place += behind
        elif behind == -2:
            words = []
            for _ in range(2):
                end = data.find(b"\n", place, place + LONGEST_NAME + 1)
                if end < 0:
                    raise ArchiveError(_DAMAGED)
                words.append(data[place:end].decode("utf-8", "replace"))
                place = end + 1
            argument = ".".join(words)
        elif behind < 0:
            start = place - behind
            length = int.from_bytes(data[place:start], "little")
            place = start + length
            argument = data[start:place]
        if place > size:
            raise ArchiveError(_DAMAGED)
        yield opcode, argument, place
        if opcode == _STOP:
            return
    raise ArchiveError(f"more than {MOST_STEPS:,} values in addition to the weights")


def count_steps(data: bytes, place: int = 0) -> tuple[int, int]:
    """Return the number of opcodes of a pickle and the position after it. Raises as `operations` does."""
    steps, end = 0, place
    for steps, (_, _, end) in enumerate(operations(data, place), 1):  # noqa: B007 - the last values are returned
        pass
    return steps, end


class InertUnpickler:
    """Builds the plain values of a pickle. Override `find`, `call`, `set_state` and `persistent` to recognize more.

    Lists, tuples, dicts, numbers, texts and bytes are built. Sets become `Foreign`, as do all other objects. A key of
    a dict that is not text, a float, None or an integer below 2^61 becomes `Foreign` too, because hashing an
    arbitrary key can take exponential time.

    Args:
        data: Bytes that contain the pickle.
        place: Where it starts.
    """

    def __init__(self, data: bytes, place: int = 0) -> None:
        self.data = data
        self.place = place
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def find(self, name: str) -> Any:
        """Return what stands for the class or function of this name."""
        return Foreign(name)

    def call(self, function: Foreign, arguments: tuple[Any, ...]) -> Any:
        """Return what stands for the result of a call."""
        return Foreign(function.name)

    def persistent(self, key: Any) -> Any:
        """Return what stands for an object that is stored outside the pickle."""
        raise ArchiveError(_DAMAGED)

    def set_state(self, target: Any, state: Any) -> None:
        """Set the state of an object: ignored here."""
        if type(target) is not Foreign and type(target) is not dict:  # an OrderedDict can have attributes
            raise ArchiveError(_DAMAGED)

    def load(self) -> Any:
        """Return the value of the pickle. Raises ArchiveError if the pickle is damaged."""
        try:
            for opcode, argument, end in operations(self.data, self.place):
                if opcode == _STOP:
                    self.place = end
                    return self.stack.pop()
                _DO[opcode](self, argument)
        except ArchiveError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArchiveError(_DAMAGED) from error
        raise ArchiveError(_DAMAGED)

    # ------------------------------------------------------------ operations on the stack
    def push(self, value: Any) -> None:
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """Pop everything above the last mark."""
        place = self.marks.pop()
        values = self.stack[place:]
        del self.stack[place:]
        return values

    def popped(self, count: int) -> tuple[Any, ...]:
        if count > len(self.stack):
            raise ArchiveError(_DAMAGED)
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return values

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        elif type(target) is not Foreign:
            raise ArchiveError(_DAMAGED)

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Foreign:
            if target.content is None:
                target.content = {}
            target = target.content
        if type(target) is not dict:
            raise ArchiveError(_DAMAGED)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[as_key(key)] = value

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self.set_state(target, state)

    def reduce(self, count: int) -> None:
        function, arguments, *_ = self.popped(count)
        if type(function) is not Foreign or type(arguments) is not tuple:
            raise ArchiveError(_DAMAGED)
        self.push(self.call(function, arguments))

    def stack_global(self) -> None:
        module, name = self.popped(2)
        if type(module) is not str or type(name) is not str or len(module) + len(name) > LONGEST_NAME:
            raise ArchiveError(_DAMAGED)
        self.push(self.find(f"{module}.{name}"))

    def memoize(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def inert(self, name: str) -> None:
        self.push(self.find(f"builtins.{name}"))


def as_key(key: Any) -> Any:
    """Return the key of a dict if hashing it is cheap, otherwise a `Foreign` object in its place."""
    kind = type(key)
    if kind is str or kind is float or kind is bool or key is None or kind is Foreign or kind is bytes:
        return key
    return key if kind is int and key.bit_length() <= 61 else Foreign(f"builtins.{kind.__name__}")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _frozen(machine: InertUnpickler) -> None:
    machine.marked()
    machine.inert("frozenset")


def _unsigned(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def _signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


_Do = Callable[[InertUnpickler, Any], object]


def _pushing(convert: Callable[[Any], Any]) -> _Do:
    """An operation that pushes its argument, converted."""
    return lambda machine, raw: machine.push(convert(raw))


_BY_LETTER: dict[bytes, _Do] = {
    b"(": lambda m, _: m.marks.append(len(m.stack)),
    b"0": lambda m, _: m.stack.pop(),
    b"1": lambda m, _: m.marked(),
    b"N": _pushing(lambda _: None),
    b"\x88": _pushing(lambda _: True),
    b"\x89": _pushing(lambda _: False),
    b"]": _pushing(lambda _: []),
    b"}": _pushing(lambda _: {}),
    b")": _pushing(lambda _: ()),
    **dict.fromkeys((b"K", b"M"), _pushing(_unsigned)),
    **dict.fromkeys((b"J", b"\x8a"), _pushing(_signed)),
    b"G": _pushing(lambda raw: struct.unpack(">d", raw)[0]),
    **dict.fromkeys((b"X", b"\x8c", b"\x8d"), _pushing(_text)),
    **dict.fromkeys((b"U", b"T"), _pushing(lambda raw: raw.decode("utf-8", "replace"))),  # texts of Python 2
    **dict.fromkeys((b"B", b"C", b"\x8e", b"\x96"), _pushing(lambda raw: raw)),
    b"t": lambda m, _: m.push(tuple(m.marked())),
    b"\x85": lambda m, _: m.push(m.popped(1)),
    b"\x86": lambda m, _: m.push(m.popped(2)),
    b"\x87": lambda m, _: m.push(m.popped(3)),
    b"a": lambda m, _: m.extend(list(m.popped(1))),
    b"e": lambda m, _: m.extend(m.marked()),
    b"s": lambda m, _: m.update(list(m.popped(2))),
    b"u": lambda m, _: m.update(m.marked()),
    **dict.fromkeys((b"q", b"r"), lambda m, raw: m.memoize(_unsigned(raw))),
    b"\x94": lambda m, _: m.memoize(len(m.memo)),
    **dict.fromkeys((b"h", b"j"), lambda m, raw: m.push(m.memo[_unsigned(raw)])),
    b"c": lambda m, name: m.push(m.find(name)),
    b"\x93": lambda m, _: m.stack_global(),
    b"Q": lambda m, _: m.push(m.persistent(*m.popped(1))),
    **dict.fromkeys((b"R", b"\x81"), lambda m, _: m.reduce(2)),
    b"\x92": lambda m, _: m.reduce(3),
    b"b": lambda m, _: m.build(),
    b"\x8f": lambda m, _: m.inert("set"),
    b"\x90": lambda m, _: m.extend(m.marked()),
    b"\x91": lambda m, _: _frozen(m),
    **dict.fromkeys((b"\x80", b"\x95"), lambda m, _: None),
}
_DO: dict[int, _Do] = {letter[0]: do for letter, do in _BY_LETTER.items()}
