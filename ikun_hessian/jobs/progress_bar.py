"""The progress bar of an analysis or a training run."""

from __future__ import annotations

import sys

from hessian_tools.io.text import one_line


class Bar:
    """A progress bar on standard error. It is hidden if standard error is not a terminal, or if `shown` is False."""

    def __init__(self, name: str = "", shown: bool = True) -> None:
        self.name = f"{name}: " if name else ""
        self.shown = shown

    def __enter__(self) -> Bar:
        from tqdm import tqdm

        hidden = None if self.shown else True  # None hides it if standard error is not a terminal
        self.bar = tqdm(total=1, disable=hidden, leave=False, dynamic_ncols=True, desc=self.name)
        self.bar.bar_format = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        return self

    def update(self, phase: str, done: int, total: int, worst: float = float("nan")) -> None:
        self.bar.total = max(total, done, 1)
        self.bar.set_description_str(f"{self.name}{phase} ", refresh=False)
        self.bar.set_postfix_str(f"residual {worst:.0e}" if worst == worst else "", refresh=False)
        self.bar.update(done - self.bar.n)

    def say(self, line: str) -> None:
        """Print a warning above the bar."""
        self.bar.write(f"! {one_line(line)}", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        self.bar.close()
