"""The files of a training run next to its checkpoints: a log with one JSON line per epoch, and a description."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessian_tools.io.files import naming, write_atomically
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions

if TYPE_CHECKING:
    from ikun.layer_statistics import LayerStatistics
    from ikun.networks import Network

TRAINING_SCHEMA = "ikun-hessian/train/1"


def run_paths(out: Path) -> dict[str, Path]:
    """Return the paths of a run's log ("log"), its description ("run") and the state of an interrupted run ("resume").

    Args:
        out: Path of the checkpoint.
    """
    return {
        "log": out.with_suffix(".train.jsonl"),
        "run": out.with_suffix(".train.json"),
        "resume": out.with_name(out.name + ".resume"),
    }


def snapshot_path(out: Path, epoch: int) -> Path:
    """Return the path of the checkpoint that is written after an epoch."""
    return out.with_name(f"{out.stem}.epoch{epoch:04d}{out.suffix}")


def loss_path(out: Path, loss: float) -> Path:
    """Return the path of the checkpoint of the first epoch whose training loss is at most `loss`."""
    return out.with_name(f"{out.stem}.loss{loss:g}{out.suffix}")


def write_log(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write the log anew with exactly these epochs.

    A run that was killed between writing a line of the log and its state may have logged one epoch too many.
    """
    write_atomically(path, lambda file: file.write("".join(_line(line) for line in history).encode()))


def append(path: Path, line: dict[str, Any]) -> None:
    """Append one epoch to the log."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(_line(line))


def write_description(path: Path, description: dict[str, Any]) -> None:
    """Write the description of a run, with its schema and the versions of the software."""
    whole = clean({"schema": TRAINING_SCHEMA, **description, "versions": versions(("torch",))})
    write_atomically(path, lambda file: file.write((json.dumps(whole, indent=1) + "\n").encode()))


def layer_lines(net: Network, reference: Network, observed: Sequence[LayerStatistics]) -> dict[str, dict[str, Any]]:
    """Summarize every layer for the log.

    Args:
        net: The network after an epoch.
        reference: The network before training, with weights W0.
        observed: Statistics of the layers of `net`.

    Returns:
        For each layer, by name: the statistics, and the distance of the weights, ||W - W0|| / ||W0||.
    """
    first, now = (
        {name: weights.weight.detach() for name, weights, *_ in network.stages()} for network in (reference, net)
    )
    kept = ("firing_rate", "derivative_square", "current_variance", "gradient_square")
    return {
        s.name: {
            **{key: getattr(s, key) for key in kept},
            "derivative_square_by_step": list(s.derivative_square_by_step),
            "distance": float((now[s.name] - first[s.name]).norm() / first[s.name].norm()),
        }
        for s in observed
    }


def _line(line: dict[str, Any]) -> str:
    return json.dumps(clean(line)) + "\n"
