"""Load and call functions of the user's, named on the command line, and report their errors in one line."""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import random
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ikun_hessian.jobs.errors import UsageError

OURS = Path(__file__).parents[3]
PACKAGES = ("ikun_hessian", "hessian_tools", "ikun")
FORM = "give module:function, or path/to/file.py:function"


_loaded = False  # whether this command has loaded code of the user's


def forget() -> None:
    """Begin a new command: no code of the user's is loaded."""
    global _loaded
    _loaded = False


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
    global _loaded
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"{option} {text}: {FORM}")
    _loaded = True
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
        UsageError: If the user's code raises any other error, or changes the working directory.
    """
    folder = Path.cwd()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UsageError | passed):
            raise
        raise UsageError(f"{what}: {told(error)}") from error
    if (now := Path.cwd()) != folder:  # results would be written there
        os.chdir(folder)
        raise UsageError(f"{what}: it changed the working directory to {now}: leave that out, and use absolute paths")


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


def users_error(error: BaseException) -> UsageError | None:
    """Convert an error that the user's code raised during an analysis to one line with the user's file and line.

    Args:
        error: Any error of a command.

    Returns:
        The error to report, or None if `error` does not come from the user's code, is a message of this project, or
        says that memory ran out.
    """
    ours = type(error).__module__.partition(".")[0] in PACKAGES
    memory = isinstance(error, MemoryError) or re.search("out of memory|not enough memory|allocate memory", str(error))
    if not _loaded or ours or memory or isinstance(error, KeyboardInterrupt) or not where(error):
        return None
    return UsageError(f"your code raised {told(error)}")


def sources(parts: Iterable[Any]) -> list[Path]:
    """Return the source files of functions and classes, and of all code of the user's that these files import.

    Standard library, installed packages and this project are left out of the imports. Imports are found in the text of
    the files, wherever they stand, and are followed if the module is loaded. A module that is loaded by its name in a
    string is found if the string is the whole name.

    Args:
        parts: Functions and classes. Those that have no file are ignored, and so are classes of installed packages.

    Returns:
        The files, without repetitions.
    """
    modules = {name: file for name, module in list(sys.modules.items()) if (file := _users_file(module)) is not None}
    names = {file: name for name, file in reversed(modules.items())}
    found: dict[Path, None] = {}
    left = []
    for part in parts:
        with contextlib.suppress(TypeError, OSError):
            source = inspect.getsourcefile(inspect.unwrap(part)) or ""
            left += [Path(source)] if _is_users(source) or not inspect.isclass(part) else []
    while left:
        file = left.pop()
        if file in found or not file.is_file():
            continue
        found[file] = None
        if file in names:
            left += [modules[name] for name in _imports(file, names[file]) if name in modules]
    return list(found)


def _users_file(module: Any) -> Path | None:
    """Return the source file of a module, if it is the user's."""
    file = getattr(module, "__file__", None)
    return Path(file) if isinstance(file, str) and file.endswith(".py") and _is_users(file) else None


def _imports(file: Path, name: str) -> Iterator[str]:
    """Yield the names of the modules that a file may import: more than it does, never fewer."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # the module was loaded from an older text
        return
    package = getattr(sys.modules.get(name), "__package__", None) or ""
    for node in ast.walk(tree):
        places: list[str] = []
        if isinstance(node, ast.Import):
            places = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            places = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            if any(alias.name == "*" for alias in node.names):
                places += [loaded for loaded in list(sys.modules) if loaded.startswith(f"{base}.")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            places = [node.value]
        for place in places:
            parts = place.split(".")
            yield from (".".join(parts[:i]) for i in range(1, len(parts) + 1))


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
    if filename.startswith("<") or {"site-packages", "dist-packages"} & set(Path(filename).parts):
        return False
    return not any(Path(filename).is_relative_to(folder) for folder in _libraries())


@functools.cache
def _libraries() -> list[Path]:
    """Return the folders of this project, of Python and of the installed packages."""
    installed = [Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")]
    return [*(OURS / name for name in PACKAGES), *installed]


def _short(filename: str) -> str:
    """Return the path relative to the working directory, if the file is in it."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
