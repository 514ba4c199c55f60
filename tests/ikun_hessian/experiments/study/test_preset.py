"""Tests of presets: their runs, changes to them, and refusals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ikun.initializers.catalog import INITIALIZERS
from ikun_hessian.experiments.study import grid, plan, preset
from ikun_hessian.experiments.study.preset import PresetError

TINY = """
title = "T"
by = "init"
seeds = 2
[train]
channels = 2
lr = 0.01
[vary]
init = ["kaiming", "xavier"]
optimizer = ["adam", "sgd"]
[when.optimizer.sgd]
lr = 0.1
[[spectrum]]
at = ["final", "loss"]
top = 3
[[spectrum]]
tag = "published"
samples = 1
[flatness]
draws = 4
[quick]
seeds = 1
flatness = false
[quick.vary]
init = ["ikun"]
[quick.when.optimizer.sgd]
lr = 1.0
"""


def written(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def test_a_grid_expands_to_named_runs_under_its_conditions(tmp_path: Path) -> None:
    found = grid.run_grid(preset.read_preset(written(tmp_path)))
    assert list(found) == [
        f"{init}-{optimizer}-s{seed}"
        for seed in (0, 1)
        for init in ("kaiming", "xavier")
        for optimizer in ("adam", "sgd")
    ]
    assert found["xavier-sgd-s1"] == {"channels": 2, "lr": 0.1, "init": "xavier", "optimizer": "sgd", "seed": 1}
    assert found["xavier-adam-s1"]["lr"] == 0.01


def test_the_quick_form_is_merged_key_by_key(tmp_path: Path) -> None:
    full, quick = (preset.read_preset(written(tmp_path), quick=q) for q in (False, True))
    assert [str(a) for a in full.analyses] == [
        "spectrum final",
        "spectrum loss",
        "spectrum final published",
        "flatness final",
    ]
    assert [str(a) for a in quick.analyses] == ["spectrum final", "spectrum loss", "spectrum final published"]
    assert list(grid.run_grid(quick)) == ["ikun-adam-s0", "ikun-sgd-s0"]
    assert grid.run_grid(quick)["ikun-sgd-s0"]["lr"] == 1.0
    assert list(grid.run_grid(preset.read_preset(written(tmp_path), quick=True, seeds=3)))[-1] == "ikun-sgd-s2"


def test_several_grids_take_what_they_lack_from_train(tmp_path: Path) -> None:
    text = """
        title = "T"
        by = "init"
        seeds = 1
        [train]
        schedule = "cosine"
        dropout = 0.0
        weight-decay = 0.0
        [[vary]]
        init = ["ikun", "lecun"]
        schedule = ["cosine", "none"]
        [[vary]]
        init = ["ikun"]
        weight-decay = [1e-4, 0.25]
        """
    found = grid.run_grid(preset.read_preset(written(tmp_path, text)))
    assert list(found) == [
        "ikun-s0",
        "ikun-schedulenone-s0",
        "lecun-s0",
        "lecun-schedulenone-s0",
        "ikun-weight-decay0p0001-s0",
        "ikun-weight-decay0p25-s0",
    ]
    assert found["ikun-weight-decay0p25-s0"]["schedule"] == "cosine"
    assert found["lecun-s0"]["weight-decay"] == 0.0
    with pytest.raises(PresetError, match=r"'weight-decay' is not in every \[\[vary\]\]"):
        preset.read_preset(written(tmp_path, text.replace("weight-decay = 0.0", "")))


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("channels=4", "channels", 4),
        ("train.surrogate=sigmoid:4", "surrogate", "sigmoid:4"),
        ("init=lecun", "init", "lecun"),
        ("lr=0.5", "lr", 0.5),
        ("save-at-loss=[0.1, 0.2]", "save-at-loss", [0.1, 0.2]),
    ],
)
def test_changes_from_the_command_line_are_applied(tmp_path: Path, change: str, key: str, value: Any) -> None:
    """Of all runs, those of a [when] too."""
    found = grid.run_grid(preset.read_preset(written(tmp_path), changes=[change]))
    assert [options[key] for options in found.values()] == [value] * len(found)


def test_an_analysis_is_left_out(tmp_path: Path) -> None:
    for name in ("spectrum", "flatness"):
        found = preset.read_preset(written(tmp_path), changes=[f"{name}=false"])
        assert {analysis.command for analysis in found.analyses} == {"spectrum", "flatness"} - {name}


def test_lists_and_analyses_can_be_changed(tmp_path: Path) -> None:
    changes = ["init=lecun, ikun", "spectrum.top=7", "spectrum.published.samples=2", "spectrum.at=final", "seeds=3"]
    found = preset.read_preset(written(tmp_path), changes=[*changes, "accuracy=0.5"])
    assert (found.seeds, found.accuracy) == (3, 0.5)
    assert found.grids[0]["init"] == ["lecun", "ikun"]
    assert {str(a): a.options for a in found.analyses} == {
        "spectrum final": {"top": 7},
        "spectrum final published": {"samples": 2},
        "flatness final": {"draws": 4},
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "T"', "", "'title' is missing"),
        ('title = "T"', 'titel = "T"', "unknown key 'titel': did you mean 'title'?"),
        ("[flatness]", "[flatnes]", "unknown key 'flatnes': did you mean 'flatness'?"),
        ("[quick]\nseeds = 1", "[quick]\nsedes = 1", "unknown key 'quick.sedes': did you mean 'seeds'?"),
        ('by = "init"', 'by = "inits"', "by = 'inits' is not varied: did you mean 'init'?"),
        ("seeds = 2", "seeds = 0", "seeds must be at least 1"),
        ("seeds = 2", "seeds = true", "seeds must be a whole number"),
        ("seeds = 2", "accuracy = 90", "accuracy must be above 0"),
        ("[when.optimizer.sgd]", "[when.optimizer.sdg]", "optimizer is never 'sdg': did you mean 'sgd'?"),
        ("[when.optimizer.sgd]", "[when.optimiser.sgd]", "'optimiser' is not varied: did you mean 'optimizer'?"),
        ("[when.optimizer.sgd]\nlr", "[when.optimizer.sgd]\ninit", "sets 'init', which is varied itself"),
        ('["adam", "sgd"]', '"adam"', "[vary] optimizer must be a list"),
        ('["adam", "sgd"]', "[]", "[vary] optimizer must be a list"),
        ("[vary]", "[vary]\nseed = [1]", "[vary] seed: set seeds = N"),
        ("[train]", "[train]\nseed = 3", "[train] seed: set seeds = N at the top level, or --seeds N"),
        ("[when.optimizer.sgd]", "[when.optimizer.sgd]\nseed = 3", "[when.optimizer.sgd] seed: set seeds = N"),
        ('["adam", "sgd"]', '["adam", "sgd", "adam"]', "[vary] optimizer has 'adam' twice"),
        ('["adam", "sgd"]', "[1, 2.5, 1.0]", "[vary] optimizer has '1' twice"),
        ('by = "init"', 'by = "seed"', "by = 'seed' is not varied: choose one of init, optimizer"),
        ("[train]", '[train]\ninit = "ikun"', "'init' is in [train] and in [vary]"),
        ('at = ["final", "loss"]', 'at = ["final", "lost"]', "no moment 'lost': did you mean 'loss'?"),
        ('at = ["final", "loss"]', 'at = "final"', "at must be a list"),
        ('tag = "published"', 'tag = "a b"', "tag must be a word"),
        ('tag = "published"', "", "two [[spectrum]] for 'final' have tag"),
        ("[[spectrum]]\nat", "[[spectrum\nat", "not valid TOML"),
        ("[quick]", "[quick]\n[quick.spectrum]\ntop = 1", "list of tables: write [[quick.spectrum]]"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    path = written(tmp_path, TINY.replace(old, new, 1))
    with pytest.raises(PresetError) as error:
        preset.read_preset(path, quick="quick.spectrum" in new)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr", "give KEY=VALUE"),
        ("quick.seeds=1", "unknown key"),
        ("spectrum.one.top=1", "has no [spectrum] with tag 'one'"),
        ("robustness.draws=2", "has no [robustness]"),
        ("flatness=true", "give flatness=false to remove it, or flatness.KEY=VALUE"),
        ("seed=7", "set seeds = N at the top level, or --seeds N"),
        ("lrr.x=1", "unknown key"),
    ],
)
def test_changes_that_cannot_be_made_are_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(PresetError, match=message.replace("[", r"\[")):
        preset.read_preset(written(tmp_path), changes=[change])


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("train", {"lrr": 1}, "[train] has no option 'lrr': did you mean 'lr'?"),
        ("train", {"seed": 1}, "[train] has no option 'seed'"),
        ("train", {"init": "kaimng"}, "[train] init: no 'kaimng': did you mean 'kaiming'?"),
        ("train", {"surrogate": "atn:2"}, "[train] surrogate: no 'atn:2': did you mean 'atan'?"),
        ("train", {"lr": "fast"}, "[train] lr: 'fast' is not a valid float"),
        ("train", {"epochs": 1.5}, "[train] epochs: '1.5' is not a valid integer"),
        ("train", {"detach-reset": 1}, "[train] detach-reset must be true or false"),
        ("spectrum", {"tops": 3}, "[spectrum] has no option 'tops': did you mean 'top'?"),
        ("spectrum", {"split": "tset"}, "[spectrum] split: no 'tset': did you mean 'test'?"),
        ("flatness", {"calibrate": True}, "[flatness] has no option 'calibrate'"),
        ("spectrum", {"loss": "ce"}, "[spectrum] has no option 'loss'"),  # only for networks of the user's own
        ("train", {"init": "foo"}, "[train] init: no 'foo': choose one of delta_orthogonal, firing,"),
        ("train", {"hidden": {"a": 1}}, "[train] hidden must be a single value, not {'a': 1}"),
        ("train", {"epochs": [1, 2]}, "[train] epochs: '1,2' is not a valid integer"),
        ("spectrum", {"batch-size": 0}, "[spectrum] batch-size must be positive, not 0"),
        ("spectrum", {"memory": 1.0}, "[spectrum] has no option 'memory'"),
        ("robustness", {"severity": [1]}, "[robustness] has no option 'severity': did you mean 'severities'?"),
        ("robustness", {"corruptions": ["blurr"]}, "[robustness] corruptions: no 'blurr': did you mean 'blur'?"),
        ("robustness", {"noise": ["loud"]}, "[robustness] noise: 'loud' is not a valid float"),
        ("robustness", {"severities": [True]}, "[robustness] severities: 'True' is not a valid integer"),
        ("robustness", {"draws": [4, 6]}, "[robustness] draws: '4,6' is not a valid integer"),
    ],
)
def test_options_that_the_commands_lack_are_refused(table: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PresetError) as error:
        plan.parse_options("my.toml", table, options)
    assert str(error.value).startswith("my.toml: ")
    assert message in str(error.value)


def test_options_are_those_of_the_command_line() -> None:
    given = {"save-at-loss": [0.1, 0.02], "hidden": [8, 4], "detach-reset": True, "lr": 1e-5}
    found = plan.parse_options("x", "train", given, seed=3)
    assert (found["save_at_loss"], found["hidden"], found["detach_reset"]) == ((0.1, 0.02), "8,4", True)
    assert (found["lr"], found["seed"], found["epochs"]) == (1e-5, 3, 20)
    assert plan.parse_options("x", "spectrum", {"density": False})["density"] is False


def test_a_grid_too_large_is_refused_with_its_size(tmp_path: Path) -> None:
    found = preset.read_preset(written(tmp_path), seeds=251)
    with pytest.raises(PresetError, match="1004 runs"):
        grid.run_grid(found)
    assert len(grid.run_grid(found, force=True)) == 1004


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, TINY.replace('["adam", "sgd"]', '["adam", "sgd"]\nsurrogate = ["atan:2", "atan2"]'))
    with pytest.raises(PresetError, match="two runs would be called kaiming-adam-atan2-s0"):
        grid.run_grid(preset.read_preset(path))


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(PresetError, match="no preset 'nosuch': choose one of datasets, depth, "):
        preset.find("nosuch")
    with pytest.raises(PresetError, match="no preset 'papr': did you mean 'paper'"):
        preset.find("papr")
    with pytest.raises(PresetError, match="cannot be read"):
        preset.read_preset(preset.find("nowhere.toml"))


@pytest.mark.parametrize("name", preset.names())
@pytest.mark.parametrize("quick", [False, True])
def test_the_shipped_presets_are_valid(name: str, quick: bool) -> None:
    """Every option is one of the commands', and a quick form is small and has seeds enough."""
    found = preset.read_preset(preset.find(name), quick=quick)
    options = grid.run_grid(found)
    for run in {str({k: v for k, v in o.items() if k != "seed"}): o for o in options.values()}.values():
        plan.parse_options(name, "train", {k: v for k, v in run.items() if k != "seed"})
    for analysis in found.analyses:
        plan._step(name, analysis, 1.0)
    assert found.question
    if found.generalization:  # many small networks of few seeds: see test_plan of the study of generalization
        assert len(options) * len(found.generalization["environments"]) <= (80 if quick else 1000)
        return
    assert found.seeds >= 5
    assert len(options) <= (135 if quick else 400)
    assert all(len(run) <= 60 for run in options)


