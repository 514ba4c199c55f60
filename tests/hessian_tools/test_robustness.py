"""Accuracy under weight noise against its closed form, and the tables of a study."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from run_tools import make_run
from scipy import stats

from hessian_tools.objective import make_objective
from hessian_tools.robustness import (
    Accuracy,
    RobustnessResult,
    RobustnessSettings,
    lost,
    markdown,
    noisy_accuracy,
    ranks,
    rows,
)
from hessian_tools.runs import Run


def test_accuracy_under_weight_noise_of_a_linear_classifier() -> None:
    """Weights m and -m of two classes with noise of standard deviation s each: x > 0 is right with probability
    Phi(2 m / (s sqrt 2)). Every filter is one weight here, of root mean square m, so that s = scale m."""
    model = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0], [-3.0]]))
    x = torch.linspace(0.1, 1, 7)[:, None]
    objective = make_objective(model, torch.nn.functional.cross_entropy, (x, torch.zeros(7, dtype=torch.int64)))
    for scale in (0.5, 1.0, 3.0):
        found = noisy_accuracy(objective, scale, 2000, seed=1)
        expected = stats.norm.cdf(math.sqrt(2) / scale)
        assert abs(found.value - expected) < 4 * found.stderr + 1e-3
        # antithetic: one of a pair is right where the other may be wrong, and both are never wrong
        q = 1 - expected
        assert found.stderr == pytest.approx(math.sqrt((q / 2 - q * q) / 1000), rel=0.15, abs=1e-3)
    assert noisy_accuracy(objective, 1.0, 20, seed=1) == noisy_accuracy(objective, 1.0, 20, seed=1)
    assert noisy_accuracy(objective, 1e-6, 4, seed=1) == Accuracy(1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 3}, "draws come in antithetic pairs"),
        ({"draws": 2}, "draws come in antithetic pairs"),
        ({"noise": (0.1, 0.0)}, "noise must be positive"),
        ({"noise": (math.inf,)}, "noise must be positive"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustnessSettings(**change)  # type: ignore[arg-type]


def measured(seeds: int = 4) -> list[tuple[Run, RobustnessResult]]:
    """Runs whose loss of accuracy under blur grows with the first metric, and under weight noise falls with it."""
    found = []
    for init in ("ikun", "kaiming"):
        for seed in range(seeds):
            run = make_run(init, seed)
            sharp = next(iter(run.flatness[""].main.values())).value
            drop = 0.1 * math.atan(sharp)
            found.append(
                (
                    run,
                    RobustnessResult(
                        schema="ikun-hessian/robustness/1",
                        checkpoint={},
                        data={},
                        network={},
                        training={},
                        settings={},
                        accuracy=0.9,
                        disturbed={
                            "blur": {"1": Accuracy(0.9 - drop), "5": Accuracy(0.9 - 3 * drop)},
                            "weight_noise": {"0.1": Accuracy(0.7 + drop, 0.01)},
                        },
                        seconds=1.0,
                        versions={},
                    ),
                )
            )
    return found


def test_what_was_lost_and_its_ranks() -> None:
    known = measured()
    run, result = known[3]
    first = next(iter(run.flatness[""].main))
    drop = 0.9 - result.disturbed["blur"]["1"].value
    assert lost(result) == pytest.approx({"blur": 2 * drop, "weight_noise": 0.2 - drop})
    table = ranks(known, "init")
    assert (table[first]["blur"][0].value, table[first]["blur"][1].value) == (1, 1)
    assert (table[first]["weight_noise"][0].value, table[first]["weight_noise"][1].value) == (-1, -1)
    for name, row in table.items():
        x = [r.flatness[""].main[name].value for r, _ in known]
        y = [lost(found)["blur"] for _, found in known]
        assert row["blur"][0].value == pytest.approx(stats.kendalltau(x, y).statistic)
        within = [stats.kendalltau(x[i : i + 4], y[i : i + 4]).statistic for i in (0, 4)]
        assert row["blur"][1].value == pytest.approx(sum(within) / 2)


def test_the_tables() -> None:
    known = measured()
    table = rows(known, "init")
    assert len(table) == 8 * 3
    assert table[1] == {
        "run": known[0][0].name,
        "init": "ikun",
        "seed": 0,
        "disturbance": "blur",
        "severity": "5",
        "accuracy": known[0][1].disturbed["blur"]["5"].value,
        "stderr": "",
        "lost": pytest.approx(0.9 - known[0][1].disturbed["blur"]["5"].value),
    }
    assert table[2]["stderr"] == 0.01
    text = markdown(known, "init")
    drops = sorted(100 * lost(found)["blur"] for _, found in known[:4])
    assert f"| init ikun (4 runs) | {(drops[1] + drops[2]) / 2:.2f} |" in text
    first = next(iter(known[0][0].flatness[""].main))
    assert f"| {first} | 1.00 (1.00) | -1.00 (-1.00) |" in text
    bare = [(dataclasses.replace(run, flatness={}), found) for run, found in known]
    assert "Kendall" not in markdown(bare, "init")
