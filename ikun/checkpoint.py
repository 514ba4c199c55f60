"""The checkpoint: one .pt that says everything needed to rebuild the network, its data, its loss, and how it was made.

Files come from strangers: they are read as data (archive.py), checked field by field, and the network is built only
after the shapes of its weights are known to agree with its description.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from hessian_tools.io.files import write_atomically
from hessian_tools.io.torch_archive import ArchiveError, read_archive
from hessian_tools.io.versions import versions
from ikun.data.datasets import DATASETS, Dataset
from ikun.data.encoding import encoded
from ikun.data.lazy import Images
from ikun.data.spec import DataSpec
from ikun.losses import LOSSES
from ikun.networks import Network, Spec

CHECKPOINT_SCHEMA = "ikun-hessian/checkpoint/1"
LONGEST = 1000  # characters of an error line
# What a checkpoint says of its training: all of this or nothing
_TRAINED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("init", "optimizer", "schedule"), (str,)),
    **dict.fromkeys(("alpha", "lr", "weight_decay"), (int, float)),
    **dict.fromkeys(("batch_size", "seed", "samples", "epochs_run"), (int,)),
    "failures": (list, tuple),
}
_MORE: dict[str, tuple[type, ...]] = {  # that others do not have
    **dict.fromkeys(("law", "loss", "data_sha256"), (str,)),
    "momentum": (int, float),
    **dict.fromkeys(("epochs", "patience", "snapshots", "best_epoch"), (int,)),
    "save_at_loss": (list, tuple),
    "saved_at_loss": (dict,),
}
_EPOCH: dict[str, tuple[type, ...]] = dict.fromkeys(("loss", "accuracy", "test_accuracy"), (int, float))


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that names the file and says why and what to do."""

    def __init__(self, message: str) -> None:
        """Values quoted from a foreign file may hold line breaks, a terminal's commands, or a megabyte."""
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]} ...")


