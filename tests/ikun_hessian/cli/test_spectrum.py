"""Tests of the command spectrum."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_tools import FAST, Capture, fails

import cli
from hessian_tools.results.spectrum import load_spectrum


def test_spectrum_leaves_results_and_figures(analysed: Path, capsys: Capture) -> None:
    for name in ("a", "b"):
        for suffix in ("json", "npz", "png", "pdf"):
            assert (analysed / f"{name}.spectrum.{suffix}").stat().st_size > 500
    raw = json.loads((analysed / "a.spectrum.json").read_text())
    assert raw["data"]["samples"] == 96
    assert raw["network"]["surrogate"] == "atan:2"
    assert list(raw["spectra"]) == ["hessian", "ggn"]
    values = [e["value"] for e in raw["spectra"]["hessian"]["eigenvalues"]]
    assert values == sorted(values, reverse=True)
    low = [e["value"] for e in raw["spectra"]["hessian"]["smallest_eigenvalues"]]
    assert low == sorted(low)
    assert set(raw["sensitivity"]) == {"slope x 1/2", "slope x 2", "ties reversed"}


def test_a_result_that_was_cut_to_a_time_is_kept_by_the_same_command(analysed: Path, capsys: Capture) -> None:
    short = ["spectrum", str(analysed / "a.pt"), "--samples", "20", "--tag", "short", "--time", "0.001s", "--resume"]
    assert cli.run(short) == 0
    written = (analysed / "a.short.spectrum.json").read_bytes()
    assert json.loads(written)["settings"]["cuts"]
    assert cli.run(short) == 0
    assert (analysed / "a.short.spectrum.json").read_bytes() == written
    fails(capsys, 2, "was made with top 10; now 4.", *short, "--top", "4")


def test_other_settings_do_not_overwrite(analysed: Path, capsys: Capture) -> None:
    path = str(analysed / "a.pt")
    before = (analysed / "a.spectrum.json").read_bytes()
    message = "was made with steps 8; now 9. Keep both with --tag NAME, or replace it with --force."
    fails(capsys, 2, message, "spectrum", path, *FAST, "--steps", "9")
    fails(capsys, 2, "samples; now 95. Keep both", "spectrum", path, *FAST, "--samples", "95")
    fails(capsys, 2, "was made with surrogate atan:2; now atan:4.", "spectrum", path, *FAST, "--surrogate", "atan:4")
    fails(capsys, 2, "dtype float32; now float64", "spectrum", path, *FAST, "--dtype", "float64")
    fails(capsys, 2, "parameters", "spectrum", path, *FAST, "--params", "fc*")
    assert (analysed / "a.spectrum.json").read_bytes() == before
    quick = ["--no-density", "--operator", "ggn", "--samples", "20", "--params", "fc*", "--dtype", "float64"]
    assert cli.run(["spectrum", path, *quick, "--top", "2", "--smallest", "0", "--tag", "fc"]) == 0
    tagged = json.loads((analysed / "a.fc.spectrum.json").read_text())
    assert tagged["blocks"] == {}
    assert list(tagged["parameters"]) == ["fc1.weight", "fc2.weight"]
    assert (analysed / "a.spectrum.json").read_bytes() == before
    assert cli.run(["spectrum", path, *quick, "--top", "1", "--smallest", "0", "--tag", "fc", "--force"]) == 0


def test_layers_steps_and_diagonals_are_measured(trained: Path, tmp_path: Path) -> None:
    asked = ["--per-layer", "--per-step", "--diagonal", "--diagonal-probes", "4", "--out", str(tmp_path)]
    assert cli.run(["spectrum", str(trained / "a.pt"), *FAST, "--operator", "hessian", *asked]) == 0
    raw = json.loads((tmp_path / "a.spectrum.json").read_text())
    assert list(raw["blocks"]) == ["conv1", "norm1", "conv2", "norm2", "fc1", "fc2"]
    assert (tmp_path / "a.spectrum.layers.png").exists()
    layers, steps = (
        list(csv.DictReader((tmp_path / f"a.spectrum.{name}.csv").read_text().splitlines()))
        for name in ("layers", "steps")
    )
    assert [row["layer"] for row in layers] == list(raw["blocks"])
    assert sum(int(row["parameters"]) for row in layers) == raw["num_parameters"]
    for row in layers:
        block = raw["blocks"][row["layer"]]
        assert float(row["lambda_max"]) == block["eigenvalues"][0]["value"]
        per_parameter = block["trace"]["estimate"] / int(row["parameters"])
        assert float(row["trace_per_parameter"]) == pytest.approx(per_parameter, rel=1e-12)
    assert [int(row["step"]) for row in steps] == list(range(1, raw["network"]["timesteps"] + 1))
    assert all(float(row["trace_low"]) <= float(row["trace"]) <= float(row["trace_high"]) for row in steps)
    assert raw["spectra"]["hessian"]["diagonal"] == {"method": "probes", "products": 4}
    with np.load(tmp_path / "a.spectrum.npz") as arrays:
        entries = {name: arrays[f"hessian.diagonal.{name}"] for name in raw["parameters"]}
    assert {name: a.size for name, a in entries.items()} == raw["parameters"]


def test_the_largest_by_magnitude_are_saved_with_their_vectors(trained: Path, tmp_path: Path) -> None:
    """The same eigenvalues as the two ends, and columns of the .npz that are their eigenvectors."""
    path, out = (
        str(trained / "a.pt"),
        ["--no-density", "--operator", "hessian", "--samples", "40", "--out", str(tmp_path)],
    )
    assert cli.run(["spectrum", path, *out, "--top", "6", "--smallest", "6", "--tag", "ends"]) == 0
    assert cli.run(["spectrum", path, *out, "--magnitude", "6", "--save-vectors", "--tag", "size"]) == 0
    ends, size = (load_spectrum(tmp_path / f"a.{tag}.spectrum.json").spectra["hessian"] for tag in ("ends", "size"))
    both = sorted((e.value for e in (*ends.eigenvalues, *ends.smallest_eigenvalues)), key=abs)[-6:]
    found = [e.value for e in (*size.eigenvalues, *size.smallest_eigenvalues)]
    assert sorted(found) == pytest.approx(sorted(both), rel=1e-4)
    assert [e.value for e in size.eigenvalues] == sorted((v for v in found if v >= 0), reverse=True)
    assert [e.value for e in size.smallest_eigenvalues] == sorted(v for v in found if v < 0)
    with np.load(tmp_path / "a.size.spectrum.npz") as arrays_:
        vectors = arrays_["hessian.vectors"]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(6), atol=1e-5)
    sizes = load_spectrum(tmp_path / "a.size.spectrum.json").parameters
    cuts = np.cumsum([0, *sizes.values()])
    shares = [(vectors[a:b, 0] ** 2).sum() for a, b in itertools.pairwise(cuts)]
    assert shares == pytest.approx(list(size.eigenvalues[0].layers.values()), abs=1e-5)


def test_accuracy_damping_and_samples_curve_reach_the_analysis(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    command = [
        "spectrum",
        str(trained / "a.pt"),
        "--top",
        "3",
        "--smallest",
        "1",
        "--samples",
        "60",
        "--accuracy",
        "0.05",
    ]
    command += ["--damping", "0.5", "--samples-curve", "1,8,60", "--resamples", "3", "--out", str(tmp_path), "--full"]
    assert cli.run(command) == 0
    screen = capsys.readouterr().out
    assert "effective dimension, z=0.5" in screen
    assert "No effective dimension and log det of the hessian" in screen  # lambda_min is below -0.5
    assert not [line for line in screen.splitlines() if len(line) > 80 and not line.startswith("files")]
    result = load_spectrum(tmp_path / "a.spectrum.json")
    hessian, ggn = result.spectra["hessian"], result.spectra["ggn"]
    assert hessian.density is not None
    assert hessian.density.probes >= 4
    assert hessian.density.accuracy <= 0.025
    assert hessian.effective_dimension is None
    assert hessian.negative_share is not None
    assert 0 < hessian.negative_share.estimate < 1
    assert ggn.log_determinant is not None
    assert ggn.log_determinant.damping == 0.5
    assert [(p.samples, len(p.traces)) for p in result.samples_curve] == [(1, 3), (8, 3), (60, 1)]
    assert result.samples_curve[-1].eigenvalues[0][0] == pytest.approx(hessian.eigenvalues[0].value, rel=2e-3)
    assert (tmp_path / "a.spectrum.samples.png").exists()


def test_a_trajectory_is_measured_and_drawn(tmp_path: Path, capsys: Capture) -> None:
    run = [
        "--channels",
        "2",
        "--epochs",
        "4",
        "--subset",
        "150",
        "--snapshots",
        "2",
        "--optimizer",
        "sgd",
        "--lr",
        "0.1",
    ]
    assert cli.run(["train", *run, "--out", str(tmp_path / "a.pt")]) == 0
    snapshots = [str(path) for path in sorted(tmp_path.glob("a.epoch*.pt"))]
    quick = ["--no-density", "--top", "2", "--smallest", "1", "--samples", "50"]
    assert cli.run(["spectrum", *snapshots, *quick, "--trajectory"]) == 0
    rows = (tmp_path / "trajectory.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "2", "4"]
    assert (tmp_path / "trajectory.png").exists()
    fails(
        capsys, 2, "--trajectory needs several snapshots", "spectrum", snapshots[0], *quick, "--trajectory", "--force"
    )


def test_pyhessian_agrees_with_ours(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ["spectrum", str(trained / "a.pt"), "--samples", "40", "--top", "2", "--out", str(tmp_path)]
    assert cli.run([*common, "--tag", "ours", "--no-density", "--magnitude", "2"]) == 0
    assert (
        cli.run([*common, "--tag", "theirs", "--method", "power", "--backend", "pyhessian", "--operator", "hessian"])
        == 0
    )
    capsys.readouterr()
    assert cli.run(["compare", str(tmp_path), "--out", str(tmp_path)]) == 0
    screen = capsys.readouterr().out
    assert "pyhessian" in screen
    assert "lanczos" in screen
    ours, theirs = (load_spectrum(tmp_path / f"a.{tag}.spectrum.json").spectra["hessian"] for tag in ("ours", "theirs"))
    assert ours.trace is not None
    assert theirs.trace is not None
    assert theirs.density is None
    largest = [max((*s.eigenvalues, *s.smallest_eigenvalues), key=lambda e: abs(e.value)) for s in (ours, theirs)]
    assert largest[1].value == pytest.approx(largest[0].value, rel=0.05)


def test_too_little_memory_is_refused_at_once(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    path = str(analysed / "a.pt")
    fails(capsys, 2, "GiB of memory", "spectrum", path, *FAST, "--memory", "1e-5", "--out", str(tmp_path))
    fails(capsys, 2, "must be positive", "spectrum", path, *FAST, "--memory", "-1", "--out", str(tmp_path))


@pytest.mark.parametrize("curve", ["0,5", "5,1", "5,5", "a,b", "1,,2"])
def test_a_malformed_samples_curve_is_refused(analysed: Path, tmp_path: Path, capsys: Capture, curve: str) -> None:
    command = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path), "--samples-curve", curve]
    fails(capsys, 2, f"--samples-curve '{curve}'", *command)


def test_more_samples_on_the_curve_than_there_are_is_refused(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path), "--samples-curve", "8,97"]
    fails(capsys, 2, "but the objective has 96", *command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "give a number from 1 to 200, or all"),
        (["--samples", "many"], "give a number from 1 to 200, or all"),
        (["--operator", "jacobian"], "unknown operator jacobian"),
        (["--operator", "finite-differences"], "are not a Hessian"),
        (["--params", "conv9*"], "no parameter matches 'conv9*'"),
        (["--surrogate", "nothing"], "unknown surrogate"),
        (["--top", "0"], "at least 1"),
        (["--scaled", "0"], "scaled must be at least 1"),
        (["--batch-size", "0"], "must be positive"),
        (["--memory", "0"], "must be positive"),
        (["--backend", "pyhessian"], "backend pyhessian"),
        (["--operator", "relaxed", "--surrogate", "fast_sigmoid:25"], "no relaxed network"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_bad_options_are_refused(
    trained: Path, capsys: Capture, options: list[str], message: str, tmp_path: Path
) -> None:
    fails(capsys, 2, message, "spectrum", str(trained / "a.pt"), "--out", str(tmp_path), *options)
    assert list(tmp_path.iterdir()) == []


def test_a_long_analysis_says_beforehand_what_it_takes(
    trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["spectrum", str(trained / "a.pt"), *FAST, "--no-density", "--out", str(tmp_path)]
    assert cli.run([*asked, "--tag", "short"]) == 0
    assert "expected" not in capsys.readouterr().err
    monkeypatch.setattr("ikun_hessian.jobs.analyses.spectrum.LONG", 0.0)
    assert cli.run(asked) == 0
    said = capsys.readouterr().err
    assert re.search(r"expected    about \d+ min in all, \d+\.\d GiB of memory \(\d+ products of [\d.e-]+ s\)", said)
    assert cli.run([*asked, "--force", "--quiet"]) == 0
    assert "expected" not in capsys.readouterr().err
