"""Tests of the estimate of time and memory: its products are those that the analysis makes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from objectives import spiking_objective

from hessian_tools.analysis.planning.estimate import Estimate, estimate_time
from hessian_tools.analysis.planning.memory import TEMPORARY, budget_of, in_use
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import planned_products, spectrum
from hessian_tools.engine.product import kept_bytes
from hessian_tools.objective import Objective

SETTINGS = SpectrumSettings(top=3, smallest=2, steps=20, memory=1.0)


@pytest.fixture(scope="module")
def objective() -> Objective:
    return spiking_objective(samples=40, batch_size=20, dtype=torch.float32, input_shape=(1, 6, 6), hidden=(12,))


def of(objective: Objective, settings: SpectrumSettings) -> Estimate:
    return estimate_time(objective, settings, planned_products(settings, ("slope x 2",), objective.size))


@pytest.mark.parametrize(
    "changes",
    [{}, {"density": False}, {"operators": ("ggn",)}, {"top": 6, "smallest": 0, "trace_probes": 8, "probes": 2}],
)
def test_the_products_are_about_those_of_the_analysis(objective: Objective, changes: dict[str, object]) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    done = spectrum(objective, settings, variants={"slope x 2": objective})
    made = sum(s.hessian_vector_products for s in done.spectra.values())
    assert 0.6 < of(objective, settings).products / made < 1.7


def test_what_is_not_asked_for_costs_nothing(objective: Objective) -> None:
    whole, fewer = of(objective, SETTINGS), of(objective, dataclasses.replace(SETTINGS, density=False))
    assert whole.products - fewer.products == 2 * (4 * 20 - 4)  # without the density, the trace draws its own probes
    assert min(whole.seconds, fewer.seconds, whole.product_seconds) > 0


def test_the_memory_holds_the_basis_and_the_vectors(objective: Objective) -> None:
    vectors = 8 * objective.size * (20 + 5 + 4)
    assert of(objective, SETTINGS).memory > vectors


def test_the_batches_at_work_are_not_free_for_the_basis(objective: Objective) -> None:
    once, each = kept_bytes(objective) or (0, 0)
    assert in_use(objective) == TEMPORARY * (once + 20 * each)  # one thread
    memory = 8 * objective.size * 40 / 2**30  # too small for a long basis
    assert budget_of(objective, memory, 2).basis_dtype == torch.float32
    assert budget_of(objective, memory, 2).kept < budget_of(objective, 10 * memory, 2).kept
