"""Tests of text that is safe on terminals, in Markdown and in spreadsheets."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from hessian_tools.io.files import csv_cell, write_table
from hessian_tools.io.text import markdown, one_line, without_control_codes


def test_control_codes_are_replaced() -> None:
    assert without_control_codes("a\x1b[31mb\x07\x9b\u202ec\r") == "a?[31mb???c?"
    assert without_control_codes("λ₁ = 1\n\tµ") == "λ₁ = 1\n\tµ"
    assert without_control_codes("name-\udcff.pt") == "name-?.pt"  # a file name that is not UTF-8
    assert one_line("a\n b\t c") == "a b c"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("a\nb", "a b"),
        ("<script>", r"\<script>"),
        ("p <0.001", "p <0.001"),
        ("[x](http://y)", r"[x\](http://y)"),
        ("1.2 [0.9, 1.5]", "1.2 [0.9, 1.5]"),
        ("`x`", r"\`x\`"),
        ("a\\|b", r"a\\\|b"),
        ("gradient_stable", "gradient_stable"),
    ],
)
def test_markdown_shows_the_text_as_it_is(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@sum(a)", "\t=1"])
def test_formulas_are_texts_in_a_table(text: str, tmp_path: Path) -> None:
    write_table([{"init": text, "=x": "b"}, {"init": "a,b\nc"}], tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["init", "'=x"], [f"'{text}", "b"], ["a,b\nc", ""]]


@pytest.mark.parametrize("value", ["-", "-1.5", "+3", "-inf", "ikun", "", -2.0, None, float("inf")])
def test_numbers_and_words_are_left_alone(value: object) -> None:
    assert csv_cell(value) == value
