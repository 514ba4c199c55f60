"""Data parallelism over processes started by torchrun, with gloo between CPUs and NCCL for sums between GPUs.

Every rank runs the same algorithm on the same vectors. For a product, each rank computes its share of the batches, and
one sum over the ranks gives all of them the same result. All ranks must run on the same kind of machine: what they
compute from equal vectors is assumed to be bit-identical.
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
# How long a rank waits for a slower one. A dead rank is noticed at once by its closed connection.
TIMEOUT = timedelta(minutes=30)
# How long a sum between GPUs may take. NCCL does not notice a dead rank. All ranks have met over gloo before the sum.
SUM_TIMEOUT = timedelta(minutes=3)


class RankError(RuntimeError):
    """Another process of the run is gone, or there is no GPU for this one. The message says what to do."""


@dataclass(frozen=True)
class Group:
    """The processes of one run. Every rank must call the same methods in the same order.

    All methods raise RankError if another process has died.

    Attributes:
        rank: Number of this process, 0 to size - 1.
        size: Number of processes.
        gpus: The NCCL group that sums tensors on GPUs; None if the run is on the CPU.
    """

    rank: int
    size: int
    gpus: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks on every rank, with the shape and device of `tensor` and bit-identical."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        between_gpus = self.gpus is not None and total.device.type == "cuda"
        with _answering(self.rank, self.size):
            if between_gpus:
                torch.cuda.current_stream(total.device).synchronize()  # so that the sum does not wait for the product
                dist.all_reduce(torch.zeros(1))  # over gloo, which notices a dead rank at once
            dist.all_reduce(total, group=self.gpus if between_gpus else None)
        return total

    def broadcast(self, obj: T) -> T:
        """Return rank 0's object on every rank; the objects of the other ranks are ignored.

        The object must be picklable, with tensors on the CPU.
        """
        box = [obj]
        with _answering(self.rank, self.size):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        """Leave the group. No other method may be called afterwards."""
        if dist.is_initialized():
            dist.destroy_process_group()


def environment_number(name: str, *, least: int, default: int) -> int:
    """Return a whole number from an environment variable that torchrun sets.

    Args:
        name: The variable.
        least: Smallest value allowed.
        default: Value if the variable is not set.

    Raises:
        ValueError: If the variable holds anything else.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise ValueError(
            f"{name}={text} in the environment: it must be a whole number of at least {least}. torchrun sets it; "
            "otherwise unset it"
        )
    return int(text)


def initialize_group(device: torch.device | str) -> Group | None:
    """Join the run described by torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK).

    Args:
        device: cpu or cuda. On CUDA, GPU number LOCAL_RANK becomes the current device.

    Returns:
        The group, or None for a single process.

    Raises:
        RankError: If a machine has more processes than GPUs, or if the other processes do not join.
        ValueError: If one of these variables is not a valid number.
    """
    size = environment_number("WORLD_SIZE", least=1, default=1)
    if size == 1 or "RANK" not in os.environ:
        return None
    rank = environment_number("RANK", least=0, default=0)
    if rank >= size:
        raise ValueError(f"RANK={rank} with WORLD_SIZE={size} in the environment: ranks are from 0 to {size - 1}")
    if torch.device(device).type == "cuda":
        local = environment_number("LOCAL_RANK", least=0, default=rank)
        if local >= torch.cuda.device_count():
            raise RankError(
                f"rank {rank} of {size}: no GPU is left for this process ({torch.cuda.device_count()} on this machine)."
                " Start one process per GPU, or use the CPU."
            )
        torch.cuda.set_device(local)
        # Collectives wait for their result and raise in this thread, instead of a watchdog that ends the process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    gpus = None
    with _answering(rank, size):
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
        if torch.device(device).type == "cuda":
            gpus = dist.new_group(backend="nccl", timeout=SUM_TIMEOUT)
    group = Group(rank, size, gpus)
    # Threads of gloo could otherwise abort a process that ends with an error, which hides the exit code.
    atexit.register(group.close)
    return group


@contextlib.contextmanager
def _answering(rank: int, size: int) -> Iterator[None]:
    """Convert a failure of the process group to a RankError."""
    try:
        yield
    except RuntimeError as error:
        # the first sentence, without the name and line of the source file
        reason = re.split(r"\. |\n", re.sub(r"^\[.*?:\d+\]\s*", "", str(error).strip()))[0]
        raise RankError(
            f"rank {rank} of {size}: another process of the run has died or does not answer ({reason[:150]}). Start "
            "all processes again to resume."
        ) from error
