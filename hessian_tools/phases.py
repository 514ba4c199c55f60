"""The finished phases of an analysis, kept on disk, so that an interrupted one goes on behind the last of them.

Every phase draws from a generator of its own, so a resumed analysis ends with the same arrays as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hessian_tools.operators import Operator
from hessian_tools.results import write_atomically


class ResumeError(ValueError):
    """A state that cannot be resumed: one line that names the file and says why."""


class Phases:
    """Runs phases by name, or takes their results from `path`; None keeps nothing.

    key: whatever the results depend on, as plain values; a state with another key is refused.
    """

    def __init__(self, path: Path | None = None, key: Any = None) -> None:
        self.path = path
        self.key = json.dumps(key, sort_keys=True)
        self.products = 0
        self._done: dict[str, Any] = {}
        if path is not None and path.exists():
            self._done = _read(path, self.key)

    def run(self, name: str, op: Operator, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The phase's result, a dict of tensors and plain values; its products with `op` are added to `products`."""
        if name not in self._done:
            before = op.products
            value = compute()
            self._done[name] = {"value": value, "products": op.products - before}
            if self.path is not None:
                state = {"key": self.key, "done": self._done}
                write_atomically(self.path, lambda file: torch.save(state, file))
        self.products += self._done[name]["products"]
        result: dict[str, Any] = self._done[name]["value"]
        return result


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # torch.load raises many kinds on damaged files
        raise ResumeError(f"{path}: not the state of an interrupted analysis: start anew with --force") from None
    if not isinstance(state, dict) or state.get("key") != key or not isinstance(state.get("done"), dict):
        raise ResumeError(
            f"{path}: the interrupted analysis had other settings, weights, data or versions: repeat them, or start "
            "anew with --force"
        )
    done: dict[str, Any] = state["done"]
    return done
