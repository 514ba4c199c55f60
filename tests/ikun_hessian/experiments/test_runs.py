"""Tests of collecting runs from the files of the commands, complete and damaged."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from run_tools import make_run, make_study, write_run, write_study

from hessian_tools.io import json as results
from hessian_tools.io.json import ResultError
from ikun_hessian.experiments.runs import TrainingRun, gather


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainingRun]]:
    """Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("study")
    return folder, write_study(folder)


def none(text: str) -> None:
    raise AssertionError(text)


def same(found: TrainingRun, made: TrainingRun) -> None:
    for field in dataclasses.fields(TrainingRun):
        value, expected = getattr(found, field.name), getattr(made, field.name)
        if field.name in ("spectra", "flatness"):
            assert list(value) == sorted(expected)
            for key, result in value.items():
                assert results.clean(dataclasses.asdict(result)) == results.clean(dataclasses.asdict(expected[key]))
        elif field.name == "epochs_run":
            assert value == len(made.log)
        else:
            assert value == expected, field.name


def test_a_study_comes_back_as_written(study: tuple[Path, list[TrainingRun]]) -> None:
    folder, made = study
    found = gather([folder], none)
    assert [run.name for run in found] == [run.name for run in made]
    for run, expected in zip(found, made, strict=True):
        same(run, expected)
    assert [run.name for run in found if run.diverged] == ["xavier-adam-s3"]


def test_a_path_may_be_a_checkpoint_a_result_or_a_description(study: tuple[Path, list[TrainingRun]]) -> None:
    folder, made = study
    runs = folder / "runs"
    (whole,) = gather([runs / "ikun-adam-s0.pt"], none)
    same(whole, made[0])
    (described,) = gather([runs / "ikun-adam-s0.train.json"], none)
    assert described.log == made[0].log
    assert not described.spectra
    (one,) = gather([runs / "ikun-adam-s0.loss0.02.spectrum.json"], none)
    assert list(one.spectra) == ["loss0.02"]
    assert (one.training, one.start) == (made[0].training, made[0].start)
    assert one.log == made[0].log
    (snapshot,) = gather([runs / "ikun-adam-s0.loss0.02.pt"], none)
    assert (snapshot.name, list(snapshot.spectra), list(snapshot.flatness)) == (
        "ikun-adam-s0",
        ["loss0.02"],
        ["loss0.02"],
    )
    assert len(gather([folder, runs, runs / "ikun-adam-s0.pt"], none)) == len(made)  # every file once


def test_a_result_alone_says_what_was_trained(tmp_path: Path) -> None:
    """Without NAME.train.json: the surrogate trained with, not that of the analysis; snapshots belong to their run."""
    made = make_run(network={"surrogate": "atan:5"})
    trained = {
        **made.training,
        "data_sha256": "ab",
        "samples": 1437,
        "epochs_run": 12,
        "best_epoch": 9,
        "failures": ["NaN: x"],
    }
    for key, tag in (("", ""), ("loss0.02", ""), ("", "wide")):
        network = {**made.network, "surrogate": "atan:2", "trained_surrogate": "atan:5"}
        changed = dataclasses.replace(made.spectra[key], training=trained, network=network)
        name = ".".join(part for part in (made.name, key, tag, "spectrum", "json") if part)
        results.save_result(changed, tmp_path / name)
    (found,) = gather([tmp_path], none)
    assert found.name == made.name
    assert list(found.spectra) == ["", "loss0.02", "wide"]
    assert found.value("surrogate") == "atan:5"
    assert found.data == {"name": "digits", "sha256": "ab", "samples": 1437}
    assert (found.best_epoch, found.epochs_run, found.failures, found.diverged) == (9, 12, ("NaN: x",), True)
    assert found.training == made.training
    (tmp_path / "kaiming-adam-s0.spectrum.json").rename(tmp_path / "other.spectrum.json")
    assert "other" in [run.name for run in gather([tmp_path], none)]


def test_names_may_contain_dots(tmp_path: Path) -> None:
    for name in ("ikun-a0.5", "ikun-a0.5-s1", "ikun-a0.5.again"):
        write_run(dataclasses.replace(make_run(), name=name), tmp_path)
    found = gather([tmp_path], none)
    assert [(run.name, sorted(run.spectra)) for run in found] == [
        (name, ["", "loss0.02"]) for name in ("ikun-a0.5", "ikun-a0.5-s1", "ikun-a0.5.again")
    ]


def test_runs_of_one_name_get_their_folders(tmp_path: Path) -> None:
    for where in ("a/runs", "b/runs"):
        write_run(make_run(), tmp_path / where)
    write_run(make_run("ikun"), tmp_path / "b" / "runs")
    names = [run.name for run in gather([tmp_path], none)]
    assert names == ["a/runs/kaiming-adam-s0", "b/runs/kaiming-adam-s0", "ikun-adam-s0"]


