"""Tests of the README and the pages of docs/: code blocks run, and the names in them exist.

The blocks of a page run in order, in one namespace and one folder that holds the shipped checkpoints. They are python
blocks and command lines of ikun-hessian (indented, or fenced as console). A block with a title is written to a file of
that name. A block that cannot run here has the comment <!-- not run: why --> above it and is listed in NOT_RUN; its
options are still checked.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import itertools
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "checkpoints" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "README.md": ["installs", "a network of yours", "minutes", "installs"],
    "checkpoints/README.md": ["minutes"],
    "docs/calibration.md": ["minutes", "an hour"],
    "docs/cluster.md": ["starts several processes", "a cluster", "a cluster"],
    "docs/event-data.md": ["a download"],
    "docs/findings.md": ["minutes", "hours", "minutes", "needs the repository's benchmarks"],
    "docs/findings/README.md": ["minutes"],
    "docs/gpu.md": ["needs a GPU"],
    "docs/index.md": ["installs"],
    "docs/long-runs.md": ["sets an environment variable"],
    "docs/presets.md": ["needs the study above", "hours"],
    "docs/training.md": ["a download"],
    "docs/true-hessian.md": ["minutes"],
    "docs/tutorial.md": ["minutes"],
}
LIBRARIES = (
    "spikingjelly",
    "snntorch",
    "norse",
    "nir",
    "nirtorch",
    "torchvision",
    "tonic",
)  # of other people's networks
FOREIGN = {"--nproc-per-node", "--no-python", "--no-deps"}  # options of torchrun and pip
RUN = "ikun-hessian"
SHIPPED = "checkpoints/digits-csnn-ikun.pt"  # the README's first command analyses it, at more samples than here
PROGRAM = re.compile(r"(\$ )?(ikun-hessian|python3?|pip|torchrun|mkdocs|pytest|git|cd|curl|wget|uv|conda|docker)\b")
COMMANDS = ("console", "bash", "sh", "shell")
TEXT = ("text", "json", "toml")  # toml without a title: an excerpt


@dataclass(frozen=True)
class Block:
    """text at a line of a page. kind: python, commands, file (title says which) or text; reason: why it is not run."""

    line: int
    kind: str
    text: str
    title: str = ""
    reason: str = ""

    def commands(self) -> list[list[str]]:
        """The words of every command, continued lines joined, `a && b` taken apart."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            parts = itertools.groupby(words, lambda word: word == "&&")
            found += [list(part) for separator, part in parts if not separator]
        return found


def blocks(text: str) -> list[Block]:
    """All code blocks of a page, in order. Raises ValueError for a fence whose language is not known here."""
    found: list[Block] = []
    lines = text.splitlines()
    reason, i = "", 0
    while i < len(lines):
        begin, line = i, lines[i]
        if fence := re.match(r"( *)(```+)\s*(\w*)(.*)", line):
            body = []
            i += 1
            while i < len(lines) and lines[i].strip() != fence[2]:
                body.append(lines[i].removeprefix(fence[1]))
                i += 1
            title = re.search(r'title="([^"]+)"', fence[4])
            found.append(_fenced(begin + 1, fence[3], title[1] if title else "", "\n".join(body), reason))
            reason = ""
        elif line.startswith("    ") and (begin == 0 or not lines[begin - 1].strip()):
            while i + 1 < len(lines) and (lines[i + 1].startswith("    ") or not lines[i + 1].strip()):
                i += 1
            body = [part[4:] for part in lines[begin : i + 1]]
            kind = "commands" if any(map(PROGRAM.match, body)) else "text"
            found.append(Block(begin + 1, kind, "\n".join(body).rstrip(), "", reason))
            reason = ""
        elif mark := re.fullmatch(r"<!-- not run: (.+) -->", line.strip()):
            reason = mark[1]
        elif line.strip():
            reason = ""
        i += 1
    return found


def _fenced(line: int, language: str, title: str, text: str, reason: str) -> Block:
    if title:
        return Block(line, "file", text, title, reason)
    if language in COMMANDS:
        return Block(line, "commands", text, "", reason)
    if language not in ("python", *TEXT):
        raise ValueError(f"line {line}: a block of '{language}': use python, console, text, json or toml")
    return Block(line, "python" if language == "python" else "text", text, "", reason)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def options() -> dict[str, click.Command]:
    from ikun_hessian.cli.main import cli

    return {"": cli, **cli.commands}


def option_names(command: click.Command) -> set[str]:
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}


# --- they run


def runnable(page: Path) -> list[Block]:
    return [b for b in blocks(page.read_text(encoding="utf-8")) if b.kind != "text" and not b.reason]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the shipped checkpoints; modules imported from it are unloaded afterwards."""
    from joblib.externals.loky import get_reusable_executor

    # without results of the README's first command in the same folder
    results = shutil.ignore_patterns("*.spectrum.*", "*.landscape.*", "*.flatness.*", "*.calibration.*")
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints", ignore=results)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    get_reusable_executor(max_workers=1).shutdown(wait=True)  # its processes may work in another directory
    yield tmp_path
    get_reusable_executor(max_workers=1).shutdown(wait=True)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=name_of)
def test_every_block_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "\n".join(block.text for block in runnable(page))
    for library in LIBRARIES:
        if re.search(rf"^\s*(import|from) {library}\b", whole, re.MULTILINE):
            pytest.importorskip(library)
    monkeypatch.setenv("MPLBACKEND", "agg")
    if page.name == "tutorial.md":  # it runs in the folder where the reader ran the README
        run_line(f"spectrum {SHIPPED} --samples 16 --top 1 --smallest 0 --no-density".split(), "README.md")
        run_blocks(ROOT / "README.md")
    run_blocks(page)


def run_blocks(page: Path) -> None:
    """Run all blocks of a page that run here."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in runnable(page):
        where = f"{name_of(page)}:{block.line}"
        if block.kind == "file":
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text + "\n", encoding="utf-8")
        elif block.kind == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
        else:
            for words in block.commands():
                assert words[0] == RUN, f"{where}: `{words[0]}` cannot run here: mark it with <!-- not run: why -->"
                run_line(words[1:], where)


