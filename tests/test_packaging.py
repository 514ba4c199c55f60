"""Tests of the installed package: wheel, source archive, metadata, and the working directory of the command."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest
import yaml
from command_tools import ROOT, SHIPPED

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("ikun", "hessian_tools", "ikun_hessian")
OTHER = "9.8.7"  # the version that is built here: whoever says another one read it elsewhere
BUILD = "import sys, setuptools.build_meta as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"
IMPORTED_AS = {"lazy-loader": "lazy_loader", "pillow": "PIL", "scikit-learn": "sklearn"}
OPTIONAL = {"spikingjelly", "snntorch", "norse", "nir", "triton", "pandas"}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _sources() -> dict[str, bytes]:
    """The files to install by their names in the wheel."""
    wanted = [
        path
        for top in PACKAGES
        for end in ("py", "pyi", "toml", "typed", "css", "js")
        for path in (ROOT / top).rglob(f"*.{end}")
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in wanted}


def _build(source: Path, out: Path) -> tuple[Path, Path]:
    """(wheel, source archive) of a tree, through the hooks that pip calls."""
    done = subprocess.run([sys.executable, "-P", "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, source archive) of this tree as version OTHER, with unrelated files next to the packages."""
    place = tmp_path_factory.mktemp("build")
    tree = place / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site")
    shutil.copytree(ROOT, tree, ignore=ignored)
    text = (tree / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text(text.replace(f'version = "{PROJECT["version"]}"', f'version = "{OTHER}"', 1))
    (tree / "mine.py").write_text("")
    (tree / "experiments").mkdir()
    (tree / "experiments" / "__init__.py").write_text("")
    return _build(tree, place)


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(built[0]) as wheel:
        return email.message_from_bytes(wheel.read(f"ikun_hessian-{OTHER}.dist-info/METADATA"))


@pytest.fixture(scope="module")
def started(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `ikun-hessian` or `python` on the unpacked wheel, in a folder of modules that have names like ours."""
    place = tmp_path_factory.mktemp("installed")
    site, script, hostile = place / "site", place / "bin" / "ikun-hessian", place / "hostile"
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
        table = wheel.read(f"ikun_hessian-{OTHER}.dist-info/entry_points.txt").decode()
    entry = re.search(r"\[console_scripts\]\nikun-hessian = ([\w.]+):(\w+)\n", table)
    assert entry
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {entry[1]} import {entry[2]}\nsys.exit({entry[2]}())\n")
    stems = {path.stem for top in PACKAGES for path in (ROOT / top).rglob("*.py")} - {"__init__", "__main__"}
    stems |= {"cli", "utils", "config", "data", "models", "dataset", "commands", "adapters", "tests"}
    hostile.mkdir()
    for name in stems - sys.stdlib_module_names - OPTIONAL - {"cuda"}:  # torch asks for NVIDIA's cuda
        (hostile / f"{name}.py").write_text("raise SystemExit(99)\n")
    assert {"cli.py", "utils.py", "data.py", "layers.py"} <= {path.name for path in hostile.iterdir()}

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *([str(script)] if command == "ikun-hessian" else []), *arguments]
        path = os.pathsep.join([str(hostile), str(site)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, cwd=hostile, env=environment, capture_output=True, text=True)

    return run


def test_the_wheel_holds_the_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist()}
    told = {name.partition("/")[2] for name in found if name.startswith(f"ikun_hessian-{OTHER}.dist-info/")}
    assert told == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    inside = {name: data for name, data in found.items() if ".dist-info/" not in name}
    assert inside == _sources()
    assert found[f"ikun_hessian-{OTHER}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert built[0].name.endswith("-py3-none-any.whl")


def test_the_source_archive_makes_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / f"ikun_hessian-{OTHER}"
    told = {"pyproject.toml", "setup.cfg", "PKG-INFO", "MANIFEST.in", "ikun_hessian.egg-info"}
    read = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    assert {path.name for path in tree.iterdir()} == {*told, *read, *PACKAGES}
    wheels = []
    for path in (built[0], _build(tree, tmp_path)[0]):
        with zipfile.ZipFile(path) as wheel:
            wheels.append({name: wheel.read(name) for name in wheel.namelist()})
    assert wheels[0] == wheels[1]


def test_the_metadata_are_those_of_the_project(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("ikun-hessian", OTHER)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Author"] == "the ikun-hessian authors"
    assert metadata["Author"] in (ROOT / "LICENSE").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(required) == sorted(PROJECT["dependencies"])
    classifiers = metadata.get_all("Classifier", [])
    assert "Programming Language :: Python :: 3.11" in classifiers
    assert "Programming Language :: Python :: 3.10" not in classifiers
    assert not [line for line in classifiers if line.startswith("License ::")]  # indexes refuse both


def test_what_is_imported_is_required_and_the_reverse() -> None:
    imported: set[str] = set()
    for path in (path for top in PACKAGES for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names - set(PACKAGES) - OPTIONAL == {
        IMPORTED_AS.get(name, name) for name in _names(PROJECT["dependencies"])
    }


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", line)[0] for line in requirements}


def test_the_version_has_one_source(started: Run) -> None:
    where = started("python", "-c", "import ikun, ikun_hessian; print(ikun.__file__, ikun_hessian.__file__)")
    assert where.stdout.count("/installed") == 2  # the wheel, not this tree
    for line in (["ikun-hessian"], ["python", "-m", "ikun_hessian"]):
        done = started(*line, "--version")
        assert (done.returncode, done.stdout) == (0, f"ikun-hessian, version {OTHER}\n"), done.stderr
    for name, text in _sources().items():
        assert f'"{PROJECT["version"]}"' not in text.decode(), name


def test_help_of_every_command_imports_nothing_heavy(started: Run) -> None:
    light = {"click", "lazy_loader"}
    heavy = {IMPORTED_AS.get(name, name) for name in _names(PROJECT["dependencies"])} - light
    code = f"""
import sys
from ikun_hessian.cli.main import cli, run
for command in ([], *([name] for name in cli.commands)):
    assert run([*command, "--help"]) == 0, command
    assert not {heavy!r} & sys.modules.keys(), (command, {heavy!r} & sys.modules.keys())
assert run(["--version"]) == 0 and run(["spectrum", "--no-such-option"]) == 2
assert not {heavy!r} & sys.modules.keys()
print(*cli.commands)
"""
    done = started("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert {"train", "spectrum", "flatness", "landscape", "info", "compare", "figures", "study"} <= set(
        done.stdout.splitlines()[-1].split()
    )


@pytest.mark.parametrize("line", [["ikun-hessian"], ["python", "-m", "ikun_hessian"]])
def test_files_of_like_names_in_the_working_directory_are_not_imported(started: Run, line: list[str]) -> None:
    """A user's own modules, first on the path, shadow nothing of ours and are not run."""
    for arguments, expected in ((["--help"], "spectrum"), (["info", str(SHIPPED / "digits-csnn-ikun.pt")], "forward")):
        done = started(*line, *arguments)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_the_presets_are_found_in_the_wheel(started: Run) -> None:
    done = started("ikun-hessian", "study", "--list")
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "ikun_hessian" / "experiments" / "presets").iterdir():
        assert path.stem in done.stdout


def test_citation_and_changelog_agree_with_the_project() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"message", "title", "authors", "date-released"} <= found.keys()
    assert (found["cff-version"], found["type"]) == ("1.2.0", "software")
    assert (found["title"], str(found["version"])) == (PROJECT["name"], PROJECT["version"])
    assert (found["license"], found["authors"]) == (PROJECT["license"], PROJECT["authors"])
    initializer, pyhessian = found["references"]
    assert initializer["title"].startswith("IKUN: Initialization to Keep snn training")
    assert "2411.18250" in initializer["url"]
    assert pyhessian["title"].startswith("PyHessian: ")
    for reference in found["references"]:
        assert all(author["family-names"] for author in reference["authors"])
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(.+?)\] - (\S+)$", changes, re.MULTILINE)
    assert released[0] == (PROJECT["version"], str(found["date-released"]))
    kinds = set(re.findall(r"^### (.+)$", changes, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
