"""Pair runs that differ in the compared condition but share their seed and all other settings."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hessian_tools.io.json import ResultError
from hessian_tools.results.comparability import Unlike, refuse_unlike
from ikun_hessian.experiments.grouping import (
    NO_CONDITION,
    common_conditions,
    level,
    levels,
    plain,
    settings_groups,
    show,
)

if TYPE_CHECKING:
    from ikun_hessian.experiments.runs import TrainingRun


@dataclass(frozen=True)
class Paired:
    """Runs grouped by level of the compared condition, and paired with the reference level by seed.

    Attributes:
        by: The compared condition.
        reference: The reference level.
        levels: The runs of each level, the reference first.
        pairs: For each other level, pairs (run, run of the reference with the same seed).
        seeds: Seeds of all runs.
        follows: Settings whose value is determined by the level (such as the learning rate of an optimizer), as
            {setting: {level: value}}.
        unpaired: For each level, names of the runs without a partner. Levels without such runs are absent.
    """

    by: str
    reference: str
    levels: dict[str, list[TrainingRun]]
    pairs: dict[str, list[tuple[TrainingRun, TrainingRun]]]
    seeds: tuple[str, ...]
    follows: dict[str, dict[str, str]]
    unpaired: dict[str, tuple[str, ...]]

    @property
    def runs(self) -> list[TrainingRun]:
        """All runs, the reference level first."""
        return [run for some in self.levels.values() for run in some]


def pair_runs(runs: Sequence[TrainingRun], by: str, reference: str | None) -> Paired:
    """Pair the runs of one setting by seed.

    Args:
        runs: Runs of one setting (see `ikun_hessian.experiments.grouping.settings_groups`).
        by: The compared condition.
        reference: The reference level. By default "kaiming" if it is one of the levels, otherwise the first level.

    Returns:
        The paired runs.

    Raises:
        ResultError: If the condition or the reference is unknown, there are fewer than two levels, the runs have
            several settings (their pairs would not be independent), two runs are identical, or the runs of a pair were
            trained on different data.
    """
    if by == "seed":
        raise ResultError("--by seed: runs are paired by their seed: choose another condition")
    require_condition(runs, by, f"--by {by}")
    names = levels(runs, by)
    if len(names) < 2:
        others = [key for key in common_conditions(runs) if key != by and len({level(run, key) for run in runs}) > 1]
        choose = f": choose --by {' or '.join(others)}" if others else ""
        raise ResultError(f"a comparison needs at least two levels of {by}: all runs have {by} {names[0]}{choose}")
    reference = reference or ("kaiming" if "kaiming" in names else names[0])
    if reference not in names:
        raise ResultError(f"--reference {reference}: no run has this {by}: choose one of {', '.join(names)}")
    if len(apart := list(settings_groups(runs, by))) > 1:
        raise ResultError(f"the runs have several settings ({apart[0]}; {apart[1]}): compare one at a time (--where)")
    order = [reference, *(name for name in names if name != reference)]
    grouped = {name: [run for run in runs if level(run, by) == name] for name in order}
    keyed: dict[str, dict[str, TrainingRun]] = {name: {} for name in order}
    for name, some in grouped.items():
        for run in some:
            seed = plain(run.value("seed"))
            if seed in keyed[name]:
                raise ResultError(_twins(keyed[name][seed], run))
            keyed[name][seed] = run
    base = keyed[reference]
    pairs = {
        name: [(run, base[seed]) for seed, run in some.items() if seed in base]
        for name, some in keyed.items()
        if name != reference
    }
    follows = _follows(grouped, by)
    for pair in (pair for some in pairs.values() for pair in some):
        _refuse_other_data(pair, (by, *follows))
    unpaired = {name: tuple(run.name for seed, run in keyed[name].items() if seed not in base) for name in pairs}
    met = {seed for name in pairs for seed in keyed[name]}
    unpaired[reference] = tuple(run.name for seed, run in base.items() if seed not in met)
    return Paired(
        by=by,
        reference=reference,
        levels=grouped,
        pairs=pairs,
        seeds=tuple(dict.fromkeys(level(run, "seed") for run in runs)),
        follows=follows,
        unpaired={name: found for name, found in unpaired.items() if found},
    )


def _refuse_other_data(pair: tuple[TrainingRun, TrainingRun], compared: Sequence[str]) -> None:
    """Raise ResultError if two runs were trained on different samples, unless a compared condition selects the data."""
    one, other = pair
    if any(key in one.data and plain(one.data[key]) != plain(other.data.get(key)) for key in compared):
        return
    hashes = one.data.get("sha256"), other.data.get("sha256")
    if None not in hashes:
        names = [one.name, other.name]
        refuse_unlike(names, Unlike("sha256", "training data", hashes), "train both runs of a pair on the same data")


def _twins(one: TrainingRun, other: TrainingRun) -> str:
    """Explain why two runs with the same setting, level and seed cannot both be compared, and what to do."""
    keys = dict.fromkeys(key for run in (one, other) for part in (run.training, run.network, run.data) for key in part)
    for key in (key for key in keys if key not in NO_CONDITION and plain(one.value(key)) != plain(other.value(key))):
        known = level(one if other.value(key) is None else other, key)
        return (
            f"{one.name} and {other.name} differ in {key}, which is not recorded for all runs: choose "
            f"with --where {key}={known}"
        )
    return f"{one.name} and {other.name} have the same recorded settings: give only one of them"


def _follows(grouped: dict[str, list[TrainingRun]], by: str) -> dict[str, dict[str, str]]:
    """Return the other settings that differ between the levels, with their value at each level."""
    runs = [run for some in grouped.values() for run in some]
    varied = [key for key in common_conditions(runs) if key != by and len({plain(run.value(key)) for run in runs}) > 1]
    return {key: {name: show(some[0].value(key)) for name, some in grouped.items()} for key in varied}


def chosen_runs(runs: Sequence[TrainingRun], where: Sequence[str]) -> list[TrainingRun]:
    """Select the runs that meet every condition.

    Args:
        runs: The runs.
        where: Conditions of the form KEY=VALUE.

    Returns:
        The selected runs.

    Raises:
        ResultError: If a condition is malformed, names an unknown setting, or no run meets it.
    """
    kept = list(runs)
    for condition in where:
        key, sign, value = condition.partition("=")
        if not sign:
            raise ResultError(f"--where '{condition}': give a condition and its value, for instance norm=bn")
        require_condition(runs, key, f"--where {condition}")
        values = dict.fromkeys(level(run, key) for run in kept)
        kept = [run for run in kept if level(run, key) == value]
        if not kept:
            raise ResultError(f"--where {condition}: no run matches: {key} is {' or '.join(values)}")
    return kept


def require_condition(runs: Sequence[TrainingRun], key: str, option: str) -> None:
    """Raise ResultError, with the closest or all known names, if no run has the condition `key`."""
    keys = sorted({k for run in runs for part in (run.training, run.network, run.data) for k in part})
    if all(run.value(key) is None for run in runs):
        near = difflib.get_close_matches(key, keys, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(keys)}"
        raise ResultError(f"{option}: no run has a condition '{key}': {hint}")


def several_seeds(runs: Sequence[TrainingRun], by: str) -> bool:
    """Return whether there are at least two levels, one of them trained with several seeds."""
    seeds: dict[str, set[str]] = {}
    for run in runs:
        seeds.setdefault(level(run, by), set()).add(plain(run.value("seed")))
    return len(seeds) > 1 and any(len(some) > 1 for some in seeds.values())
