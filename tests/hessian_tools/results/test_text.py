"""Tests of the short texts of results: a `repr` that fits on a screen, whatever the size of the result."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import hessian_tools.results
from hessian_tools.analysis.flatness.flatness import flatness
from hessian_tools.analysis.flatness.settings import FlatnessSettings
from hessian_tools.analysis.landscape import LandscapeSettings, landscape
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.objective import Objective, make_objective
from hessian_tools.results.operator_spectrum import Trace
from hessian_tools.results.text import brief, with_error
from ikun.losses import mean_square

NAN = math.nan


@pytest.fixture(scope="module")
def objective() -> Objective:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return make_objective(net, mean_square, (torch.rand(32, 5), torch.randint(0, 3, (32,))))


def test_results_take_a_few_lines(objective: Objective) -> None:
    spectral = spectrum(objective, SpectrumSettings(top=9, smallest=2), provenance={"checkpoint": {"path": "x/a.pt"}})
    flat = flatness(objective, FlatnessSettings(draws=4, probes=4))
    lines = landscape(objective, LandscapeSettings(points=3, plane_points=3))
    for result in (spectral, flat, lines):
        text = repr(result)
        assert len(text) < 1000
        assert len(text.splitlines()) <= 12
        assert text.startswith(f"{type(result).__name__}")
        assert "32 samples" in text
        assert "P = 75" in text
    top = spectral.spectra["ggn"].eigenvalues[0]
    assert f"ggn: lambda_max {top.value:.3g} +- {top.data_stderr:.1g}" in repr(spectral)
    assert "of a.pt" in repr(spectral)
    for part in (spectral.spectra["ggn"], spectral.spectra["ggn"].density, top, flat.main["ggn trace"], lines.lines[0]):
        assert len(repr(part)) < 600
        assert "\n" not in repr(part)


def test_every_result_class_that_holds_containers_is_brief() -> None:
    """A new result class would otherwise print all its numbers."""
    folder = Path(str(hessian_tools.results.__path__[0]))
    for file in folder.glob("*.py"):
        module = importlib.import_module(f"hessian_tools.results.{file.stem}")
        for value in vars(module).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                holds = [
                    f.name for f in dataclasses.fields(value) if str(f.type).startswith("dict[") or "..." in str(f.type)
                ]
                generated = value.__repr__.__qualname__ == f"{value.__name__}.__repr__" and hasattr(
                    value.__repr__, "__wrapped__"
                )
                assert not (holds and generated), f"{value.__name__} prints all of {holds}: set __repr__ = brief"


def test_brief_counts_what_is_long() -> None:
    @dataclasses.dataclass
    class Some:
        number: float = 0.1234567891
        text: str = "x" * 100
        pair: tuple[float, float] = (1.0, NAN)
        many: tuple[float, ...] = (1.0,) * 9
        none: dict[str, float] = dataclasses.field(default_factory=dict)

    assert brief(Some()) == f"Some(number=0.123457, text='{'x' * 39}…', pair=(1, nan), many=<9 entries>, none={{}})"


def test_an_error_that_is_only_known_from_below() -> None:
    assert with_error(2.0, Trace(2.0, 0.1, (1, 3), 8, 0.25)) == "2 +- 0.2"
    assert with_error(2.0, Trace(2.0, 0.1, (1, 3), 8, NAN)) == "2"
    assert with_error(2.0, Trace(2.0, 0.1, (1, 3), 8, NAN, 0.9, 0.5)) == "2 (> 0.5)"
