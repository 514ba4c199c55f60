"""The public names and their signatures are those of public_api.txt, so that every change of them is a decision.

`python -m tests.test_public_api` writes the file anew.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest

import hessian_tools
import ikun
import ikun_hessian

FILE = Path(__file__).with_name("public_api.txt")


def signature(name: str, value: object) -> str:
    """One line: a function with its parameters, a class with its constructor's, anything else with its type."""
    if inspect.isclass(value) and is_dataclass(value):
        return f"class {name}({', '.join(f.name for f in fields(value))})"
    if inspect.isclass(value) or inspect.isfunction(value):
        try:
            parameters = inspect.signature(value)
        except ValueError:  # an exception's constructor in C
            return f"class {name}"
        bare = [p.replace(annotation=p.empty, default=plain(p.default)) for p in parameters.parameters.values()]
        return f"{'class' if inspect.isclass(value) else 'def'} {name}{inspect.Signature(bare)}"
    return f"{name}: {type(value).__name__}"


def plain(default: object) -> object:
    """A default as text that is the same in every process: a function by its name."""
    return Named(default.__name__) if inspect.isfunction(default) else default


class Named(str):
    def __repr__(self) -> str:
        return str(self)


def lines() -> list[str]:
    packages: list[ModuleType] = [hessian_tools, ikun, ikun_hessian]
    return [signature(f"{p.__name__}.{n}", getattr(p, n)) for p in packages for n in sorted(p.__all__)]


def test_names_and_signatures_are_the_recorded_ones() -> None:
    assert lines() == FILE.read_text().splitlines(), "run `python -m tests.test_public_api` if the change is intended"


@pytest.mark.parametrize("package", [hessian_tools, ikun, ikun_hessian], ids=lambda p: p.__name__)
def test_a_public_name_is_never_a_module(package: ModuleType) -> None:
    modules = {p.stem for p in Path(str(package.__file__)).parent.iterdir()}
    assert not modules & set(package.__all__)
    assert not any(inspect.ismodule(getattr(package, name)) for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError):
        package.no_such_name  # noqa: B018


def test_no_two_public_things_have_one_name() -> None:
    """Functions and classes of the three packages. Only the passes of the neurons share names, of one protocol."""
    found: dict[str, list[str]] = {}
    for package in ("hessian_tools", "ikun", "ikun_hessian"):
        for path in (FILE.parents[1] / package).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(str(path.relative_to(FILE.parents[1])))
    passes = ("ikun/kernels/", "ikun/nodes/passes.py")
    for name in (
        "flatness",
        "landscape",
        "true_hessian",
    ):  # of an objective in hessian_tools, and of a user's model in ikun_hessian
        assert len(found.pop(name)) == 2
    twice = {name: paths for name, paths in found.items() if len(paths) > 1}
    assert {n: p for n, p in twice.items() if not all(path.startswith(passes) for path in p)} == {}


def test_importing_the_packages_loads_nothing_heavy() -> None:
    code = (
        "import sys, hessian_tools, ikun, ikun_hessian; print({'torch', 'numpy', 'scipy', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
