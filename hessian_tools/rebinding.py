"""Copy an object deeply, together with the functions that it holds.

`copy.deepcopy` does not copy functions. A lambda or a hook that refers to a module would still compute with the module
that was copied: with weights that no derivative reaches. Here such functions are made anew over the copies.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

OBJECTS = 10_000  # that one search looks at, at most


def deep_copy(thing: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy whose functions refer to the copies.

    Functions, methods, partials and weak references that lead to a copied object are made anew: by their closure, their
    defaults, their attributes, or the globals that they name. Whatever lies between is copied shallowly, and all else
    that they refer to stays shared. What cannot be copied stays shared too, and then leads to the original.

    Args:
        thing: Any object.
        memo: Copies by the id of the original, as in `copy.deepcopy`. It is extended.

    Returns:
        The copy.
    """
    copied = copy.deepcopy(thing, memo)
    rebinding = _Rebinding(memo)
    for made in list(rebinding.copies.values()):
        rebinding.fill(made)
    return rebinding.swapped(copied)


class _Rebinding:
    """What takes the place of each object in a copy.

    Attributes:
        made: What was made, by the id of the original: copies, new functions, cells and globals.
        copies: Objects that are already copies, by their own id.
        kept: Originals, whose ids must stay in use.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        found = ((key, value) for key, value in memo.items() if isinstance(key, int) and key != id(memo))
        self.made = {key: value for key, value in found if not isinstance(value, tuple | types.MethodType)}
        self.copies = {id(value): value for value in self.made.values()}
        self.kept: list[Any] = [memo]

    def swapped(self, value: Any) -> Any:
        """Return what takes the place of a value in the copy: mostly the value itself."""
        if isinstance(value, _LEAVES) or id(value) in self.copies:
            return value
        if id(value) in self.made:
            return self.made[id(value)]
        if not self._leads(value):
            return value
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.swapped(value.__func__), self.swapped(value.__self__))
        if isinstance(value, weakref.ref):
            return weakref.ref(self.swapped(value()))
        if type(value) is tuple:
            return tuple(self.swapped(part) for part in value)
        try:
            new = self._note(value, copy.copy(value))
        except Exception:  # such as a lock or an open file
            return value
        self.fill(new)
        return new

    def fill(self, made: Any) -> None:
        """Replace what a copied object holds, in place."""
        if isinstance(made, functools.partial):
            function, args = self.swapped(made.func), self.swapped(made.args)
            if function is not made.func or args is not made.args:
                made.__setstate__((function, args, made.keywords, vars(made)))  # type: ignore[attr-defined]
            self.fill(made.keywords)
        for holder in (made, _attributes(made)):
            if isinstance(holder, dict | list):
                for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                    if (new := self.swapped(value)) is not value:
                        holder[key] = new

    def _note(self, old: Any, new: Any) -> Any:
        self.made[id(old)] = self.copies[id(new)] = new
        self.kept.append(old)
        return new

    def _function(self, old: types.FunctionType) -> types.FunctionType:
        cells = [(cell, self._cell(cell)) for cell in old.__closure__ or ()]
        named = {name: old.__globals__[name] for name in _names(old.__code__) if name in old.__globals__}
        leading = {name: value for name, value in named.items() if _followed(value, old) and self._leads(value)}
        scope = old.__globals__
        if leading:
            scope = self.made.get(id(scope)) or self._note(scope, dict(scope))
        new = types.FunctionType(old.__code__, scope, old.__name__, None, tuple(made for _, made in cells))
        self._note(old, functools.update_wrapper(new, old, updated=()))
        vars(new).clear()  # of __wrapped__
        vars(new).update({key: self.swapped(value) for key, value in vars(old).items()})
        new.__defaults__ = self.swapped(old.__defaults__)
        new.__kwdefaults__ = self.swapped(old.__kwdefaults__)
        scope.update({name: self.swapped(value) for name, value in leading.items()})
        for cell, made in cells:
            if made is not cell and not _contents(made):
                made.cell_contents = None  # not empty any more, if the contents lead back here
                made.cell_contents = self.swapped(cell.cell_contents)
        return new

    def _cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) not in self.made and any(self._leads(value) for value in _contents(cell)):
            self._note(cell, types.CellType())
        found: types.CellType = self.made.get(id(cell), cell)
        return found

    def _leads(self, value: Any) -> bool:
        """Whether an original can be reached from a value, other than through a copy."""
        seen: set[int] = set()
        todo = [value]
        while todo and len(seen) < OBJECTS:
            value = todo.pop()
            if isinstance(value, _LEAVES) or id(value) in seen or id(value) in self.copies:
                continue
            if id(value) in self.made:
                return True
            seen.add(id(value))
            todo += _parts(value)
        return False


_LEAVES = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType, str, bytes, int, float, types.NoneType)


def _parts(value: Any) -> Iterator[Any]:
    """Yield what an object refers to."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield from _contents(cell)
        yield from (value.__defaults__, value.__kwdefaults__, vars(value))
        named = (value.__globals__.get(name) for name in _names(value.__code__))
        yield from (other for other in named if _followed(other, value))
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, weakref.ref):
        yield value()
    else:
        if isinstance(value, dict | list | tuple):
            yield from value.values() if isinstance(value, dict) else value
        yield from _attributes(value).values()


def _followed(value: Any, function: types.FunctionType) -> bool:
    """Whether a global that a function names is followed: any object, but only functions of the same module."""
    return not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__


def _names(code: types.CodeType) -> set[str]:
    """Return the names that code uses, and those of the functions defined inside it."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*(_names(part) for part in inner))


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    """Return the contents of a cell; an empty tuple if it is empty."""
    with contextlib.suppress(ValueError):
        return (cell.cell_contents,)
    return ()


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object; an empty dict if it has none."""
    with contextlib.suppress(Exception):
        found = object.__getattribute__(value, "__dict__")
        if isinstance(found, dict):
            return found
    return {}
