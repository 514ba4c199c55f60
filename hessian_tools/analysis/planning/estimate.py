"""Estimate before a spectrum analysis how long it will take and how much memory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hessian_tools.analysis.planning.memory import Budget, budget_of
from hessian_tools.analysis.settings import STEPS, SpectrumSettings
from hessian_tools.analysis.uncertainty.round_off import round_off_samples
from hessian_tools.analysis.uncertainty.sampling_error import PROBES as DATA_PROBES
from hessian_tools.linalg.basis import orthogonalize
from hessian_tools.objective import Objective
from hessian_tools.operators.curvature import OPERATORS
from hessian_tools.results.spectrum_rows import layer_of

# Time of a product relative to one with the Hessian: measured on the networks of docs/speed.md, 0.65 to 0.8.
RELATIVE = {"hessian": 1.0, "relaxed": 1.0, "ggn": 0.75, "fisher": 0.75, "smoothed": 0.75}
ROUND_OFF = 4.0  # a product in its dtype and one in float64, of a batch that is traced for this
PART = 50  # products with the operator of a subset of the samples
FORWARD = 1 / 3  # a forward pass, relative to a product
WORK = 8  # vectors of P float64 in a step of Lanczos or of a density, and models of variants


@dataclass(frozen=True)
class Estimate:
    """An estimate of what an analysis takes.

    Attributes:
        seconds: Time.
        products: Number of products with all operators.
        product_seconds: Time of one product with the first operator, measured.
        memory: Largest memory of the process in bytes, or of the device.
    """

    seconds: float
    products: int
    product_seconds: float
    memory: float


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        product: Seconds of a product with the Hessian.
        row: Seconds to orthogonalize against one vector of the Lanczos basis.
        held: Bytes that the process holds.
    """

    product: float
    row: float
    held: float


def measure_costs(objective: Objective, settings: SpectrumSettings) -> Costs:
    """Measure one product and one orthogonalization.

    Args:
        objective: The loss, its data and its weights. In a group, every process must call this function.
        settings: Settings of the analysis.

    Raises:
        ValueError: If the memory does not suffice.
    """
    room, first = _room(objective, settings), settings.operators[0]
    op = OPERATORS.get(first, OPERATORS["hessian"])(objective, room.kept)
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(op.device)
    for _ in range(2):
        op @ v  # the network is traced, primals are computed, and on CUDA a graph is captured
    began = time.perf_counter()
    float((op @ v)[0])  # waits for the device
    product = time.perf_counter() - began
    rows = v.to(room.basis_dtype).expand(4, -1).contiguous() / v.norm()
    orthogonalize(v, rows.T)
    began = time.perf_counter()
    float(orthogonalize(v, rows.T)[0][0])
    row = (time.perf_counter() - began) / 4
    if objective.group is not None:
        product, row = objective.group.broadcast((product, row))
    return Costs(product / RELATIVE.get(first, 1.0), row, _held(op.device))


def estimate_time(
    objective: Objective, settings: SpectrumSettings, expected: Mapping[str, int], costs: Costs | None = None
) -> Estimate:
    """Count the products that an analysis needs, and multiply them by their time.

    The number of products until the eigenvalues converge is not known beforehand, so the estimate is good to a factor
    of about 1.5.

    Args:
        objective: The loss, its data and its weights. In a group, every process must call this function.
        settings: Settings of the analysis.
        expected: Expected products of every phase of the analysis (see `hessian_tools.analysis.spectrum`).
        costs: What a product takes; None: it is measured.

    Returns:
        The estimate.

    Raises:
        ValueError: If the memory does not suffice.
    """
    costs = costs or measure_costs(objective, settings)
    size, first, room = objective.size, settings.operators[0], _room(objective, settings)
    pairs, steps = _pairs(settings, size), _steps(settings, size)
    filled = min(room.vectors, max(steps, expected.get(f"{first}: eigenvalues", 0)))
    memory = costs.held + size * (room.basis_dtype.itemsize * filled + 8 * (pairs + WORK))
    seconds, products = 0.0, 0
    for name in settings.operators:
        unit = costs.product * RELATIVE.get(name, 1.0)
        found = pairs if name == first else min(settings.magnitude or settings.top, size)
        counts = {
            "symmetry": 2,
            "error from the data": found + DATA_PROBES,
            **{what: n for key, n in expected.items() for of, _, what in [key.partition(": ")] if of == name},
        }
        searched = counts.get("eigenvalues", 0)
        counts["eigenvalues"] = searched + found  # for the residuals
        products += sum(counts.values())
        rounding = ROUND_OFF * found * round_off_samples(objective) / objective.samples
        taken = unit * (sum(counts.values()) + (rounding if objective.dtype == torch.float32 else 0))
        taken += costs.row * counts["eigenvalues"] * min(room.vectors, searched) / 2
        taken += costs.row * counts.get("density", 0) * (steps / 2 + found)
        repeats, others = _extras(objective, settings) if name == first else (0, 0.0)
        seconds += taken * (1 + repeats) + unit * others
        products += repeats * sum(counts.values()) + round(others)
    seconds += costs.product * FORWARD * settings.draws
    return Estimate(seconds, products, costs.product * RELATIVE.get(first, 1.0), memory)


def _extras(objective: Objective, settings: SpectrumSettings) -> tuple[int, float]:
    """Return how often the analysis of the first operator is repeated for layers, and other products that are needed.

    A product with the block of a layer takes about the time of a product with the whole operator.
    """
    layers = len(set(map(layer_of, objective.parameters))) if settings.per_layer else 0
    total = objective.samples
    parts = [(n / total, 1 if n == total else settings.resamples) for n in settings.samples_curve]
    curve = sum(share * count * PART for share, count in parts)
    return layers, curve + (settings.trace_probes if settings.per_step else 0)


def _pairs(settings: SpectrumSettings, size: int) -> int:
    return min(settings.magnitude or settings.top + settings.smallest, size)


def _steps(settings: SpectrumSettings, size: int) -> int:
    return min(settings.steps or STEPS, size) if settings.density else 0


def _room(objective: Objective, settings: SpectrumSettings) -> Budget:
    size = objective.size
    return budget_of(objective, settings.memory, _pairs(settings, size), _steps(settings, size))


def _held(device: torch.device) -> float:
    """Return the bytes that this process holds now: on the device, or in memory if the system tells."""
    if device.type == "cuda":
        return float(torch.cuda.memory_reserved(device))
    statm = Path("/proc/self/statm")
    return float(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0.0
