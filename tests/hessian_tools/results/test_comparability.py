"""Tests of which results are comparable, how they are labelled, and how two methods are compared on screen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from hessian_tools.analysis.ranking import told_apart
from hessian_tools.io.json import ResultError
from hessian_tools.results.comparability import by_method, common_operators, comparable, labelled, method_of
from hessian_tools.results.operator_spectrum import Eigenvalue, Spectrum, Trace
from hessian_tools.results.spectrum import SPECTRUM_SCHEMA, SpectrumResult
from ikun_hessian.reports.spectrum import compare_lines

NAN = math.nan


def spectrum(values: tuple[float, ...], low: tuple[float, ...] = (), **changes: Any) -> Spectrum:
    def pair(value: float) -> Eigenvalue:
        return Eigenvalue(value, 1e-7 * abs(value), 0.1 * abs(value), True, {"fc1.weight": 1.0})

    made = Spectrum(
        1e-7,
        120,
        tuple(map(pair, values)),
        tuple(map(pair, low)),
        Trace(9.0, 0.1, (8.8, 9.2), 32, 0.3),
        4.0,
        0.7,
        None,
    )
    return dataclasses.replace(made, **changes)


def result(init: str = "ikun", sha256: str = "ab", **changes: Any) -> SpectrumResult:
    made = SpectrumResult(
        schema=SPECTRUM_SCHEMA,
        checkpoint={"path": f"runs/{init}.pt", "sha256": sha256},
        data={"name": "digits", "samples": 100, "loss": "mse"},
        network={"surrogate": "atan:2"},
        training={"init": init},
        activity={},
        settings={"method": "lanczos", "backend": "own"},
        num_parameters=500,
        parameters={"fc1.weight": 500},
        weight_norms={"fc1.weight": 1.0},
        loss=0.5,
        accuracy=0.9,
        gradient_norm=1e-4,
        dtype="float32",
        device="cpu",
        seed=0,
        sensitivity={},
        spectra={"hessian": spectrum((3.0, 2.0, 1.0), (-1.0, -0.5)), "ggn": spectrum((4.0, 3.0))},
        blocks={},
        warnings=(),
        seconds=1.0,
        versions={},
    )
    return dataclasses.replace(made, **changes)


POWER = {"method": "power", "backend": "own"}
PYHESSIAN = {"method": "power", "backend": "pyhessian"}


def theirs(scale: float = 1.0, **changes: Any) -> SpectrumResult:
    """PyHessian's two of the same checkpoint: it missed the second eigenvalue."""
    found = spectrum((3.0 * scale, 1.2 * scale), hessian_vector_products=2000)
    first, second = found.eigenvalues
    second = dataclasses.replace(second, residual=0.4 * scale, converged=False)
    found = dataclasses.replace(found, eigenvalues=(first, second), scale_free_lambda_max=NAN, trace=None)
    return result(settings=PYHESSIAN, spectra={"hessian": found}, **changes)


def names(*found: SpectrumResult) -> list[str]:
    return [label for label, _ in labelled(list(found))]


# --- names


def test_the_method_is_read_from_the_settings() -> None:
    assert [method_of(result(settings=s)) for s in ({}, POWER, PYHESSIAN)] == ["lanczos", "power", "pyhessian"]


def test_initializers_name_results_that_differ_in_them() -> None:
    assert names(result(), result("kaiming", "cd")) == ["ikun", "kaiming"]
    # neither another method nor another checkpoint of that name needs saying where the initializer says enough
    assert names(result(), result("kaiming", "cd", settings=POWER)) == ["ikun", "kaiming"]


def test_methods_name_results_of_one_checkpoint() -> None:
    assert names(result(), theirs()) == ["ikun lanczos", "ikun pyhessian"]
    assert names(result(), theirs(), result("kaiming", "cd")) == ["ikun lanczos", "ikun pyhessian", "kaiming"]
    assert names(result(settings=POWER), theirs(), result()) == ["ikun power", "ikun pyhessian", "ikun lanczos"]
    bare: dict[str, Any] = {"training": {}}
    assert names(result(**bare), result(settings=POWER, **bare)) == ["ikun lanczos", "ikun power"]  # the file's stem
    none: dict[str, Any] = {"training": {}, "checkpoint": {}}
    assert names(result(**none), result(settings=POWER, **none)) == ["result lanczos", "result power"]


def test_what_methods_do_not_tell_apart_is_named_by_file_or_number() -> None:
    assert names(result(), result()) == ["1 ikun", "2 ikun"]
    assert names(result(), result(), theirs()) == ["1 ikun", "2 ikun", "3 ikun"]
    # other weights of one initializer: a method would not say what differs
    seeds = [result(checkpoint={"path": f"runs/seed{i}.pt", "sha256": str(i)}) for i in range(2)]
    assert names(*seeds) == ["seed0", "seed1"]
    other = dataclasses.replace(seeds[1], settings=POWER)
    assert names(seeds[0], other) == ["seed0", "seed1"]


# --- what may be compared


def test_operators_in_common_are_enough() -> None:
    both, one = result(), result("kaiming", spectra={"hessian": spectrum((1.0,))})
    comparable(labelled([both, one]))
    assert common_operators(labelled([both, one])) == common_operators(labelled([one, both])) == ["hessian"]
    other = result("xavier", spectra={"ggn": spectrum((1.0,))})
    comparable(labelled([both, other]))
    with pytest.raises(
        ResultError, match=r"no operator is in all results \(ikun has hessian, ggn; kaiming has hessian;"
    ):
        comparable(labelled([both, one, other]))
    with pytest.raises(ResultError, match="no operator"):
        comparable(labelled([one, other]))


