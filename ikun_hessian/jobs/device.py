"""Choose the device and the memory limit of a command."""

from __future__ import annotations

import os

from ikun_hessian.jobs.errors import UsageError


def pick(device: str) -> str:
    """Return the device to use, and set CUDA to full precision and deterministic algorithms.

    Args:
        device: "cpu", "cuda", "cuda:N" for the CUDA device of this number, or "auto" for CUDA if there is a device.

    Raises:
        UsageError: If PyTorch does not find the CUDA device that was asked for, or for "mps".
    """
    import torch

    from hessian_tools.runtime.distributed import environment_number

    if device == "mps":
        raise UsageError("--device mps: this device has no float64, which curvature needs: use --device cpu")
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UsageError(f"--device {device}: PyTorch finds no CUDA device: use --device cpu")
        number = int(device.partition(":")[2] or 0)
        if number >= count:
            numbers = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise UsageError(f"--device {device}: PyTorch finds {count} CUDA device(s): use {numbers}")
        torch.cuda.set_device(number if ":" in device else torch.cuda.current_device())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local = environment_number("LOCAL_RANK", least=0, default=0)
    if device == "cuda" and "LOCAL_RANK" in os.environ and local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # before anything is placed on the first GPU
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return device


def half_of_the_memory(device: str) -> float:
    """Return half of the memory that this process has, in GiB.

    On CUDA, that is the memory of its GPU: each process of a run has its own. On the CPU, it is that of the machine,
    divided by the number of processes there.
    """
    import torch

    from hessian_tools.runtime.distributed import environment_number

    if device.startswith("cuda"):
        total, processes = torch.cuda.mem_get_info(torch.device(device))[1], 1
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        processes = environment_number("LOCAL_WORLD_SIZE", least=1, default=1)
    return max(0.1, round(total / 2**31 / processes, 1))
