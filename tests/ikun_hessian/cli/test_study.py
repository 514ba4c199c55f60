"""Tests of the command study: from a preset to tables and figures, with interruptions and failing runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest
import torch
from command_tools import ROOT, TINY_SPECTRUM, TINY_TRAINING, Capture, fails, limited
from joblib.externals.loky.process_executor import TerminatedWorkerError

import cli
from hessian_tools.io.files import locked
from ikun.checkpoint import save_checkpoint
from ikun.training import loop as training
from ikun_hessian.cli.study import _gathered
from ikun_hessian.experiments.runs import gather
from ikun_hessian.experiments.study import plan, runner
from ikun_hessian.experiments.study import unit as unit_files
from ikun_hessian.experiments.study.preset import read_preset
from ikun_hessian.experiments.study.record import changed

TINY = f"""
title = "Tiny"
question = "Which?"
by = "init"
seeds = 2
accuracy = 0.2
figures = ["epochs"]
{TINY_TRAINING}lr = 0.02
save-at-loss = [0.11]
[vary]
init = ["kaiming", "ikun"]
[when.init.ikun]
alpha = 0.1
[[spectrum]]
at = ["final", "loss"]
{TINY_SPECTRUM}[robustness]
severities = [3]
noise = [0.2]
draws = 4
samples = 40
"""
RUNS = [f"{init}-s{seed}" for seed in (0, 1) for init in ("kaiming", "ikun")]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def studied(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "done"
    assert cli.run(["study", str(preset), "--out", str(folder), "--jobs", "1"]) == 0
    return folder


def files(folder: Path) -> set[str]:
    """All but a lock that may stay."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found - {runner.WORKING}


def measured(folder: Path) -> dict[str, Any]:
    """What every file of runs says, but for times and places; weights to the bit."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "runs").iterdir()):
        if path.suffix == ".pt":
            found[path.name] = {k: v.tolist() for k, v in torch.load(path, weights_only=True)["state"].items()}
        elif path.suffix == ".jsonl":
            found[path.name] = path.read_text()
        elif path.suffix == ".json":
            values = json.loads(path.read_text())
            for key in ("seconds", "checkpoint", "settings", "start"):
                values.pop(key, None)
            found[path.name] = values
    return found


def same(folder: Path, studied: Path) -> None:
    assert files(folder) == files(studied)
    assert measured(folder) == measured(studied)
    assert (folder / "compare.csv").read_text() == (studied / "compare.csv").read_text()
    assert (folder / "tables.md").read_text() == (studied / "tables.md").read_text()


def test_a_study_goes_from_a_preset_to_tables_and_figures(studied: Path, preset: Path, capsys: Capture) -> None:
    """All runs are there, what the library reads of them is what was asked for, and nothing is done twice."""
    for name in RUNS:
        assert {f"runs/{name}.{end}" for end in ("pt", "robustness.json", "spectrum.json", "train.json")} <= files(
            studied
        )
    reached = {name for name in RUNS if f"runs/{name}.loss0.11.spectrum.json" in files(studied)}
    assert reached == {name for name in RUNS if f"runs/{name}.loss0.11.pt" in files(studied)}
    assert 0 < len(reached) < len(RUNS)
    assert {"figures/epochs.png", "figures/epochs.pdf", "figures/epochs.csv", "robustness.csv"} <= files(studied)
    runs = {run.name: run for run in gather([studied / "runs"])}
    assert sorted(runs) == sorted(RUNS)
    ikun = runs["ikun-s1"]
    assert (ikun.training["alpha"], ikun.training["seed"], ikun.data["seed"], ikun.network["hidden"]) == (
        0.1,
        1,
        1,
        [8],
    )
    assert ikun.spectra[""].data["samples"] == 32
    assert all(("loss0.11" in run.spectra) == (run.name in reached) for run in runs.values())
    assert "# Tiny\n\nWhich?" in (studied / "tables.md").read_text()
    assert "weight_noise" in (studied / "tables.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (studied / "runs").iterdir()}
    capsys.readouterr()
    assert cli.run(["study", str(preset), "--out", str(studied), "--jobs", "1"]) == 0
    assert "runs        4, 4 done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (studied / "runs").iterdir()} == before


def test_a_study_interrupted_after_a_run_resumes(
    studied: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Once at the end of a training, once among the analyses; then a result is cut off: the same files in the end."""
    study = ["study", str(preset), "--out", str(tmp_path / "s"), "--jobs", "1"]
    analyse, calls = runner._analyse, 0

    save = save_checkpoint

    def cut(checkpoint: Any, path: Path) -> None:
        if path.name == "kaiming-s0.pt":
            raise KeyboardInterrupt
        save(checkpoint, path)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", cut)
        assert cli.run(study) == 130
    assert [path.name for path in tmp_path.glob("s/runs/*.resume")] == ["kaiming-s0.pt.resume"]

    def stop(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        analyse(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_analyse", stop)
        assert cli.run(study) == 130
    assert "Interrupted. Run the same command again to resume." in capsys.readouterr().err
    damaged = tmp_path / "s" / "runs" / "kaiming-s0.spectrum.json"
    damaged.write_text(damaged.read_text()[:500])
    assert cli.run([*study, "--dry-run"]) == 0
    assert "runs        4, 0 done" in capsys.readouterr().out
    assert cli.run(study) == 0
    same(tmp_path / "s", studied)


def test_a_study_killed_with_its_workers_resumes(studied: Path, preset: Path, tmp_path: Path) -> None:
    """After SIGKILL during two runs, the runs end too, and the next study ends with the same files."""
    study = ["study", str(preset), "--out", str(tmp_path / "s"), "--jobs"]
    command = [sys.executable, "-m", "ikun_hessian", *study, "2"]
    with subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=PIPE, stderr=DEVNULL) as first:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("s/runs/*.train.json"))) < 2 and first.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        first.kill()
    assert first.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("s/runs/*.robustness.json"))
    assert cli.run([*study, "1"]) == 0
    same(tmp_path / "s", studied)