def test_conditions_still_hold_between_methods() -> None:
    comparable(labelled([result(), theirs()]))
    with pytest.raises(ResultError, match="surrogate of the analysis differs, atan:2 for ikun lanczos but atan:1"):
        comparable(labelled([result(), theirs(network={"surrogate": "atan:1"})]))
    with pytest.raises(ResultError, match="set of parameters"):
        comparable(labelled([result(), theirs(parameters={"fc2.weight": 500})]))
    with pytest.raises(ResultError, match="at least two"):
        comparable(labelled([theirs()]))


def test_pairs_of_methods_start_with_the_better_one() -> None:
    own, power, other = result(), result(settings=POWER), theirs()
    kaiming = result("kaiming", "cd", settings=POWER)
    assert by_method(labelled([other, kaiming, own])) == [(own, other)]
    assert by_method(labelled([other, power, own])) == [(own, power), (own, other)]
    assert by_method(labelled([other, power])) == [(power, other)]
    assert by_method(labelled([own, result(seed=1)])) == []
    assert by_method(labelled([result(checkpoint={}), theirs(checkpoint={})])) == []


# --- the screen


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_the_screen_compares_two_methods(scale: float) -> None:
    spectra = {"hessian": spectrum((3.0 * scale, 2.0 * scale), (-1.0 * scale,)), "ggn": spectrum((4.0,))}
    both = labelled([result(spectra=spectra), theirs(scale)])
    lines = compare_lines(both)
    assert max(map(len, lines)) <= 80
    assert "left out because not all results have it: ggn (ikun lanczos)" in lines
    start = lines.index("ikun.pt, hessian: pyhessian compared to lanczos")
    assert lines[start + 1].split() == ["rank", "lanczos", "residual", "pyhessian", "residual", "converged"]
    assert lines[start + 2].split() == [
        "1",
        f"{3 * scale:.5g}",
        f"{3e-7 * scale:.1e}",
        f"{3 * scale:.5g}",
        f"{3e-7 * scale:.1e}",
        "yes",
    ]
    assert lines[start + 3].split() == [
        "2",
        f"{2 * scale:.5g}",
        f"{2e-7 * scale:.1e}",
        f"{1.2 * scale:.5g}",
        f"{0.4 * scale:.1e}",
        "NO",
    ]
    assert lines[start + 4].split() == ["products", "120", "2000"]


def test_the_screen_compares_both_ends_of_what_both_have() -> None:
    own = result(spectra={"hessian": spectrum((3.0,), (-1.0,))})
    power = result(settings=POWER, spectra={"hessian": spectrum((3.0, 2.5), (-1.0, -0.5))})
    lines = compare_lines(labelled([own, power]))
    start = lines.index("ikun.pt, hessian: power compared to lanczos")
    rows = [line.split() for line in lines[start + 2 : start + 6]]
    assert [row[0] for row in rows] == ["1", "2", "500", "499"]
    assert rows[1][1:3] == rows[3][1:3] == ["-", "-"]
    assert rows[2][1] == rows[2][3] == "-1"


def test_one_method_needs_no_second_table() -> None:
    lines = compare_lines(labelled([result(), result("kaiming", "cd")]))
    assert not any("compared to" in line or "left out" in line for line in lines)
    assert [line for line in lines if line in ("hessian", "ggn")] == ["hessian", "ggn"]


def test_long_names_and_sizes_fit_80_columns() -> None:
    path = {"path": "runs/" + "a-long-name-" * 9 + ".pt", "sha256": "ab"}
    big: dict[str, Any] = {"checkpoint": path, "num_parameters": 123_456_789}
    found = labelled([result("fluctuation-driven", **big), result("fluctuation-driven", settings=POWER, **big)])
    lines = compare_lines(found)
    assert max(map(len, lines)) <= 80
    assert any("…" in line and "lanczos" in line for line in lines)


def measured(init: str, value: float, error: float, least: float = NAN, converged: bool = True) -> SpectrumResult:
    found = spectrum((value,))
    (top,) = found.eigenvalues
    top = dataclasses.replace(top, data_stderr=error, data_stderr_least=least, converged=converged)
    return result(init, spectra={"ggn": dataclasses.replace(found, eigenvalues=(top,), trace=None)})


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (measured("kaiming", 2.0, 0.3), "told"),  # 1 apart, twice the error is 2 hypot(.3, .4) = 1
        (measured("kaiming", 1.99, 0.3), "told"),
        (measured("kaiming", 2.01, 0.3), "close"),
        (measured("kaiming", 1.0, NAN), "unknown"),
        (measured("kaiming", 1.0, NAN, least=0.1), "unknown"),
        (measured("kaiming", 1.0, NAN, least=1.0), "close"),  # within twice what is known of the error
        (measured("kaiming", 1.0, 0.1, converged=False), "unknown"),
    ],
)
def test_networks_are_told_apart_by_twice_the_error_of_the_difference(other: SpectrumResult, verdict: str) -> None:
    base = measured("ikun", 3.0 + 1e-9, 0.4)
    found = told_apart(labelled([base, other]))
    assert [name for name in ("told", "close", "unknown") if getattr(found, name)] == [verdict]
    first = compare_lines(labelled([base, other]))[0]
    assert first.startswith({"told": "told apart", "close": "not apart", "unknown": "unknown"}[verdict])
    if verdict == "told":
        assert "kaiming is 3" in found.told[0]
        assert "below ikun (2" in found.told[0]
    else:
        assert getattr(found, verdict) == ("GGN lambda_max",)
