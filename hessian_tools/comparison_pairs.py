"""Which runs pair: two levels of the condition compared, alike in everything else that was varied."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from hessian_tools.results import ResultError
from hessian_tools.runs import Run
from hessian_tools.study_groups import NO_CONDITION, level, levels, plain, show


@dataclass(frozen=True)
class Paired:
    """The runs of every level of `by`, the reference first, and each other level's pairs (run, the reference's run).

    agreeing: conditions that vary and that pairs agree in, with their values. follows: conditions whose value goes with
    the level, by level (the learning rate of an optimizer). unpaired: by level, the runs without a partner.
    """

    by: str
    reference: str
    levels: dict[str, list[Run]]
    pairs: dict[str, list[tuple[Run, Run]]]
    agreeing: dict[str, tuple[str, ...]]
    follows: dict[str, dict[str, str]]
    unpaired: dict[str, tuple[str, ...]]

    @property
    def runs(self) -> list[Run]:
        return [run for some in self.levels.values() for run in some]


def pair_runs(runs: Sequence[Run], by: str, reference: str | None) -> Paired:
    """Raises ResultError for an unknown condition or reference, fewer than two levels, and runs that are alike."""
    _known(runs, by, f"--by {by}")
    names = levels(runs, by)
    if len(names) < 2:
        raise ResultError(f"a comparison needs at least two levels of {by}: all runs have {names[0]}")
    reference = reference or ("kaiming" if "kaiming" in names else names[0])
    if reference not in names:
        raise ResultError(f"--reference {reference}: no run has it: {by} is {', '.join(names)}")
    order = [reference, *(name for name in names if name != reference)]
    grouped = {name: [run for run in runs if level(run, by) == name] for name in order}
    varied, follows = _varied(grouped, by)
    keyed: dict[str, dict[tuple[str, ...], Run]] = {}
    for name, some in grouped.items():
        keyed[name] = {}
        for run in some:
            key = tuple(plain(run.value(condition)) for condition in varied)
            if twin := keyed[name].get(key):
                raise ResultError(
                    f"{twin.name} and {run.name} differ in nothing that is known of them: give one of them"
                )
            keyed[name][key] = run
    base = keyed[reference]
    pairs = {
        name: [(run, base[key]) for key, run in some.items() if key in base]
        for name, some in keyed.items()
        if name != reference
    }
    unpaired = {name: tuple(run.name for key, run in keyed[name].items() if key not in base) for name in pairs}
    partners = [set(keyed[name]) for name in pairs]
    unpaired[reference] = tuple(run.name for key, run in base.items() if not any(key in some for some in partners))
    return Paired(
        by=by,
        reference=reference,
        levels=grouped,
        pairs=pairs,
        agreeing={key: tuple(dict.fromkeys(level(run, key) for run in runs)) for key in varied},
        follows=follows,
        unpaired={name: found for name, found in unpaired.items() if found},
    )


def _varied(grouped: dict[str, list[Run]], by: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """(conditions that pairs must agree in, those that follow from the level with their value in each)."""
    runs = [run for some in grouped.values() for run in some]
    keys = dict.fromkeys(key for run in runs for part in (run.training, run.network, run.data) for key in part)
    varied, follows = ["seed"] if len({plain(run.value("seed")) for run in runs}) > 1 else [], {}
    for key in keys:
        if key == by or key in NO_CONDITION or len({plain(run.value(key)) for run in runs}) == 1:
            continue
        values = {name: {plain(run.value(key)) for run in some} for name, some in grouped.items()}
        if all(len(some) == 1 for some in values.values()):
            follows[key] = {name: show(some[0].value(key)) for name, some in grouped.items()}
        else:
            varied.append(key)
    return varied, follows


def chosen_runs(runs: Sequence[Run], where: Sequence[str]) -> list[Run]:
    """The runs that meet every condition KEY=VALUE. Raises ResultError for one that none meets."""
    kept = list(runs)
    for condition in where:
        key, sign, value = condition.partition("=")
        if not sign:
            raise ResultError(f"--where '{condition}': give a condition and its value, for instance norm=bn")
        _known(runs, key, f"--where {condition}")
        values = dict.fromkeys(level(run, key) for run in kept)
        kept = [run for run in kept if level(run, key) == value]
        if not kept:
            raise ResultError(f"--where {condition}: no such run: {key} is {' or '.join(values)}")
    return kept


def _known(runs: Sequence[Run], key: str, option: str) -> None:
    keys = sorted({k for run in runs for part in (run.training, run.network, run.data) for k in part})
    if all(run.value(key) is None for run in runs):
        near = difflib.get_close_matches(key, keys, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(keys)}"
        raise ResultError(f"{option}: no run has a condition '{key}': {hint}")


def several_seeds(runs: Sequence[Run], by: str) -> bool:
    """Whether there are two levels or more, and one that was trained from several seeds."""
    seeds: dict[str, set[str]] = {}
    for run in runs:
        seeds.setdefault(level(run, by), set()).add(plain(run.value("seed")))
    return len(seeds) > 1 and any(len(some) > 1 for some in seeds.values())
