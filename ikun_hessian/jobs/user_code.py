"""Load and call functions of the user's, named on the command line, and report their errors in one line."""

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
    """Load a function. Modules in the working directory can be imported.

    Args:
        option: The command-line option that names the function, for messages.
        text: The function, as "module:function" or "path/to/file.py:function".

    Returns:
        The function.

    Raises:
        UsageError: If there is no such function or its module fails. The message starts with the option.
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
        raise UsageError(f"{option} {text}: '{name}' is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function


def called(option: str, text: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the user's with all random generators seeded, so that it returns the same every time.

    Args:
        option: The command-line option that names the function, for messages.
        text: The function's name, for messages.
        function: The function.
        arguments: Its arguments.

    Returns:
        What the function returns.

    Raises:
        UsageError: If the function fails.
    """
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with readable(f"{option} {text}"):
        return function(*arguments)


@contextlib.contextmanager
def readable(what: str, passed: type[Exception] = UsageError) -> Iterator[None]:
    """Run the user's code in a context that sends its output to standard error and reports its errors in one line.

    Args:
        what: The start of the message.
        passed: Errors of this class are not changed.

    Raises:
        UsageError: If the user's code raises any other error.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UsageError | passed):
            raise
        raise UsageError(f"{what}: {told(error)}") from error


def told(error: BaseException) -> str:
    """Return the class, the message and the place of an error in one line."""
    said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    text = f"{type(error).__name__}{f': {said}' if said else ''}"
    return f"{text if len(text) <= 200 else text[:197] + '...'}{where(error)}"


def where(error: BaseException) -> str:
    """Return the last line of the traceback that is in the user's files, or an empty string."""
    if isinstance(error, SyntaxError):
        return f" ({_short(error.filename or '?')}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f" ({_short(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""


def sources(functions: list[Callable[..., Any]]) -> list[Path]:
    """Return the source files of functions, without repetitions. Functions that have none are ignored."""
    found = []
    for function in functions:
        with contextlib.suppress(TypeError, OSError):
            found.append(Path(inspect.getsourcefile(inspect.unwrap(function)) or ""))
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _imported(place: str) -> ModuleType:
    """Import a module by its name."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # the module exists, but it imports one that does not
        raise UsageError(f"no module '{place}' in {Path.cwd()} or among the installed packages: {FORM}") from None


@functools.cache
def _from_file(path: Path) -> ModuleType:
    """Import the module in a file. It can import modules in the same folder, as a script can."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = f"{path.stem} in {path.parent}"  # not only the stem, which could be the name of an installed module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_users(filename: str) -> bool:
    """Whether a file is the user's: not part of this project, of Python or of an installed package."""
    library = [OURS / "ikun_hessian", OURS / "hessian_tools", OURS / "ikun"]
    library += [Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")]
    return not filename.startswith("<") and not any(Path(filename).is_relative_to(folder) for folder in library)


def _short(filename: str) -> str:
    """Return the path relative to the working directory, if the file is in it."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
