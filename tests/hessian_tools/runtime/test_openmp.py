"""Tests of running functions on OpenMP's threads: order, exceptions, and a missing library."""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from hessian_tools.runtime import openmp
from hessian_tools.runtime.openmp import side_by_side


@pytest.fixture(params=[False, True], ids=["openmp", "pool"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(openmp, "_library", lambda: None)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_results_come_in_order(count: int) -> None:
    assert side_by_side([partial(pow, 3, i) for i in range(count)]) == [3**i for i in range(count)]


@pytest.mark.skipif(sys.platform != "linux", reason="of torch for Linux")
def test_torch_brings_the_library() -> None:
    assert openmp._library() is not None


@pytest.mark.usefixtures("anywhere")
def test_functions_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=30)
    assert sorted(side_by_side([barrier.wait] * 3)) == [0, 1, 2]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("error", [ValueError, IndexError, KeyboardInterrupt, SystemExit])
def test_an_exception_of_a_function_is_raised(error: type[BaseException]) -> None:
    def fail() -> float:
        raise error("this one")

    for functions in ([fail], [time.time, fail], [fail, time.time, time.time]):
        with pytest.raises(error, match="this one"):
            side_by_side(functions)
    assert len(side_by_side([time.time] * 2)) == 2


def test_an_early_interruption_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """The calling thread's region ends at its first instruction; another thread does all the work."""

        def GOMP_parallel(self, region: Callable[[None], None], *_: object) -> None:  # noqa: N802
            other = threading.Thread(target=region, args=(None,))
            other.start()
            other.join()

    monkeypatch.setattr(openmp, "_library", Library)
    with pytest.raises(KeyboardInterrupt):
        side_by_side([time.time] * 3)


@pytest.mark.usefixtures("anywhere")
def test_calls_from_other_threads_work() -> None:
    x = torch.ones(200_000)

    def work(i: int) -> list[float]:
        for _ in range(20):
            found = side_by_side([lambda: float(x.sum()), lambda: float(i)])
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(8))) == [[200_000.0, float(i)] for i in range(8)]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_works() -> None:
    side_by_side([time.time] * 2)
    if (child := os.fork()) == 0:
        os._exit(0 if side_by_side([partial(pow, 2, i) for i in range(3)]) == [1, 2, 4] else 1)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)
    assert ended[1] == 0
