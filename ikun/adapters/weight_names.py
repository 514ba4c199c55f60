"""Match the names of weights in a file with those of a network: training frameworks put prefixes in front of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

WRAPPERS = ("module", "_orig_mod")  # components that data parallelism and torch.compile put into names
# Last components of names that are not weights: the counters of the profiler thop, and what neurons carry from one
# time step to the next.
COUNTERS = frozenset({"total_ops", "total_params"})
STATE = frozenset({"mem", "membrane", "membrane_potential", "v", "u", "spk", "spike", "spikes", "syn", "i_syn"})
SHORT = frozenset({"v", "u"})  # names of STATE that could also be names of weights
# Names of entries beside the network: the module of a loss, metrics, a moving average of the weights.
BESIDE = re.compile(
    r"((\w+_)?(loss\w*|criteri(on|a)\d*|metrics?|acc(uracy)?|ema(_\w+)?))\..+|n_averaged|initted|step", re.I
)
AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged)([._]|$)", re.I)


class AmbiguousError(ValueError):
    """More than one set of weights in the file fits the network. The arguments are the prefixes of their names."""


@dataclass(frozen=True)
class Match:
    """Names of the network and of the file that belong together.

    Attributes:
        names: Names of the file by names of the network.
        prefix: What stands in front of the names in the file.
        rest: The other names of the file.
        averaged: The prefix of a second set that fits, an average of the weights; "" if there is none.
    """

    names: dict[str, str]
    prefix: str
    rest: list[str]
    averaged: str = ""


def match_names(own: Collection[str], names: Collection[str], needed: Collection[str]) -> Match:
    """Find the prefix with which the most names of the network occur in a file.

    `module` and `_orig_mod` are ignored anywhere in a name. A component that all names of the network have in front
    may be missing in the file.

    Args:
        own: Names of the network.
        names: Names in the file.
        needed: Names of the network that the file must have.

    Returns:
        The match. It can lack names of the network.

    Raises:
        AmbiguousError: If several sets of names fit completely, other than an average of the weights.
    """
    if set(needed) <= set(names):
        return Match({name: name for name in own if name in names}, "", [n for n in names if n not in own])
    ours, theirs = _shortened(own), _shortened(names)
    found: dict[tuple[tuple[str, str], ...], str] = {}
    first = {name.partition(".")[0] for name in ours}
    for outer in ["", f"{first.pop()}."] if len(first) == 1 else [""]:
        inner = {name.removeprefix(outer): name for name in ours}
        for prefix in _prefixes(inner, theirs):
            pairs = ((full, prefix + name) for name, full in inner.items())
            found.setdefault(tuple((ours[a], theirs[b]) for a, b in pairs if b in theirs), prefix)
    whole = {pairs: prefix for pairs, prefix in found.items() if set(needed) <= {a for a, _ in pairs}}
    averages = {pairs: prefix for pairs, prefix in whole.items() if AVERAGED.search(prefix)}
    plain = {pairs: prefix for pairs, prefix in whole.items() if pairs not in averages}
    if len(plain) > 1 or (not plain and len(averages) > 1):
        raise AmbiguousError(*(plain or averages).values())
    best = next(iter(plain or averages or {}), None) or max(found, key=len, default=())
    taken = {b for _, b in best}
    other = next(iter(averages.values()), "") if plain else ""
    return Match(dict(best), found.get(best, ""), [name for name in names if name not in taken], other)


def _shortened(names: Collection[str]) -> dict[str, str]:
    """Return the names by what is left of them without wrappers. Names stay whole if two of them would coincide."""
    short = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in names}
    return short if len(short) == len(names) else {name: name for name in names}


def _prefixes(inner: Collection[str], names: Collection[str]) -> list[str]:
    """Return the prefixes with which names of the network occur, the most frequent ones first."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for i in range(min(len(parts), 20)):
            if ".".join(parts[i:]) in inner:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    return [prefix for prefix, _ in counts.most_common(20)]


def is_state(name: str) -> bool:
    """Return whether a name is that of a counter or of the state of a neuron."""
    return name.rpartition(".")[2] in COUNTERS | STATE


def is_beside(name: str, prefix: str, modules: Collection[str], attributes: Collection[str]) -> bool:
    """Return whether an entry of a file that the network lacks can be ignored.

    Args:
        name: The name in the file.
        prefix: The prefix of the network's names in the file.
        modules: Names of the modules of the network.
        attributes: Names of the attributes of its modules.
    """
    short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    inside = short.startswith(prefix)
    path, _, last = short.removeprefix(prefix).rpartition(".")
    if last in COUNTERS:
        return True
    if inside and last in STATE and path in modules:
        return last not in SHORT or f"{path}.{last}".removeprefix(".") in attributes
    return BESIDE.fullmatch(short) is not None and (not inside or not prefix)
