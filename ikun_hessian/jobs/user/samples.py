"""Read the samples that a function of the user's returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.user.code import called, load_function, readable

if TYPE_CHECKING:
    from torch import Tensor

WHAT = "(inputs, targets), a data set of such samples, or batches of them"
LABELS = ("labels", "label", "targets", "target")  # keys of the targets in a batch that is one dict
MOST_EMPTY = 1000  # batches without samples, one after the other


def read_samples(
    text: str, samples: str, limit: float, time_first: bool = False, fewer: bool = False
) -> tuple[Any, Tensor]:
    """Read samples from a function of the user's, "module:function" or "path/to/file.py:function".

    The other arguments, the result and the errors are those of `samples_in`.
    """
    _check_count(samples)
    found = called("--data", text, load_function("--data", text))
    return samples_in(found, f"--data {text}", samples, limit, time_first, fewer)


def samples_in(
    found: Any, what: str, samples: str, limit: float, time_first: bool = False, fewer: bool = False
) -> tuple[Any, Tensor]:
    """Read samples from data of the user's.

    Args:
        found: A pair (inputs, targets), a data set, or batches such as those of a DataLoader.
        what: What holds the samples, for messages.
        samples: Number of samples, or "all".
        limit: Largest size of the samples in GiB.
        time_first: Whether batches have time as the first axis: inputs [T, N, ...] with two axes or more, and targets
            [T, N, ...] with three axes or more. Others have the samples first.
        fewer: Whether there may be fewer samples.

    Returns:
        Inputs x [N, ...], a tensor, or a dict, tuple or list of tensors, and targets y [N, ...].

    Raises:
        UsageError: If the data fail, are something else, or have too few or too many samples.
    """
    import torch

    from hessian_tools import nested

    _check_count(samples)
    xs, ys, count, size, empty = [], [], 0, 0, 0
    wanted = None if samples == "all" else int(samples)
    with readable(what):
        for number, batch in enumerate(_batches(found, what), 1):
            x, y = _pair(batch, f"{what}: batch {number}", time_first)
            xs.append(x)
            ys.append(y)
            count, size = count + len(y), size + sum(t.nbytes for t in [*nested.tensors(x), y])
            empty = 0 if len(y) else empty + 1
            if empty > MOST_EMPTY:
                raise UsageError(f"{what}: {empty} batches in a row have no samples: end the data, or yield samples")
            if wanted is not None and count >= wanted:
                break
            if size > limit * 2**30:
                raise UsageError(
                    "{}: more than {} GiB of samples: give {samples}, or more {memory}",
                    what,
                    f"{limit:.2g}",
                    samples=...,
                    memory=...,
                )
        if not count:
            raise UsageError(f"{what}: returned no samples")
        if wanted is not None and count < wanted and not fewer:
            raise UsageError("{samples}: give a number from 1 to {}, or all", count, samples=wanted)
        for name, parts in (("inputs", xs), ("targets", ys)):
            shapes = list(dict.fromkeys(_sample(part) for part in parts))
            if len(shapes) > 1:
                raise UsageError(f"{what}: {name} have shapes {shapes[0]} and {shapes[1]}: all must be the same")
        x, y = nested.selected(nested.joined(xs), slice(wanted)), torch.cat(ys)[:wanted]
    if not all(torch.isfinite(t).all() for t in [*nested.tensors(x), y]):
        raise UsageError(f"{what}: NaN or infinite values")
    return x, y


def _check_count(samples: str) -> None:
    """Raise UsageError if a number of samples is neither "all" nor at least 1."""
    if samples != "all" and not (samples.isdecimal() and int(samples) >= 1):
        raise UsageError("{samples}: give a number, or all", samples=samples)


def _sample(part: Any) -> str:
    """Describe the shapes and dtypes of one sample, with their names in a dict."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    leaves = [(path, t) for path, t in pytree.tree_flatten_with_path(part)[0] if isinstance(t, Tensor)]
    kinds = [(pytree.keystr(path), f"{list(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}") for path, t in leaves]
    return ", ".join(f"{name} {kind}".strip() for name, kind in kinds)