def test_no_initializer_is_forgotten() -> None:
    grids = preset.read_preset(preset.find("initializers")).grids
    assert set(grids[0]["init"]) == set(INITIALIZERS) - {
        "gradient_stable",
        "relay",
        "tdbn",
    }  # tdbn: kaiming where the threshold is 1
    assert any("gradient_stable" in grid["init"] for grid in preset.read_preset(preset.find("depth")).grids)
    assert all("relay" in grid["init"] for grid in preset.read_preset(preset.find("initialization")).grids)


LARGE = {
    "dotted keys": ("a" + ".a" * 5000 + " = 1\n", "nested more than 30 levels deep"),
    "tables": ("[a" + ".a" * 5000 + "]\nb = 1\n", "nested more than 30 levels deep"),
    "lists": ("[vary]\ninit = " + "[" * 200 + "1" + "]" * 200 + "\n", "nested more than 30 levels deep"),
    "deep lists": ("[vary]\ninit = " + "[" * 20_000 + "\n", "not valid TOML"),
    "values": ("[vary]\ninit = [" + ", ".join(f"'v{i}'" for i in range(200_000)) + "]\n", "more than 20,000 keys"),
    "keys": ("".join(f"k{i} = 1\n" for i in range(50_000)), "more than 20,000 keys"),
}


@pytest.mark.parametrize("name", LARGE)
def test_files_that_are_too_large_are_refused_at_once(name: str, tmp_path: Path) -> None:
    text, message = LARGE[name]
    began = time.process_time()
    with pytest.raises(PresetError, match=message) as caught:
        preset.read_preset(written(tmp_path, text))
    assert time.process_time() - began < 10
    assert len(str(caught.value)) < 1100


def test_a_number_of_seeds_that_does_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    found = preset.read_preset(written(tmp_path), seeds=10**9)
    for force in (False, True):
        with pytest.raises(PresetError, match="4,000,000,000 runs, but a study has at most 100,000"):
            grid.run_grid(found, force)


def test_values_of_set_that_are_nested_too_deeply_are_texts(tmp_path: Path) -> None:
    with pytest.raises(PresetError):
        preset.read_preset(written(tmp_path), changes=["seeds=" + "[" * 5000 + "]" * 5000])
