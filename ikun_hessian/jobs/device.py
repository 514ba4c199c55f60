"""Choose the device and the memory limit of a command."""

from __future__ import annotations

import os

from ikun_hessian.jobs.errors import UsageError


def pick(device: str) -> str:
    """Return the device to use, and set CUDA to full precision and deterministic algorithms.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA if there is a device.

    Raises:
        UsageError: If "cuda" was asked for and PyTorch finds no CUDA device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device: use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return device


def half_of_the_memory(device: str) -> float:
    """Return half of the memory of the device (on the CPU: of the machine) in GiB, divided by the local processes."""
    import torch

    from hessian_tools.runtime.distributed import environment_number

    if device == "cuda":
        total = torch.cuda.mem_get_info()[1]
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = environment_number("LOCAL_WORLD_SIZE", least=1, default=1)
    return max(0.1, round(total / 2**31 / processes, 1))