@dataclass(frozen=True)
class Checkpoint:
    """network and state: the trained weights. data, loss: what they were trained on. training: how, as plain values.
    history: one dict per epoch, the lines of the training log."""

    network: Spec
    data: DataSpec
    loss: str
    state: dict[str, Tensor]
    training: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def kept(self) -> dict[str, Any]:
        """The line of the epoch that the weights are of; {} where there is none."""
        epoch = self.training.get("best_epoch", len(self.history))
        return next((line for line in self.history if line.get("epoch") == epoch), {})

    def build(self, **changes: Any) -> Network:
        """The network with its weights; changes replace fields of the description (surrogate, ties, relaxed)."""
        network = Network(dataclasses.replace(self.network, **changes))
        network.load_state_dict(self.state)
        return network.eval()

    def samples(self, split: str = "train", data_dir: str | Path | None = None) -> Dataset:
        """The data set. Raises what loading it raises, and CheckpointError for labels that the network has no output
        for."""
        found = self.data.load(split, data_dir)
        if (classes := int(found.labels.max()) + 1) > self.network.classes:
            raise CheckpointError(
                f"this checkpoint's network has {self.network.classes} classes, and the data {self.data.name} "
                f"{classes}: not data that it was trained on"
            )
        return found

    def inputs(self, images: Images) -> Images:
        """Network inputs: samples as they are, or Poisson spikes drawn once from the data seed and frozen.

        Raises CheckpointError for images of another shape than the network's, DataError as data.encode does.
        """
        if tuple(images.shape[-3:]) != self.network.input_shape:
            raise CheckpointError(
                f"this checkpoint's network takes inputs {list(self.network.input_shape)}, and the data "
                f"{self.data.name} are {list(images.shape[-3:])}: not data that it was trained on"
            )
        return encoded(images, self.network.timesteps, self.network.coding, self.data.seed)


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write the whole file or nothing."""
    save_atomically(
        {
            "schema": CHECKPOINT_SCHEMA,
            "network": {**dataclasses.asdict(checkpoint.network)},
            "data": dataclasses.asdict(checkpoint.data),
            "loss": checkpoint.loss,
            "state": {k: v.detach().cpu().clone() for k, v in checkpoint.state.items()},
            "training": checkpoint.training,
            "history": checkpoint.history,
            "versions": versions(("torch",)),
        },
        Path(path),
    )


def save_atomically(values: dict[str, Any], path: Path) -> None:
    """torch.save, the whole file or nothing."""

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(values, file)
        except RuntimeError as error:  # torch's own hides what stopped a write: a full disk, Ctrl-C
            raise (error.__context__ or error) from None

    write_atomically(path, write)


def sha256(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_plain(path: str | Path) -> dict[str, Any]:
    """The dict in a .pt file, without running any code from it. Raises CheckpointError."""
    try:
        values = read_archive(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file: `ikun-hessian train --out {path}` makes one") from None
    except OSError as error:
        raise CheckpointError(f"{path}: may not be read ({error.strerror}): check its permissions") from None
    except (ArchiveError, ValueError) as error:  # a path with a zero byte is a ValueError
        raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a checkpoint of ikun-hessian: it holds a {type(values).__name__}")
    if odd := _odd(values.get("settings")):  # of a state to resume from: they are compared with those asked for
        raise CheckpointError(f"{path}: damaged or foreign: field 'settings' must hold plain values, and not {odd}")
    return values


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint. Raises CheckpointError with one line for any file that is not one."""
    values = read_plain(path)
    schema = values.get("schema")
    if schema != CHECKPOINT_SCHEMA:
        if isinstance(schema, str) and schema.startswith("ikun-hessian/checkpoint/"):
            raise CheckpointError(
                f"{path}: written by another version ({schema}, expected {CHECKPOINT_SCHEMA}): upgrade ikun-hessian"
            )
        raise CheckpointError(f"{path}: not a checkpoint of ikun-hessian (no schema {CHECKPOINT_SCHEMA} in it)")
    try:
        network, data, loss, state, training, history = _fields(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or foreign checkpoint: {error}") from None
    _check_state(path, network, state)
    return Checkpoint(network, data, loss, state, training, history)


def _fields(values: dict[str, Any]) -> tuple[Spec, DataSpec, str, dict[str, Tensor], dict[str, Any], list[Any]]:
    wanted = {"network": dict, "data": dict, "loss": str, "state": dict, "training": dict, "history": list}
    for name, kind in wanted.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"field '{name}' is missing or no {kind.__name__}")
    network = Spec.from_dict(values["network"])
    raw = values["data"]
    fields = {"name", "subset", "seed", "held_out"}  # image_size is younger
    if set(raw) - {"image_size"} != fields or raw["name"] not in DATASETS:
        raise ValueError("field 'data' does not name a known data set")
    if any(not _whole(raw[k]) for k in ("seed", "held_out")):
        raise ValueError("field 'data': seed and held_out must be whole numbers")
    if any(raw.get(k) is not None and not _whole(raw[k]) for k in ("subset", "image_size")):
        raise ValueError("field 'data': subset and image_size must be whole numbers")
    if raw["held_out"] >= (2**31 if raw["subset"] is None else min(raw["subset"], 2**31)):
        raise ValueError(f"field 'data': {raw['held_out']} held-out samples of {raw['subset'] or 'all'}")
    if raw.get("image_size") is not None and raw["name"] != "image-folder":
        raise ValueError(f"field 'data': {raw['name']} has a size of its own, and no image_size")
    if values["loss"] not in LOSSES:
        raise ValueError(f"unknown loss '{values['loss']}'")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in values["state"].items()):
        raise ValueError("field 'state' must map names to tensors")
    if not all(isinstance(line, dict) for line in values["history"]):
        raise ValueError("field 'history' must hold one dict per epoch")
    for name in ("training", "history"):
        if odd := _odd(values[name]):
            raise ValueError(f"field '{name}' must hold plain values, and not {odd}")
    training = values["training"]
    if training and (missing := [name for name in _TRAINED if name not in training]):
        raise ValueError(f"field 'training' lacks {', '.join(missing)}")
    for name, kinds, found in (
        ("training", _TRAINED | _MORE, training),
        *(("history", _EPOCH, line) for line in values["history"]),
    ):
        for key in kinds.keys() & found.keys():
            if not isinstance(found[key], kinds[key]) or isinstance(found[key], bool):
                raise ValueError(f"field '{name}': {key} must be {kinds[key][-1].__name__}")
    return network, DataSpec(**raw), values["loss"], values["state"], values["training"], values["history"]


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _odd(value: object) -> str:
    """What in it no JSON file and no screen would take; "" if nothing."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return "names that are no text"
        return next((o for k, v in value.items() if (o := _odd(k) or _odd(v))), "")
    if isinstance(value, list | tuple):
        return next((o for v in value if (o := _odd(v))), "")
    if isinstance(value, str):
        return "" if value.isprintable() and len(value) <= LONGEST else "text that cannot be shown"
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63):
        return ""
    return "a huge number" if isinstance(value, int) else f"a {type(value).__name__}"


def _check_state(path: str | Path, network: Spec, state: dict[str, Tensor]) -> None:
    with torch.device("meta"):  # shapes without memory: a description may claim any size
        expected = Network(network).state_dict()
    if wrong := sorted(set(expected) ^ set(state)):
        raise CheckpointError(f"{path}: the weights do not fit the network described: {', '.join(wrong[:3])}")
    storages = {}
    for name, tensor in expected.items():
        found = state[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: '{name}' is {found.dtype} {list(found.shape)}, the network has {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        stored = found.layout == torch.strided and found.device.type == "cpu"
        storage = found.untyped_storage() if stored else None
        if storage is None or storage.data_ptr() in storages or storage.nbytes() < found.nbytes:
            raise CheckpointError(f"{path}: '{name}' is not stored in full: not a checkpoint that ikun-hessian wrote")
        storages[storage.data_ptr()] = name  # one for every weight: else a small file could ask for a large network
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                f"{path}: '{name}' has NaN or infinite entries: the training diverged, take an earlier one"
            )
        if name.endswith("running_var") and bool((found < 0).any()):
            raise CheckpointError(f"{path}: '{name}' has negative entries, and is a variance: the file is damaged")
