"""Tests of user code that raises or prints during an analysis, and of the files that its hash covers."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from command_tools import ROOT, Capture, limited
from torch import nn

import cli
from ikun_hessian.jobs.user.code import _is_users, load_function, sources

FAST = ["--top", "2", "--smallest", "1", "--no-density", "--operator", "hessian"]
NETWORK = """
    import os, sys
    import torch
    from torch import nn

    class Error(Exception):
        pass

    class Stop(BaseException):
        pass

    class Network(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.act = act

        def forward(self, x):
            self.act(x)
            return self.layer(x).tanh()

    def data():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(24, 5, generator=generator), torch.arange(24) % 3

    def empty():
        while True:
            yield torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)

    def gaps():
        x, y = data()
        for i in range(24):
            yield x[:0], y[:0]
            yield x[i : i + 1], y[i : i + 1]

    def silent():
        return Network(lambda x: None)

    def loss(outputs, targets):
        print("printed by the loss")
        return nn.functional.cross_entropy(outputs, targets)

    def prints():
        return Network(lambda x: print("printed by the forward"))

    def writes():
        return Network(lambda x: os.write(1, b"written to the descriptor\\n"))

    def spawns():
        return Network(lambda x: os.system("echo printed by a child"))
"""
ERRORS = {
    "KeyError('later')": "KeyError: 'later'",
    "OSError(28, 'No space left on device')": "OSError: [Errno 28] No space left on device",
    "BrokenPipeError(32, 'Broken pipe')": "BrokenPipeError: [Errno 32] Broken pipe",
    "EOFError()": "EOFError",
    "SystemExit(7)": "SystemExit: 7",
    "SystemExit()": "SystemExit",
    "StopIteration()": "StopIteration",
    "AssertionError()": "AssertionError",
    "RuntimeError('two\\nlines')": "RuntimeError: two lines",
    "ValueError('wrong \\x1b[31m')": "ValueError: wrong ?[31m",
    "Error('own')": "Error: own",
    "Stop('own')": "Stop: own",
}


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(textwrap.dedent(NETWORK))
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    torch.save({f"layer.{name}": p for name, p in layer.state_dict().items()}, "w.pt")


def command(model: str = "silent", data: str = "data", loss: str = "ce", *more: str) -> list[str]:
    own = ["--model", f"nets.py:{model}", "--data", f"nets.py:{data}", "--loss", loss]
    return ["spectrum", "w.pt", *own, *FAST, *more]


def failing(error: str) -> int:
    """Add a function `fails` that builds a network which raises for the whole data. Return the line that raises."""
    lines = textwrap.dedent(NETWORK).splitlines()
    lines += [
        "def act(x):",
        "    if len(x) == 24:",
        f"        raise {error}",
        "def fails():",
        "    return Network(act)",
    ]
    Path("nets.py").write_text("\n".join(lines) + "\n")
    return len(lines) - 2


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_user_code_after_the_trial_are_one_line_with_file_and_line(error: str, capsys: Capture) -> None:
    line = failing(error)
    assert cli.run(command("fails")) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == ["opening w.pt", f"error: your code raised {ERRORS[error]} (nets.py, line {line})"]
    assert said.out == ""


@pytest.mark.parametrize("place", [0, -1])
def test_debug_shows_the_whole_traceback_before_the_line(place: int, capsys: Capture) -> None:
    line = failing("KeyError('later')")
    words = command("fails")
    assert cli.run(["--debug", *words] if place == 0 else [*words, "--debug"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"error: your code raised KeyError: 'later' (nets.py, line {line})"
    assert sum(text.startswith("Traceback") for text in said) == 2  # the user's error, and the one that reports it
    assert any("raise KeyError('later')" in text for text in said)


def test_memory_that_runs_out_in_user_code_has_the_hint_of_any_other(capsys: Capture) -> None:
    failing("MemoryError('not enough memory')")
    assert cli.run(command("fails")) == 1
    assert capsys.readouterr().err.endswith("error: not enough memory: lower --batch-size or --memory\n")


@pytest.mark.parametrize("model", ["prints", "writes", "spawns"])
def test_what_user_code_prints_does_not_reach_json(model: str) -> None:
    """In a process of its own, with real file descriptors: print, os.write and a child process."""
    words = [sys.executable, str(ROOT / "cli.py"), *command(model, "data", "nets.py:loss", "--json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "ikun-hessian/spectrum/1"
    assert "printed by the loss" in done.stderr
    shown = {"prints": "printed by the forward", "writes": "written to the descriptor", "spawns": "printed by a child"}
    assert shown[model] in done.stderr


def test_what_user_code_prints_does_not_reach_json_in_a_python_process(capsys: Capture) -> None:
    assert cli.run(command("prints", "data", "nets.py:loss", "--json")) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["num_parameters"] == 18
    assert {"printed by the forward", "printed by the loss"} <= set(said.err.splitlines())
    print("back")
    assert capsys.readouterr().out == "back\n"


@pytest.mark.parametrize(("closed", "shown"), [("2>&-", True), ("2>/dev/full", True), ("2>&- >&-", False)])
def test_a_closed_standard_error_stops_nothing(closed: str, shown: bool) -> None:
    words = " ".join([sys.executable, str(ROOT / "cli.py"), *command("prints", "data", "ce", "--json")])
    done = subprocess.run(["sh", "-c", f"{words} {closed}"], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert Path("w.spectrum.json").exists()
    assert bool(done.stdout) == shown
    if shown:
        assert json.loads(done.stdout)["num_parameters"] == 18


@pytest.mark.parametrize("place", ["build", "data", "forward"])
def test_user_code_that_changes_the_working_directory_is_refused(place: str, tmp_path: Path, capsys: Capture) -> None:
    """The results would be written elsewhere, and the checkpoint not be found."""
    moves = {
        "build": "def moves():\n    os.chdir('/')\n    return silent()\n",
        "data": "def moves():\n    os.chdir('/')\n    return data()\n",
        "forward": "def moves():\n    return Network(lambda x: os.chdir('/'))\n",
    }
    Path("nets.py").write_text(textwrap.dedent(NETWORK) + moves[place])
    assert cli.run(command("silent", "moves") if place == "data" else command("moves")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    option = "--data" if place == "data" else "--model"
    assert said.startswith(f"error: {option} nets.py:moves: it changed the working directory to /: ")
    assert Path.cwd() == tmp_path
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == ["nets.py", "w.pt"]


def test_batches_without_samples_do_not_go_on_for_ever(capsys: Capture) -> None:
    with limited(60):
        assert cli.run(command("silent", "empty")) == 2
    assert "--data nets.py:empty: 1001 batches in a row have no samples" in capsys.readouterr().err
    assert cli.run(command("silent", "gaps")) == 0


# ---------------------------------------------------------------- the hash of the code
MODULES = {
    "user_pack/__init__.py": "",
    "user_pack/sizes.py": "WIDTH = 4\n",
    "user_pack/deep/__init__.py": "from .wide import *\n",
    "user_pack/deep/wide.py": "from ..sizes import WIDTH\nwide = WIDTH\n",
    "user_lazy.py": "FACTOR = 1\n",
    "user_named.py": "class Layer: pass\n",
    "user_star/__init__.py": "__all__ = ['part']\n",
    "user_star/part.py": "PART = 1\n",
    "user_unused.py": "X = 1\n",
    "user_main.py": """
        import importlib
        import json, torch
        import user_pack.deep
        from user_star import *
        named = importlib.import_module("user_named")
        def build():
            import user_lazy
            return user_lazy.FACTOR * user_pack.deep.wide
    """,
}


def test_all_user_code_that_is_imported_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants, relative and star imports, packages, imports in functions and by name; no installed packages."""
    for name, text in MODULES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    build = load_function("--model", "user_main:build")
    importlib.import_module("user_unused")
    assert build() == 4
    found = {str(path.relative_to(tmp_path)) for path in sources([build])}
    assert found == set(MODULES) - {"user_unused.py"}
    for name in [name for name in sys.modules if name.startswith("user_")]:
        del sys.modules[name]


