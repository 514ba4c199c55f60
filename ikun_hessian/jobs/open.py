"""From a checkpoint and the options of a command to objectives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
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


SLOPES = {"slope x 1/2": {"steeper": 0.5}, "slope x 2": {"steeper": 2.0}}


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a Job is made of. network(steeper=1.0, **changes): the model and what resets it. activity: of the neurons,
    on so many samples."""

    network: Callable[..., tuple[nn.Module, Callable[[nn.Module], None] | None]]
    loss: Loss
    x: Images
    y: Tensor
    variants: dict[str, dict[str, Any]]
    threshold: float | None
    provenance: dict[str, Any]
    activity: Callable[[int], dict[str, Any]]


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
) -> Job:
    """Open a checkpoint and its data as the options (options.opening_options, options.own_options) say.

    memory: GiB. A quarter is for the batches at work: as many samples each as fit, where batch_size is None; where not
    one fits, or not as many as asked for, long sequences run in segments of time. An eighth is for samples from disk:
    where they do not fit, a batch is read whenever it is used. device: "cpu" or "cuda", as from `pick`. group: the
    processes that share the work; all of them call this. Raises what loading raises, all of it ValueError, and
    UsageError for samples that are not there.
    """
    import torch

    from hessian_tools.chain import segments
    from hessian_tools.chain.segments import bytes_per_sample
    from hessian_tools.objective import make_objective
    from ikun.checkpoint import sha256

    before = _version(path)
    if own is not None and own.meant(path):
        if split != "train" or data_dir is not None:
            raise UsageError("--split and --data-dir are for checkpoints of ikun-hessian: --data says which samples")
        source = _own(path, own, samples, surrogate, memory)
    else:
        source = _ours(path, samples, split, surrogate, data_dir, memory)

    digest = sha256(path)
    if _version(path) != before:  # a training that ended just now
        raise UsageError(f"{path} changed while it was read: run the same again")

    def objective(steeper: float = 1.0, **changes: Any) -> Objective:
        network, reset = source.network(steeper, **changes)
        made = make_objective(
            network,
            source.loss,
            (source.x, source.y),
            batch_size=batch_size,
            params=params,
            dtype=getattr(torch, dtype),
            device=device,
            reset=reset,
        )
        return dataclasses.replace(made, group=group, segmentation=segments if segmented else None)

    segmented = False
    batch_size, segmented = _cut(objective(), batch_size, memory * 2**30 / 4, group)
    first = objective()
    each = bytes_per_sample(dataclasses.replace(first, segmentation=None))  # an autograd pass takes about three of it
    few = max(1, min(512, int(memory * 2**30 / 12 / each))) if each else 512
    provenance = {
        "checkpoint": {"path": str(path), "sha256": digest},
        **source.provenance,
        "activity": source.activity(few),
    }
    plain = json.loads(json.dumps(provenance))
    return Job(path, first, objective, source.variants, source.threshold, plain)


def _ours(path: Path, samples: str, split: str, surrogate: str | None, data_dir: Path | None, memory: float) -> _Source:
    """A checkpoint of this package."""
    from ikun.checkpoint import CheckpointError, load_checkpoint
    from ikun.layer_statistics import observe
    from ikun.losses import LOSSES
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

    def built(steeper: float = 1.0, **changes: Any) -> tuple[nn.Module, None]:
        return checkpoint.build(**{"surrogate": str(analysed.steeper(steeper)), **changes}), None

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
    return _Source(built, LOSSES[checkpoint.loss], x, y, variants, network.threshold, provenance, activity)


def _own(path: Path, own: Own, samples: str, surrogate: str | None, memory: float) -> _Source:
    """A network of the user's own."""
    from ikun.adapters.summary import firing_rates
    from ikun_hessian.jobs.user_network import in_options, open_own

    found = open_own(path, own, samples=samples, surrogate=surrogate, memory=memory)

    def built(steeper: float = 1.0, **changes: Any) -> tuple[nn.Module, Callable[[nn.Module], None] | None]:
        if unknown := set(changes) - {"surrogate"}:
            raise ValueError(f"a network of your own has no other form ({', '.join(sorted(unknown))})")
        with in_options():
            adapted = found.adapted(steeper, **changes)
        return adapted.model, adapted.reset

    return _Source(
        built,
        found.loss,
        found.x,
        found.y,
        dict(SLOPES) if found.spiking else {},
        found.threshold,
        {"data": found.data, "network": found.network, "training": {}},
        lambda few: firing_rates(found.adapted(), found.x[:few]),
    )


def _version(path: Path) -> tuple[int, ...]:
    """Another one after a file was written anew."""
    if not path.is_file():
        return ()
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _cut(objective: Objective, asked: int | None, memory: float, group: Group | None) -> tuple[int, bool]:
    """(samples in a batch, whether time is cut into segments: where such a batch does not fit into `memory` bytes).

    Unless asked for, as many samples as fit, but on the CPU no more than is fast: batches run side by side, and arrays
    beyond some 30 MB come from fresh pages every time. At least 64 if they fit, shorter batches being all overhead
    unless the sequences are long.
    """
    import torch

    from hessian_tools.chain import segments
    from hessian_tools.chain.segments import bytes_per_sample
    from hessian_tools.operators.curvature import batch_size_within

    long = bytes_per_sample(objective) is not None
    if asked is not None and not long:
        return asked, False
    processes = group.size if group else 1
    workers = torch.get_num_threads() if objective.device.type == "cpu" else 1
    most = batch_size_within(objective, memory / workers, asked or 2048)
    segmented = long and most < min(asked or 1, objective.samples)
    if segmented:
        objective = dataclasses.replace(objective, segmentation=segments)
        most = max(1, batch_size_within(objective, memory / workers))
    if objective.device.type == "cpu":
        share = -(-objective.samples // (workers * processes))
        most = min(most, max(1 if long else 64, min(share, batch_size_within(objective, 2**27))))
    chosen = asked or min(most, -(-objective.samples // processes)), segmented  # a batch for every process
    return chosen if group is None else group.broadcast(chosen)


def _samples(
    checkpoint: Checkpoint, split: str, samples: str, data_dir: Path | None, memory: float
) -> tuple[Dataset, Images, str]:
    """(data set, network inputs, a hash of the very samples). Those on disk are read if they take no more than `memory`
    bytes."""
    from ikun.data.lazy import taken

    data = checkpoint.samples(split, data_dir)
    if samples != "all" and not (samples.isdecimal() and 1 <= int(samples) <= len(data)):
        raise UsageError(f"--samples {samples}: give a number from 1 to {len(data)}, or all")
    count = len(data) if samples == "all" else int(samples)
    x = taken(checkpoint.inputs(data.images), slice(count))
    if 4 * math.prod(x.shape) <= memory:  # float32
        x = x[:]
    return data, x, hashlib.sha256(f"{data.sha256} {count}".encode()).hexdigest()
