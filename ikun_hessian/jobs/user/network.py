"""Open a network of the user's own for analysis: its weights, samples, loss and surrogates, as the options say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.user.code import called, load_function, readable, sources, where
from ikun_hessian.jobs.user.loss import fitting_targets, loss_by_name, loss_name, loss_of_option, tried_loss
from ikun_hessian.jobs.user.samples import WHAT, read_samples

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hessian_tools.objective import Loss
    from ikun.adapters import Adapted
    from ikun.surrogate_check import Spike


Build = Callable[..., "Adapted"]  # (x, surrogate, replacement, steeper, reset)
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
    path: Path,
    own: Own,
    *,
    samples: str,
    surrogate: str | None,
    memory: float,
    fewer: bool = False,
    forward_only: bool = False,
) -> Opened:
    """Open the network that `own` describes with the weights in a file, or the whole network in a .nir file.

    Args:
        path: The file.
        own: The options that describe the network, its samples and its loss.
        samples: Number of samples, or "all".
        surrogate: Surrogate NAME:P to analyse with, in place of all surrogates; None for the network's own.
        memory: Memory in GiB. The samples may use a quarter of it.
        fewer: Whether there may be fewer samples than asked for.
        forward_only: Whether only forward passes will be made, so that the network needs no derivatives.

    Returns:
        The opened network.

    Raises:
        AdapterError: If the network cannot be adapted.
        UsageError: If the file, an option or a function of the user's cannot be used.
    """
    if own.data is None:
        raise UsageError(GIVE_DATA)
    if path.suffix == ".nir" and own.model is not None:
        raise UsageError(f"{path} holds a whole network: leave out --model")
    reset = load_function("--reset", own.reset) if own.model is not None and own.reset is not None else None
    build = _nir(path, own) if own.model is None else _built(path, own, own.model, forward_only)
    x, y = read_samples(own.data, samples, memory / 4, own.time_first_data, fewer)
    code = [load_function("--model", own.model)] if own.model is not None else []
    loss = loss_name(own.loss or "mse")
    labels = replace(own, model=own.model or path.name, loss=loss)
    with time_explained(own, lambda other: _built(path, other, own.model or "")(x, None, None, 1.0, reset)):
        return _opened(build, x, y, labels, surrogate, reset, code, partial(loss_of_option, loss), own.model is None)


@contextmanager
def time_explained(own: Own, tried: Callable[[Own], object]) -> Iterator[None]:
    """Say whether a network that cannot be adapted needs a number of time steps, or must not get one.

    Args:
        own: Its options.
        tried: Adapts the network with other options.

    Raises:
        AdapterError: In place of one that is raised inside, if the network can be adapted with or without a number of
            time steps.
    """
    from ikun.adapters import AdapterError

    try:
        yield
    except AdapterError as error:
        shapes = "fails on inputs of shape" in str(error) or "gave outputs of shape" in str(error)
        if not shapes or "give " in str(error):  # time is not the reason, or it says what to do
            raise
        try:
            tried(replace(own, timesteps=2 if own.timesteps is None else None))
        except (AdapterError, UsageError):
            raise error from None
        if own.timesteps is None:
            raise AdapterError("the network needs the number of time steps T: give {steps}", steps=...) from None
        raise AdapterError("the network runs through time by itself: leave out {steps}", steps=...) from None


def open_network(
    network: nn.Module,
    x: Any,
    y: Tensor,
    own: Own,
    *,
    loss: str | Callable[..., Any],
    reset: Callable[[nn.Module], None] | None,
    surrogate: str | None,
    forward_only: bool = False,
) -> Opened:
    """Open a network that is in memory, as `open_own` opens one from a file.

    Args:
        network: The network. It is not changed.
        x: Inputs [N, ...], a tensor, or a dict, tuple or list of tensors.
        y: Targets [N, ...].
        own: Description of the network and its samples. The functions in it are only names.
        loss: Name of a loss, or a function loss(outputs, targets).
        reset: Clears the state of the network, in addition to the library's own reset.
        surrogate: Surrogate NAME:P to analyse with, in place of all surrogates; None for the network's own.
        forward_only: Whether only forward passes will be made, so that the network needs no derivatives.

    Returns:
        The opened network.

    Raises:
        AdapterError: If the network cannot be adapted.
        UsageError: If the loss or the targets cannot be used.
    """

    def chosen(first: Adapted, x: Any, y: Tensor) -> tuple[Loss, list[Callable[..., Any]]]:
        if not isinstance(loss, str):
            return tried_loss(loss, f"loss={own.loss}", first, x, y)
        if (known := loss_by_name(loss)) is None:
            raise UsageError("{loss}: give 'ce' (cross-entropy), 'mse', 'tet', or a function", loss=loss)
        return known, []

    def build(x: Any, surrogate: Any, replacement: Any, steeper: float, reset: Any) -> Adapted:
        return _adapted(network, x, own, surrogate, replacement, steeper, reset, forward_only)

    return _opened(build, x, y, own, surrogate, reset, [], chosen, False)


def _opened(
    build: Build,
    x: Any,
    y: Tensor,
    own: Own,
    surrogate: str | None,
    reset: Callable[..., Any] | None,
    code: list[Callable[..., Any]],
    loss_of: Callable[[Adapted, Any, Tensor], tuple[Loss, list[Callable[..., Any]]]],
    nir: bool,
) -> Opened:
    """Adapt a network and describe it. `loss_of` returns the loss and its functions, `code` are further functions."""
    import torch

    from hessian_tools import nested
    from hessian_tools.perturbation import class_count
    from ikun.adapters.summary import described
    from ikun.surrogates import Surrogate

    analysed = Surrogate.parse(surrogate) if surrogate else None
    instead = Surrogate.parse(own.replace_surrogate) if own.replace_surrogate else None
    if analysed and instead:
        raise UsageError(
            "{surrogate} replaces every surrogate: leave out {replacement}", surrogate=..., replacement=...
        )

    def adapted(steeper: float = 1.0, surrogate: str | None = None) -> Adapted:
        if steeper == 1 and surrogate is None:
            return first
        every = Surrogate.parse(surrogate) if surrogate else analysed
        return build(x, *(None if s is None else s.steeper(steeper) for s in (every, instead)), steeper, reset)

    with located():
        first = build(x, analysed, instead, 1.0, reset)
        network = described(first, nested.selected(x, slice(3)))
    y = fitting_targets(own.loss or "", y, first, x)
    loss, functions = loss_of(first, x, y)
    trained = network.pop("trained_surrogate") or (str(analysed) if nir and network["neuron"] else None)
    stay = dict.fromkeys(str(instead) if f.replaced else f.label for f in first.surrogates)
    functions = [*functions, *code, *([reset] if reset else [])]
    threshold = network.pop("threshold")
    classes = [type(module) for module in first.model.modules() if not type(module).__module__.startswith("torch.")]
    network = {
        "model": own.model,
        "code": digest(sorted(file.read_bytes() for file in sources([*functions, *classes]))),
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
    data = {"name": own.data, "split": "", "sha256": digest([shapes, *parts]), "loss": own.loss}
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


def _built(path: Path, own: Own, model: str, forward_only: bool = False) -> Build:
    """Build the user's network and load its weights. Returns a function that adapts it."""
    from torch import nn

    from ikun.adapters import AdapterError, load_weights, read_weights
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

    def build(x: Any, surrogate: Any, replacement: Any, steeper: float, reset: Any) -> Adapted:
        with readable(f"--model {model}", AdapterError):
            adapted = _adapted(network, x, own, surrogate, replacement, steeper, reset, forward_only)
        return replace(adapted, warnings=(*notes, *adapted.warnings))

    return build


def _adapted(
    network: nn.Module,
    x: Any,
    own: Own,
    surrogate: Any,
    replacement: Any,
    steeper: float,
    reset: Any,
    forward_only: bool,
) -> Adapted:
    """Adapt a network as `own` describes it, for forward passes only if it has no derivatives and none are needed."""
    from ikun.adapters import AdapterError, adapt

    make = partial(
        adapt,
        network,
        x,
        **adapt_options(own),
        surrogate=_spike(surrogate),
        replacement=_spike(replacement),
        steeper=steeper,
        reset=reset,
    )
    try:
        return make()
    except AdapterError:
        if not forward_only:
            raise
    return make(forward_only=True)


def _nir(path: Path, own: Own) -> Build:
    """Return a function that reads and adapts the network in a .nir file."""
    from ikun.adapters import adapt
    from ikun.adapters.libraries.nir import read_nir

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
