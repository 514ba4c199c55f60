"""Configuration and fixtures of all tests: one thread, repeatable examples, kernels that run without a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: the same bits for any alignment of arrays, as the application has them (ikun_hessian).
os.environ.setdefault("MKL_CBWR", "AUTO")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

# Hypothesis draws the same examples every time and has no deadline, so that a failure is due to the change under test.
# For other and more examples: --hypothesis-profile=explore
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("steady")
torch.set_num_threads(1)  # keeps the order of sums
os.environ["XDG_DATA_DIRS"] = "/nowhere"  # data sets that happen to be installed are not used
LONGEST = {
    "test_pretend_device.py",
    "test_notebooks.py",
    "test_documents.py",
    "test_distributed.py",
    "test_interruption.py",
    "test_examples.py",
}
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported; runs its kernels in Python on the CPU


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that extended.txt lists as `extended`, by name or with parameters; run the longest first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    listed = set((Path(__file__).parent / "extended.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        if not listed.isdisjoint((item.nodeid, item.nodeid.partition("[")[0])):
            item.add_marker(pytest.mark.extended)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch, which is fastest for networks of a few units."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