def test_a_result_is_not_kept_after_an_imported_module_was_edited(tmp_path: Path) -> None:
    """The kind: --model's file is as it was, but a module that it imports computes something else now."""
    Path("helper.py").write_text("SLOPE = 1.0\n")
    Path("mine.py").write_text(
        "from nets import Network, data\nimport helper\n"
        "def build():\n    net = Network(lambda x: None)\n    net.slope = helper.SLOPE\n    return net\n"
    )
    own = ["--model", "mine:build", "--data", "mine:data", "--loss", "ce", "--resume"]
    words = [sys.executable, str(ROOT / "cli.py"), "spectrum", "w.pt", *own, *FAST]
    run = {"capture_output": True, "text": True}
    assert subprocess.run(words, **run).returncode == 0  # type: ignore[call-overload]
    assert "unchanged" in subprocess.run(words, **run).stdout  # type: ignore[call-overload]
    Path("helper.py").write_text("SLOPE = 2.0\n")
    done = subprocess.run(words, **run)  # type: ignore[call-overload]
    assert done.returncode == 2
    assert "w.spectrum.json was made with other code" in done.stderr
    shutil.rmtree("__pycache__", ignore_errors=True)


def test_an_error_of_this_project_is_not_told_as_one_of_user_code(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """User code is loaded and called, but the error is raised in a file of this project."""
    monkeypatch.setattr("hessian_tools.analysis.spectrum.spectrum", {}.__getitem__)  # which takes no such arguments
    assert cli.run(command()) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: unexpected TypeError: ")
    assert not _is_users(str(ROOT / "hessian_tools" / "objective.py"))
    assert not _is_users(str(ROOT / "ikun_hessian" / "cli" / "main.py"))
    assert _is_users(str(Path("nets.py").resolve()))


@pytest.mark.parametrize("value", ["5e-324", "1e-170", "1e160", "1e300"])
@pytest.mark.parametrize("option", ["--radius", "--rho", "--noise"])
def test_scales_that_overflow_are_refused(option: str, value: str, capsys: Capture) -> None:
    words = ["flatness", *command()[1 : -len(FAST)], option, value, "--calibrate"]
    assert cli.run(words) == 2
    assert f"{option[2:]} must be a positive number from 1e-12 to 1e+06" in capsys.readouterr().err