def run_line(words: list[str], where: str) -> None:
    """One command of ours, with * and > as a shell has them."""
    from ikun_hessian.cli.main import run

    with contextlib.ExitStack() as stack:
        if ">" in words:
            at = words.index(">")
            file = stack.enter_context(Path(words[at + 1]).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
            words = words[:at]
        arguments = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
        assert run(arguments) == 0, f"{where}: {' '.join(words)}"


# --- names exist


def test_what_is_not_run_is_known() -> None:
    """Whoever leaves a block out says so here."""
    found = {name_of(page): [b.reason for b in blocks(page.read_text(encoding="utf-8")) if b.reason] for page in PAGES}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_exist(page: Path) -> None:
    """Those of every command line, run or not; and every --word of the text, in some command."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(text):
        for words in block.commands() if block.kind == "commands" else []:
            if RUN not in words:
                continue
            words = words[words.index(RUN) + 1 :]
            known = option_names(options()[words[0] if words[0] in options() else ""])
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known, f"{name_of(page)}:{block.line}: {words[0]} has no {', '.join(used - known)}"
    everywhere = set().union(*map(option_names, options().values())) | FOREIGN
    for line in text.splitlines():
        scripts = "".join((ROOT / script).read_text() for script in re.findall(r"benchmarks/\w+\.py", line))
        for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"<!--.*?-->", "", line)):
            assert word in everywhere or word in scripts, f"{name_of(page)}: no command has {word}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), f"{name_of(page)}: no {target}"
            assert not anchor or anchor in anchors(linked), f"{name_of(page)}: no place #{anchor} in {path}"
    for path in re.findall(r"(?:ikun|hessian_tools|ikun_hessian|benchmarks|tests)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), f"{name_of(page)}: no {path}"


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs name the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_modules_and_functions_exist(page: Path) -> None:
    """hessian_tools.a.b wherever it stands, and what the reference takes from the docstrings."""
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"(?<![\w/-])(?:ikun|hessian_tools|ikun_hessian)(?:\.[A-Za-z_]\w*)+", text)):
        if not re.fullmatch(r"ikun\.(pt|spectrum|flatness)\b.*", name):  # files of a checkpoint called ikun
            resolve(name)
    for module, listed in re.findall(r"^::: (\S+)\n    options:\n      members: \[(.*)\]$", text, re.MULTILINE):
        for member in listed.split(", "):
            assert resolve(f"{module}.{member}").__doc__, f"{module}.{member} has no docstring"


@pytest.mark.parametrize("package", ["hessian_tools", "ikun", "ikun_hessian"])
def test_public_names_are_in_the_reference(package: str) -> None:
    """Every class and function of `__all__` is in a module that a page of docs/api takes the docstrings of."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    members: dict[str, list[str]] = {}  # by module; none: all of them
    for module, listed in re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\]$)?", pages, re.MULTILINE):
        members[module] = listed.split(", ") if listed else []
    public = importlib.import_module(package)
    for name in public.__all__:
        value = getattr(public, name)
        if callable(value):
            module = value.__module__
            assert module in members, f"{package}.{name}: no page of docs/api has {module}"
            assert not members[module] or name in members[module], f"{package}.{name} is not among the members"


def resolve(name: str) -> object:
    """The module of this name, or what is in one. Raises AssertionError."""
    words = name.split(".")
    found: object = importlib.import_module(words[0])
    for i, word in enumerate(words[1:], 2):
        with contextlib.suppress(ModuleNotFoundError):  # no module, or one whose library is not there
            importlib.import_module(".".join(words[:i]))
        assert hasattr(found, word), f"no {name}"
        found = getattr(found, word)
    return found


# --- the reader of pages


def test_blocks_are_found() -> None:
    page = """text

    ikun-hessian info x.pt     # a comment
    ikun-hessian spectrum x.pt \\
        --top 3 && pip install y

    a formula = 1

<!-- not run: a reason -->

    pip install z

```python title="a.py"
x = 1
```

<!-- not run: too far above -->

words

```python
y = 2
```

- a list
    that goes on
"""
    found = blocks(page)
    assert [(b.kind, b.title, b.reason, b.line) for b in found] == [
        ("commands", "", "", 3),
        ("commands", "", "a reason", 11),
        ("file", "a.py", "", 13),
        ("python", "", "", 21),
    ]
    assert found[1].commands() == [["pip", "install", "z"]]
    assert found[0].commands()[:3] == [
        ["ikun-hessian", "info", "x.pt"],
        ["ikun-hessian", "spectrum", "x.pt", "--top", "3"],
        ["pip", "install", "y"],
    ]
    with pytest.raises(ValueError, match="a block of 'ruby'"):
        blocks("```ruby\n```\n")
