"""Tests of saving, loading and comparing spectra, and of their warnings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from spectra import full, pair, sample

from hessian_tools.analysis.warnings import warnings_of
from hessian_tools.io.files import write_atomically
from hessian_tools.io.json import ResultError
from hessian_tools.results.comparability import comparable, labelled
from hessian_tools.results.operator_spectrum import Trace
from hessian_tools.results.spectrum import load_spectrum, save_spectrum, to_json

NAN = float("nan")


def test_results_round_trip_and_carry_their_schema(tmp_path: Path) -> None:
    result = sample()
    json_path, npz_path = save_spectrum(result, tmp_path / "a.spectrum")
    assert to_json(load_spectrum(json_path)) == to_json(result)
    raw = json.loads(json_path.read_text())
    assert raw["schema"] == "ikun-hessian/spectrum/1"
    assert raw["sensitivity"]["ties reversed"] is None
    hessian = raw["spectra"]["hessian"]
    for key in ("value", "residual", "data_stderr", "converged"):
        assert key in hessian["eigenvalues"][0]
    data = {"data_stderr", "data_concentration", "data_stderr_least"}
    assert set(hessian["trace"]) == {"estimate", "stderr", "ci95", "probes", *data}
    assert {"nodes", "weights", "probes", "steps"} <= set(hessian["density"])
    for key in ("checkpoint", "data", "num_parameters", "loss", "gradient_norm", "dtype", "device", "seed", "versions"):
        assert key in raw
    with np.load(npz_path) as arrays:
        np.testing.assert_array_equal(arrays["hessian.eigenvalues"], [3, 2])
        np.testing.assert_array_equal(arrays["hessian.density.1"], [[3, 0.1], [0.1, 0.9]])


def test_infinite_numbers_become_null(tmp_path: Path) -> None:
    spectrum = sample().spectra["hessian"]
    trace = Trace(1.0, float("inf"), (-float("inf"), float("inf")), 1, NAN)
    result = sample(spectra={"hessian": dataclasses.replace(spectrum, trace=trace)})
    path = save_spectrum(result, tmp_path / "a")[0]
    assert json.loads(path.read_text())["spectra"]["hessian"]["trace"]["ci95"] == [None, None]
    loaded = load_spectrum(path).spectra["hessian"].trace
    assert loaded is not None
    assert np.isnan(loaded.stderr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ('{"schema": ', "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[1]", "not a spectrum of this version"),
        ('{"schema": "ikun-hessian/spectrum/2"}', "schema 'ikun-hessian/spectrum/2'"),
        ('{"schema": "ikun-hessian/spectrum/1"}', "lacks checkpoint"),
    ],
)
def test_broken_files_get_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.spectrum.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=message) as error:
        load_spectrum(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_every_field_is_checked(tmp_path: Path) -> None:
    good = to_json(sample())
    path = tmp_path / "x.spectrum.json"
    for key, value in good.items():
        wrong = {**good, key: [["wrong"]] if not isinstance(value, list) else {"wrong": 1}}
        path.write_text(json.dumps(wrong))
        with pytest.raises(ResultError):
            load_spectrum(path)
    with pytest.raises(ResultError, match="cannot be read"):
        load_spectrum(tmp_path / "missing.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- comparing


def test_comparable_results_pass_and_are_labelled() -> None:
    results = labelled([sample("ikun"), sample("kaiming", 2.0)])
    assert [label for label, _ in results] == ["ikun", "kaiming"]
    comparable(results)
    assert [label for label, _ in labelled([sample(), sample()])] == ["1 ikun", "2 ikun"]


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("data", "name", "fashion-mnist", "data set differs, digits for ikun but fashion-mnist for kaiming"),
        ("data", "samples", 50, "number of samples"),
        ("data", "sha256", "ef", "samples differs"),
        ("data", "split", "test", "split"),
        ("data", "loss", "ce", "loss"),
        ("network", "timesteps", 8, "timesteps T"),
        ("network", "reset", "soft", "reset"),
        ("network", "detach_reset", True, "detached reset"),
        ("network", "surrogate", "atan:4", "surrogate"),
        ("network", "norm", "none", "normalization"),
        ("network", "ties", "last", "tie rule"),
    ],
)
def test_what_is_not_comparable_is_named(part: str, key: str, value: object, message: str) -> None:
    other = sample("kaiming")
    other = dataclasses.replace(other, **{part: {**getattr(other, part), key: value}})  # type: ignore[arg-type]
    with pytest.raises(ResultError, match=message):
        comparable(labelled([sample(), other]))


def test_other_operators_or_parameters_or_a_single_result_are_refused() -> None:
    with pytest.raises(ResultError, match="set of parameters"):
        comparable(labelled([sample(), sample("b", parameters={"fc1.weight": 6})]))
    with pytest.raises(ResultError, match="at least two"):
        comparable(labelled([sample()]))


# --- what was added later


def test_everything_round_trips_but_the_vectors_which_are_arrays(tmp_path: Path) -> None:
    json_path, npz_path = save_spectrum(full(), tmp_path / "a.spectrum")
    loaded = load_spectrum(json_path)
    assert to_json(loaded) == to_json(full())
    assert "vectors" not in json_path.read_text().replace('"vectors": false', "")
    assert loaded.spectra["hessian"].vectors is None
    with np.load(npz_path) as arrays:
        assert arrays["hessian.vectors"].shape == (10, 4)
        assert "hessian.eigenvalues.bound" in arrays


def test_a_result_of_an_earlier_version_loads(tmp_path: Path) -> None:
    """Fields that have been added since are missing in it, and stay empty."""
    path = save_spectrum(sample(), tmp_path / "a.spectrum")[0]
    raw = json.loads(path.read_text())
    del raw["samples_curve"]
    for spectrum in raw["spectra"].values():
        for name in ("search", "gradient_share", "effective_dimension", "log_determinant", "negative_share"):
            del spectrum[name]
        for value in spectrum["eigenvalues"]:
            del value["bound"], value["gradient"], value["participation"]
    path.write_text(json.dumps(raw))
    assert to_json(load_spectrum(path)) == to_json(sample())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"largest": 2.4}, "found 2.4, above a reported value"),
        ({"smallest": -0.9}, "found -0.9, below a reported value"),
    ],
)
def test_a_missed_eigenvalue_is_a_warning(changes: dict[str, float], words: str) -> None:
    result = full()
    assert not any("missed" in w for w in warnings_of(result))
    hessian = result.spectra["hessian"]
    assert hessian.search is not None
    hessian = dataclasses.replace(hessian, search=dataclasses.replace(hessian.search, **changes))
    found = warnings_of(dataclasses.replace(result, spectra={"hessian": hessian}))
    assert any(words in w for w in found)


def test_a_ggn_that_is_not_positive_semidefinite_is_a_warning() -> None:
    result = full()
    ggn = result.spectra["ggn"]
    assert ggn.search is not None
    ggn = dataclasses.replace(ggn, search=dataclasses.replace(ggn.search, smallest=-0.01))
    found = warnings_of(dataclasses.replace(result, spectra={"ggn": ggn}))
    assert any("the loss is not convex in the outputs" in w for w in found)


def warned(**changes: object) -> str:
    return " ".join(warnings_of(sample(**changes)))  # type: ignore[arg-type]


def test_warnings_follow_from_the_numbers() -> None:
    clean = sample()
    spectrum = clean.spectra["hessian"]
    chosen = {**clean.settings, "probes": 2}
    assert warnings_of(sample(spectra={"ggn": clean.spectra["ggn"]}, sensitivity={}, settings=chosen)) == ()
    assert "have 2 probes instead of 4" in warned(settings={**clean.settings, "probes": None})
    cut = {**clean.settings, "time": 60.0, "cuts": ["this", "that"]}
    assert "To fit 60 s, these were left out: this; that." in warned(settings=cut)
    assert "Negative eigenvalues (magnitude up to 33%" in warned()
    vague = dataclasses.replace(spectrum, eigenvalues=(pair(3.0, data_stderr=1.5),))
    assert "a 50% standard error from the data" in warned(spectra={"hessian": vague})
    lost = dataclasses.replace(spectrum, eigenvalues=(pair(3.0), pair(2.0, converged=False)))
    assert "1 eigenvalue(s) of the hessian did not converge" in warned(spectra={"hessian": lost})
    assert "gradient is not small" in warned(gradient_norm=1.0)
    assert "when the slope of the surrogate is halved" in warned(sensitivity={"slope x 2": 9.0})
    assert "rect" in warned(network={**clean.network, "surrogate": "rect:1"})
    assert "never fire" in warned(activity={"spike2": {"firing_rate": 0.0, "dead": 0.9}})
    assert "Training reported: dead layer" in warned(training={**clean.training, "failures": ["dead layer: x"]})


def test_a_spectrum_without_eigenvalues_is_refused(tmp_path: Path) -> None:
    raw = to_json(sample())
    raw["spectra"]["hessian"]["eigenvalues"] = []
    (tmp_path / "a.spectrum.json").write_text(json.dumps(raw))
    with pytest.raises(ResultError, match=r"a\.spectrum\.json: the spectrum of hessian has no eigenvalues"):
        load_spectrum(tmp_path / "a.spectrum.json")


@pytest.mark.parametrize("where", ["num_parameters", "seed", "hessian_vector_products", "probes", "fc1.weight"])
def test_negative_counts_are_refused(where: str, tmp_path: Path) -> None:
    raw = to_json(sample())
    spectrum = raw["spectra"]["hessian"]
    parts = {"hessian_vector_products": spectrum, "probes": spectrum["trace"], "fc1.weight": raw["parameters"]}
    part = parts.get(where, raw)
    name = where if where in part else next(iter(part))
    part[name] = -1
    (tmp_path / "a.spectrum.json").write_text(json.dumps(raw))
    with pytest.raises(ResultError, match=f"{name}' must not be negative"):
        load_spectrum(tmp_path / "a.spectrum.json")