def test_failed_and_unfinished_runs_say_so(tmp_path: Path) -> None:
    run = make_run(diverged=True)
    write_run(
        dataclasses.replace(run, failures=(*run.failures, "failed: spectrum: out of memory: 3 GiB"), finished=False),
        tmp_path,
    )
    (found,) = gather([tmp_path], none)
    assert found.failures == ("NaN: the loss is not finite", "failed: spectrum: out of memory: 3 GiB")
    assert not found.finished
    (tmp_path / f"{run.name}.failed.json").write_text("{}")
    said: list[str] = []
    (found,) = gather([tmp_path], said.append)
    assert found.failures == run.failures
    assert len(said) == 1
    assert "failed.json" in said[0]


@pytest.mark.parametrize(
    ("ending", "text", "why"),
    [
        ("spectrum.json", "{", "not a JSON file"),
        ("spectrum.json", "{}", "schema None"),
        ("flatness.json", "[1]", "not a flatness of this version"),
        ("train.json", '{"schema": "ikun-hessian/train/1"}', "lacks network"),
        ("train.json", '{"schema": "ikun-hessian/train/9"}', "schema 'ikun-hessian/train/9'"),
    ],
)
def test_damaged_files_are_skipped_or_refused(tmp_path: Path, ending: str, text: str, why: str) -> None:
    """Kept out of a searched folder with one line; an error where the user named the file or its checkpoint."""
    write_run(make_run(), tmp_path)
    write_run(make_run("ikun"), tmp_path)
    damaged = tmp_path / f"kaiming-adam-s0.{ending}"
    damaged.write_text(text)
    said: list[str] = []
    found = gather([tmp_path], said.append)
    assert [run.name for run in found] == ["ikun-adam-s0", "kaiming-adam-s0"]
    assert len(said) == 1
    assert str(damaged) in said[0]
    assert why in said[0]
    assert said[0].endswith("(skipped)")
    with pytest.warns(UserWarning, match="skipped"):
        gather([tmp_path])
    for path in (damaged, tmp_path / "kaiming-adam-s0.pt"):
        with pytest.raises(ResultError, match=why):
            gather([path], none)


def test_damaged_robustness_is_left_out_of_its_run(tmp_path: Path) -> None:
    write_run(make_run(), tmp_path)
    damaged = tmp_path / "kaiming-adam-s0.robustness.json"
    damaged.write_text(damaged.read_text()[:100])
    said: list[str] = []
    (found,) = gather([tmp_path], said.append)
    assert (found.robustness, found.spectra.keys()) == (None, make_run().spectra.keys())
    assert len(said) == 1
    assert said[0].startswith(f"{damaged}: not a JSON file")
    assert said[0].endswith("(skipped)")


def test_a_half_written_line_ends_the_log(tmp_path: Path) -> None:
    run = make_run()
    write_run(run, tmp_path)
    log = tmp_path / f"{run.name}.train.jsonl"
    log.write_text(log.read_text()[:-40])
    said: list[str] = []
    (found,) = gather([tmp_path], said.append)
    assert found.log == run.log[:-1]
    assert "line 12" in said[0]
    log.write_text("[]\n")
    assert gather([tmp_path], said.append)[0].log == ()


def test_a_log_with_a_gap_ends_there(tmp_path: Path) -> None:
    """The missing lines are unknown, so no later line can be the first to reach a loss."""
    run = make_run()
    write_run(run, tmp_path)
    log = tmp_path / f"{run.name}.train.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for kept, left in ((lines[:3], 3), (lines[:3] + lines[5:], 3), (lines[2:], 0)):
        log.write_text("".join(kept))
        said: list[str] = []
        (found,) = gather([tmp_path], said.append)
        assert (found.log, found.epochs_run) == (run.log[:left], 12)
        assert [text.endswith("(it and all later lines are skipped)") for text in said] == [True] * (len(kept) > left)


def test_paths_with_nothing_to_gather_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"no \*\.spectrum\.json, .* in this folder"):
        gather([tmp_path])
    with pytest.raises(ResultError, match=r"none\.spectrum\.json: cannot be read"):
        gather([tmp_path / "none.pt"])
    with pytest.raises(ResultError, match=r"gone\.spectrum\.json: cannot be read"):
        gather([tmp_path / "gone.spectrum.json"])
    with pytest.raises(ResultError, match="not a folder, a checkpoint"):
        gather([tmp_path / "x.png"])
    assert gather([]) == []


def test_temporary_files_and_other_json_do_not_matter(tmp_path: Path) -> None:
    run = make_run()
    write_run(run, tmp_path)
    (tmp_path / "study.json").write_text("{")
    shutil.copy(tmp_path / f"{run.name}.train.json", tmp_path / f".{run.name}.train.json.0.part")
    assert len(gather([tmp_path], none)) == 1


def test_made_up_studies_are_the_same_every_time() -> None:
    assert [run.log for run in make_study()] == [run.log for run in make_study()]
