"""The tables of options: their help, their defaults, and the parts of the package that they must agree with."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib import import_module
from typing import Any

import click
import pytest
from command_tools import ROOT

from hessian_tools.analysis.flatness.settings import FlatnessSettings
from hessian_tools.analysis.settings import SpectrumSettings
from ikun.networks import Spec
from ikun.training.spec import TrainingSpec
from ikun_hessian.cli.main import cli, run
from ikun_hessian.jobs.analyses import spectrum
from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.options import FLATNESS, OPENING_PARAMETERS, OWN, RESULTS, ROBUSTNESS, SPECTRUM, TRAIN
from ikun_hessian.jobs.schema import Option, OptionError, read_options

TABLES = {"train": TRAIN, "spectrum": (*SPECTRUM, *OWN, *RESULTS), "flatness": (*FLATNESS, *OWN, *RESULTS)}


def test_help_lists_the_choices_that_there_are() -> None:
    listed = [option for option in TRAIN if isinstance(option.choices, str)]
    assert len(listed) == 13
    for option in listed:
        module, name = str(option.choices).split(":")
        assert option.help.startswith(f"{', '.join(getattr(import_module(module), name))}.")


@pytest.mark.parametrize("command", TABLES)
def test_the_command_line_has_the_options_of_the_table(command: str) -> None:
    params = [p for p in cli.commands[command].params if isinstance(p, click.Option)]
    screen = ["--threads"] if command == "train" else ["--threads", "--full", "--brief", "--quiet"]
    assert [p.opts[0] for p in params] == [*(f"--{option.name}" for option in TABLES[command]), *screen]
    assert all(option.help for option in TABLES[command])


@pytest.mark.parametrize("table", [TRAIN, SPECTRUM, FLATNESS, ROBUSTNESS])
def test_names_are_unique(table: tuple[Option, ...]) -> None:
    assert len({option.name for option in table}) == len({option.parameter for option in table}) == len(table)


@pytest.mark.parametrize(
    ("table", "kinds"),
    [(TRAIN, (Spec, TrainingSpec)), (SPECTRUM, (SpectrumSettings,)), (FLATNESS, (FlatnessSettings,))],
)
def test_defaults_are_those_of_the_libraries(table: tuple[Option, ...], kinds: tuple[Any, ...]) -> None:
    defaults = {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}
    found = read_options(table, {})
    same = set(found) & set(defaults) - {
        "operators",
        "timesteps",
        "coding",
        "hidden",
        "alpha",
    }  # chosen later, or parsed
    assert len(same) >= 4
    usual = {name: found[name] for name in same}
    if table is SPECTRUM:
        assert usual.pop("draws") is None  # operator true has another default
    assert usual == {name: defaults[name] for name in usual}


def test_own_networks_have_the_options_of_their_table() -> None:
    assert [option.parameter for option in OWN] == [field.name for field in dataclasses.fields(Own)]
    assert [option.default for option in OWN] == [field.default for field in dataclasses.fields(Own)]


@pytest.mark.parametrize(
    ("command", "words", "part"),
    [
        ("spectrum", ["--seed", "9" * 20], "--seed must be at most 2^63 - 1"),
        ("spectrum", ["--seed", "-1"], "--seed must be at least 0, not -1"),
        ("spectrum", ["--batch-size", "9" * 400], "--batch-size must be at most 2^63 - 1"),
        ("spectrum", ["--memory", "1e308"], "--memory must be at most"),
        ("flatness", ["--memory", "inf"], "--memory must be at most"),
        ("landscape", ["--memory", "nan"], "--memory must be positive"),
        ("train", ["--seed", "9" * 21], "--seed must be at most 2^63 - 1"),
        ("train", ["--seed", str(2**63)], "--seed must be at most 2^63 - 1"),
        ("train", ["--epochs", "-" + "9" * 30], "--epochs must be at most 2^63 - 1 in size"),
        ("train", ["--snapshots", "1000000000"], "snapshots at most 100,000"),
    ],
)
def test_numbers_too_large_to_compute_with_are_refused_by_name(
    command: str, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, *([] if command == "train" else ["a.pt"]), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


@pytest.mark.parametrize(
    "option", [Option("x", int, multiple=True, least=0), Option("x", float, multiple=True, most=1)]
)
def test_every_value_of_a_repeated_option_is_checked(option: Option) -> None:
    option.check(())
    option.check((0, 1))
    with pytest.raises(OptionError, match="x must be at"):
        option.check((1, -1) if option.kind is int else (0.5, 2.0))
    assert read_options([option], {"x": [0, 1]})["x"] == (0, 1)


def test_what_a_result_depends_on() -> None:
    assert OPENING_PARAMETERS == ("samples", "split", "batch_size", "params", "surrogate", "dtype")


def test_the_tables_load_without_heavy_modules() -> None:
    heavy = {"torch", "numpy", "click"}
    code = f"import sys, ikun_hessian.jobs.options; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), (" 2 min ", 120)])
def test_times(text: str, seconds: float) -> None:
    assert spectrum._seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5x", "0", "-3m", "nan", "inf", "5ms", "1h30"])
def test_texts_that_are_no_times(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a time like 90s, 5m or 1\.5h"):
        spectrum._seconds(text)
