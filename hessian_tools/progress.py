"""Progress of an analysis: products done, products expected, and the worst residual."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Show = Callable[[str, int, int, float], None]  # (phase, products done, products expected, worst relative residual)


class Meter:
    """Sum the operator products over all phases of an analysis and report the totals.

    Args:
        expected: First guess of the number of products of each phase. A phase replaces the guess when it reports its
            own.
        show: Called after every change with (phase, products done, products expected, worst relative residual).
    """

    def __init__(self, expected: Mapping[str, int], show: Show | None = None) -> None:
        self._guess = dict(expected)
        self._expected = dict(expected)
        self._done: dict[str, int] = {}
        self._show = show

    def phase(self, name: str) -> Callable[[int, int, float], None]:
        """Return the progress function of one phase.

        It takes (products done, most products, worst relative residual). While the residual is NaN, the number of most
        products is only an upper bound, and the guess is used where there is one.
        """

        def report(done: int, most: int, worst: float) -> None:
            known = worst == worst or name not in self._guess
            self._update(name, done, most if known else min(most, max(self._guess[name], done + 1)), worst)

        return report

    def finish(self, name: str, products: int) -> None:
        """Report that a phase is finished, computed now or taken from an earlier run, with `products` products."""
        self._update(name, products, products, float("nan"))

    def _update(self, name: str, done: int, expected: int, worst: float) -> None:
        """Store the counts of a phase and show the totals."""
        self._done[name], self._expected[name] = done, expected
        if self._show is not None:
            self._show(name, sum(self._done.values()), sum(self._expected.values()), worst)