def test_a_study_killed_while_it_draws_leaves_no_partial_figure(studied: Path, preset: Path, tmp_path: Path) -> None:
    """The next call draws all of them again and leaves nothing half-written."""
    folder = tmp_path / "s"
    shutil.copytree(studied, folder)
    shutil.rmtree(folder / "figures")
    study = ["study", str(preset), "--out", str(folder), "--jobs", "1"]
    kill = (
        "import os, signal, sys, cli; from matplotlib.figure import Figure\n"
        "def save(self, file, **options):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "Figure.savefig = save; cli.run(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", kill, *study], cwd=ROOT, env=ONE_THREAD, stdout=DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name[:12] for path in (folder / "figures").glob(".*.part")] == [".epochs.png."]
    assert cli.run(study) == 0
    assert files(folder) == files(studied)
    for path in (folder / "figures").iterdir():
        assert path.read_bytes() == (studied / "figures" / path.name).read_bytes()


def test_other_settings_are_refused_in_a_folder_that_has_some(studied: Path, preset: Path, capsys: Capture) -> None:
    study = ["study", str(preset), "--out", str(studied), "--jobs", "1"]
    before = measured(studied)
    fails(capsys, 2, "run kaiming-s0 had another lr (0.02, now 0.5)", *study, "--set", "lr=0.5")
    fails(capsys, 2, "analysis spectrum final had another top (1, now 2)", *study, "--set", "spectrum.top=2")
    assert measured(studied) == before
    for change, key in (("lr=0.5", "lr"), ("spectrum.top=2", "top")):  # and --dry-run says what the command would do
        said = [*study, "--dry-run", "--set", change]
        assert cli.run(said) == 2
        captured = capsys.readouterr()
        assert f"had another {key} " in captured.err
        assert "runs        4, 0 done" in captured.out
        assert captured.out.splitlines()[-4:] == [f"other settings: --force  {name}" for name in RUNS]
        assert cli.run([*said, "--force"]) == 0
        assert capsys.readouterr().out.splitlines()[-4:] == [f"redo        {name}" for name in RUNS]
    assert cli.run([*study, "--dry-run", "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert "runs        6, 4 done" in out
    assert "done        kaiming-s0\n" in out
    fails(
        capsys, 2, "analysis spectrum final had another top", *study, "--set", "init=lecun", "--set", "spectrum.top=2"
    )
    assert measured(studied) == before
    # more seeds and other analyses do not count as other settings
    old = json.loads((studied / "study.json").read_text())
    assert changed(old, {**old, "runs": {**old["runs"], "new-s7": {"lr": 1}}}) == []


def test_force_repeats_what_differs(preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ikun_hessian.cli.study._finish", lambda *_: [])
    runs = tmp_path / "s" / "runs"
    study = ["study", str(preset), "--out", str(tmp_path / "s"), "--jobs", "1", "--seeds", "1", "--set", "init=kaiming"]
    assert cli.run(study) == 0
    kept = {path: path.stat().st_mtime_ns for path in (runs / "kaiming-s0.pt", runs / "kaiming-s0.robustness.json")}
    assert cli.run([*study, "--set", "spectrum.samples=16", "--force"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for moment in ("", ".loss0.11"):
        spectrum = json.loads((runs / f"kaiming-s0{moment}.spectrum.json").read_text())
        assert spectrum["data"]["samples"] == 16
    (runs / "kaiming-s0.note").write_text("of the run's own")
    assert cli.run([*study, "--set", "spectrum.samples=16", "--set", "lr=0.03", "--force"]) == 0
    assert json.loads((runs / "kaiming-s0.train.json").read_text())["training"]["lr"] == 0.03
    assert not (runs / "kaiming-s0.note").exists()


def test_a_run_that_fails_does_not_stop_the_others(preset: Path, tmp_path: Path, capsys: Capture) -> None:
    """An initializer that refuses the network, and a training that ends in NaN: kept, marked, counted."""
    changes = ["--set", "init=gradient_stable,kaiming,lecun", "--seeds", "1"]
    study = ["study", str(preset), "--out", str(tmp_path / "s"), "--jobs", "1", *changes]
    text = preset.read_text() + "[when.init.lecun]\nlr = 1e20\noptimizer = 'sgd'\nweight-decay = 1e20\n"
    own = tmp_path / "own.toml"
    own.write_text(text)
    study[1] = str(own)
    assert cli.run(study) == 0
    out = capsys.readouterr().out
    assert "! gradient_stable-s0 failed: train: the gradient_stable rule is for recurrent layers" in out
    failed = json.loads((tmp_path / "s" / "runs" / "gradient_stable-s0.failed.json").read_text())
    assert (failed["schema"], failed["step"]) == ("ikun-hessian/failed/1", "train")
    runs = {run.name: run for run in gather([tmp_path / "s" / "runs"])}
    assert runs["gradient_stable-s0"].failures[0].startswith("failed: train: ")
    assert runs["lecun-s0"].diverged
    assert "" not in runs["lecun-s0"].spectra
    assert "" in runs["kaiming-s0"].spectra
    tables = (tmp_path / "s" / "tables.md").read_text()
    assert "- gradient_stable-s0: failed: train" in tables
    assert "- lecun-s0: NaN" in tables
    assert cli.run([*study, "--dry-run"]) == 0
    states = dict(reversed(line.split()) for line in capsys.readouterr().out.splitlines() if line.endswith("-s0"))
    assert states == {"gradient_stable-s0": "failed", "kaiming-s0": "done", "lecun-s0": "done"}


def test_a_failure_is_forgotten_once_the_run_succeeds(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("ikun_hessian.cli.study._finish", lambda *_: [])
    study = ["study", str(preset), "--out", str(tmp_path / "s"), "--jobs", "1", "--seeds", "1"]
    analyse = runner._analyse

    def broken(unit: unit_files.Unit, step: unit_files.Step, *others: Path) -> None:
        if step.command == "robustness":
            raise RuntimeError("out of\nmemory")
        analyse(unit, step, *others)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_analyse", broken)
        fails_all = cli.run(study)
    assert fails_all == 1
    captured = capsys.readouterr()
    assert "! ikun-s0 failed: robustness ikun-s0: out of memory" in captured.out
    assert captured.err.splitlines()[-1] == "error: all 2 runs failed. Run the same command again to retry them."
    assert (tmp_path / "s" / "runs" / "ikun-s0.spectrum.json").exists()  # the other analyses were done
    assert cli.run(study) == 0
    assert not list((tmp_path / "s" / "runs").glob("*.failed.json"))


def test_files_that_cannot_be_used_do_not_stop_the_tables(studied: Path, preset: Path, tmp_path: Path) -> None:
    """A half-written result, a description of another version, a run of which only its failure is there."""
    folder = tmp_path / "s"
    shutil.copytree(studied, folder)
    units = plan.make(read_preset(preset), folder, data_dir=None, device="cpu", memory=1.0, leader=0).units
    half, other, failed, whole = (unit.name for unit in units)
    (folder / f"runs/{half}.spectrum.json").write_text('{"schema": "ikun-hes')
    (folder / f"runs/{other}.train.json").write_text('{"schema": "ikun-hessian/train/9"}')
    for path in (folder / "runs").glob(f"{failed}.*"):
        path.unlink()
    (folder / f"runs/{failed}.failed.json").write_text("{}")
    said: list[str] = []
    runs = {run.name: run for run in _gathered(units, said.append)}
    assert len(said) == 2
    assert f"{half}.spectrum.json: not a JSON file" in said[0] + said[1]
    assert f"{other}.train.json" in said[0] + said[1]
    assert set(runs) == {half, whole}
    assert ("" in runs[half].spectra, "" in runs[whole].spectra, runs[half].log != ()) == (False, True, True)
    assert _gathered(units[2:3], said.append) == []


def test_a_killed_worker_is_reported(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(*_: object) -> None:
        raise TerminatedWorkerError("A worker process managed by\nthe executor was unexpectedly terminated.")

    monkeypatch.setattr("ikun_hessian.cli.study._work", broken)
    fails(
        capsys,
        1,
        "was killed, possibly because memory ran out. Run the same command again",
        "study",
        str(preset),
        "--out",
        str(tmp_path),
    )


def test_progress_is_what_the_files_say(studied: Path, preset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(studied, folder)
    found = plan.make(read_preset(preset), folder, data_dir=None, device="cpu", memory=1.0, leader=0)
    unit, other = found.units[:2]
    assert (unit.name, unit.progress(), unit.done()) == ("kaiming-s0", 1.0, True)
    step, path, stem = next(iter(unit.stems()))
    assert unit_files.is_measured(step, path, stem)
    assert not unit_files.is_measured(step, other.checkpoint, stem)  # of other weights
    Path(f"{stem}.json").unlink()
    assert (unit.progress(), unit.done()) == (0.5 + 0.5 * 2 / 3, False)
    (folder / "runs" / "kaiming-s0.pt").unlink()
    assert (unit.progress(), unit.done()) == (0.5, False)  # both epochs are in the log
    log = folder / "runs" / "kaiming-s0.train.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    assert unit.progress() == 0.25
    log.unlink()
    assert unit.progress() == 0


@pytest.mark.parametrize("name", ["kaiming-s0.train.jsonl", "kaiming-s0.pt", "kaiming-s0.epoch0001.pt"])
def test_pipes_among_the_files_of_a_run_do_not_hang_a_study(
    name: str, studied: Path, preset: Path, tmp_path: Path
) -> None:
    """Opening a pipe that nobody writes would wait for ever."""
    folder = tmp_path / "s"
    shutil.copytree(studied, folder)
    found = plan.make(read_preset(preset), folder, data_dir=None, device="cpu", memory=1.0, leader=0)
    unit = found.units[0]
    (folder / "runs" / name).unlink(missing_ok=True)
    os.mkfifo(folder / "runs" / name)
    if name.endswith("jsonl"):
        unit.checkpoint.unlink()
    with limited(30):
        assert unit.done() is (name == "kaiming-s0.epoch0001.pt")
        assert unit.progress() in (0.0, 0.5, 1.0)
        assert unit.checkpoints("snapshots") == [p for p in unit.checkpoints("snapshots") if p.is_file()]


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_study_without_standard_streams(closed: str, tmp_path: Path) -> None:
    """Its workers are processes of their own, which inherit the streams."""
    (tmp_path / "t.toml").write_text(TINY.replace("seeds = 2", "seeds = 1"))
    words = f"{sys.executable} {ROOT / 'cli.py'} study t.toml --out s --jobs 2"
    done = subprocess.run(["sh", "-c", f"{words} {closed}"], stdout=DEVNULL, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "s" / "tables.md").is_file()


def test_a_worker_dies_with_its_study(tmp_path: Path) -> None:
    """Whose lock it holds: the next study waits for it."""
    (tmp_path / "runs").mkdir()
    worker = "import sys, time; from types import SimpleNamespace as N\n"
    worker += "from ikun_hessian.experiments.study.runner import _working\n"
    worker += "from pathlib import Path\n"
    worker += (
        "with _working(N(runs=Path(sys.argv[1]), study=int(sys.argv[2]))): print('up', flush=True); time.sleep(60)"
    )
    leader = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:], str(os.getpid())])"
    command = [sys.executable, "-c", leader, worker, str(tmp_path / "runs")]
    with subprocess.Popen(command, cwd=ROOT, stdout=PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "up\n"
        with pytest.raises(BlockingIOError), locked(tmp_path / runner.WORKING):
            pass
        first.kill()
        with locked(tmp_path / runner.WORKING, wait=10):
            pass


def test_one_study_at_a_time(studied: Path, preset: Path, capsys: Capture) -> None:
    study = ["study", str(preset), "--out", str(studied), "--jobs", "1"]
    with locked(studied / ".study.lock"):
        fails(capsys, 2, "another study is running here", *study)


def test_data_that_cannot_be_had_are_left_out_and_named(preset: Path, tmp_path: Path, capsys: Capture) -> None:
    own = tmp_path / "own.toml"
    own.write_text(preset.read_text().replace("[vary]", "[vary]\ndata = ['digits', 'image-folder']"))
    study = ["study", str(own), "--data-dir", str(tmp_path), "--dry-run"]
    assert cli.run(study) == 0
    out = capsys.readouterr().out
    assert "! data set image-folder is skipped: " in out
    assert "runs        4, 0 done" in out
    fails(capsys, 2, "all runs are skipped", *study, "--set", "data=image-folder")
    own.write_text(preset.read_text().replace("[train]", "[train]\ndata = 'image-folder'"))
    fails(capsys, 2, "image-folder", *study)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the NAME of a preset"),
        (["papr"], "no preset 'papr': did you mean 'paper'"),
        (["TINY", "--quick"], "has no [quick]"),
        (["TINY", "--set", "init=kaimng"], "init: no 'kaimng': did you mean 'kaiming'?"),
        (["TINY", "--set", "loss=msee"], "loss: no 'msee': did you mean 'mse'?"),
        (["TINY", "--set", "lr=-1"], "run kaiming-s0: lr, alpha and gain must be positive"),
        (["TINY", "--set", "spectrum.samples=65"], "[spectrum] samples 65: digits train has 64 samples"),
        (["TINY", "--set", "robustness.samples=361"], "[robustness] samples 361: digits test has 360 samples"),
        (["TINY", "--set", "spectrum.at=snapshots"], "[spectrum] at: no run has snapshots: give [train] snapshots = N"),
        (["TINY", "--set", "save-at-loss=[]"], "[spectrum] at: no run has a save-at-loss: give [train] save-at-loss"),
        (["TINY", "--set", "epochs=0"], "run kaiming-s0: epochs must be at least 1 in a study, not 0"),
        (["TINY", "--set", "spectrum.top=593"], "kaiming-s0: [spectrum] 593 eigenvalues are more than the 592"),
        (["TINY", "--set", "spectrum.scaled=593"], "kaiming-s0: [spectrum] 593 eigenvalues are more than the 592"),
        (["TINY", "--set", "spectrum.params=fc3*"], "params: nothing matches 'fc3*': choose from fc1.weight, "),
        (["TINY", "--set", "spectrum.surrogate=atn:2"], "run kaiming-s0: [spectrum] unknown surrogate 'atn'"),
        (["TINY", "--set", "spectrum.samples-curve=1,33"], "[spectrum] samples-curve needs 33 samples, of 32"),
        (["TINY", "--set", "hidden=a,b"], "is not a list of sizes"),
        (["TINY", "--set", "figures=epoch"], "figures: no 'epoch': did you mean 'epochs'?"),
        (["TINY", "--set", "spectrum.operator=hesian"], "[spectrum] unknown operator hesian"),
        (["TINY", "--set", "robustness.draws=3"], "[robustness] draws must be even and at least 4"),
        (["TINY", "--set", "robustness.noise=loud"], "[robustness] noise: 'loud' is not a valid float"),
        (["TINY", "--set", "robustness.corruptions=['fog']"], "[robustness] corruptions: no 'fog'"),
        (["TINY", "--set", "robustness.severity=1"], "has no option 'severity': did you mean 'severities'?"),
        (["TINY", "--seeds", "600"], "1200 runs"),
        (["TINY", "--jobs", "0"], "0 is not in the range"),
        (["TINY", "--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_mistakes_get_one_line(
    preset: Path, tmp_path: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    given = [str(preset) if word == "TINY" else word for word in arguments]
    place = [] if "--out" in given else ["--out", str(tmp_path / "s")]
    fails(capsys, 2, message, "study", *given, *place)
    assert not (tmp_path / "s").exists()


def test_insufficient_memory_is_reported_before_training(preset: Path, tmp_path: Path, capsys: Capture) -> None:
    study = ["study", str(preset), "--out", str(tmp_path / "s"), "--dry-run", "--memory"]
    fails(capsys, 2, "run kaiming-s0: [spectrum] 1 eigenpairs and 0 density steps for 592 para", *study, "1e-6")
    assert cli.run([*study, "0.1"]) == 0


def test_more_levels_than_can_be_told_apart_are_refused(preset: Path, tmp_path: Path, capsys: Capture) -> None:
    own = tmp_path / "own.toml"
    own.write_text(preset.read_text().replace("[vary]", "[vary]\ndropout = [0.1, 0.2]"))
    study = ["study", str(own), "--out", str(tmp_path / "s"), "--set", "by=dropout", "--dry-run", "--set"]
    assert cli.run([*study, f"dropout={[i / 32 for i in range(16)]}"]) == 0
    fails(capsys, 2, "has 17 levels: figures can show at most 16", *study, f"dropout={[i / 32 for i in range(17)]}")


def test_a_single_level_is_reported(preset: Path, tmp_path: Path, capsys: Capture) -> None:
    study = ["study", str(preset), "--out", str(tmp_path / "s"), "--dry-run"]
    assert cli.run([*study, "--set", "init=lecun"]) == 0
    assert "! all runs have init lecun: there is nothing to compare" in capsys.readouterr().out
    assert cli.run(study) == 0
    assert "nothing to compare" not in capsys.readouterr().out


def test_a_damaged_record_is_refused(preset: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "study.json").write_text("{}")
    fails(capsys, 2, "not the record of a study", "study", str(preset), "--out", str(tmp_path), "--jobs", "1")


def test_the_published_spectrum_can_be_had_of_any_preset(preset: Path, tmp_path: Path, capsys: Capture) -> None:
    study = ["study", str(preset), "--out", str(tmp_path / "s"), "--dry-run"]
    assert cli.run([*study, "--as-published"]) == 0
    assert "spectrum final published" in capsys.readouterr().out
    assert cli.run(["study", "paper", "--quick", "--no-as-published", "--seeds", "1", *study[2:]]) == 0
    assert "final published" not in capsys.readouterr().out


def test_the_callers_joblib_backend_is_used(preset: Path, tmp_path: Path, studied: Path, capsys: Capture) -> None:
    """joblib.parallel_config around the command: dask's and ray's backends come in this way."""
    import joblib

    with joblib.parallel_config("threading", n_jobs=2):
        assert cli.run(["study", str(preset), "--out", str(tmp_path / "s"), "--seeds", "1"]) == 0
    assert "2 in parallel" in capsys.readouterr().out
    assert measured(tmp_path / "s").items() <= measured(studied).items()
