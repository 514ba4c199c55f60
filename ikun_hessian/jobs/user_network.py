"""Open a network of the user's own for analysis: its weights, samples, loss and surrogates, as the options say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.user_code import called, load_function, readable, sources, where
from ikun_hessian.jobs.user_samples import WHAT, kind_text, read_samples

if TYPE_CHECKING:
    from torch import Tensor

    from hessian_tools.objective import Loss
    from ikun.adapters import Adapted
    from ikun.surrogate_check import Spike


GIVE_DATA = f"--data module:function is needed: a function that returns {WHAT}"


@dataclass(frozen=True)
class Opened:
    """An opened network with its samples.

    Attributes:
        adapted: Function (steeper=1.0, surrogate=None) that returns the network with steeper surrogates, or with
            another surrogate. It returns the same object whenever it is called with the defaults.
        loss: The loss.
        x: Inputs [N, ...], a tensor, or a dict, tuple or list of tensors.
        y: Targets [N, ...].
        network: Description of the network, as plain values.
        data: Description of the samples, as plain values.
        spiking: Whether the network has surrogates that can be changed.
        threshold: Threshold of the neurons, if they share one.
    """

    adapted: Callable[..., Adapted]
    loss: Loss
    x: Any
    y: Tensor
    network: dict[str, Any]
    data: dict[str, Any]
    spiking: bool
    threshold: float | None


def open_own(
    path: Path, own: Own, *, samples: str, surrogate: str | None, memory: float, fewer: bool = False
) -> Opened:
    """Open the network that `own` describes with the weights in a file, or the whole network in a .nir file.

    Args:
        path: The file.
        own: The options that describe the network, its samples and its loss.
        samples: Number of samples, or "all".
        surrogate: Surrogate NAME:P to analyse with, in place of all surrogates; None for the network's own.
        memory: Memory in GiB. The samples may use a quarter of it.
        fewer: Whether there may be fewer samples than asked for.

    Returns:
        The opened network.

    Raises:
        AdapterError: If the network cannot be adapted.
        UsageError: If the file, an option or a function of the user's cannot be used.
    """
    import torch

    from hessian_tools import nested
    from hessian_tools.perturbation import class_count
    from ikun.adapters.summary import described
    from ikun.surrogates import Surrogate

    if own.data is None:
        raise UsageError(GIVE_DATA)
    if path.suffix == ".nir" and own.model is not None:
        raise UsageError(f"{path} holds a whole network: leave out --model")
    reset = load_function("--reset", own.reset) if own.model is not None and own.reset is not None else None
    analysed = Surrogate.parse(surrogate) if surrogate else None
    instead = Surrogate.parse(own.replace_surrogate) if own.replace_surrogate else None
    if analysed and instead:
        raise UsageError("--surrogate replaces every surrogate: leave out --replace-surrogate")
    build = _nir(path, own) if own.model is None else _built(path, own, own.model)
    x, y = read_samples(own.data, samples, memory / 4, own.time_first_data, fewer)

    def adapted(steeper: float = 1.0, surrogate: str | None = None) -> Adapted:
        if steeper == 1 and surrogate is None:
            return first
        every = Surrogate.parse(surrogate) if surrogate else analysed
        return build(x, *(None if s is None else s.steeper(steeper) for s in (every, instead)), steeper, reset)

    with located():
        first = build(x, analysed, instead, 1.0, reset)
        network = described(first, nested.selected(x, slice(3)))
    y = _targets(own.loss or "mse", y, first, x)
    loss, functions = _loss(own.loss or "mse", first, x, y)
    trained = network.pop("trained_surrogate") or (str(analysed) if own.model is None and network["neuron"] else None)
    stay = dict.fromkeys(str(instead) if f.replaced else f.label for f in first.surrogates)
    functions += [load_function("--model", own.model)] if own.model is not None else []
    threshold = network.pop("threshold")
    classes = [type(module) for module in first.model.modules() if not type(module).__module__.startswith("torch.")]
    network = {
        "model": own.model or path.name,
        "code": digest(
            sorted(file.read_bytes() for file in sources([*functions, *([reset] if reset else []), *classes]))
        ),
        **network,
        "surrogate": (str(analysed) if analysed and trained else ", ".join(stay)) or None,
        "replacement": str(analysed or instead or "") or None,
        "trained_surrogate": trained,
        "dt": own.dt,
        "classes": class_count(y),
    }
    leaves = [*nested.tensors(x), y]
    parts = [t.contiguous().flatten().view(torch.uint8).numpy() for t in leaves]
    shapes = " ".join(f"{t.dtype} {list(t.shape)}" for t in leaves).encode()
    data = {"name": own.data, "split": "", "sha256": digest([shapes, *parts]), "loss": own.loss or "mse"}
    spiking = trained is not None
    return Opened(adapted, loss, x, y, network, data, spiking, threshold if spiking else None)


def digest(parts: list[Any]) -> str:
    """Return the SHA-256 of the SHA-256 digests of the parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


