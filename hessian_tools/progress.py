"""How far an analysis is: products done, products expected, and the worst residual."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Show = Callable[[str, int, int, float], None]  # (phase, products done, products expected, worst relative residual)


class Meter:
    """Adds up the products of all phases. The number expected of a phase is first a guess, then what it reports."""

    def __init__(self, expected: Mapping[str, int], show: Show | None = None) -> None:
        self._guess = dict(expected)
        self._expected = dict(expected)
        self._done: dict[str, int] = {}
        self._show = show

    def phase(self, name: str) -> Callable[[int, int, float], None]:
        """A progress function (done, most, worst residual) for one phase; most is only a bound without a residual."""

        def report(done: int, most: int, worst: float) -> None:
            known = worst == worst or name not in self._guess
            self._update(name, done, most if known else min(most, max(self._guess[name], done + 1)), worst)

        return report

    def finish(self, name: str, products: int) -> None:
        """The phase is over, computed now or taken from an earlier run, with so many products."""
        self._update(name, products, products, float("nan"))

    def _update(self, name: str, done: int, expected: int, worst: float) -> None:
        self._done[name], self._expected[name] = done, expected
        if self._show is not None:
            self._show(name, sum(self._done.values()), sum(self._expected.values()), worst)
