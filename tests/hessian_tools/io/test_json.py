"""Tests of the limits on what a result file may say."""

from __future__ import annotations

import json

import pytest

from hessian_tools.io.json import ResultError, parse_json

NOT_NEGATIVE = ["samples", "residual", "stderr", "data_stderr", "symmetry_error", "gradient_norm", "bound"]
SHARES = ["accuracy", "test_accuracy", "firing_rate", "dead"]


@pytest.mark.parametrize(
    ("name", "number"),
    [*((n, -1) for n in NOT_NEGATIVE + SHARES), *((n, -1e-300) for n in NOT_NEGATIVE), *((n, 1.5) for n in SHARES)],
)
def test_errors_norms_and_shares_out_of_their_range_are_refused(name: str, number: float) -> None:
    with pytest.raises(ResultError, match=f"field '{name}' must not be (negative|larger than 1)"):
        parse_json(json.dumps({"spectra": [{name: number}]}))


@pytest.mark.parametrize("number", [0, -0.0, 0.5, 1, None, "all", [-1], {"end": -1}])
def test_other_values_of_these_fields_are_kept(number: object) -> None:
    values = dict.fromkeys(NOT_NEGATIVE + SHARES, number)
    assert parse_json(json.dumps(values)) == values


def test_losses_eigenvalues_and_times_of_a_wrong_clock_may_be_negative() -> None:
    values = {"loss": -1.0, "value": -2.0, "estimate": -3.0, "seconds": -1.0, "samples": 10**6}
    assert parse_json(json.dumps(values)) == values
