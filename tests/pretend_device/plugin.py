"""pytest -p pretend_device.plugin: run tests on the pretend device.

PRETEND_KERNELS=triton runs the kernels in Triton's interpreter, which is slow; numba runs them otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pretend_device import kernels, streams
from pretend_device.device import pretend_device
from pretend_device.places import state

INTERPRET = os.environ.get("PRETEND_KERNELS") == "triton"
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

_device = ExitStack()
_device.enter_context(pretend_device())  # before tests are collected: some are skipped without a device


def pytest_configure(config: pytest.Config) -> None:
    for where, name, value in kernels.replaced(INTERPRET):
        setattr(where, name, value)
    for message in ("CUDA graph capture failed", "Triton failed", "Triton is not usable"):
        config.addinivalue_line("filterwarnings", f"error:{message}")


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    """Fail a test in which the device refused something, even if the code took another way."""
    state.faults.clear()
    state.counts.clear()
    state.capture, state.current = None, 0
    streams.settle()
    yield
    assert not state.faults


def pytest_unconfigure(config: pytest.Config) -> None:
    _device.close()
