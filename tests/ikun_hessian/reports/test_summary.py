"""Tests of the summaries: the answers within 12 lines of 80 columns."""

from __future__ import annotations

import dataclasses

import pytest
from spectra import NAN, full, pair, sample

from hessian_tools.results.spectrum import LossRise, SpectrumResult
from ikun_hessian.reports.summary import MOST_LINES, closed, spectrum_summary

RISE = LossRise(0.25, 0.03, 0.04, 0.1, 8)


def told(result: SpectrumResult, files: str = "runs/ikun.spectrum.{json,npz,png,pdf}") -> str:
    text = spectrum_summary(result, files)
    lines = text.split("\n")
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= 80
    return " ".join(text.split())


def test_the_summary_answers_what_was_asked() -> None:
    text = told(sample(loss_rise=RISE))
    assert "opened runs/ikun.pt: csnn, 10 weights, T = 4, surrogate atan:2" in text
    assert "data digits train, 100 samples; loss (mse) 0.5, accuracy 90.0%" in text
    assert "Hessian 3 +- 0.03 12 +- 0.5 GGN 3 +- 0.03 12 +- 0.5" in text
    assert "spiking loss rises by 0.25 +- 0.05 (+50%) under 10% weight noise" in text  # 0.05^2 = 0.03^2 + 0.04^2
    assert "ranking by lambda_max, if two networks differ by more than 3%" in text  # 2 sqrt(2) x 1%
    assert "files runs/ikun.spectrum.{json,npz,png,pdf}" in text
    assert "--full" in text
    assert "--full" not in spectrum_summary(sample(), terminal=False)


def test_every_result_has_a_short_summary() -> None:
    long = sample(checkpoint={"path": "a/" * 200 + "b.pt"}, warnings=("One.", "Two."), loss_rise=RISE)
    every = dict.fromkeys(("hessian", "ggn", "fisher", "relaxed", "smoothed"), long.spectra["hessian"])
    bare = sample(checkpoint={}, network={}, training={}, activity={}, data={"samples": 5}, accuracy=NAN)
    for result in (full(), long, dataclasses.replace(long, spectra=every, gradient_norm=9.0), bare):
        for files in ("", "c/" * 300):
            told(result, files)


def with_top(**changes: object) -> SpectrumResult:
    base = sample(loss_rise=RISE)
    ggn = base.spectra["ggn"]
    changed = dataclasses.replace(ggn, eigenvalues=(pair(3.0, **changes), *ggn.eigenvalues[1:]))
    return dataclasses.replace(base, spectra={**base.spectra, "ggn": changed})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_stderr": 0.9}, "not by lambda_max of the GGN (data error 30%); by lambda_max of the Hessian"),
        ({"data_stderr": NAN, "data_stderr_least": 0.09}, "3 +- 0.09 or more"),
        ({"data_stderr": NAN, "data_stderr_least": 0.09}, "(data error at least 3%)"),
        ({"converged": False}, "no: lambda_max of the GGN did not converge"),
    ],
)
def test_a_ranking_that_the_errors_do_not_support_is_refused(changes: dict[str, object], words: str) -> None:
    assert words in told(with_top(**changes))


def test_a_network_that_learned_nothing_cannot_be_ranked() -> None:
    text = told(sample(data={"samples": 100, "classes": 10}, accuracy=0.1, loss_rise=RISE))
    assert "ranking no: the network has not learned its task" in text
    assert "! warning The accuracy on these samples is 10.0%" in text


def test_at_most_two_warnings_are_shown() -> None:
    loud = sample(gradient_norm=9.0, sensitivity={"slope x 2": 30.0}, training={"failures": ["NaN"]}, data={})
    assert told(loud).count("! warning") == 2


def test_one_sample_gives_no_error() -> None:
    base = sample(data={"samples": 1}, loss_rise=LossRise(-0.1, 0.01, NAN, 0.1, 8))
    spectra = {
        name: dataclasses.replace(
            s,
            eigenvalues=tuple(dataclasses.replace(e, data_stderr=NAN) for e in s.eigenvalues),
            trace=s.trace and dataclasses.replace(s.trace, data_stderr=NAN),
        )
        for name, s in base.spectra.items()
    }
    text = told(dataclasses.replace(base, spectra=spectra))
    assert "no: a single sample gives no error from the data" in text
    assert "falls by 0.1 +- 0.01" in text


@pytest.mark.parametrize("lines", range(2, 12))
def test_the_first_warning_is_cut_rather_than_left_out(lines: int) -> None:
    long = "The draws are too few to find the eigenvectors: an eigenvalue below 0.021 cannot be found. " * 2
    text = closed([f"line {i}" for i in range(lines)], [long.strip(), "Another."], "a.json", "a note")
    rows = text.splitlines()
    assert len(rows) <= max(MOST_LINES, lines + 2)
    assert max(map(len, rows)) <= 80
    assert ("! warning" in text) == (lines < 10)
    assert ("…" in text) == (7 < lines < 10)
