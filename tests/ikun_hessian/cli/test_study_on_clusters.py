"""Tests of studies on a real local Dask cluster and a real local Ray: the numbers are those of one process.

The tests are skipped unless these packages are installed: pip install 'dask[distributed]' ray
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import joblib
import pytest
from command_tools import TINY_SPECTRUM, TINY_TRAINING, Capture

import cli

PRESET = f"""
title = "Four runs"
by = "init"
seeds = 2
{TINY_TRAINING}[vary]
init = ["kaiming", "xavier"]
[[spectrum]]
{TINY_SPECTRUM}"""


@contextmanager
def dask() -> Iterator[AbstractContextManager[Any]]:
    distributed = pytest.importorskip("dask.distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster):
        yield joblib.parallel_config("dask")


@contextmanager
def ray() -> Iterator[AbstractContextManager[Any]]:
    backend = pytest.importorskip("ray.util.joblib")  # a folder /tmp/ray, as Ray leaves it, can be imported as ray
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        backend.register_ray()
        yield joblib.parallel_config("ray")
    finally:
        ray.shutdown()


CLUSTERS = {"dask": dask, "ray": ray}


def numbers(folder: Path) -> dict[str, Any]:
    """Spectra of all runs, and losses of their training, by file name."""
    files = sorted((folder / "runs").glob("*.spectrum.json"))
    return {file.name: json.loads(file.read_text())["spectra"] for file in files}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The preset, and the folder of the study by one process."""
    folder = tmp_path_factory.mktemp("alone")
    preset = folder / "four.toml"
    preset.write_text(PRESET)
    assert cli.run(["study", str(preset), "--out", str(folder / "one"), "--jobs", "1"]) == 0
    return preset, folder / "one"


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_study_on_a_cluster_has_the_numbers_of_one_process(
    name: str, alone: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    preset, one = alone
    study = ["study", str(preset), "--out", str(tmp_path / "s")]
    with CLUSTERS[name]() as config, config:
        assert cli.run(study) == 0
        assert "2 in parallel" in capsys.readouterr().out
        assert cli.run(study) == 0  # nothing is left to do
        assert "4 done" in capsys.readouterr().out
    assert len(numbers(one)) == 4
    assert numbers(tmp_path / "s") == numbers(one)
