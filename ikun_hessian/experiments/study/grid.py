"""The runs of a study: all combinations of what a preset varies."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

from ikun_hessian.experiments.study.preset import Preset, PresetError, text

MOST_RUNS = 1000
MOST_FORCED = 100_000  # more would not fit into memory


def run_grid(preset: Preset, force: bool = False) -> dict[str, dict[str, Any]]:
    """List the runs of a study.

    The seed varies slowest, so that a study that is stopped halfway has all of its conditions.

    Args:
        preset: The study.
        force: Whether more than MOST_RUNS runs are allowed, up to MOST_FORCED.

    Returns:
        The options of `train` of every run, including the seed, by the name of the run, for example "ikun-sgd-s0". The
        name has the varied values that differ from [train].

    Raises:
        PresetError: If there are too many runs, or if two runs have the same name.
    """
    count = sum(math.prod(map(len, grid.values())) for grid in preset.grids) * preset.seeds
    if count > MOST_FORCED:
        raise PresetError(f"{preset.source}: {count:,} runs, but a study has at most {MOST_FORCED:,}: reduce seeds")
    if count > MOST_RUNS and not force:
        raise PresetError(f"{preset.source}: {count} runs: shorten the lists of [vary], reduce seeds, or use --force")
    varied = list(dict.fromkeys([preset.by, *(key for grid in preset.grids for key in grid)]))
    usual = {key: preset.train[key] for key in varied if key in preset.train}
    choices = [
        {**usual, **dict(zip(grid, values, strict=True))}
        for grid in preset.grids
        for values in itertools.product(*grid.values())
    ]
    named = [key for key in varied if key == preset.by or len({text(c[key]) for c in choices}) > 1]
    found: dict[str, dict[str, Any]] = {}
    for seed, choice in itertools.product(range(preset.seeds), choices):
        options = dict(preset.train)
        for key, value, extra in preset.when:
            if text(choice[key]) == value:
                options |= extra
        options |= {**choice, "seed": seed}
        words = [_word(key, choice[key]) for key in named if key == preset.by or choice[key] != usual.get(key)]
        name = "-".join([*words, f"s{seed}"])
        if found.setdefault(name, options) != options:
            raise PresetError(f"{preset.source}: two runs would be called {name}: remove one of the values")
    return found


def _word(key: str, value: Any) -> str:
    """Return a part of a run's name: the value, after its key if the value is a number or means nothing without it."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "", re.sub(r"[,]", "x", text(value).replace(".", "p")))
    return plain if isinstance(value, str) and plain and value != "none" and not plain[0].isdigit() else f"{key}{plain}"
