"""Tests of levels, settings, moments, quartiles with infinite values, and survival."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_tools import make_run, make_study

from ikun_hessian.experiments.grouping import (
    at_moment,
    cut,
    display_name,
    epoch_at,
    epochs_to,
    horizon,
    levels,
    moment_of,
    moments,
    over,
    quartiles,
    settings_groups,
    survival,
)
from ikun_hessian.experiments.runs import TrainingRun

finite = st.floats(-1e6, 1e6)


def lines(*accuracies: float | None) -> tuple[dict[str, Any], ...]:
    return tuple({"epoch": i, "test_accuracy": a, "loss": 1 / i} for i, a in enumerate(accuracies, 1))


def test_levels_are_numbers_by_size_or_names_by_alphabet() -> None:
    runs = [make_run("ikun", training={"alpha": alpha}) for alpha in (10.0, 0.5, 2.0)]
    assert levels(runs, "alpha") == ["0.5", "2", "10"]
    assert levels(make_study(seeds=(0,)), "init") == ["ikun", "kaiming", "xavier"]
    with pytest.raises(ValueError, match=r"--by inti: no run has this condition: choose one of .*init"):
        levels(runs, "inti")
    with pytest.raises(ValueError, match="--by seed: 17 levels are too many to distinguish: use at most 16"):
        levels([make_run(seed=seed) for seed in range(17)], "seed")


def test_settings_are_named_by_what_tells_them_apart() -> None:
    def made(**training: Any) -> list[TrainingRun]:
        return [make_run(init, seed, training=training) for init in ("ikun", "kaiming") for seed in (0, 1)]

    assert list(settings_groups(made(), "init")) == [""]
    depths = [run for depth in (10, 20, 5) for run in made(depth=depth)]
    assert list(settings_groups(depths, "init")) == ["depth 5", "depth 10", "depth 20"]
    found = settings_groups([*made(optimizer="sgd", lr=0.1), *made(optimizer="adam", lr=0.001)], "init")
    assert {name: len(of) for name, of in found.items()} == {"sgd": 4, "adam": 4}
    found = settings_groups([*made(weight_decay=0.0), *made(weight_decay=0.5, schedule="none")], "init")
    assert list(found) == ["cosine", "schedule none"]  # the decay follows from it
    assert list(settings_groups(made(alpha=0.5) + made(alpha=1.0), "init", ("alpha",))) == [""]
    by_optimizer = settings_groups([*made(optimizer="sgd", lr=0.1), *made(optimizer="adam", lr=0.001)], "optimizer")
    assert list(by_optimizer) == ["ikun", "kaiming"]  # the rate follows from the level


def test_a_setting_of_a_list_is_the_same_as_a_tuple() -> None:
    runs = [make_run(network={"hidden": hidden}) for hidden in ([8, 8], (8, 8))]
    assert list(settings_groups(runs, "init")) == [""]
    assert display_name("hidden", (8, 4)) == "hidden 8-4"
    pairs = [("norm", "none"), ("norm", "bn"), ("lr", 1e-3), ("detach_reset", True)]
    assert [display_name(*pair) for pair in pairs] == [
        "norm none", "bn", "lr 0.001", "detach reset true",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("", ("", "")),
        ("loss0.02", ("loss0.02", "")),
        ("loss0.02.ggn", ("loss0.02", "ggn")),
        ("loss1e-05.one-image", ("loss1e-05", "one-image")),
        ("loss2.1st", ("loss2", "1st")),
        ("loss5", ("loss5", "")),
        ("epoch0005", ("epoch0005", "")),
        ("epoch0005.x.y", ("epoch0005", "x.y")),
        ("published", ("", "published")),
        ("lossy", ("", "lossy")),
        ("a\nb", ("", "a\nb")),
    ],
)
def test_a_key_is_split_into_moment_and_tag(key: str, expected: tuple[str, str]) -> None:
    assert moment_of(key) == expected


def test_moments_come_in_the_order_of_training() -> None:
    run = make_run(moments=("", "loss0.005", "loss0.05", "epoch0003"), tags=("one-image",))
    assert moments([run]) == ["loss0.05", "loss0.005", ""]
    assert [epoch_at(run, "epoch0003"), epoch_at(run, "")] == [3, 12]
    first = next(line["epoch"] for line in run.log if line["loss"] <= 0.05)
    assert epoch_at(run, "loss0.05") == first > 1
    assert epoch_at(dataclasses.replace(run, best_epoch=7), "") == 7
    assert epoch_at(run, "loss1e-09") is None
    assert epoch_at(dataclasses.replace(run, log=(), best_epoch=None), "") is None


def test_an_operator_of_its_own_file_stands_beside_the_others() -> None:
    run = make_run(moments=("",))
    whole = run.spectra[""]
    parts = {name: dataclasses.replace(whole, spectra={name: s}) for name, s in whole.spectra.items()}
    for spectra in ({"": parts["hessian"], "ggn": parts["ggn"]}, {"hessian": parts["hessian"], "ggn": parts["ggn"]}):
        found = at_moment(dataclasses.replace(run, spectra=spectra), "")
        assert found is not None
        assert found.spectra == whole.spectra
    other = dataclasses.replace(run, spectra={"": parts["hessian"], "fc": parts["ggn"], "loss0.1.ggn": parts["ggn"]})
    found = at_moment(other, "")
    assert found is not None
    assert list(found.spectra) == ["hessian"]
    assert at_moment(run, "loss0.3") is None


@given(st.lists(finite, min_size=1, max_size=30))
def test_quartiles_are_those_of_numpy(values: list[float]) -> None:
    assert quartiles([*values, math.nan]) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])), abs=1e-9)


@given(st.lists(finite, max_size=12), st.integers(1, 6), st.sampled_from([-1, 1]))
def test_quartiles_with_infinite_values_are_the_limit_of_large_ones(values: list[float], count: int, sign: int) -> None:
    found = quartiles([*values, *[sign * math.inf] * count])
    limit = np.quantile([*values, *[sign * 1e200] * count], [0.25, 0.5, 0.75])
    for ours, theirs in zip(found, limit.tolist(), strict=True):
        if math.isinf(ours):
            assert sign * theirs > 1e190 < sign * ours
        else:
            assert theirs == pytest.approx(ours, abs=1e-6)


def test_quartiles_without_values_are_nan() -> None:
    assert all(math.isnan(q) for q in (*quartiles([]), *quartiles([math.nan])))


def test_survival_is_the_product_of_those_left() -> None:
    """Klein & Moeschberger's first example, remission of 21 patients under 6-MP (Freireich et al. 1963)."""
    events = {6: 3, 7: 1, 10: 1, 13: 1, 16: 1, 22: 1, 23: 1}
    censored = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    times = [t for t, n in events.items() for _ in range(n)] + censored
    reached = [True] * (len(times) - len(censored)) + [False] * len(censored)
    steps, share = survival(times, reached)
    published = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    for t, s in published.items():
        assert share[steps.index(t)] == pytest.approx(s, abs=5e-4)
    assert (steps[0], share[0]) == (0.0, 1.0)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=15))
