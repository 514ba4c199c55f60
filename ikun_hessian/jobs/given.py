"""Open a network and samples that are in memory, or files, for the functions of `ikun_hessian` such as `analyze`."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Job, Own

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hessian_tools.objective import Objective
    from ikun_hessian.jobs.user.network import Opened

LOSS_NEEDED = (
    "{loss} is needed: give 'ce' (cross-entropy), 'mse', 'tet', or the function loss(outputs, targets) of the training"
)


@dataclasses.dataclass(frozen=True)
class Opening:
    """How to open a network in Python. The names and meanings are those of the command line's options.

    Attributes:
        samples: Number of samples; None for all.
        timesteps: Number of time steps to run the network for. None: the network runs through time by itself, or has
            no time. For `sequences`, None is the length of the second axis of the inputs.
        sequences: Whether samples are sequences [T, ...], with one input per step.
        time_first: Whether the network takes and returns [T, N, ...]. None: as its library does.
        time_first_data: Whether the batches of the data have time as the first axis.
        output: Which of several outputs to use: "spikes" (the first), "membrane" (the last), a number or a name.
        readout: How to reduce the outputs over time: "mean", "sum", "last", "max" or "none".
        valid: Entry of the inputs with the mask [N, T] or the lengths [N] of padded sequences.
        library: Library of the network; None: recognized by its layers.
        reset: Function that clears the network's state in addition to the library's reset; for NIR "hard" or "soft".
        dt: Time step of a NIR graph, in the unit of its time constants.
        surrogate: Surrogate "NAME:P" to analyse with, instead of the network's own.
        replace_surrogate: Surrogate "NAME:P" for those that cannot be differentiated twice.
        split: Split of the data set of a checkpoint of ikun-hessian.
        params: Pattern of parameter names, such as "fc*".
        batch_size: Samples per batch; None: as many as fit into a quarter of `memory`.
        dtype: "float32" or "float64".
        device: Device to compute on; None: that of the network.
        memory: Memory in GiB; None: half of the memory of the device.
        name: Name of the network in results; None: its class.
    """

    samples: int | None = None
    timesteps: int | None = None
    sequences: bool = False
    time_first: bool | None = None
    time_first_data: bool = False
    output: str | None = None
    readout: str | None = None
    valid: str | None = None
    library: str | None = None
    reset: Callable[[nn.Module], None] | str | None = None
    dt: float | None = None
    surrogate: str | None = None
    replace_surrogate: str | None = None
    split: str = "train"
    params: str = "*"
    batch_size: int | None = None
    dtype: str = "float32"
    device: str | None = None
    memory: float | None = None
    name: str | None = None


def open_given(
    model: Any, data: Any, loss: str | Callable[..., Any] | None, opening: Opening, forward_only: bool = False
) -> tuple[Job, float]:
    """Open a network with its samples.

    Args:
        model: A torch module, also of SpikingJelly, snnTorch, Norse or Sinabs, a `nir.NIRGraph`, or the path of a
            checkpoint of ikun-hessian or of a .nir file. It is not changed.
        data: Samples (inputs, targets), a data set, or batches such as those of a DataLoader. None: those of the
            checkpoint.
        loss: Name of a loss, or a function loss(outputs, targets). None: that of the checkpoint.
        opening: The other options.
        forward_only: Whether only forward passes will be made, so that the network needs no derivatives.

    Returns:
        The opened network, and the memory in GiB that an analysis may use.

    Raises:
        ParameterError: If the network, the samples or the options cannot be used.
        ValueError: If a file cannot be used.
    """
    from ikun_hessian.jobs.device import half_of_the_memory
    from ikun_hessian.jobs.open import make_job, open_job, source_of

    path = Path(model) if isinstance(model, str | Path) else None
    shared: dict[str, Any] = {key: getattr(opening, key) for key in ("batch_size", "params", "dtype")}
    shared["forward_only"] = forward_only
    if path is not None and path.suffix != ".nir" and data is None:
        device = opening.device or "cpu"
        memory = opening.memory or half_of_the_memory(device)
        samples = "all" if opening.samples is None else str(opening.samples)
        job = open_job(
            path, samples=samples, split=opening.split, surrogate=opening.surrogate, memory=memory, data_dir=None,
            device=device, **shared,
        )  # fmt: skip
        return job, memory
    if path is not None and path.suffix != ".nir":
        from ikun.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(path)
        model, loss = checkpoint.build(), loss or checkpoint.loss
    if data is None:
        raise UsageError("{data} is needed: give (inputs, targets), a Dataset or a DataLoader", data=...)
    if loss is None:
        raise UsageError(LOSS_NEEDED, loss=...)
    network, surrogate = _network(model, path, opening)
    device = opening.device or str(next((p.device for p in network.parameters()), "cpu"))
    memory = opening.memory or half_of_the_memory(device)
    x, y = _samples(data, opening, memory / 4)
    name = opening.name or (path.name if path else type(model).__name__)
    opening = dataclasses.replace(opening, name=name, surrogate=surrogate)
    if network is not model:  # a network of NIR takes [T, N, ...]
        opening = dataclasses.replace(opening, time_first=True)
    found = _found(network, x, y, loss, opening, data_kind(data), forward_only)
    return make_job(source_of(found), Path(), weights_digest(network), memory=memory, device=device, **shared), memory


def objective_of(
    network: nn.Module, data: Any, loss: str | Callable[..., Any], opening: Opening, most: int
) -> tuple[Objective, tuple[Any, Tensor]]:
    """Open a network with at most `most` samples, without a description of it.

    Returns:
        The objective, and its inputs and targets, which can be given as `data` again.

    Raises:
        ParameterError: If the network, the samples or the options cannot be used.
    """
    import torch

    from hessian_tools.objective import make_objective
    from ikun_hessian.jobs.device import half_of_the_memory

    memory = opening.memory or half_of_the_memory("cpu")
    x, y = _samples(data, dataclasses.replace(opening, samples=most), memory / 4, fewer=True)
    found = _found(network, x, y, loss, opening, data_kind(data))
    adapted = found.adapted()
    objective = make_objective(
        adapted.model, found.loss, (found.x, found.y), batch_size=opening.batch_size, params=opening.params,
        dtype=getattr(torch, opening.dtype), device=opening.device, reset=adapted.reset,
    )  # fmt: skip
    return objective, (x, y)


def _found(
    network: nn.Module,
    x: Any,
    y: Tensor,
    loss: str | Callable[..., Any],
    opening: Opening,
    data: str,
    forward_only: bool = False,
) -> Opened:
    """Adapt a network and check that the loss and the targets fit."""
    from ikun.adapters import adapt
    from ikun_hessian.jobs.user.loss import loss_name
    from ikun_hessian.jobs.user.network import adapt_options, open_network, time_explained

    steps = opening.timesteps
    if opening.sequences and steps is None and getattr(x, "ndim", 0) > 1:
        steps = int(x.shape[1])
    named = loss_name(loss) if isinstance(loss, str) else loss
    own = Own(
        model=opening.name or type(network).__name__,
        data=data,
        loss=named if isinstance(named, str) else getattr(named, "__name__", type(named).__name__),
        timesteps=steps,
        **{key: getattr(opening, key) for key in _SHARED},
    )
    reset = opening.reset if callable(opening.reset) else None

    def adapted(other: Own) -> object:
        return adapt(network, x, **adapt_options(other))

    with time_explained(own, adapted):
        return open_network(
            network, x, y, own, loss=named, reset=reset, surrogate=opening.surrogate, forward_only=forward_only
        )


_SHARED = (
    "library", "sequences", "time_first", "output", "readout", "valid", "time_first_data", "replace_surrogate", "dt"
)  # fmt: skip


def _network(model: Any, path: Path | None, opening: Opening) -> tuple[nn.Module, str | None]:
    """Return the network of a module, a NIR graph or a .nir file, and the surrogate to analyse it with."""
    from torch import nn

    if isinstance(model, nn.Module):
        if isinstance(opening.reset, str):
            raise UsageError("{reset}: give a function that clears the state of the network", reset=opening.reset)
        return model, opening.surrogate
    nir = path is not None or type(model).__name__ == "NIRGraph"
    if not nir:
        raise UsageError(
            "the model is a {}, but a torch.nn.Module, a NIR graph or a path is needed", type(model).__name__
        )
    from ikun.adapters.libraries.nir import from_nir, read_nir
    from ikun.surrogates import Surrogate, spike

    if opening.timesteps is None and not opening.sequences:
        raise UsageError("a NIR graph does not define {timesteps}", timesteps=...)
    if callable(opening.reset):
        raise UsageError("{reset}: a NIR graph needs 'hard' or 'soft'", reset=...)
    parsed = Surrogate.parse(opening.surrogate) if opening.surrogate else None
    options: dict[str, Any] = {
        "dt": opening.dt,
        "spike": None if parsed is None else lambda h: spike(h, parsed),
        "reset": opening.reset,
    }
    return (from_nir(model, **options) if path is None else read_nir(path, **options)), None


def _samples(data: Any, opening: Opening, limit: float, fewer: bool = False) -> tuple[Any, Tensor]:
    """Read the samples, with all random generators seeded and put back: a shuffled loader gives the same every time."""
    from ikun_hessian.jobs.user.samples import samples_in

    count = "all" if opening.samples is None else str(opening.samples)
    with seeded():
        return samples_in(data, "data", count, limit, opening.time_first_data, fewer)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed the random generators of Python, NumPy and torch, and put their states back at the end."""
    with kept_randomness():
        import numpy as np
        import torch

        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


@contextmanager
def untouched() -> Iterator[None]:
    """Compute exactly, outside of autocast, and put the random generators and torch's settings back at the end."""
    import torch

    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with kept_randomness(), exact, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Put the states of the random generators of Python, NumPy and torch (on every device) back at the end."""
    import numpy as np
    import torch

    plain, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(array)


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and values of a network's parameters and buffers."""
    import torch

    whole = hashlib.sha256()
    for name, t in network.state_dict().items():
        if isinstance(t, torch.Tensor):
            whole.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
            whole.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def data_kind(data: Any) -> str:
    """Name the data: the class of the data set, or of what holds the tensors."""
    inner = getattr(data, "dataset", data)
    return "tensors" if isinstance(inner, tuple | list) else type(inner).__name__