@contextmanager
def located() -> Iterator[None]:
    """Add the line of the user's code that failed, if there is one, to the message of an AdapterError."""
    from ikun.adapters import AdapterError

    try:
        yield
    except AdapterError as error:
        if error.__cause__ is None:
            raise
        raise AdapterError("{}{}", error, where(error.__cause__)) from error


# ---------------------------------------------------------------- the network
Build = Callable[..., "Adapted"]  # (x, surrogate, replacement, steeper, reset)


def _spike(surrogate: Any) -> Spike | None:
    """Return the spike function of a surrogate."""
    from ikun.surrogates import spike

    return None if surrogate is None else lambda h: spike(h, surrogate)


def adapt_options(own: Own) -> dict[str, Any]:
    """Return the arguments of `adapt` that the options of a network give."""
    return {
        "library": own.library,
        "steps": own.timesteps,
        "sequences": own.sequences,
        "time_first": own.time_first,
        "output": own.output or "spikes",
        "readout": own.readout,
        "valid": own.valid,
    }


def _built(path: Path, own: Own, model: str) -> Build:
    """Build the user's network and load its weights. Returns a function that adapts it."""
    from torch import nn

    from ikun.adapters import AdapterError, adapt, load_weights, read_weights
    from ikun.adapters.adapt_network import bare

    if own.dt is not None:
        raise UsageError("--dt is only for .nir files: leave it out")
    function = load_function("--model", model)
    if isinstance(function, nn.Module):
        raise UsageError(f"--model {model}: it is a network: give a function or class without arguments that makes one")
    network = called("--model", model, function)
    if not isinstance(network, nn.Module):
        raise UsageError(f"--model {model}: returned a {type(network).__name__}, but a torch.nn.Module is needed")
    notes: list[str] = []
    weights = read_weights(path, notes.append)
    try:
        load_weights(bare(network), weights, notes.append)
    except AdapterError as error:
        raise UsageError(f"{path}: {error}") from None

    def build(x: Tensor, surrogate: Any, replacement: Any, steeper: float, reset: Any) -> Adapted:
        with readable(f"--model {model}", AdapterError):
            adapted = adapt(
                network,
                x,
                **adapt_options(own),
                surrogate=_spike(surrogate),
                replacement=_spike(replacement),
                steeper=steeper,
                reset=reset,
            )
        return replace(adapted, warnings=(*notes, *adapted.warnings))

    return build


def _nir(path: Path, own: Own) -> Build:
    """Return a function that reads and adapts the network in a .nir file."""
    from ikun.adapters import adapt
    from ikun.adapters.nir import read_nir

    try:
        import nir  # noqa: F401 - checked before anything is read
    except ImportError:
        raise UsageError(f"{path}: reading it needs the package nir: pip install nir") from None
    if own.timesteps is None:
        raise UsageError(f"{path} does not define time steps: give --timesteps, --dt, --surrogate and --reset")
    for name, value in (("replace-surrogate", own.replace_surrogate), ("output", own.output), ("library", own.library)):
        if value is not None:
            raise UsageError(f"--{name} is not for .nir files: leave it out")

    def build(x: Tensor, surrogate: Any, replacement: Any, steeper: float, reset: Any) -> Adapted:
        network = read_nir(path, dt=own.dt, spike=_spike(surrogate), reset=own.reset)
        options: dict[str, Any] = {"steps": own.timesteps, "sequences": own.sequences, "time_first": True}
        return adapt(network, x, **options, readout=own.readout, valid=own.valid)

    return build


