"""The command line end to end, and the line and exit code that every mistake gets."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
from hessian_tools.results import load_spectrum

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "checkpoints"
FAST = ["--top", "3", "--smallest", "2", "--steps", "8", "--probes", "2", "--samples", "96"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = ["--channels", "2", "--epochs", "2", "--subset", "200", "--snapshots", "1", "--lr", "0.01"]
    assert cli.run(["train", *options, "--out", str(folder / "a.pt")]) == 0
    assert cli.run(["train", *options, "--init", "kaiming", "--out", str(folder / "b.pt")]) == 0
    return folder


@pytest.fixture(scope="module")
def analysed(trained: Path) -> Path:
    assert cli.run(["spectrum", str(trained / "a.pt"), str(trained / "b.pt"), *FAST]) == 0
    return trained


def fails(capture: Capture, code: int, message: str, *arguments: str) -> None:
    """The command ends with the code and one line on standard error, with no traceback."""
    capture.readouterr()
    assert cli.run(list(arguments)) == code
    lines = [line for line in capture.readouterr().err.splitlines() if not line.startswith("opening ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_train_leaves_a_checkpoint_its_log_and_snapshots(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "a.train.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2]
    assert {"loss", "accuracy", "test_accuracy", "gradient_norm", "layers", "failures"} <= set(log[0])
    assert {"firing_rate", "derivative_square", "distance"} == set(log[0]["layers"]["conv1"])
    assert (trained / "a.epoch0002.pt").exists()
    assert not list(trained.glob("*.resume"))


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


def test_screen_fits_80_columns(analysed: Path, capsys: Capture) -> None:
    assert cli.run(["info", str(analysed / "a.pt")]) == 0
    assert cli.run(["compare", str(analysed / "a.pt"), str(analysed / "b.pt"), "--out", str(analysed)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if str(analysed) not in line]
    assert len(lines) > 30
    assert max(map(len, lines)) <= 80
    assert (analysed / "compare.eigenvalues.png").exists()


def test_json_and_nothing_else_on_stdout(analysed: Path, capsys: Capture) -> None:
    capsys.readouterr()
    both = [str(analysed / "a.pt"), str(analysed / "b.pt")]
    assert cli.run(["spectrum", *both, *FAST, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["training"]["init"] for r in found] == ["ikun", "kaiming"]
    assert cli.run(["spectrum", both[0], *FAST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "ikun-hessian/spectrum/1"
    assert cli.run(["info", both[0], "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {"initialization", "trained"} == set(layers)
    assert {"rule_variance", "weight_variance", "derivative_square", "forward_gain", "backward_gain"} <= set(
        layers["trained"][1]
    )


def test_other_settings_do_not_overwrite(analysed: Path, capsys: Capture) -> None:
    path = str(analysed / "a.pt")
    before = (analysed / "a.spectrum.json").read_bytes()
    fails(capsys, 2, "was made with another settings steps", "spectrum", path, *FAST, "--steps", "9")
    fails(capsys, 2, "--tag", "spectrum", path, *FAST, "--samples", "95")
    fails(capsys, 2, "network surrogate", "spectrum", path, *FAST, "--surrogate", "atan:4")
    fails(capsys, 2, "dtype", "spectrum", path, *FAST, "--dtype", "float64")
    fails(capsys, 2, "parameters", "spectrum", path, *FAST, "--params", "fc*")
    assert (analysed / "a.spectrum.json").read_bytes() == before
    quick = ["--no-density", "--operator", "ggn", "--samples", "20", "--params", "fc*", "--dtype", "float64"]
    assert cli.run(["spectrum", path, *quick, "--top", "2", "--smallest", "0", "--tag", "fc"]) == 0
    tagged = json.loads((analysed / "a.fc.spectrum.json").read_text())
    assert tagged["blocks"] == {}
    assert list(tagged["parameters"]) == ["fc1.weight", "fc2.weight"]
    assert (analysed / "a.spectrum.json").read_bytes() == before
    assert cli.run(["spectrum", path, *quick, "--top", "1", "--smallest", "0", "--tag", "fc", "--force"]) == 0


def test_per_layer(trained: Path, tmp_path: Path) -> None:
    command = ["spectrum", str(trained / "a.pt"), *FAST, "--operator", "hessian", "--per-layer", "--out", str(tmp_path)]
    assert cli.run(command) == 0
    raw = json.loads((tmp_path / "a.spectrum.json").read_text())
    assert list(raw["blocks"]) == ["conv1", "norm1", "conv2", "norm2", "fc1", "fc2"]
    assert (tmp_path / "a.spectrum.layers.png").exists()


def arrays(path: Path) -> list[bytes]:
    with np.load(path) as found:
        return [found[name].tobytes() for name in sorted(found)]


PHASES = ["symmetry", "eigenvalues", "density", "trace", "error from the data", "scale-free"]
KILL = """
import os, signal, sys
import cli
calls = 0
def update(self, name, done, total, worst):
    global calls
    calls += name == {phase!r}
    if calls == {call}:
        os.kill(os.getpid(), signal.{signal})
