"""Settings of an analysis of the smoothed loss's own Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from hessian_tools.io.errors import check_scale

LEAST_DRAWS = 400  # 12 observations of the trace, 20 of a projection, 12 of one direction, and a few pairs of a search
LEAST_OBSERVATIONS = 12  # of a direction or the trace; an interval needs 10
STRATA = 2  # steps along a direction in one observation, for each sign of the noise
PASSES = 2 * (1 + 2 * STRATA)  # forward passes of one observation of a direction
PILOT = 40  # pairs of a search from which follows whether it can find anything
TRACE_PASSES = 6  # of one observation of the trace


@dataclass(frozen=True)
class TrueHessianSettings:
    """Settings of `true_hessian`.

    Attributes:
        noise: Noise scale s, relative to the root mean square of each filter.
        draws: Number of forward passes over all samples, in all.
        top: Number of largest eigenvalues. Fewer are measured if the draws do not suffice.
        smallest: Number of smallest eigenvalues. Fewer are measured if the draws do not suffice.
        group: Number of samples that share a draw of the noise. Fewer samples give more independent draws in the same
            number of forward passes over all samples, and longer passes.
        seed: Random seed.
        memory: Memory in GiB for draws that are kept and for eigenvectors.
        operators: Names of other operators whose eigenvectors are measured too.
    """

    noise: float = 0.1
    draws: int = 4000
    top: int = 10
    smallest: int = 5
    group: int = 64
    seed: int = 0
    memory: float = 4.0
    operators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_scale("noise", self.noise)
        if self.draws < LEAST_DRAWS:
            raise ValueError(f"draws must be at least {LEAST_DRAWS} for operator true, not {self.draws}")
        for name, least in {"top": 1, "smallest": 0, "group": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True)
class DrawPlan:
    """How the forward passes are divided.

    Attributes:
        trace: Observations of the trace.
        search: Pairs z, -z of the search for eigenvectors.
        given: Observations of the projection on the given directions.
        projection: Observations of the projection on the candidates.
        directions: Number of largest and of smallest eigenvalues.
        lines: Observations of every one of them.
        pilot: Pairs of a search that was given up.
    """

    trace: int
    search: int
    given: int
    projection: int
    directions: tuple[int, int]
    lines: int
    pilot: int = 0

    @property
    def passes(self) -> dict[str, int]:
        """Forward passes of every stage."""
        return {
            "trace": TRACE_PASSES * self.trace,
            "given directions": 3 * self.given,
            "search": 2 * (self.search or self.pilot),
            "projection": 3 * self.projection,
            "eigenvalues": PASSES * self.lines * sum(self.directions),
        }


def draw_plan(settings: TrueHessianSettings, size: int, given: int, groups: int, pilot: int = 0) -> DrawPlan:
    """Divide the forward passes between the stages.

    Args:
        settings: The settings.
        size: Number P of weights with noise.
        given: Number of given directions.
        groups: Number of groups of samples with draws of their own.
        pilot: Number of pairs after which the search is given up; 0 if it is not.

    Returns:
        A tenth of the passes are for the trace, 15% for each projection, 30% for the eigenvalues, and the rest for the
        search. If P is more than twice the draws of a search, it could find nothing, and its passes go to the
        eigenvalues in the span of the given directions. Without such directions, all go to the trace.
    """
    total = settings.draws
    trace = max(LEAST_OBSERVATIONS, total // 10 // TRACE_PASSES)
    projection = total * 3 // 20 // 3
    on_given = projection if given else 0
    left = total - TRACE_PASSES * trace - 3 * (projection + on_given)
    search = max(4, (left - total * 3 // 10) // 2)
    most = size
    if pilot or size > 2 * search * groups:
        search, most = 0, given
        left -= 2 * pilot
    if not most:
        return DrawPlan(total // TRACE_PASSES, 0, 0, 0, (0, 0), 0)
    left -= 2 * search
    top = min(settings.top, most)
    low = min(settings.smallest, most - top)
    room = max(1, left // (PASSES * LEAST_OBSERVATIONS))
    if top + low > room:  # both ends in the same proportion
        low = room * low // (top + low)
        top = room - low
    return DrawPlan(trace, search, on_given, projection, (top, low), left // (PASSES * (top + low)), pilot)
