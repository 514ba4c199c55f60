"""Checkpoints: .pt files that describe a trained network, its data, its loss and its training.

A checkpoint contains everything that is needed to rebuild the network. Checkpoints may come from untrusted sources.
They are therefore read as data without running code (see `hessian_tools.io.torch_archive`), and every field is checked.
The network is built only after the shapes of the weights have been compared with its description.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
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
LONGEST = 1000  # maximum length of an error message or a stored text, in characters
# Fields that describe the training and their types. A checkpoint has all of them, or no description of its training.
_TRAINED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("init", "optimizer", "schedule"), (str,)),
    **dict.fromkeys(("alpha", "lr", "weight_decay"), (int, float)),
    **dict.fromkeys(("batch_size", "seed", "samples", "epochs_run"), (int,)),
    "failures": (list, tuple),
}
# Optional fields that describe the training
_MORE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("law", "loss", "data_sha256", "sam_forward"), (str,)),
    **dict.fromkeys(("momentum", "sam"), (int, float)),
    **dict.fromkeys(("epochs", "patience", "snapshots", "best_epoch"), (int,)),
    "save_at_loss": (list, tuple),
    "saved_at_loss": (dict,),
}
# Fields of a line of the training log that are checked
_EPOCH: dict[str, tuple[type, ...]] = dict.fromkeys(("loss", "accuracy", "test_accuracy"), (int, float))


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is one line that names the file, the problem and the remedy."""

    def __init__(self, message: str) -> None:
        """Replace unprintable characters and cut long text: messages quote values from untrusted files."""
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]} ...")