cli._Bar.update = update
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(cli.run(sys.argv[1:]))
"""


def equal(found: Path, expected: Path) -> None:
    """Two runs' spectra and arrays, to the bit."""
    assert arrays(found.with_suffix(".spectrum.npz")) == arrays(expected.with_suffix(".spectrum.npz"))
    raw = [json.loads(path.with_suffix(".spectrum.json").read_text()) for path in (found, expected)]
    for part in ("spectra", "sensitivity", "loss", "gradient_norm"):
        assert raw[0][part] == raw[1][part]


@pytest.mark.parametrize(
    ("phase", "call"), [*((f"hessian: {p}", c) for p in PHASES for c in (1, 2)), ("ggn: density", 9)]
)
def test_interrupted_in_any_phase_and_resumed(
    analysed: Path, tmp_path: Path, phase: str, call: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Stopped at the beginning or in the middle of a phase, resumed: the same arrays as without the interruption."""
    part = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path)]
    calls = 0

    def stop(self: object, name: str, done: int, total: int, worst: float) -> None:
        nonlocal calls
        calls += name == phase
        if calls == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli._Bar, "update", stop)
        assert cli.run(part) == 130
    assert cli.run([*part, "--resume"]) == 0
    equal(tmp_path / "a", analysed / "a")
    assert not list(tmp_path.glob("*.resume*"))


@pytest.mark.parametrize(
    ("phase", "call", "name"),
    [
        ("hessian: eigenvalues", 9, "SIGKILL"),
        ("hessian: density", 5, "SIGKILL"),
        ("hessian: slope x 2", 3, "SIGTERM"),
        ("ggn: trace", 2, "SIGKILL"),
    ],
)
def test_killed_and_resumed(analysed: Path, tmp_path: Path, phase: str, call: int, name: str) -> None:
    part = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path)]
    script = KILL.format(phase=phase, call=call, signal=name)
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the run it is compared with
    killed = subprocess.run([sys.executable, "-c", script, *part], cwd=ROOT, env=one, capture_output=True, text=True)
    if name == "SIGKILL":
        assert killed.returncode == -signal.SIGKILL
    else:
        assert killed.returncode == 130
        assert killed.stderr.splitlines()[-1] == "interrupted: --resume goes on"
    assert (tmp_path / "a.spectrum.resume").exists()
    assert not (tmp_path / "a.spectrum.json").exists()
    assert cli.run([*part, "--resume"]) == 0
    equal(tmp_path / "a", analysed / "a")
    assert not list(tmp_path.glob("*.resume*"))


def test_resuming_what_has_changed(
    analysed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for file in ("a", "b"):
        shutil.copy(analysed / f"{file}.pt", tmp_path)
    part = ["spectrum", str(tmp_path / "a.pt"), *FAST]

    def stop(self: object, name: str, done: int, total: int, worst: float) -> None:
        if name == "hessian: density":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli._Bar, "update", stop)
        assert cli.run(part) == 130
    fails(capsys, 2, "an interrupted analysis lies at", *part)
    fails(capsys, 2, "the settings changed since", *part, "--seed", "3", "--resume")
    fails(capsys, 2, "the data", *part, "--samples", "90", "--resume")
    shutil.copy(tmp_path / "a.pt", tmp_path / "kept.pt")
    shutil.copy(tmp_path / "b.pt", tmp_path / "a.pt")
    fails(capsys, 2, "the checkpoint", *part, "--resume")
    shutil.copy(tmp_path / "kept.pt", tmp_path / "a.pt")
    assert cli.run([*part, "--resume"]) == 0
    equal(tmp_path / "a", analysed / "a")
    before = (tmp_path / "a.spectrum.json").read_bytes()
    assert cli.run([*part, "--resume"]) == 0  # nothing left to do
    assert (tmp_path / "a.spectrum.json").read_bytes() == before


def test_a_full_disk_loses_nothing(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    """Files may grow to 20 kB only: the run ends with one line, and goes on once there is room."""
    part = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path)]
    script = (
        "import resource, signal, sys, cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run([sys.executable, "-c", script, *part], cwd=ROOT, env=one, capture_output=True, text=True)
    assert full.returncode == 1
    last = full.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "a.spectrum.resume" in last
    assert "File too large" in last
    assert cli.run([*part, "--resume"]) == 0
    equal(tmp_path / "a", analysed / "a")


def test_largest_by_magnitude_with_the_vectors(trained: Path, tmp_path: Path) -> None:
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


def test_accuracy_damping_and_samples_curve(trained: Path, tmp_path: Path, capsys: Capture) -> None:
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
    command += ["--damping", "0.5", "--samples-curve", "1,8,60", "--resamples", "3", "--out", str(tmp_path)]
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


def test_trajectory(tmp_path: Path, capsys: Capture) -> None:
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


def test_pyhessian_beside_ours(trained: Path, tmp_path: Path, capsys: Capture) -> None:
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
def test_a_samples_curve_that_is_none(analysed: Path, tmp_path: Path, capsys: Capture, curve: str) -> None:
    command = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path), "--samples-curve", curve]
    fails(capsys, 2, f"--samples-curve '{curve}'", *command)


def test_more_samples_on_the_curve_than_there_are(analysed: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["spectrum", str(analysed / "a.pt"), *FAST, "--out", str(tmp_path), "--samples-curve", "8,97"]
    fails(capsys, 2, "at most 96 are here", *command)


def test_a_process_that_is_killed_ends_the_other_with_a_line(trained: Path, tmp_path: Path) -> None:
    """torchrun with two gloo ranks, of which rank 1 kills itself in the density; --resume ends as one process does."""
    common = [
        "spectrum",
        str(trained / "a.pt"),
        "--samples",
        "40",
        "--top",
        "2",
        "--smallest",
        "0",
        "--dtype",
        "float64",
    ]
    common += ["--batch-size", "16", "--operator", "hessian", "--steps", "8", "--out", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "dying.py"
    dying = KILL.format(phase="hessian: density", call=5, signal="SIGKILL")
    script.write_text(dying.replace("if calls ==", 'if os.environ["RANK"] == "1" and calls =='))
    one = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = {"cwd": ROOT, "env": one, "capture_output": True, "text": True}
    died = subprocess.run([*launch, str(script), *common], **run)  # type: ignore[call-overload]
    assert died.returncode != 0
    lines = [line for line in died.stderr.splitlines() if "rank 0 of 2" in line]
    assert len(lines) == 1, died.stderr
    assert "--resume" in lines[0]
    assert (tmp_path / "two/a.spectrum.resume").exists()
    resumed = subprocess.run([*launch, str(ROOT / "cli.py"), *common, "--resume"], **run)  # type: ignore[call-overload]
    assert resumed.returncode == 0, resumed.stderr
    common[-1] = str(tmp_path / "one")
    assert cli.run(common) == 0
    found, expected = (load_spectrum(tmp_path / f"{n}/a.spectrum.json").spectra["hessian"] for n in ("two", "one"))
    assert [e.value for e in found.eigenvalues] == pytest.approx([e.value for e in expected.eigenvalues], rel=1e-9)


def test_two_processes(trained: Path, tmp_path: Path) -> None:
    """torchrun with two gloo ranks: the eigenvalues of one process."""
    common = [
        "spectrum",
        str(trained / "a.pt"),
        "--samples",
        "60",
        "--top",
        "4",
        "--smallest",
        "2",
        "--dtype",
        "float64",
    ]
    common += ["--batch-size", "16", "--no-density", "--operator", "hessian", "--json"]
    assert cli.run([*common, "--out", str(tmp_path / "one")]) == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "cli.py"),
    ]
    two = subprocess.run(
        [*torchrun, *common, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr
    found = json.loads(two.stdout)["spectra"]["hessian"]
    expected = json.loads((tmp_path / "one/a.spectrum.json").read_text())["spectra"]["hessian"]
    norm = max(abs(e["value"]) for e in expected["eigenvalues"])
    for kind in ("eigenvalues", "smallest_eigenvalues"):
        for a, b in zip(found[kind], expected[kind], strict=True):
            assert a["value"] == pytest.approx(b["value"], abs=1e-10 * norm)


def test_compare_refuses_what_was_not_measured_alike(analysed: Path, capsys: Capture) -> None:
    path = str(analysed / "b.pt")
    assert cli.run(["spectrum", path, *FAST, "--samples", "50", "--no-density", "--tag", "few"]) == 0
    fails(
        capsys,
        2,
        "number of samples differs, 96",
        "compare",
        str(analysed / "a.pt"),
        str(analysed / "b.few.spectrum.json"),
    )
    fails(capsys, 2, "at least two", "compare", path)
    fails(capsys, 2, "cannot be read", "compare", path, str(analysed / "none.pt"))
    fails(capsys, 2, "no *.spectrum.json", "compare", str(SHIPPED / "..") + "/ikun")


def damaged(folder: Path) -> dict[str, Path]:
    good = (SHIPPED / "digits-csnn-ikun.pt").read_bytes()
    files = {name: folder / f"{name}.pt" for name in ("empty", "truncated", "text", "foreign", "nan", "future")}
    files["empty"].write_bytes(b"")
    files["truncated"].write_bytes(good[: len(good) // 2])
    files["text"].write_text("hello")
    torch.save({"state_dict": {"w": torch.ones(2)}}, files["foreign"])
    values = torch.load(SHIPPED / "digits-csnn-ikun.pt", weights_only=True)
    torch.save({**values, "schema": "ikun-hessian/checkpoint/9"}, files["future"])
    values["state"]["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(values, files["nan"])
    return files


@pytest.mark.parametrize("command", ["spectrum", "info"])
def test_bad_checkpoints(tmp_path: Path, capsys: Capture, command: str) -> None:
    expected = {
        "empty": "not a checkpoint that can be loaded safely",
        "truncated": "not a checkpoint that can be loaded safely",
        "text": "not a checkpoint that can be loaded safely",
        "foreign": "not a checkpoint of ikun-hessian",
        "nan": "NaN or infinite",
        "future": "another version",
    }
    for name, path in damaged(tmp_path).items():
        fails(capsys, 2, expected[name], command, str(path))
    fails(capsys, 2, "no such file", command, str(tmp_path / "missing.pt"))


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"schema": "ikun-hessian/checkpoint/1", "state": Evil()}, "evil.pt")
    fails(capsys, 2, "evil.pt: not a checkpoint that can be loaded safely", "spectrum", "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "xaviar"], "init must be one of ikun"),
        (["--surrogate", "atan:x"], "'x' is not a number"),
        (["--surrogate", "stairs"], "unknown surrogate 'stairs'"),
        (["--data", "mnist"], "unknown data set 'mnist'"),
        (["--model", "vgg"], "model must be one of csnn, mlp"),
        (["--lr", "-1"], "lr and alpha must be positive"),
        (["--tau", "1"], "tau must exceed 1"),
        (["--subset", "99999"], "a subset of 99999"),
        (["--hidden", "a,b"], "--hidden 'a,b'"),
        (["--epochs", "few"], "'few' is not a valid integer"),
        (["--resume"], "no interrupted run to resume"),
        (["--held-out", "5000"], "leaves nothing"),
        (["--data", "fashion-mnist", "--data-dir", "/dev/null"], "/dev/null is not a folder"),
    ],
)
def test_bad_training_options(tmp_path: Path, capsys: Capture, options: list[str], message: str) -> None:
    fails(capsys, 2, message, "train", *options, "--out", str(tmp_path / "x.pt"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "give a number from 1 to 200, or all"),
        (["--samples", "many"], "give a number from 1 to 200, or all"),
        (["--operator", "jacobian"], "unknown operator jacobian"),
        (["--operator", "finite-differences"], "are no Hessian"),
        (["--params", "conv9*"], "no parameter matches 'conv9*'"),
        (["--surrogate", "nothing"], "unknown surrogate"),
        (["--top", "0"], "at least 1"),
        (["--batch-size", "0"], "must be positive"),
        (["--backend", "pyhessian"], "backend pyhessian"),
        (["--operator", "relaxed", "--surrogate", "fast_sigmoid:25"], "no relaxed network"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_bad_spectrum_options(trained: Path, capsys: Capture, options: list[str], message: str, tmp_path: Path) -> None:
    fails(capsys, 2, message, "spectrum", str(trained / "a.pt"), "--out", str(tmp_path), *options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_by_train(trained: Path, capsys: Capture) -> None:
    fails(capsys, 2, "exists: choose another --out", "train", "--out", str(trained / "a.pt"))


def test_places_that_cannot_be_written(trained: Path, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(
        capsys, 2, "choose another place", "spectrum", str(trained / "a.pt"), *FAST, "--out", str(tmp_path / "file/x")
    )
    fails(capsys, 2, "choose another place", "train", "--epochs", "0", "--out", str(tmp_path / "file" / "x.pt"))


def test_help_is_light_and_interruption_is_130(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    code = "import sys, cli; cli.run(['spectrum', '--help']); assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--smallest" in done.stdout

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hessian_tools.spectrum.spectrum", interrupted)
    assert cli.run(["spectrum", str(trained / "a.pt"), "--tag", "x"]) == 130


def test_computation_failures_are_exit_code_1(monkeypatch: pytest.MonkeyPatch, trained: Path, capsys: Capture) -> None:
    from hessian_tools.spectrum import AnalysisError

    for error, message in ((AnalysisError("not symmetric"), "not symmetric"), (MemoryError(), "lower --batch-size")):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("hessian_tools.spectrum.spectrum", fail)
        fails(capsys, 1, message, "spectrum", str(trained / "a.pt"), "--tag", "x")


def test_diverged_training_keeps_finite_weights_and_fails(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x.pt"
    options = [
        "--norm",
        "none",
        "--optimizer",
        "sgd",
        "--lr",
        "1e20",
        "--weight-decay",
        "1e20",
        "--epochs",
        "3",
        "--subset",
        "100",
        "--channels",
        "2",
    ]
    assert cli.run(["train", *options, "--out", str(out)]) == 1
    assert "diverged" in capsys.readouterr().err
    assert cli.run(["info", str(out)]) == 0


@pytest.mark.parametrize("init", ["ikun", "kaiming", "xavier"])
def test_shipped_checkpoints_are_what_their_readme_says(init: str) -> None:
    from ikun.checkpoint import load_checkpoint
    from ikun.training import evaluate

    path = SHIPPED / f"digits-csnn-{init}.pt"
    assert path.stat().st_size < 1_000_000
    checkpoint = load_checkpoint(path)
    assert checkpoint.training["init"] == init
    assert evaluate(checkpoint.build(), checkpoint.data.load("test"), checkpoint.loss)[1] >= 0.95
    assert checkpoint.data.load().sha256 == checkpoint.training["data_sha256"]
