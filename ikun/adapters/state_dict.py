"""Read the weights that training scripts save, without running code from the file."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hessian_tools.io.torch_archive import ArchiveError, Foreign, read_archive
from ikun.adapters.base import AdapterError
from ikun.adapters.weight_names import SHORT, AmbiguousError, is_beside, is_state, match_names

KEYS = ("net", "model", "state_dict", "model_state_dict", "network", "weights", "module")  # where scripts save weights
EMA_KEYS = ("model_ema", "ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict")  # moving averages of them
CONVERT = "where the file was made, run torch.save(model.state_dict(), 'weights.pt')"
SHOWN, LONGEST = 3, 200  # number of names in a message, and of characters of each
DEEPEST = 4  # dicts around the weights
Say = Callable[[str], object]


def warn(line: str) -> None:
    """Emit a Python warning."""
    warnings.warn(line, stacklevel=3)


def read_weights(path: str | Path, say: Say = warn) -> dict[str, Tensor]:
    """Read the weights in a file of torch.save, of its old format before torch 1.6, or in a .safetensors file.

    Whatever else the file holds, such as an argparse.Namespace or the state of an optimizer, is read as data.

    Args:
        path: The file.
        say: Called with a line about weights in the file that are not used. The default emits a Python warning.

    Returns:
        The tensors by name.

    Raises:
        AdapterError: If the file cannot be read, or holds no weights or several sets of weights.
    """
    try:
        loaded = read_archive(path, foreign=True)
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file") from None
    except (ArchiveError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{path}: not a file of torch.save, or a damaged one ({reason})") from error
    try:
        return state_dict_of(loaded, lambda line: say(f"{path}: {line}"))
    except AdapterError as error:
        raise AdapterError("{}: {}", path, error) from None


def state_dict_of(loaded: Any, say: Say = warn) -> dict[str, Tensor]:
    """Find the weights in the contents of a file.

    Args:
        loaded: A dict of tensors, which may have numbers and texts beside them, or a dict that holds one: under a key
            in KEYS, otherwise under one in EMA_KEYS, otherwise as the only dict of tensors, or the only one with such
            a key.
        say: Called with a line about weights that are not used. The default emits a Python warning.

    Returns:
        The tensors by name. `_orig_mod.`, and `module.` if all names start with it, are removed from the names.

    Raises:
        AdapterError: If there are no weights, or several sets of weights.
    """
    if isinstance(loaded, nn.Module):
        raise AdapterError(f"a whole model instead of its weights: {CONVERT}")
    found = _found(loaded, say, DEEPEST)
    if found is None:
        raise AdapterError(_why_none(loaded))
    weights = {name.replace("_orig_mod.", ""): t for name, t in found.items()}
    if len(weights) < len(found):
        raise AdapterError("two entries have the same name without _orig_mod.")
    while all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): t for name, t in weights.items()}
    return weights


def _found(value: Any, say: Say, deepest: int) -> dict[str, Tensor] | None:
    """Return the weights in a value, or None. Raises if there are several."""
    if not isinstance(value, dict) or not value or not deepest:
        return None
    noted = [name for name, item in value.items() if item is None or type(item) in (bool, int, float, str)]
    if weights := _weights({name: item for name, item in value.items() if name not in noted}):
        if noted:
            say(f"ignored what is not a tensor beside the weights: {_some(noted)}")
        if extra := [name for name in value if name not in weights and name not in noted]:
            say(f"ignored the extra state of modules: {_some(extra)}")
        return weights
    inner = {key: _found(value.get(key), say, deepest - 1) for key in KEYS + EMA_KEYS}
    plain = {key: found for key in KEYS if (found := inner[key]) is not None}
    averaged = {key: found for key in EMA_KEYS if (found := inner[key]) is not None}
    if not plain and not averaged:
        items = [(key, item) for key, item in value.items() if isinstance(key, str) and isinstance(item, dict)]
        keyed = {key for key, item in items if any(inner in item for inner in KEYS + EMA_KEYS)}
        every = ((key, _found(item, say, deepest - 1) if key in keyed else _weights(item)) for key, item in items)
        plain = {key: found for key, found in every if found}
    chosen = plain or averaged
    if len(chosen) > 1:
        raise AdapterError(f"several sets of weights, under {_some(list(chosen))}: save only one of them")
    if plain and averaged:
        say(f"used the weights under {_some(list(plain))}, not their moving average under {_some(list(averaged))}")
    elif averaged:
        say(f"used the moving average of the weights, under {_some(list(averaged))}: there are no others")
    return next(iter(chosen.values()), None)


def _weights(value: Any) -> dict[str, Tensor] | None:
    """Return a dict of tensors without the extra state of its modules, or None for anything else."""
    if not isinstance(value, dict):
        return None
    kept = {k: t for k, t in value.items() if not (isinstance(k, str) and k.rpartition(".")[2] == "_extra_state")}
    return kept if kept and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in kept.items()) else None


def _why_none(loaded: Any) -> str:
    """Say why there are no weights in the contents of a file."""
    inside = [key for key in KEYS + EMA_KEYS if isinstance(loaded, dict) and key in loaded]
    for value in [loaded, *(loaded[key] for key in inside)]:
        if isinstance(value, Foreign):
            return f"it holds a whole object ({_some([value.name])}) instead of its weights: {CONVERT}"
    if inside and isinstance(loaded[inside[0]], dict) and loaded[inside[0]]:
        return _why_none(loaded[inside[0]])
    keys = ", ".join(KEYS)
    if not isinstance(loaded, dict) or not loaded:
        return f"no weights found: a dict of tensors is needed, directly or under {keys}"
    odd = [
        f"{name} ({value.name})" if isinstance(value, Foreign) else str(name)
        for name, value in loaded.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    return f"no weights found: {_some(odd)} are not tensors, and there is no {keys}"


def load_weights(model: nn.Module, weights: dict[str, Tensor], say: Say = warn) -> None:
    """Load weights into a model. The model does not change if they do not fit.

    A prefix that all names have in the file, such as `model.` of Lightning, is ignored. Entries that the model lacks
    are refused, except the state of neurons (`mem`, `v`), counters of a profiler (`total_ops`), losses, metrics, and
    moving averages of the weights.

    Args:
        model: The model.
        weights: Tensors by name, those of the model.
        say: Called with a line about entries that are not used. The default emits a Python warning.

    Raises:
        AdapterError: If names or shapes do not match, with the most similar names, or if weights are not finite.
    """
    own = dict(model.state_dict())
    if extra := [name for name, t in own.items() if not isinstance(t, Tensor)]:
        raise AdapterError(f"modules with extra state that is not a tensor are not supported: {_some(extra)}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if lazy := [name for name, t in own.items() if is_lazy(t)]:
        raise AdapterError(f"the model has lazy layers ({_some(lazy)}): run it on a batch of inputs before")
    state = {name for name in own if name not in parameters and is_state(name)}
    optional = {name for name in state if name.rpartition(".")[2] not in SHORT}
    groups: dict[tuple[Any, ...], list[str]] = {}  # names of the same tensor
    for name, t in own.items():
        groups.setdefault((t.data_ptr(), t.shape, t.stride()) if t.data_ptr() else (name,), []).append(name)
    once = {name for names in groups.values() for name in names[1:]}  # a .safetensors file has each tensor once
    try:
        match = match_names(own, weights, own.keys() - optional - once)
    except AmbiguousError as error:
        raise AdapterError(
            f"several sets of weights fit the model: names that begin with {_some(list(error.args))}: save only one"
        ) from None
    fitting = {name: weights[theirs] for name, theirs in match.names.items()}
    for names in groups.values():
        if known := [fitting[name] for name in names if name in fitting]:
            same_shape = all(t.shape == own[names[0]].shape for t in known)  # other shapes are refused below
            if same_shape and not all(_same(t, known[0]) for t in known[1:]):
                raise AdapterError(f"{_some(names)} share one tensor in the model, but not in the file")
            fitting |= {name: known[0] for name in names if name not in fitting}
    unused = [name for name in own if name in optional and name not in fitting]
    unused += [name for name in own if name in state & fitting.keys() and fitting[name].shape != own[name].shape]
    fitting = {name: t for name, t in fitting.items() if name not in unused}
    modules = {name for name, _ in model.named_modules()}
    named = [(f"{path}.{a}".removeprefix("."), m, a) for path, m in model.named_modules() for a in SHORT]
    attributes = {full for full, module, a in named if _has(module, a)}
    beside = [name for name in match.rest if is_beside(name, match.prefix, modules, attributes)]
    _check(own, parameters, fitting, unused, [name for name in match.rest if name not in beside])
    if match.averaged:
        say(f"used the weights {match.prefix}*, not their moving average {match.averaged}*")
        beside = [name for name in beside if not name.startswith(match.averaged)]
    if beside:
        say(f"ignored entries of the file that are not weights of the model: {_some(beside)}")
    if unused:
        say(f"the state of neurons is not taken from the file: {_some(unused)}")
    model.load_state_dict(fitting, strict=False)


def _check(
    own: dict[str, Tensor], parameters: set[str], fitting: dict[str, Tensor], unused: list[str], unexpected: list[str]
) -> None:
    """Raise if weights do not fit a model.

    Args:
        own: The model's own tensors by name.
        parameters: Names of the parameters among them.
        fitting: The weights from the file, by the names of the model.
        unused: Names of the model for which no weights are needed.
        unexpected: Names of the file that the model does not have.
    """
    problems = []
    if missing := [name for name in own if name not in fitting and name not in unused]:
        near = [f"{name}{_near(name, unexpected)}" for name in missing[:SHOWN]]
        problems.append(f"missing {_some(near + missing[SHOWN:])}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{name} {list(t.shape)} for {list(own[name].shape)}"
        for name, t in fitting.items()
        if own[name].shape != t.shape
    ]
    if shapes:
        problems.append(f"other shapes: {_some(shapes)}")
    if problems:
        raise AdapterError(f"the weights do not fit the model: {'; '.join(problems)}")
    kinds = [
        f"{name} ({str(t.dtype).removeprefix('torch.')})"
        for name, t in fitting.items()
        if own[name].dtype.is_floating_point and not t.dtype.is_floating_point
    ]
    if kinds:
        raise AdapterError(f"the weights are not real numbers: {_some(kinds)}: save the weights before quantization")
    if broken := [n for n, t in fitting.items() if n in parameters and not _finite(t, own[n])]:
        raise AdapterError(f"NaN or infinite weights: {_some(broken)}: the training diverged: use an earlier file")


def _finite(t: Tensor, own: Tensor) -> bool:
    """Return whether all elements are finite, also as numbers of the model's type."""
    return bool(torch.isfinite(t.to(own.dtype)).all())


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of the same shape have the same elements. NaN equals NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _has(module: nn.Module, name: str) -> bool:
    """Return whether a module has this attribute, other than a parameter. An attribute that raises is there."""
    try:
        return not isinstance(getattr(module, name), nn.Parameter)
    except AttributeError:
        return False
    except Exception:  # the user's property
        return True


def _near(name: str, names: list[str]) -> str:
    """Return the most similar name as a question, or an empty string."""
    found = difflib.get_close_matches(name, names[:1000], 1, 0.5)
    return f" ({found[0]}?)" if found else ""


def _some(names: list[str]) -> str:
    """Join the first names, without unprintable characters, and count the others."""
    more = len(names) - SHOWN
    shown = ("".join(c if c.isprintable() else "?" for c in name[:LONGEST]) for name in names[:SHOWN])
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