def test_survival_is_that_computed_by_hand(runs: list[tuple[int, bool]]) -> None:
    steps, share = survival([t for t, _ in runs], [r for _, r in runs])
    for t in range(11):
        expected = math.prod(
            1 - sum(u == e and r for u, r in runs) / sum(u >= e for u, _ in runs)
            for e in {u for u, r in runs if r and u <= t}
        )
        assert share[int(np.searchsorted(steps, t, side="right")) - 1] == pytest.approx(expected)


def test_epochs_to_an_accuracy_are_counted_or_censored() -> None:
    run = make_run(training={"epochs": 10})
    there = dataclasses.replace(run, log=lines(0.5, None, 0.9, 0.95))
    assert epochs_to(there, 0.9) == (3, True)
    assert epochs_to(there, 0.96) == (10, False)  # stopped early: it never will
    assert epochs_to(dataclasses.replace(there, finished=False), 0.96) == (4, False)  # under way
    broken = dataclasses.replace(there, finished=False, failures=("NaN: the loss is not finite",))
    assert epochs_to(broken, 0.96) == (10, False)
    failed = dataclasses.replace(there, finished=False, log=(), failures=("failed: train: out of memory",))
    assert epochs_to(failed, 0.5) == (10, False)
    unmeasured = dataclasses.replace(there, finished=False, failures=("failed: spectrum: out of memory",))
    assert horizon(unmeasured) == 4
    assert horizon(dataclasses.replace(run, training={}, log=lines(0.1, 0.2))) == 2


def test_a_log_that_was_cut_is_censored_at_its_end() -> None:
    """Whatever else says that the training ended: the accuracy may have come in a line that is missing."""
    run = dataclasses.replace(make_run(training={"epochs": 10}), log=lines(0.5, 0.6, 0.7), epochs_run=10)
    for part in (run, dataclasses.replace(run, finished=False, failures=("NaN: the loss is not finite",))):
        assert cut(part)
        assert not over(part)
        assert epochs_to(part, 0.9) == (3, False)
        assert epochs_to(part, 0.6) == (2, True)
    assert epoch_at(dataclasses.replace(run, best_epoch=None), "") is None
    stopped = dataclasses.replace(run, epochs_run=3)
    assert not cut(stopped)
    assert over(stopped)
    assert epochs_to(stopped, 0.9) == (10, False)
    gone = dataclasses.replace(run, log=())
    assert (cut(gone), horizon(gone)) == (True, 0)
