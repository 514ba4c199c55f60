"""Tests of analyses that have to fit a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessian_tools.analysis.planning import time_budget
from hessian_tools.analysis.planning.estimate import Costs, estimate_time
from hessian_tools.analysis.planning.time_budget import CUTS, MARGIN, fit
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import planned_products, spectrum
from hessian_tools.objective import Objective, make_objective
from hessian_tools.resume import Phases


def objective() -> Objective:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    x, y = torch.randn(90, 6, dtype=torch.float64), torch.arange(90) % 4
    return make_objective(net, F.cross_entropy, (x, y))


def seconds_of(product: float) -> time_budget.Callable[[SpectrumSettings, bool], float]:
    o, costs = objective(), Costs(product, 0.0, 0.0)

    def seconds(settings: SpectrumSettings, variants: bool) -> float:
        expected = planned_products(settings, ["a", "b"] if variants else [], o.size)
        return estimate_time(o, settings, expected, costs).seconds

    return seconds


def test_nothing_is_left_out_if_all_of_it_fits() -> None:
    found = fit(SpectrumSettings(), 1e6, seconds_of(0.01))
    assert (found.settings, found.variants, found.cuts) == (SpectrumSettings(), True, ())


@pytest.mark.parametrize("limit", [1.0, 3.0, 10.0, 30.0, 100.0, 300.0])
def test_what_is_left_fits(limit: float) -> None:
    seconds = seconds_of(0.1)
    found = fit(SpectrumSettings(), limit, seconds)
    fits = MARGIN * seconds(found.settings, found.variants) <= limit
    assert fits or found.settings.max_products < SpectrumSettings().max_products
    names = [name for name, _ in CUTS]
    assert [c for c in found.cuts if c in names] == [n for n in names if n in found.cuts]  # in their order
    more = fit(SpectrumSettings(), 3 * limit, seconds)
    assert {*more.cuts} & {*names} <= {*found.cuts}


def test_the_result_says_what_was_left_out_and_keeps_it_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    o, asked = objective(), SpectrumSettings(time=5.0, exact=False)
    monkeypatch.setattr("hessian_tools.analysis.spectrum.measure_costs", lambda *_: Costs(0.1, 0.0, 0.0))
    first = spectrum(o, asked, variants={"slope x 2": o}, phases=Phases(tmp_path / "a.resume", {}))
    assert first.settings["time"] == 5.0
    assert first.settings["cuts"]
    assert not first.sensitivity
    assert first.spectra["hessian"].density is None
    (said,) = (w for w in first.warnings if w.startswith("To fit 5 s, these were left out"))
    assert all(cut in said for cut in first.settings["cuts"])
    monkeypatch.setattr("hessian_tools.analysis.spectrum.measure_costs", lambda *_: Costs(1e-9, 0.0, 0.0))
    again = spectrum(o, asked, variants={"slope x 2": o}, phases=Phases(tmp_path / "a.resume", {}))
    assert again.settings == first.settings
    assert again.spectra == first.spectra
    free = spectrum(o, asked)
    assert "cuts" not in free.settings


@pytest.mark.parametrize(
    "extra", [{"per_layer": True}, {"samples_curve": (10, 90)}, {"per_step": True}, {"scaled": 5}, {"diagonal": True}]
)
def test_extras_take_time_and_are_left_out_first(extra: dict[str, Any]) -> None:
    seconds, asked = seconds_of(0.1), SpectrumSettings(**extra)
    assert seconds(asked, True) > seconds(SpectrumSettings(), True)
    found = fit(asked, MARGIN * seconds(SpectrumSettings(), True), seconds)
    assert (found.settings, found.variants, found.cuts) == (SpectrumSettings(), True, (CUTS[0][0],))


def test_layers_take_as_many_products_each_as_the_operator() -> None:
    whole, layers = (seconds_of(0.1)(SpectrumSettings(("hessian",), per_layer=p, draws=0), False) for p in (0, 1))
    assert layers == pytest.approx(3 * whole)


def test_an_operator_that_is_left_out_need_not_be_exact() -> None:
    found = fit(SpectrumSettings(exact=True), 1e-3, seconds_of(0.1))
    assert (found.settings.operators, found.settings.exact) == (("hessian",), False)


@pytest.mark.parametrize("time", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_none(time: float) -> None:
    with pytest.raises(ValueError, match="time must be a positive number of seconds"):
        SpectrumSettings(time=time)


def test_all_eigenvalues_stay_where_they_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessian_tools.analysis.spectrum.measure_costs", lambda *_: Costs(0.1, 0.0, 0.0))
    found = spectrum(objective(), SpectrumSettings(operators=("ggn",), time=1.0))
    assert found.settings["cuts"]
    assert found.spectra["ggn"].trace.probes == 0