@dataclass(frozen=True)
class Checkpoint:
    """A trained network with the description of its data and its training.

    Attributes:
        network: Description of the network.
        data: Description of the data that the network was trained on.
        loss: Name of the training loss, a key of `ikun.losses.LOSSES`.
        state: The state dict with the trained weights.
        training: Settings and outcome of the training, as plain values.
        history: The training log, one dict per epoch.
    """

    network: Spec
    data: DataSpec
    loss: str
    state: dict[str, Tensor]
    training: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def kept(self) -> dict[str, Any]:
        """The log line of the epoch that the weights come from, or {} if there is none."""
        epoch = self.training.get("best_epoch", len(self.history))
        return next((line for line in self.history if line.get("epoch") == epoch), {})

    def build(self, **changes: Any) -> Network:
        """Build the network with its trained weights, in evaluation mode.

        Args:
            **changes: Values that replace fields of the description, for example surrogate, ties or relaxed.

        Returns:
            The network.
        """
        network = Network(dataclasses.replace(self.network, **changes))
        network.load_state_dict(self.state)
        return network.eval()

    def samples(self, split: str = "train", data_dir: str | Path | None = None) -> Dataset:
        """Load the data set that the network was trained on.

        Args:
            split: "train" or "test".
            data_dir: Directory of the data files. The default is that of `DataSpec.load`.

        Returns:
            The data set.

        Raises:
            CheckpointError: If a label is larger than the number of outputs of the network.
            DataError: If the data cannot be loaded. See `DataSpec.load`.
        """
        found = self.data.load(split, data_dir)
        if (classes := int(found.labels.max()) + 1) > self.network.classes:
            raise CheckpointError(
                f"the network of this checkpoint has {self.network.classes} classes, but the data {self.data.name} "
                f"have {classes}: the network was not trained on these data"
            )
        return found

    def inputs(self, images: Images) -> Images:
        """Convert samples to network inputs.

        Direct coding and spike trains leave the samples unchanged. Poisson spikes are drawn once, with the seed of the
        data.

        Args:
            images: The samples [N, C, H, W] or [N, T, C, H, W].

        Returns:
            The network inputs.

        Raises:
            CheckpointError: If the samples do not have the input shape of the network.
            DataError: If the samples cannot be coded. See `ikun.data.encoding.encode`.
        """
        if tuple(images.shape[-3:]) != self.network.input_shape:
            raise CheckpointError(
                f"the network of this checkpoint takes inputs {list(self.network.input_shape)}, but the data "
                f"{self.data.name} are {list(images.shape[-3:])}: the network was not trained on these data"
            )
        return encoded(images, self.network.timesteps, self.network.coding, self.data.seed)


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint to `path` atomically: if writing fails, an existing file is left unchanged."""
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
    """Write `values` with torch.save, atomically: if writing fails, an existing file is left unchanged."""

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(_unshared(values), file)
        except RuntimeError as error:  # raise the original error (full disk, Ctrl-C) that torch replaced
            raise (error.__context__ or error) from None

    write_atomically(path, write)


def _unshared(value: Any) -> Any:
    """Copy all containers in `value`, and share equal texts.

    A pickle stores an object that occurs twice only once. Without this, the bytes of a file would depend on where its
    values come from: computed, or read from the state of an interrupted run.
    """
    if isinstance(value, dict):
        return {_unshared(key): _unshared(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_unshared, value))
    return sys.intern(value) if type(value) is str else value


def sha256(path: str | Path) -> str:
    """Return the SHA-256 digest of a file as a hexadecimal string."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_plain(path: str | Path) -> dict[str, Any]:
    """Read the dict in a .pt file without running any code from it.

    Args:
        path: The file.

    Returns:
        The dict.

    Raises:
        CheckpointError: If the file cannot be read, or does not contain a dict of plain values and tensors.
    """
    try:
        values = read_archive(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file: check the path, or train a network first") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None
    except (ArchiveError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a checkpoint of ikun-hessian: it holds a {type(values).__name__}")
    # a saved state of an interrupted training run has 'settings', which are compared with the current settings
    if odd := _odd(values.get("settings")):
        raise CheckpointError(f"{path}: damaged or invalid file: field 'settings' must hold plain values, not {odd}")
    return values


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint.

    Args:
        path: The file.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the file is not a valid checkpoint.
    """
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
        raise CheckpointError(f"{path}: damaged or invalid checkpoint: {error}") from None
    _check_state(path, network, state)
    return Checkpoint(network, data, loss, state, training, history)


def _fields(values: dict[str, Any]) -> tuple[Spec, DataSpec, str, dict[str, Tensor], dict[str, Any], list[Any]]:
    """Check the fields of a checkpoint and return them. Raises ValueError or TypeError for an invalid field."""
    wanted = {"network": dict, "data": dict, "loss": str, "state": dict, "training": dict, "history": list}
    for name, kind in wanted.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"field '{name}' is missing or not a {kind.__name__}")
    network = Spec.from_dict(values["network"])
    raw = values["data"]
    fields, added = {"name", "subset", "seed", "held_out"}, ("image_size", "frames")  # those added later may be missing
    if set(raw) - set(added) != fields or raw["name"] not in DATASETS:
        raise ValueError("field 'data' does not name a known data set")
    if any(not _whole(raw[k]) for k in ("seed", "held_out")):
        raise ValueError("field 'data': seed and held_out must be whole numbers")
    if any(raw.get(k) is not None and not _whole(raw[k]) for k in ("subset", *added)):
        raise ValueError("field 'data': subset, image_size and frames must be whole numbers")
    if raw["held_out"] >= (2**31 if raw["subset"] is None else min(raw["subset"], 2**31)):
        raise ValueError(f"field 'data': held_out is {raw['held_out']}, too many for {raw['subset'] or 'all'} samples")
    for key, name in zip(added, ("image-folder", "n-mnist"), strict=True):
        if raw.get(key) is not None and raw["name"] != name:
            raise ValueError(f"field 'data': {key} is only for {name}, not for {raw['name']}")
    if values["loss"] not in LOSSES:
        raise ValueError(f"unknown loss '{values['loss']}'")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in values["state"].items()):
        raise ValueError("field 'state' must map names to tensors")
    if not all(isinstance(line, dict) for line in values["history"]):
        raise ValueError("field 'history' must hold one dict per epoch")
    for name in ("training", "history"):
        if odd := _odd(values[name]):
            raise ValueError(f"field '{name}' must hold plain values, not {odd}")
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
    """Return whether a value is an int from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < 2**63


def _odd(value: object) -> str:
    """Describe a value in `value` that cannot be written to JSON or printed; "" if there is none."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return "keys that are not text"
        return next((o for k, v in value.items() if (o := _odd(k) or _odd(v))), "")
    if isinstance(value, list | tuple):
        return next((o for v in value if (o := _odd(v))), "")
    if isinstance(value, str):
        return "" if value.isprintable() and len(value) <= LONGEST else "text that is unprintable or too long"
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63):
        return ""
    return "an integer of more than 64 bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _check_state(path: str | Path, network: Spec, state: dict[str, Tensor]) -> None:
    """Check that the weights fit the network. Raises CheckpointError if they do not."""
    with torch.device("meta"):  # allocates no memory: an untrusted description may ask for any size
        expected = Network(network).state_dict()
    if wrong := sorted(set(expected) ^ set(state)):
        raise CheckpointError(f"{path}: the weights do not fit the network described: {', '.join(wrong[:3])}")
    storages = {}
    for name, tensor in expected.items():
        found = state[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: '{name}' is {found.dtype} {list(found.shape)}, but the network has {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        stored = found.layout == torch.strided and found.device.type == "cpu"
        storage = found.untyped_storage() if stored else None
        if storage is None or storage.data_ptr() in storages or storage.nbytes() < found.nbytes:
            raise CheckpointError(f"{path}: '{name}' is not stored in full: ikun-hessian did not write this file")
        # every tensor needs its own storage; otherwise a small file could ask for a huge network
        storages[storage.data_ptr()] = name
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                f"{path}: '{name}' has NaN or infinite entries: the training diverged, use an earlier checkpoint"
            )
        if name.endswith("running_var") and bool((found < 0).any()):
            raise CheckpointError(f"{path}: '{name}' is a variance and has negative entries: the file is damaged")
