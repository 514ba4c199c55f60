"""Tests of the building blocks of a page: whatever is not marked as HTML is escaped."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest

from ikun_hessian.reports.html.elements import (
    Html,
    details,
    html,
    html_table,
    interval,
    listed,
    number,
    tag,
    value_with_error,
)

ATTACKS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='x",
    "</style>",
    "a & b",
    "&lt;",
]


class _Read(HTMLParser):
    """Collects tags, attribute values and texts as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.values: list[str | None] = []
        self.texts = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts += data


@pytest.mark.parametrize("attack", ATTACKS)
def test_strings_are_texts_wherever_they_are_put(attack: str) -> None:
    built = [
        tag("p", attack, data_tip=attack),
        html_table((attack, "x"), [(attack, attack)]),
        listed([attack]),
        details(attack, attack),
        html(attack),
    ]
    for text in built:
        read = _Read(text)
        assert set(read.tags) <= {
            "p",
            "div",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "ul",
            "li",
            "details",
            "summary",
        }
        assert attack in read.texts
    assert attack in _Read(built[0]).values


def test_html_is_put_in_as_it_is_and_attributes_are_named_as_in_html() -> None:
    assert tag("p", Html("<b>x</b>"), class_="a", aria_label="b", hidden=True, id=None, open=False) == (
        '<p class="a" aria-label="b" hidden><b>x</b></p>'
    )
    assert tag("circle", cx=1) == '<circle cx="1"/>'
    assert listed([]) == ""
    assert "\x1b" not in tag("p", "\x1b[31m")


def test_numbers_have_true_minus_signs_and_errors() -> None:
    assert number(-1.23456e-7, 3) == "−1.23e−07"
    assert (number(math.nan), interval((math.nan, math.nan))) == ("–", "–")
    assert value_with_error(1.5, 0.123) == "1.5 ± 0.12"
    assert value_with_error(1.5, math.nan) == "1.5"
    assert value_with_error(1.5, math.nan, 0.26) == "1.5 (± more than 0.3)"
    assert interval((-1, 2.5)) == "[−1, 2.5]"
