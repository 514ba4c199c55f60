"""Functions of the user's own, named on the command line: found, called, and what goes wrong in them in one line."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import random
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ikun_hessian.jobs.errors import UsageError

OURS = Path(__file__).parents[1]
FORM = "give module:function, or path/to/file.py:function"


def load_function(option: str, text: str) -> Callable[..., Any]:
    """The function that `module:function` or `path/to/file.py:function` names; the working directory is importable.

    Raises UsageError with one line that starts with the option.
    """
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"{option} {text}: {FORM}")
    with readable(f"{option} {text}"):
        module = _from_file(Path(place).resolve()) if place.endswith(".py") else _imported(place)
    found = getattr(module, name, None)
    if found is None:
        near = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)], 1)
        raise UsageError(f"{option} {text}: {place} has no '{name}'{f' ({near[0]}?)' if near else ''}")
    if not callable(found):
        raise UsageError(f"{option} {text}: '{name}' is a {type(found).__name__}, and no function")
    function: Callable[..., Any] = found
    return function


def called(option: str, text: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) with all random generators seeded: it makes the same every time."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with readable(f"{option} {text}"):
        return function(*arguments)


@contextlib.contextmanager
def readable(what: str, passed: type[Exception] = UsageError) -> Iterator[None]:
    """The user's own code at work: what it prints goes to standard error, what it raises becomes one line, unless it is
    of the kind `passed`."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UsageError | passed):
            raise
        raise UsageError(f"{what}: {told(error)}") from error


def told(error: BaseException) -> str:
    """What was raised, in one line, and where."""
    said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    text = f"{type(error).__name__}{f': {said}' if said else ''}"
    return f"{text if len(text) <= 200 else text[:197] + '...'}{where(error)}"


def where(error: BaseException) -> str:
    """The last line of the traceback that is in the user's own files; empty if none is."""
    if isinstance(error, SyntaxError):
        return f" ({_short(error.filename or '?')}, line {error.lineno})"
    his = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_his(frame.filename)]
    return f" ({_short(his[-1].filename)}, line {his[-1].lineno})" if his else ""


def sources(functions: list[Callable[..., Any]]) -> list[Path]:
    """The files that functions were read from, as far as there are any."""
    found = []
    for function in functions:
        with contextlib.suppress(TypeError, OSError):
            found.append(Path(inspect.getsourcefile(inspect.unwrap(function)) or ""))
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _imported(place: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # one that his module wants
        raise UsageError(f"no module '{place}' in {Path.cwd()} or among the installed ones: {FORM}") from None


@functools.cache
def _from_file(path: Path) -> ModuleType:
    """The module in a file, its neighbours importable as if it had been started."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = f"{path.stem} in {path.parent}"  # the name alone could be that of an installed module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_his(filename: str) -> bool:
    library = [OURS / "ikun_hessian", OURS / "hessian_tools", OURS / "ikun"]
    library += [Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")]
    return not filename.startswith("<") and not any(Path(filename).is_relative_to(folder) for folder in library)


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
