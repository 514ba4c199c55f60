"""Tests of the tables on robustness in a study."""

from __future__ import annotations

import dataclasses

import pytest
from run_tools import make_study
from scipy import stats

from hessian_tools.results.robustness import Accuracy, lost
from ikun_hessian.reports.robustness import ranks, robustness_markdown, robustness_rows


def test_lost_accuracy_is_ranked_against_flatness() -> None:
    runs = make_study(("ikun", "kaiming"), range(4), ())
    kept = runs[3].robustness
    assert kept is not None
    drop = 0.9 - kept.disturbed["blur"]["1"].value
    assert lost(kept) == pytest.approx({"blur": 2 * drop, "weight_noise": 0.2 - drop})
    table = ranks(runs, "init")
    assert set(table) == set(runs[0].flatness[""].main)
    for name, row in table.items():
        x = [run.flatness[""].main[name].value for run in runs]
        for kind in ("blur", "weight_noise"):
            y = [lost(run.robustness)[kind] for run in runs if run.robustness]
            assert row[kind][0].value == pytest.approx(stats.kendalltau(x, y).statistic)
            within = [stats.kendalltau(x[i : i + 4], y[i : i + 4]).statistic for i in (0, 4)]
            assert row[kind][1].value == pytest.approx(sum(within) / 2)


def test_equal_losses_are_ties() -> None:
    kept = make_study(("ikun",), (0,), ())[0].robustness
    assert kept is not None
    assert 0.9 - 0.6 != 0.7 - 0.4
    one, other = (
        dataclasses.replace(kept, accuracy=whole, disturbed={"blur": {"1": Accuracy(left)}})
        for whole, left in ((0.9, 0.6), (0.7, 0.4))
    )
    assert lost(one) == lost(other)


def test_the_tables_hold_every_run_and_the_medians() -> None:
    runs = make_study(("ikun", "kaiming"), range(4), (("kaiming", 2),))
    first = runs[0].robustness
    assert first is not None
    table = robustness_rows(runs, "init")
    assert len(table) == 7 * 3  # nothing of the run that diverged
    assert table[1] == {
        "run": runs[0].name,
        "init": "ikun",
        "seed": 0,
        "disturbance": "blur",
        "severity": "5",
        "accuracy": first.disturbed["blur"]["5"].value,
        "stderr": "",
        "lost": pytest.approx(0.9 - first.disturbed["blur"]["5"].value),
    }
    assert table[2]["stderr"] == 0.01
    text = robustness_markdown(runs, "init")
    drops = sorted(100 * lost(run.robustness)["blur"] for run in runs[:4] if run.robustness)
    assert f"| init ikun (4 runs) | {(drops[1] + drops[2]) / 2:.2f} |" in text
    assert "| init kaiming (3 runs) |" in text
    assert "Kendall" in text
    assert "Kendall" not in robustness_markdown([dataclasses.replace(run, flatness={}) for run in runs], "init")
    assert robustness_markdown([dataclasses.replace(run, robustness=None) for run in runs], "init") == ""


def test_settings_have_tables_of_their_own() -> None:
    """Two runs of one seed are not independent: they may not share a rank correlation."""
    decays = [make_study(("ikun", "kaiming"), range(4), (), training={"weight_decay": w}) for w in (0.0, 0.1)]
    text = robustness_markdown([run for runs in decays for run in runs], "init")
    assert text.count("### weight decay 0") == 2
    for runs in decays:
        assert robustness_markdown(runs, "init") in text
