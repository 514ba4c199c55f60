"""Tests of saving, loading, comparing and showing spectra."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hessian_tools.analysis.warnings import warnings_of
from hessian_tools.io.files import write_atomically
from hessian_tools.io.json import ResultError
from hessian_tools.results.comparability import comparable, labelled
from hessian_tools.results.spectrum import (
    SPECTRUM_SCHEMA,
    Density,
    Eigenvalue,
    Functional,
    SamplePoint,
    Search,
    Spectrum,
    SpectrumResult,
    Trace,
    load_spectrum,
    save_spectrum,
    to_json,
)
from ikun_hessian.reports.spectrum import compare_lines, spectrum_lines

NAN = float("nan")


def pair(value: float, **changes: object) -> Eigenvalue:
    base = Eigenvalue(value, 1e-8, 0.01 * abs(value), True, {"fc1.weight": 0.75, "fc2.weight": 0.25})
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def sample(init: str = "ikun", scale: float = 1.0, **changes: object) -> SpectrumResult:
    def spectrum(low: tuple[float, ...]) -> Spectrum:
        return Spectrum(
            1e-7,
            100,
            tuple(pair(scale * v) for v in (3.0, 2.0)),
            tuple(pair(scale * v) for v in low),
            Trace(12 * scale, scale, (10 * scale, 14 * scale), 32, 0.5 * scale),
            4 * scale,
            7 * scale,
            Density(((3.0, 0.0), (3.0, 0.1)), ((0.1, 0.9), (0.1, 0.9)), 2, 60, 1),
        )

    base = SpectrumResult(
        SPECTRUM_SCHEMA,
        {"path": f"runs/{init}.pt", "sha256": "ab" * 32},
        {"name": "digits", "split": "train", "samples": 100, "sha256": "cd", "loss": "mse"},
        {
            "model": "csnn",
            "neuron": "if",
            "reset": "hard",
            "detach_reset": False,
            "surrogate": "atan:2",
            "timesteps": 4,
            "coding": "direct",
            "norm": "bn",
            "ties": "first",
        },
        {
            "init": init,
            "alpha": 1.0,
            "optimizer": "adam",
            "lr": 0.001,
            "schedule": "cosine",
            "weight_decay": 0.0,
            "batch_size": 64,
            "epochs_run": 20,
            "seed": 42,
            "failures": [],
        },
        {"spike1": {"firing_rate": 0.2, "dead": 0.01}},
        {"top": 2},
        10,
        {"fc1.weight": 6, "fc2.weight": 4},
        {"fc1.weight": 1.0, "fc2.weight": 2.0},
        0.5,
        0.9,
        1e-4,
        "float32",
        "cpu",
        0,
        {"slope x 1/2": 2.5 * scale, "slope x 2": 3.5 * scale, "ties reversed": NAN},
        {"hessian": spectrum((-1.0, -0.5)), "ggn": spectrum(())},
        {},
        (),
        1.5,
        {"torch": "2.6"},
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


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
    assert set(hessian["trace"]) == {"estimate", "stderr", "ci95", "probes", "data_stderr"}
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


def full() -> SpectrumResult:
    """Every optional part present."""
    base = sample()
    search = Search(60, 0.02, 4, 60, 1.5, -0.4)
    part = Functional(3.5, 0.1, (3.2, 3.8), 4, 1e-3, 0.05)
    spectra = {
        name: dataclasses.replace(
            s,
            search=search if name == "hessian" else dataclasses.replace(search, smallest=0.0),
            gradient_share=0.25,
            effective_dimension=part,
            log_determinant=part,
            negative_share=dataclasses.replace(part, estimate=0.3, ci95=(0.28, 0.32), damping=NAN),
            vectors=np.eye(10, 4, dtype=np.float32),
        )
        for name, s in base.spectra.items()
    }
    return dataclasses.replace(base, spectra=spectra, samples_curve=(SamplePoint(1, True, ((5.0, 1.0),), (9.0,)),))


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
        for pair in spectrum["eigenvalues"]:
            del pair["bound"], pair["gradient"], pair["participation"]
    path.write_text(json.dumps(raw))
    assert to_json(load_spectrum(path)) == to_json(sample())
    assert max(map(len, spectrum_lines(load_spectrum(path)))) <= 80


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


# --- the screen


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


def test_layers_are_listed_when_there_are_blocks() -> None:
    result = sample()
    lines = spectrum_lines(dataclasses.replace(result, blocks={"fc1": result.spectra["hessian"]}))
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("fc1"))
    assert row.split()[:3] == ["fc1", "6", "3"]


def test_a_plain_model_has_a_screen_too() -> None:
    bare = sample(checkpoint={}, network={}, training={}, activity={}, data={"samples": 5}, accuracy=NAN)
    assert max(map(len, spectrum_lines(bare))) <= 80
    hessian = dataclasses.replace(bare.spectra["hessian"], smallest_eigenvalues=(), trace=None, density=None)
    assert spectrum_lines(dataclasses.replace(bare, spectra={"hessian": hessian}, sensitivity={}))


def warned(**changes: object) -> str:
    return " ".join(warnings_of(sample(**changes)))  # type: ignore[arg-type]


def test_warnings_follow_from_the_numbers() -> None:
    clean = sample()
    spectrum = clean.spectra["hessian"]
    assert warnings_of(sample(spectra={"ggn": clean.spectra["ggn"]}, sensitivity={})) == ()
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