def _batches(found: Any, what: str) -> Iterator[Any]:
    """Yield the batches in what the user's function returned."""
    from torch.utils.data import DataLoader, Dataset

    pair = isinstance(found, tuple | list) and len(found) == 2 and _is_inputs(found[0]) and _is_array(found[1])
    if pair or (isinstance(found, Mapping) and any(key in found for key in LABELS)):
        yield found
    elif isinstance(found, Dataset) or (_is_data_set(found) and not hasattr(found, "__iter__")):
        yield from DataLoader(found, batch_size=256)
    elif isinstance(found, dict | str | bytes) or _is_array(found) or not hasattr(found, "__iter__"):
        raise UsageError(f"{what}: returned {kind_text(found)}, but {WHAT} are needed")
    else:
        yield from found


def _is_data_set(value: Any) -> bool:
    """Whether a value has a length and samples by index, like torch's data sets and those of tonic."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, dict | str | bytes)


def _is_inputs(value: Any) -> bool:
    """Whether a value is an array, or a dict, tuple or list with arrays."""
    if isinstance(value, Mapping):
        return any(_is_inputs(part) for part in value.values())
    if isinstance(value, tuple | list):
        return any(_is_inputs(part) for part in value)
    return _is_array(value)


def _is_array(value: Any) -> bool:
    """Whether a value is an array or a tensor."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _pair(batch: Any, what: str, time_first: bool) -> tuple[Any, Tensor]:
    """Check a batch and return its inputs and targets as tensors on the CPU, samples first. A dict can hold both."""
    import torch

    from hessian_tools import nested

    if isinstance(batch, Mapping) and (keys := [key for key in LABELS if key in batch]):
        batch = {key: value for key, value in batch.items() if key != keys[0]}, batch[keys[0]]
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and _is_inputs(batch[0]) and _is_array(batch[1])):
        needed = f"(inputs [N, ...], targets [N, ...]), or a dict with {LABELS[0]},"
        raise UsageError(f"{what} is {kind_text(batch)}, but {needed} are needed")
    y = torch.as_tensor(batch[1]).detach().cpu()
    x = _tensors(batch[0])
    shapes, given = [t.shape for t in nested.tensors(x)], y.shape
    if time_first:
        x = nested.mapped(lambda t: t.transpose(0, 1) if t.dim() > 1 else t, x)
        y = y.transpose(0, 1) if y.dim() > 2 else y
    elif y.dim() and all(s[:1] != y.shape[:1] and s[1:2] == y.shape[:1] for s in shapes):
        raise UsageError(
            "{} has inputs {} for {} targets: if the first axis is time, give {time_first_data}",
            what,
            ", ".join(str(list(s)) for s in shapes),
            len(y),
            time_first_data=True,
        )
    fits = y.dim() > 0 and all(t.shape[:1] == y.shape[:1] for t in nested.tensors(x))
    if (isinstance(x, torch.Tensor) and x.dim() < 2) or not fits:
        raise UsageError(
            f"{what} has inputs {', '.join(str(list(s)) for s in shapes)} and targets {list(given)}, but "
            f"{'[T, N, ...] and [N]' if time_first else '[N, ...] and [N, ...]'} are needed"
        )
    return x, y


def _tensors(value: Any) -> Any:
    """Return inputs with tensors on the CPU in place of arrays."""
    import torch

    if isinstance(value, Mapping):
        return {key: _tensors(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_tensors(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return torch.as_tensor(value).detach().cpu() if _is_array(value) else value


def kind_text(value: Any) -> str:
    """Describe a value by its class, and arrays by their shape and dtype."""
    if _is_array(value):
        return f"{type(value).__name__} {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    inner = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{inner}"
