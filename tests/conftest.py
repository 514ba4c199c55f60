"""Shared by all tests: the oracle can be imported by its name, and one thread keeps sums in one order."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# The same examples each time, none of them timed: a pull request fails for what it changed.
# Other examples, and more: --hypothesis-profile=explore
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("steady")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels run in Python, on the CPU
