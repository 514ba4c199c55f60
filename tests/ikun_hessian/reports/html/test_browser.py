"""Tests of the page in a real browser, wide and light, and as wide as a telephone and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import MISSING, Browser, browser
from landscape_tools import made
from run_tools import make_study, write_study

from hessian_tools.io import json as results
from ikun_hessian.reports.html.page import report_page
from ikun_hessian.reports.html.sources import collect

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
TIP = "return document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
PLACE = (
    "const r = document.querySelector({!r}).getBoundingClientRect(); "
    "return [r.left + r.width / 2, r.top + r.height / 2]"
)
INSIDE = (
    "const t = document.getElementById('tip').getBoundingClientRect(); "
    "return t.left >= 0 && t.right <= window.innerWidth"
)
UNFOLDED = "return [...document.querySelectorAll('details')].map(d => (d.open = true, d.scrollWidth - d.clientWidth))"
OTHER_PLANE = (
    "const s = document.querySelector('.surfaces select'); s.selectedIndex = 1; s.dispatchEvent(new Event('change'))"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_study(folder, make_study(seeds=(1, 2), moments=("",)))
    results.save_result(made(), folder / "one.landscape.json")
    results.save_result(made(2.0), folder / "two.landscape.json")
    (folder / "r.html").write_text(report_page(collect([folder])), encoding="utf-8")
    return folder / "r.html"


@pytest.fixture(scope="module", params=[(1200, False), (390, True)], ids=["wide", "telephone"])
def opened(page: Path, request: pytest.FixtureRequest) -> Iterator[Browser]:
    with browser(*request.param) as window:
        window.open(page)
        yield window


def test_nothing_is_wrong_nothing_is_fetched_and_nothing_sticks_out(opened: Browser) -> None:
    assert opened.complaints() == []
    assert opened.run("return performance.getEntriesByType('resource').length") == 0
    wide, widest = opened.run("return [screen.width, document.documentElement.scrollWidth]")
    assert widest <= max(wide, 1200 if wide > 500 else 390)
    for part in opened.run(UNFOLDED):
        assert part <= 1
    assert opened.run("return document.documentElement.scrollWidth") == widest


def test_the_nearest_eigenvalue_says_its_numbers(opened: Browser) -> None:
    opened.run("document.querySelector('#spectra svg.chart').scrollIntoView({block: 'center', behavior: 'instant'})")
    wanted = opened.run("return document.querySelector('#spectra svg.chart circle').dataset.tip")
    assert opened.run(TIP) == ""
    x, y = opened.run(PLACE.format("#spectra svg.chart circle"))
    opened.point(x, y)
    assert opened.run(TIP) == wanted
    assert "rank 1" in wanted
    assert opened.run(INSIDE)


def test_surfaces_turn_share_a_scale_and_say_their_losses(opened: Browser) -> None:
    count = "return document.querySelectorAll('.surfaces figure').length"
    pixels = "return document.querySelector('.surfaces figure canvas').toDataURL()"
    opened.run("document.querySelector('.surfaces').scrollIntoView({block: 'center', behavior: 'instant'})")
    assert opened.run(count) == 2
    before = opened.run(pixels)
    x, y = opened.run(PLACE.format(".surfaces figure canvas"))
    opened.point(x, y, drag=(60, 0))
    turned = opened.run(pixels)
    assert turned != before
    assert float(opened.run("return document.querySelector('.surfaces input[type=range]').value")) > 40
    opened.run(OTHER_PLANE)
    assert opened.run(pixels) != turned
    spots = []
    for dy in range(-60, 90, 15):
        opened.point(x, y + dy)
        spots.append(opened.run(TIP))
    assert any("loss 0." in text and "eigenvector 1" in text for text in spots)
    assert opened.complaints() == []


def test_colours_follow_the_scheme(opened: Browser) -> None:
    dark = opened.run("return matchMedia('(prefers-color-scheme: dark)').matches")
    ground = opened.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
