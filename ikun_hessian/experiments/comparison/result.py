"""Result of a comparison of training runs: rows of measures, correlations and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ikun_hessian.experiments.comparison.measures import LeftOut
from ikun_hessian.experiments.comparison.sample_size import SampleSize
from ikun_hessian.experiments.comparison.statistics import Interval

NAN = math.nan
NO_INTERVAL, NO_SIZE = Interval(), SampleSize()


@dataclass(frozen=True)
class Row:
    """One measure of one level of the compared condition.

    The fields from `pairs` on compare the level with the reference and keep their defaults for the reference itself.

    Attributes:
        family: Group of measures within which p-values are adjusted.
        measure: Name of the measure.
        unit: "%" for fractions, "epochs", or "".
        moment: Key of the moment, "" for the end of training.
        level: The level.
        values: Value of each run: NaN if unknown, infinite if the run counts as worse than any number.
        median: Median over the level's runs, infinite values included. For epochs, the Kaplan-Meier median.
        lost: Number of runs without a finite value.
        ratio: Whether levels are compared by ratio instead of difference.
        pairs: Number of pairs.
        shift: Hodges-Lehmann estimate of the ratio or difference to the reference. The interval holds the values that
            the test of `p` does not reject.
        p: Exact p-value of the signed-rank test. For epochs with censored runs, times are truncated to the window in
            which both runs of a pair were observed (see `ikun_hessian.experiments.comparison.censored`).
        holm: p adjusted for the comparisons of the family by Holm's method.
        equivalence: p-value of the two one-sided tests that the ratio lies outside the margin, adjusted in the same
            way.
        effect: Standardized mean difference d_z, of logarithms if `ratio` is set.
        superiority: Fraction of the pairs in which the level has the larger value.
        needed: Number of pairs to plan a study with.
    """

    family: str
    measure: str
    unit: str
    moment: str
    level: str
    values: dict[str, float]
    median: Interval
    lost: int
    ratio: bool
    pairs: int = 0
    shift: Interval = NO_INTERVAL
    p: float = NAN
    holm: float = NAN
    equivalence: float = NAN
    effect: Interval = NO_INTERVAL
    superiority: Interval = NO_INTERVAL
    needed: SampleSize = NO_SIZE


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau between a measure and the accuracy gap (train minus test).

    Attributes:
        measure: Name of the measure.
        moment: Key of the moment.
        overall: Correlation over all pairs of runs.
        within: Correlation over pairs of runs of the same level.
    """

    measure: str
    moment: str
    overall: Interval
    within: Interval


@dataclass(frozen=True)
class StartingCost:
    """One-time cost of a level's initializer.

    Attributes:
        seconds: Median wall time over the level's runs, in seconds.
        forward_passes: Median number of forward passes over the level's runs.
    """

    seconds: float
    forward_passes: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_runs`.

    Attributes:
        by: The compared condition.
        reference: The reference level.
        levels: Number of runs of each level.
        accuracy: Test accuracy for the number of epochs to reach it.
        margin: Ratios between 1 / margin and margin count as equivalent.
        moments: Keys of the compared moments.
        seeds: Seeds of all runs.
        logged: Number of runs with a log.
        follows: Settings whose value is determined by the level (such as the learning rate of an optimizer), as
            {setting: {level: value}}. Their effect cannot be separated from that of the level.
        unpaired: For each level, names of the runs without a partner in the reference.
        lost: For each run with a problem, what went wrong.
        left_out: Differences between results, caused by the compared condition, that exclude measures.
        rows: One row per measure, moment and level.
        correlations: Correlations of the measures with the accuracy gap.
        data: Description of the data and network that all runs share.
        surrogates: For each moment, the surrogate of the analysis, if it is common to all runs and some run was trained
            with another.
        start: Cost of each level's initializer, if initializers are compared.
    """

    by: str
    reference: str
    levels: dict[str, int]
    accuracy: float
    margin: float
    moments: tuple[str, ...]
    seeds: tuple[str, ...]
    logged: int
    follows: dict[str, dict[str, str]]
    unpaired: dict[str, tuple[str, ...]]
    lost: dict[str, str]
    left_out: tuple[LeftOut, ...]
    rows: tuple[Row, ...]
    correlations: tuple[Correlation, ...]
    data: str = ""
    surrogates: dict[str, str] = field(default_factory=dict)
    start: dict[str, StartingCost] = field(default_factory=dict)

    @property
    def most_pairs(self) -> int:
        """The largest number of pairs of any row."""
        return max((row.pairs for row in self.rows), default=0)
