"""Messages that name parameters: in Python, in another spelling, nested, with braces, and after pickling."""

from __future__ import annotations

import pickle

import pytest

from hessian_tools.io.errors import ParameterError

BRACES = "{0} {steps} {"


def in_upper_case(name: str, value: object) -> str:
    return name.upper() if value is ... else f"{name.upper()} {value}"


def test_parameters_are_spelled_in_python_or_otherwise() -> None:
    error = ParameterError("{} has {} steps: give {steps}, or {data_dir}", "a.pt", 4, steps=30, data_dir=...)
    assert str(error) == "a.pt has 4 steps: give steps=30, or data_dir="
    assert error.spelled(in_upper_case) == "a.pt has 4 steps: give STEPS 30, or DATA_DIR"
    assert str(ParameterError("give {coding}", coding="spikes")) == "give coding='spikes'"


def test_an_error_as_a_value_is_spelled_in_the_same_way() -> None:
    inner = ParameterError("{}: give {steps}", BRACES, steps=...)
    outer = ParameterError("{}: {}", BRACES, inner)
    assert str(outer) == f"{BRACES}: {BRACES}: give steps="
    assert outer.spelled(in_upper_case) == f"{BRACES}: {BRACES}: give STEPS"


def test_braces_have_no_meaning_outside_of_a_template() -> None:
    assert str(ParameterError(BRACES)) == BRACES
    assert str(ParameterError("{}", BRACES)) == BRACES
    assert str(ParameterError("{library} is unknown", library=BRACES)) == f"library={BRACES!r} is unknown"


def test_the_message_is_one_line() -> None:
    assert str(ParameterError("a\nb\r\nc")) == "a b c"
    assert str(ParameterError("{}: {steps}", "a\nb", steps=1)) == "a b: steps=1"


@pytest.mark.parametrize("error", [ParameterError(BRACES), ParameterError("{}: {steps}", BRACES, steps=3)])
def test_pickling_keeps_values_and_parameters(error: ParameterError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ParameterError
    assert str(again) == str(error)
    assert again.spelled(in_upper_case) == error.spelled(in_upper_case)
