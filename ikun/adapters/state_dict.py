"""Read the weights that training scripts save, without running code from the file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.io.torch_archive import ArchiveError, CodeError, read_archive
from ikun.adapters.base import AdapterError

KEYS = ("net", "model", "state_dict", "model_state_dict")  # where scripts save the weights along with other data
CONVERT = "where the file was made, run torch.save(model.state_dict(), 'weights.pt')"
SHOWN, LONGEST = 3, 200  # number of names in a message, and of characters of each


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights in a file of torch.save.

    Raises:
        AdapterError: If the file cannot be read, holds no weights, or would run code to be loaded.
    """
    try:
        loaded = read_archive(path)
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file") from None
    except CodeError as error:
        raise AdapterError(f"{path} holds more than tensors and would run code to be loaded: {CONVERT}") from error
    except (ArchiveError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{path}: not a file of torch.save, or a damaged one ({reason})") from error
    try:
        return state_dict_of(loaded)
    except AdapterError as error:
        raise AdapterError("{}: {}", path, error) from None


def state_dict_of(loaded: Any) -> dict[str, Tensor]:
    """Find the weights in the contents of a file.

    Args:
        loaded: A dict of tensors, or a dict that holds one under a key in KEYS.

    Returns:
        The tensors by name. `_orig_mod.`, and `module.` if all names start with it, are removed from the names.

    Raises:
        AdapterError: If there are no weights.
    """
    if isinstance(loaded, nn.Module):
        raise AdapterError(f"a whole model instead of its weights: {CONVERT}")
    for key in KEYS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            return state_dict_of(loaded[key])
    if not isinstance(loaded, dict) or not loaded:
        raise AdapterError(f"no weights found: a dict of tensors is needed, directly or under {', '.join(KEYS)}")
    odd = [str(name) for name, t in loaded.items() if not (isinstance(name, str) and isinstance(t, Tensor))]
    if odd:
        raise AdapterError(f"no weights found: {_some(odd)} are not tensors, and there is no {', '.join(KEYS)}")
    weights = {str(name).replace("_orig_mod.", ""): t for name, t in loaded.items()}
    while all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): t for name, t in weights.items()}
    return weights


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights into a model. The model does not change if they do not fit.

    Args:
        model: The model.
        weights: Tensors by name, exactly those of the model.

    Raises:
        AdapterError: If names or shapes do not match, with the most similar names, or if weights are not finite.
    """
    own = model.state_dict()
    if not set(own) <= set(weights) and {f"module.{name}" for name in weights} == set(own):
        weights = {f"module.{name}": t for name, t in weights.items()}  # the only layer of the model is named "module"
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    problems = []
    if missing:
        near = [f"{name}{_near(name, unexpected)}" for name in missing]
        problems.append(f"missing {_some(near)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(t.shape)}"
        for name, t in own.items()
        if name in weights and weights[name].shape != t.shape
    ]
    if shapes:
        problems.append(f"other shapes: {_some(shapes)}")
    if problems:
        raise AdapterError(f"the weights do not fit the model: {'; '.join(problems)}")
    if broken := [name for name, _ in model.named_parameters() if not bool(torch.isfinite(weights[name]).all())]:
        raise AdapterError(f"NaN or infinite weights: {_some(broken)}: the training diverged: use an earlier file")
    model.load_state_dict(weights, strict=True)


def _near(name: str, names: list[str]) -> str:
    """Return the most similar name as a question, or an empty string."""
    found = difflib.get_close_matches(name, names, 1, 0.5)
    return f" ({found[0]}?)" if found else ""


def _some(names: list[str]) -> str:
    """Join the first names, without unprintable characters, and count the others."""
    more = len(names) - SHOWN
    shown = ("".join(c if c.isprintable() else "?" for c in name[:LONGEST]) for name in names[:SHOWN])
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
