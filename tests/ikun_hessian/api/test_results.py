"""Tests of the results of the Python functions: how they show, save, load and cite themselves."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from spectra import sample
from torch import nn

import ikun_hessian as ih
from hessian_tools.io.json import ResultError
from ikun_hessian.api.report import Report, latex
from ikun_hessian.api.spectrum import Analysis

Reports = dict[str, Report]


@pytest.fixture(scope="module")
def reports() -> Reports:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    data = torch.rand(20, 5), torch.randint(0, 3, (20,))
    return {
        "spectrum": ih.analyze(net, data, "ce", top=3, smallest=1, name="net_1", progress=False),
        "flatness": ih.flatness(net, data, "ce", draws=4, probes=4, progress=False),
        "landscape": ih.landscape(net, data, "ce", points=5, planes=(("top1", "random1"),), plane_points=3),
        "batches": ih.lambda_max_histogram(net, data, "ce", batch_size=4, progress=False),
        "true": ih.true_hessian(net, data, "ce", draws=600, top=2, smallest=1, operators="ggn", progress=False),
        "compared": ih.compare([Analysis(sample("ikun")), Analysis(sample("kaiming", scale=2))]),
    }


@pytest.mark.parametrize("kind", ["spectrum", "flatness", "landscape", "batches", "true", "compared"])
def test_a_result_shows_itself(reports: Reports, kind: str) -> None:
    report = reports[kind]
    name = type(report).__name__
    assert repr(report).startswith(f"{name} o")
    assert len(repr(report).splitlines()) <= 12
    page = report._repr_html_()
    assert page.count("<table>") == page.count("data:image/png;base64,") == 1
    assert f"<p>{name} o" in page
    frame = pytest.importorskip("pandas").DataFrame(report.rows())
    assert report.to_pandas().equals(frame)
    assert len(frame) > 3


@pytest.mark.parametrize("kind", ["spectrum", "flatness", "landscape", "batches", "true"])
def test_a_result_is_saved_and_loaded(reports: Reports, kind: str, tmp_path: Path) -> None:
    written = reports[kind].save(tmp_path / "sub" / "x")
    assert all(path.is_file() for path in written)
    path = tmp_path / "sub" / f"x.{kind}.json"
    assert path in written
    found = ih.load(path)
    assert type(found) is type(reports[kind])
    assert repr(found) == repr(reports[kind])
    if kind == "spectrum":
        assert found.save(path) == written  # the ending of a file may be given too


@pytest.mark.parametrize("kind", ["spectrum", "flatness", "landscape", "batches", "true"])
def test_a_result_is_cited(reports: Reports, kind: str) -> None:
    sentence, row = reports[kind].cite().splitlines()
    assert "ce loss" in sentence
    assert "20 samples" in sentence
    assert sentence.endswith(".")
    assert row.endswith(r"\\")
    assert row.count("&") >= 3
    if kind == "spectrum":
        assert "surrogate Hessian" in sentence
        assert row.startswith(r"net\_1 & -- & -- & ce & 20 & $")


def test_special_characters_are_escaped() -> None:
    assert latex(r"a_b & 5% ~{\x}") == r"a\_b \& 5\% \textasciitilde{}\{\textbackslash{}x\}"


def test_pandas_is_optional(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs the package pandas: pip install pandas"):
        reports["spectrum"].to_pandas()


def test_files_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(ResultError):
        ih.load(tmp_path / "missing.json")
    for text in ("{", "[1]", json.dumps({"schema": "other/1"})):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ResultError, match=re.escape(str(tmp_path / "x.json"))):
            ih.load(tmp_path / "x.json")


def test_spectra_are_compared(tmp_path: Path) -> None:
    first, second = (Analysis(sample(init, scale=scale)) for init, scale in (("ikun", 1.0), ("kaiming", 2.0)))
    path = second.save(tmp_path / "b")[0]
    found = ih.compare({"ours": first, "theirs": path})
    assert [row["lambda_max"] for row in found.rows()][:2] == [3.0, 6.0]
    assert re.search(r"ours +lambda_max 3 \+- 0.03 \(scale-free 7\), trace 12 \+- 0.5", repr(found))
    assert "theirs & hessian & $6 \\pm 0.06$" in found.cite()
    assert [p.name for p in found.save(tmp_path / "c")] == ["c.csv", "c.png", "c.pdf"]
    assert [label for label, _ in ih.compare([first, first]).results] == ["1 ikun", "2 ikun"]
    with pytest.raises(ResultError, match="at least two"):
        ih.compare([first])
    other = Analysis(sample(data={**first.result.data, "samples": 99}))
    with pytest.raises(ResultError, match="number of samples differs"):
        ih.compare([first, other])
