"""What a training run leaves beside its checkpoints: the log, a JSON line an epoch, and the description of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessian_tools.io.files import naming, write_atomically
from hessian_tools.io.json import clean
from hessian_tools.io.versions import versions
from ikun.layer_statistics import LayerStatistics

if TYPE_CHECKING:
    from ikun.networks import Network

TRAINING_SCHEMA = "ikun-hessian/train/1"


def run_paths(out: Path) -> dict[str, Path]:
    """The files of a run beside its checkpoint: log, description, and the state that an interrupted one leaves."""
    return {
        "log": out.with_suffix(".train.jsonl"),
        "run": out.with_suffix(".train.json"),
        "resume": out.with_name(out.name + ".resume"),
    }


def snapshot_path(out: Path, epoch: int) -> Path:
    return out.with_name(f"{out.stem}.epoch{epoch:04d}{out.suffix}")


def loss_path(out: Path, loss: float) -> Path:
    """Of the weights of the first epoch whose training loss was no larger than `loss`."""
    return out.with_name(f"{out.stem}.loss{loss:g}{out.suffix}")


def write_log(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """The log holds exactly these epochs, also after a kill between its last line and the state to resume from."""
    write_atomically(path, lambda file: file.write("".join(_line(line) for line in history).encode()))


def append(path: Path, line: dict[str, Any]) -> None:
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(_line(line))


def write_description(path: Path, description: dict[str, Any]) -> None:
    """NAME.train.json: schema and versions with what is given."""
    whole = clean({"schema": TRAINING_SCHEMA, **description, "versions": versions(("torch",))})
    write_atomically(path, lambda file: file.write((json.dumps(whole, indent=1) + "\n").encode()))


def layer_lines(net: Network, reference: Network, observed: Sequence[LayerStatistics]) -> dict[str, dict[str, Any]]:
    """Per layer, for the log: what `observed` says of it, and ||W - W0|| / ||W0||."""
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
