"""Data parallelism over processes, as torchrun starts them: gloo between CPUs, NCCL between GPUs.

Every rank runs the same algorithm on the same vectors and computes the products over its own share of the batches; one
sum over the ranks a product makes them equal again. The ranks must be on machines of one kind: what they compute of
equal vectors is taken to be equal bit for bit.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# A rank may wait this long for one with more to compute. A dead one is noticed at once, by its closed connection.
TIMEOUT = timedelta(minutes=30)


class RankError(RuntimeError):
    """Another process of the run is gone, or this one has no place in it; one line that says what to do."""


@dataclass(frozen=True)
class Group:
    """The processes of one run; every rank must call the same methods in the same order.

    rank: this process's number, 0 .. size - 1. All methods raise RankError where a process has died.
    """

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, on each of them; same shape and device, the same bits everywhere."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        with _answering(self.rank, self.size):
            dist.all_reduce(total)
        return total

    def broadcast(self, obj: T) -> T:
        """Rank 0's object (anything that pickles; tensors on the CPU) on every rank; the others' are dropped."""
        box = [obj]
        with _answering(self.rank, self.size):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        """Leave the group; nothing else may be called on it behind this."""
        if dist.is_initialized():
            dist.destroy_process_group()


def initialize_group(device: torch.device | str) -> Group | None:
    """Join the run that torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK) names; None for a single process.

    device: cpu or cuda; on CUDA, rank LOCAL_RANK of a machine takes that GPU as its current one. Raises RankError if
    a machine has more processes than GPUs, or if the others do not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return None
    rank = int(os.environ["RANK"])
    if torch.device(device).type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise RankError(
                f"rank {rank} of {size}: no GPU is left for it ({torch.cuda.device_count()} on this machine): start "
                "one process a GPU, or use --device cpu"
            )
        torch.cuda.set_device(local)
        # a collective waits for its result and raises in this thread, where a watchdog would end the whole process
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        backend = "nccl"
    else:
        backend = "gloo"
    with _answering(rank, size):
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
    group = Group(rank, size)
    if (
        backend == "gloo"
    ):  # its threads, if left, may abort a process that ends with an error, and so hide its exit code
        atexit.register(group.close)
    return group


@contextlib.contextmanager
def _answering(rank: int, size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # its first sentence, without the source file's name and line in front
        reason = re.split(r"\. |\n", re.sub(r"^\[.*?:\d+\]\s*", "", str(error).strip()))[0]
        raise RankError(
            f"rank {rank} of {size}: another process of the run has died or does not answer ({reason[:150]}): start "
            "the same command with --resume"
        ) from error
