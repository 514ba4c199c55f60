"""Tests of the plan of the study of generalization: grid, environments, order, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generalization_tools import TINY, planned

from ikun_hessian.experiments.generalization.plan import axes_of, in_environments
from ikun_hessian.experiments.generalization.settings import GeneralizationSettings
from ikun_hessian.experiments.study import preset
from ikun_hessian.experiments.study.grid import run_grid
from ikun_hessian.experiments.study.preset import PresetError


def test_every_environment_has_the_whole_grid_and_every_optimizer_its_own_rates(tmp_path: Path) -> None:
    units = planned(tmp_path).units
    assert len({unit.name for unit in units}) == len(units) == 2 * 8 * 2
    places = {(u.environment, *sorted(u.axes.items()), u.training.seed) for u in units}
    assert len(places) == len(units)
    for unit in units:
        assert list(unit.axes) == ["optimizer", "lr", "init"]
        assert unit.axes["optimizer"] == unit.training.optimizer
        assert unit.network.timesteps == (2 if unit.environment == "short" else 4)
        assert (unit.axes["lr"] == "1") == (unit.training.lr in (0.002, 0.2))
    assert len({(u.data.subset, u.data.seed) for u in units}) == 1  # the same images for all


def test_the_order_is_random_and_fixed_by_its_seed(tmp_path: Path) -> None:
    names = [unit.name for unit in planned(tmp_path).units]
    assert names == [unit.name for unit in planned(tmp_path).units]
    assert names != sorted(names)
    other = [u.name for u in planned(tmp_path, TINY.replace("threshold", "order = 1\nthreshold")).units]
    assert other != names
    assert sorted(other) == sorted(names)


def test_a_prefix_of_the_order_is_a_fair_sample_of_the_preset() -> None:
    found = preset.read_preset(preset.find("generalization"))
    settings = GeneralizationSettings.from_table(found.generalization)
    runs = run_grid(found)
    order = list(in_environments(runs, settings.environments, settings.order).values())
    assert len(order) == 960
    axes = axes_of(runs, preset.text)
    assert {key: len({a[key] for a in axes.values()}) for key in next(iter(axes.values()))} == dict.fromkeys(
        ("optimizer", "lr", "batch-size", "hidden", "weight-decay", "init"), 2
    )
    half = order[: len(order) // 2]
    for environment in settings.environments:
        assert 0.4 < sum(e == environment for e, _ in half) / 192 < 0.6
    assert 0.4 < sum(options["optimizer"] == "adam" for _, options in half) / 480 < 0.6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("threshold = 0.09", "treshold = 0.09", "unknown key 'treshold'"),
        ("threshold = 0.09", "threshold = 0", "threshold must be a positive number"),
        ("threshold = 0.09", "threshold = 'low'", "threshold has the invalid value 'low'"),
        ("samples = 40", "samples = 61", "there are 60 training samples"),
        ("samples = 40", "samples = 4.5", "samples has the invalid value 4.5"),
        ("draws = 4", "draws = 5", "draws must be even"),
        ("probes = 10", "probes = 3", "probes must be from 10"),
        ("observations = 2", "observations = 1", "observations must be 0, or at least 2"),
        ("short = {timesteps = 2}", "short = 3", "'short' must be a table"),
        ("short = {timesteps = 2}", "short = {seed = 1}", "sets 'seed'"),
        ("short = {timesteps = 2}", "short = {init = 'xavier'}", "sets 'init', which is varied itself"),
        ("short = {timesteps = 2}", "short = {timestep = 2}", "has no option 'timestep'"),
        ("short = {timesteps = 2}", "short = {subset = 50}", "data and subset cannot vary"),
        ("short = {timesteps = 2}", "'a b' = {}", "must be a word"),
        ("base = {}\nshort = {timesteps = 2}", "", "at least one environment"),
        ("epochs = 2", "epochs = 0", "epochs must be at least 1"),
        ("[generalization]", "[flatness]\n[generalization]", "[flatness] cannot be combined with [generalization]"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(PresetError) as error:
        planned(tmp_path, TINY.replace(old, new, 1))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_settings_refuse_the_folder_of_a_study(tmp_path: Path) -> None:
    from ikun_hessian.experiments.study.record import settle

    settle(planned(tmp_path).record, tmp_path / "out", force=False)
    assert not planned(tmp_path).refusal
    assert "had another samples" in planned(tmp_path, TINY.replace("samples = 40", "samples = 50")).refusal
    more: Any = planned(tmp_path, TINY.replace("seeds = 2", "seeds = 3"))
    assert not more.refusal
