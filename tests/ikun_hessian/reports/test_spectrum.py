"""Tests of what the terminal shows of spectra."""

from __future__ import annotations

import dataclasses
import re

import pytest
from spectra import NAN, full, sample

from hessian_tools.plots import spectrum as figures
from hessian_tools.results.comparability import labelled
from hessian_tools.results.operator_spectrum import Diagonal
from hessian_tools.results.spectrum import StepTrace
from ikun_hessian.reports.html.spectrum import spectrum_section
from ikun_hessian.reports.spectrum import compare_lines, spectrum_lines


def test_the_screen_says_how_sure_it_is() -> None:
    screen = spectrum_lines(full())
    assert max(map(len, screen)) <= 80
    text = " ".join(" ".join(screen).split())
    assert "hessian: with 95% probability, no eigenvalue is more than 0.02 outside the printed range" in text
    assert "4 other starts found -0.4 to 1.5" in text
    assert (
        "gradient 25% of its squared norm is in the span of the converged hessian eigenvectors of rank 1 to 2" in text
    )
    assert "sum |negative| / sum |all| 0.3 [0.28, 0.32] 1e-03" in text
    assert "effective dimension, z=0.05 3.5 [3.2, 3.8] 1e-03" in text
    assert "4 probes" not in text  # the sample's density has two
    assert "2 probes with at most 60 steps" in text


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_the_screen_fits_80_columns_and_holds_the_numbers(scale: float) -> None:
    lines = spectrum_lines(sample(scale=scale))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in (
        "checkpoint",
        "hard",
        "atan:2",
        "BatchNorm in evaluation mode",
        "seed 0",
        "ikun initializer",
        "90.00%",
    ):
        assert part in text
    assert f"{3 * scale:.5g}" in text
    assert "lambda_min" in text
    assert "100 samples" in text
    compared = compare_lines(labelled([sample("ikun", scale), sample("kaiming", 2 * scale)]))
    assert max(map(len, compared)) <= 80


@pytest.mark.parametrize("computed", [True, False])
def test_a_ggn_does_not_tell_a_minimum(computed: bool) -> None:
    result = sample()
    hessian = result.spectra["hessian"]
    low = tuple(dataclasses.replace(e, value=0.0) for e in hessian.smallest_eigenvalues) if computed else ()
    ggn = dataclasses.replace(hessian, smallest_eigenvalues=low)
    text = " ".join(" ".join(spectrum_lines(dataclasses.replace(result, spectra={"ggn": ggn}))).split())
    assert "minimum? unknown: the ggn cannot be negative for a convex loss (use operator hessian)" in text
    assert "use --smallest" not in text


def test_layers_are_listed_when_there_are_blocks() -> None:
    result = sample()
    lines = spectrum_lines(dataclasses.replace(result, blocks={"fc1": result.spectra["hessian"]}))
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("fc1"))
    assert row.split()[:3] == ["fc1", "6", "3"]


def test_a_parameter_of_no_module_is_a_layer_and_counts_in_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sample().spectra["hessian"]
    result = sample(parameters={"fc1.weight": 6, "fc1.bias": 2, "scale": 5}, blocks={"fc1": s, "scale": s})
    rows = [line.split() for line in spectrum_lines(result)]
    assert [row[1] for row in rows if row and row[0] in ("fc1", "scale") and len(row) > 4] == ["8", "5"]
    page = spectrum_section([("a", result)])
    assert [re.search(rf">{name}</th><td[^>]*>(\d+)<", str(page))[1] for name in ("fc1", "scale")] == ["8", "5"]
    sizes = []
    monkeypatch.setattr(figures, "draw_density", lambda ax, r, *_: sizes.append(r.num_parameters))
    figures.layers_figure(result)
    assert sizes == [8, 5]


def test_a_plain_model_has_a_screen_too() -> None:
    bare = sample(checkpoint={}, network={}, training={}, activity={}, data={"samples": 5}, accuracy=NAN)
    assert max(map(len, spectrum_lines(bare))) <= 80
    hessian = dataclasses.replace(bare.spectra["hessian"], smallest_eigenvalues=(), trace=None, density=None)
    assert spectrum_lines(dataclasses.replace(bare, spectra={"hessian": hessian}, sensitivity={}))


def test_the_screen_has_time_steps_and_diagonals() -> None:
    result = sample()
    trace = next(s.trace for s in result.spectra.values() if s.trace)
    diagonals = {"hessian": Diagonal("probes", 64), "ggn": Diagonal("Jacobian", 40)}
    spectra = {name: dataclasses.replace(s, diagonal=diagonals.get(name)) for name, s in result.spectra.items()}
    steps = tuple(StepTrace(t, 0.25, trace) for t in (1, 2))
    lines = spectrum_lines(dataclasses.replace(result, spectra=spectra, steps=steps))
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "step trace 95% interval (probes) data error loss 1 " in text
    assert f"0.25 2 {trace.estimate:.5g} " in text
    assert "diagonals hessian: from 64 probes; ggn: exact (in the .npz file)" in text