# ---------------------------------------------------------------- the loss
def _targets(loss: str, y: Tensor, adapted: Adapted, x: Any) -> Tensor:
    """Check that targets fit the network's outputs.

    Labels [N] are converted to long, and so are labels [N, ...] of outputs [N, K, ...] for cross-entropy. Targets of
    the shape of the outputs, one-hot or of a regression, are converted to floating point; for cross-entropy they must
    be probabilities along K. The targets of a loss of the user's are not checked.
    """
    if _weight(loss) is not None:
        loss = "tet"
    if loss not in ("mse", "ce", "tet"):
        return y
    shape = [len(y), *_outputs(adapted, x, 3).shape[1:]]
    over_time = _over_time(adapted)
    if over_time and loss == "ce":
        raise UsageError("--loss ce needs one output per sample: with --readout none give tet or module:function")
    if loss == "mse" and y.is_floating_point() and y.dim() == 1 and shape == [len(y), 1]:
        return y[:, None]
    if loss == "mse" and y.is_floating_point() and list(y.shape) == [*shape, 1]:
        return y[:, 0]
    if list(y.shape) == shape and (y.dim() > 1 or loss == "mse") and not y.is_complex() and loss != "tet":
        y = y if y.is_floating_point() else y.float()
        if loss == "ce" and bool((y < 0).any() or ((y.sum(1) - 1).abs() > 1e-3).any()):
            raise UsageError("--loss ce needs labels [N], or targets [N, K] whose rows are probabilities")
        return y
    labels = [shape[0], *shape[2:]] if loss == "ce" and len(shape) > 1 else shape[:1]  # one per pixel or step
    wrong = y.is_floating_point() or y.is_complex() or str(y.dtype) == "torch.bool"
    if wrong or list(y.shape) not in (labels, shape[:1]):
        raise UsageError(
            f"--loss {loss} needs labels {'[N]' if len(labels) == 1 else labels} of whole numbers, not {kind_text(y)}: "
            f"return such labels, targets of the outputs' shape {shape}, or give --loss module:function"
        )
    if loss == "tet" and len(shape) != 3:
        raise UsageError(
            f"--loss tet needs outputs [N, T, K], but those of the network are [N, {str(shape[1:])[1:]}: "
            "give --readout none"
        )
    if len(shape) == 1 or (loss != "tet" and len(shape) > 2 and y.dim() == 1):
        needed = f", or labels {labels}" if len(labels) > 1 else ""
        cure = ": give targets of that shape" if over_time else ""
        raise UsageError(
            f"--loss {loss} needs outputs [N, K]{needed}, but those of the network are [N, {str(shape[1:])[1:]}{cure}"
        )
    classes = shape[-1] if loss == "tet" else shape[1]
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"labels must be from 0 to {classes - 1} for {classes} outputs, but some are {low if low < 0 else high}"
        )
    return y.long()


def _over_time(adapted: Adapted) -> bool:
    """Whether the loss gets the outputs over time."""
    return adapted.plan.time_axis is not None and adapted.plan.readout == "none"


def _weight(loss: str) -> float | None:
    """Return the weight of the square error of "tet" or "tet:WEIGHT"; None for another loss."""
    name, _, weight = loss.partition(":")
    try:
        return None if name != "tet" else float(weight or 0.05)
    except ValueError:
        return None  # a function in a module of that name


def _outputs(adapted: Adapted, x: Any, count: int) -> Tensor:
    """Return the outputs [n, ...] for the first `count` samples."""
    import torch

    from hessian_tools import nested
    from ikun.adapters.summary import inputs_of

    with torch.no_grad():
        out: Tensor = nested.call(adapted.model, inputs_of(adapted, nested.selected(x, slice(count))))
    return out


def _loss(loss: str, adapted: Adapted, x: Any, y: Tensor) -> tuple[Loss, list[Callable[..., Any]]]:
    """Return the loss, and the user's functions that it calls.

    A loss of the user's is tried on a few samples. It must return one finite number with a gradient. That it is a mean
    over samples is checked over the data (`hessian_tools.checks`).
    """
    import torch

    from hessian_tools.evaluation import loss_in_double
    from ikun.losses import LOSSES, tet, time_first

    if loss in LOSSES:
        return LOSSES[loss], []
    if (weight := _weight(loss)) is not None:
        with readable(f"--loss {loss}"):
            return tet(weight), []
    if ":" not in loss:
        raise UsageError(f"--loss {loss}: give mse, ce, tet, or module:function")
    function, what = load_function("--loss", loss), f"--loss {loss} in double precision"
    outputs = _outputs(adapted, x, 8).double().requires_grad_()
    if _over_time(adapted):
        what += f" on outputs {list(outputs.shape)}, the samples first"
    if isinstance(function, type):
        function = called("--loss", loss, function)
    code = [function if hasattr(function, "__code__") else type(function)]
    if type(function).__module__.startswith("snntorch.functional"):  # these take outputs [T, N, K]
        if outputs.dim() < 3:
            raise UsageError(f"--loss {loss} needs the outputs over time: give --readout none")
        function = time_first(function)
    wide = loss_in_double(function)
    targets = y[:8].to(outputs.device, torch.float64 if y.is_floating_point() else y.dtype, copy=True)
    with readable(what):
        found = wide(outputs, targets)
    if not isinstance(found, torch.Tensor) or found.dim():
        raise UsageError(f"{what}: returned {kind_text(found)}, but a tensor with one number and no axes is needed")
    if not found.requires_grad:
        raise UsageError(f"{what}: torch finds no gradient with respect to the outputs")
    if not torch.isfinite(found):
        raise UsageError(f"{what}: returned {float(found)}")
    return function, code
