"""Open a checkpoint and its data for analysis."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Job, Own

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hessian_tools.objective import Loss, Objective
    from hessian_tools.runtime.distributed import Group
    from ikun.checkpoint import Checkpoint
    from ikun.data.datasets import Dataset
    from ikun.data.lazy import Images
    from ikun_hessian.jobs.job import Own
    from ikun_hessian.jobs.user.network import Opened


SLOPES = {"slope x 1/2": {"steeper": 0.5}, "slope x 2": {"steeper": 2.0}}


@dataclasses.dataclass(frozen=True)
class Source:
    """What a Job is made of.

    Attributes:
        network: Function (steeper=1.0, **changes) that returns the model, and a function that resets its state.
        loss: The loss.
        x: Inputs [N, ...]; for a network of the user's own also a dict, tuple or list of tensors.
        y: Targets [N, ...].
        variants: See Job.
        threshold: See Job.
        provenance: Description of data, network and training.
        activity: Function that returns the activity of the neurons on the given number of samples.
        renamed: Function (steeper, **changes) that returns how texts in the traced network change with the model; None
            if that is not known.
        loss_over_time: Whether the loss takes outputs over time [N, T, ...].
    """

    network: Callable[..., tuple[nn.Module, Callable[[nn.Module], None] | None]]
    loss: Loss
    x: Any
    y: Tensor
    variants: dict[str, dict[str, Any]]
    threshold: float | None
    provenance: dict[str, Any]
    activity: Callable[[int], dict[str, Any]]
    renamed: Callable[..., Callable[[str], str] | None] = lambda steeper, **changes: None
    loss_over_time: bool = False


def open_job(
    path: Path,
    *,
    own: Own | None = None,
    samples: str,
    split: str,
    batch_size: int | None,
    params: str,
    surrogate: str | None,
    dtype: str,
    memory: float,
    data_dir: Path | None,
    device: str,
    group: Group | None = None,
    forward_only: bool = False,
) -> Job:
    """Open a checkpoint and its data as the options say (jobs.options.OPENING, jobs.options.OWN).

    Args:
        path: The checkpoint.
        own: Description of a network of the user's own; None for a checkpoint of this package.
        samples: Number of samples, or "all".
        split: Split of the data set: "train" or "test".
        batch_size: Samples per batch; None for as many as fit.
        params: Pattern of parameter names.
        surrogate: Surrogate to analyse with; None for the one used in training.
        dtype: Name of the floating-point type.
        memory: Memory in GiB. A quarter of it is for the batches in use. If one does not fit, it runs in segments of
            the network. An eighth is for samples from disk. If they do not fit, each batch is read when it is used.
        data_dir: Folder of the data set; None for the download cache.
        device: "cpu" or "cuda", from `pick`.
        group: Processes that share the work. All of them must call this function.
        forward_only: Whether only forward passes will be made, so that the network needs no derivatives.

    Returns:
        The opened checkpoint.

    Raises:
        UsageError: If the samples or the options cannot be used, or if one sample does not fit into the memory.
        ValueError: If the checkpoint or the data cannot be loaded.
    """
    from ikun.checkpoint import sha256

    before = _version(path)
    if own is not None and own.meant(path):
        if split != "train" or data_dir is not None:
            raise UsageError("--split and --data-dir are for checkpoints of ikun-hessian: use --data")
        from ikun_hessian.jobs.user.network import open_own

        source = source_of(
            open_own(path, own, samples=samples, surrogate=surrogate, memory=memory, forward_only=forward_only)
        )
    else:
        source = _ours(path, samples, split, surrogate, data_dir, memory)

    digest = sha256(path)
    if _version(path) != before:  # for example, a training has just ended
        raise UsageError(f"{path} changed while it was read: run the same command again")
    return make_job(
        source,
        path,
        digest,
        batch_size=batch_size,
        params=params,
        dtype=dtype,
        memory=memory,
        device=device,
        group=group,
        forward_only=forward_only,
    )


def make_job(
    source: Source,
    path: Path,
    digest: str,
    *,
    batch_size: int | None,
    params: str,
    dtype: str,
    memory: float,
    device: str,
    group: Group | None = None,
    forward_only: bool = False,
) -> Job:
    """Make the objective of an opened network, in batches that fit into the memory.

    Args:
        source: The network, the loss and the samples.
        path: The checkpoint. Path() for a network that is in memory.
        digest: SHA-256 of the weights.
        batch_size: See `open_job`, as for the other arguments.
        params: Pattern of parameter names.
        dtype: Name of the floating-point type.
        memory: Memory in GiB.
        device: The device.
        group: Processes that share the work.
        forward_only: Whether only forward passes will be made.

    Returns:
        The job.
    """
    import torch

    from hessian_tools import nested
    from hessian_tools.analysis.operator_spectrum.step_traces import mean_over_steps
    from hessian_tools.engine.programs import share_programs
    from hessian_tools.objective import make_objective, to
    from hessian_tools.operators.curvature import product_bytes

    # moved and converted once, not for every objective
    like = torch.empty(0, dtype=getattr(torch, dtype), device=device)
    held = isinstance(source.x, torch.Tensor | Mapping | tuple | list)
    samples = (nested.converted(source.x, like) if held else source.x, to(source.y, like))

    def objective(steeper: float = 1.0, **changes: Any) -> Objective:
        network, reset = source.network(steeper, **changes)
        once = changes.get("over_time") and not source.loss_over_time
        made = make_objective(
            network,
            mean_over_steps(source.loss) if once else source.loss,
            samples,
            batch_size=batch_size,
            params=params,
            dtype=like.dtype,
            device=device,
            reset=reset,
            forward_only=forward_only,
            check=not (alike := checked and changes.keys() <= {"ties"}),  # another slope or tie rule, the same network
        )
        made = dataclasses.replace(made, group=group, batch_memory=limit)
        if alike and (change := source.renamed(steeper, **changes)) is not None:
            share_programs(probe, made, change)
        return made

    workers = torch.get_num_threads() if device == "cpu" else 1
    limit = memory * 2**30 / 4 / workers
    checked = False
    probe = objective()
    checked = True
    size = product_bytes(probe) if not forward_only else _bytes_or_none(probe)
    asked, batch_size = batch_size, _batch_size(probe, batch_size, size, memory * 2**30, workers, group)
    first = probe if asked else probe.rebatched(batch_size)  # without a copy of the samples
    few = _fitting(size, memory * 2**30 / 12, 512)  # an autograd pass takes about three times what a product keeps
    provenance = {
        "checkpoint": {"path": "" if path == Path() else str(path), "sha256": digest},
        **source.provenance,
        "activity": source.activity(few),
    }
    plain = json.loads(json.dumps(provenance))
    return Job(path, first, objective, source.variants, source.threshold, plain)


def _bytes_or_none(objective: Objective) -> tuple[float, float]:
    """Return the bytes of a product as `product_bytes`, or zeros if the network has no second derivative."""
    from hessian_tools.operators.curvature import product_bytes

    try:
        return product_bytes(objective)
    except (ValueError, RuntimeError, NotImplementedError):
        return 0.0, 0.0


def _ours(path: Path, samples: str, split: str, surrogate: str | None, data_dir: Path | None, memory: float) -> Source:
    """Open a checkpoint of this package."""
    from ikun.checkpoint import CheckpointError, load_checkpoint
    from ikun.layer_statistics import observe
    from ikun.losses import LOSSES
    from ikun.networks import OverTime
    from ikun.surrogates import Surrogate

    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        if "not a checkpoint of ikun-hessian" not in str(error):
            raise
        raise UsageError(f"{error}: for a network of your own give --model module:function") from None
    network = checkpoint.network
    trained = Surrogate.parse(network.surrogate)
    analysed = Surrogate.parse(surrogate) if surrogate else trained
    data, x, digest = _samples(checkpoint, split, samples, data_dir, memory * 2**30 / 8)
    y = data.labels[: len(x)]

    def built(steeper: float = 1.0, over_time: bool = False, **changes: Any) -> tuple[nn.Module, None]:
        model = checkpoint.build(**{"surrogate": str(analysed.steeper(steeper)), **changes})
        return (OverTime(model).eval() if over_time else model), None

    def renamed(steeper: float, **changes: Any) -> Callable[[str], str]:
        old, new = (f'"surrogate": "{s.name}:{s.parameter!r}"' for s in (analysed, analysed.steeper(steeper)))
        ties = changes.get("ties", network.ties)
        return lambda text: text.replace(old, new).replace(f'"ties": "{network.ties}"', f'"ties": "{ties}"')

    def activity(few: int) -> dict[str, Any]:
        return {
            s.neuron: {"firing_rate": s.firing_rate, "dead": s.dead, "derivative_square": s.derivative_square}
            for s in observe(checkpoint.build(), x[:few], y[:few], LOSSES[checkpoint.loss])
        }

    variants: dict[str, dict[str, Any]] = dict(SLOPES)
    if network.model == "csnn":
        variants["ties reversed"] = {"ties": "last" if network.ties == "first" else "first"}
    provenance = {
        "data": {"name": data.name, "split": split, "sha256": digest, "loss": checkpoint.loss},
        "network": {
            **dataclasses.asdict(network),
            "surrogate": str(analysed),
            "trained_surrogate": str(trained),
        },
        "training": checkpoint.training,
    }
    return Source(built, LOSSES[checkpoint.loss], x, y, variants, network.threshold, provenance, activity, renamed)


def source_of(found: Opened) -> Source:
    """Return a network of the user's own as the source of a job."""
    from hessian_tools import nested
    from ikun.adapters import variants
    from ikun.adapters.summary import firing_rates
    from ikun_hessian.jobs.user.network import located

    few = nested.selected(found.x, slice(3))

    def built(
        steeper: float = 1.0,
        surrogate: str | None = None,
        relaxed: bool = False,
        ties: str = "first",
        over_time: bool = False,
    ) -> tuple[nn.Module, Callable[[nn.Module], None] | None]:
        with located():
            adapted = found.adapted(steeper, surrogate)
            if relaxed:
                adapted = variants.relaxed_network(adapted, few)
            if over_time:
                adapted = variants.over_time(adapted)
        if ties == "last":
            adapted = variants.ties_reversed(adapted)
        return adapted.model, adapted.reset

    others: dict[str, dict[str, Any]] = dict(SLOPES) if found.spiking else {}
    if found.spiking and variants.max_pools(found.adapted(), few):
        others["ties reversed"] = {"ties": "last"}
    return Source(
        built,
        found.loss,
        found.x,
        found.y,
        others,
        found.threshold,
        {"data": found.data, "network": found.network, "training": {}},
        lambda few: firing_rates(found.adapted(), nested.selected(found.x, slice(few))),
        loss_over_time=found.adapted().plan.readout == "none",
    )


