"""Parameters of the libraries in terms of the command line."""

from __future__ import annotations

import ast
import re

import pytest
from command_tools import ROOT

from ikun.adapters import AdapterError
from ikun.data.download import DataError
from ikun_hessian.cli.main import cli
from ikun_hessian.jobs.errors import OPTIONS, in_options


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("pass a folder as {data_dir}", data_dir=...), "pass a folder as --data-dir"),
        (DataError("give {timesteps}", timesteps=30), "give --timesteps 30"),
        (DataError("give {coding}", coding="spikes"), "give --coding spikes"),
        (AdapterError("give {time_first}", time_first=False), "give --batch-first"),
        (AdapterError("{sequences} needs {steps}", sequences=True, steps=...), "--sequences needs --timesteps"),
        (AdapterError("{}: {}", "a.nir", AdapterError("give {dt}", dt=...)), "a.nir: give --dt"),
        (AdapterError("{x} is unknown", x=3), "x=3 is unknown"),
        (AdapterError("{reset}"), "{reset}"),
        (MemoryError("{reset}"), "{reset}"),
    ],
)
def test_messages_name_options(error: Exception, line: str) -> None:
    assert in_options(error) == line


def test_every_option_exists() -> None:
    known = {
        option for command in cli.commands.values() for p in command.params for option in p.opts + p.secondary_opts
    }
    assert {option.partition(" ")[0] for option in OPTIONS.values()} <= known


def raised() -> set[str]:
    """Parameters that the libraries name in errors, as keyword arguments of their classes."""
    names = set()
    for path in [*(ROOT / "ikun").rglob("*.py"), *(ROOT / "hessian_tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                names |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return names


def test_every_parameter_has_an_option() -> None:
    assert raised() >= {"data_dir", "reset", "steps"}
    assert raised() <= set(OPTIONS)


def test_the_libraries_name_no_option() -> None:
    for folder in ("ikun", "hessian_tools"):
        for path in (ROOT / folder).rglob("*.py"):
            texts = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
            assert not [text for text in texts if isinstance(text, str) and re.search(r"(?<![-\w])--[a-z]", text)]