def _version(path: Path) -> tuple[int, ...]:
    """Return a value that changes if the file is replaced or rewritten."""
    if not path.is_file():
        return ()
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _fitting(size: tuple[float, float], memory: float, most: int) -> int:
    """Return how many samples, from 1 to `most`, a batch can have so that its product keeps at most `memory` bytes.

    Args:
        size: Bytes that a product keeps once, and per sample.
        memory: Bytes.
        most: Upper bound.
    """
    once, each = size
    return int(max(1, min(most, (memory - once) / max(each, 1))))


def _batch_size(
    objective: Objective,
    asked: int | None,
    size: tuple[float, float],
    memory: float,
    workers: int,
    group: Group | None,
) -> int:
    """Return the batch size.

    If none is asked for, it is the largest with which the batches in use keep at most a quarter of the memory. On the
    CPU it is limited to what is fast: batches run in parallel, and arrays above about 30 MB are allocated in fresh
    pages every time. It is at least 64 if they take at most 1 GiB, because smaller batches are mostly overhead. Batches
    have about the same size.

    Args:
        objective: The objective.
        asked: The batch size that the user asked for.
        size: Bytes that the product of a batch keeps once, and per sample.
        memory: Memory in bytes.
        workers: Number of batches in use at the same time.
        group: Processes that share the work.

    Raises:
        UsageError: If one sample needs more memory than there is.
    """
    from hessian_tools.engine.product import least_bytes

    processes = group.size if group else 1
    if sum(size) > memory / 4 / workers and workers * (needed := least_bytes(objective)) > memory:
        raise UsageError(
            f"one sample needs about {needed / 2**30:.2g} GiB of memory in each of {workers} threads, more than "
            f"--memory {memory / 2**30:.2g}: give more --memory, or fewer --threads"
        )
    most = _fitting(size, memory / 4 / workers, 2048)
    if objective.device.type == "cpu":
        share = -(-objective.samples // (workers * processes))
        most = min(most, max(_fitting(size, 2**30, 64), min(share, _fitting(size, 2**27, 2048))))
    most = min(most, -(-objective.samples // processes))  # every process gets a batch
    chosen = asked or -(-objective.samples // -(-objective.samples // most))
    return chosen if group is None else group.broadcast(chosen)


def _samples(
    checkpoint: Checkpoint, split: str, samples: str, data_dir: Path | None, memory: float
) -> tuple[Dataset, Images, str]:
    """Return the data set, the inputs of the network, and a hash of the samples.

    Samples on disk are read into memory if they take at most `memory` bytes.
    """
    from ikun.data.lazy import taken

    data = checkpoint.samples(split, data_dir)
    if samples != "all" and not (samples.isdecimal() and 1 <= int(samples) <= len(data)):
        raise UsageError("{samples}: give a number from 1 to {}, or all", len(data), samples=samples)
    count = len(data) if samples == "all" else int(samples)
    x = taken(checkpoint.inputs(data.images), slice(count))
    if 4 * math.prod(x.shape) <= memory:  # float32
        x = x[:]
    return data, x, hashlib.sha256(f"{data.sha256} {count}".encode()).hexdigest()
