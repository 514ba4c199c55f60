"""Spectrum results with made-up numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from hessian_tools.results.operator_spectrum import Density, Eigenvalue, Functional, Search, Spectrum, Trace
from hessian_tools.results.spectrum import SPECTRUM_SCHEMA, SamplePoint, SpectrumResult

NAN = float("nan")


def pair(value: float, **changes: object) -> Eigenvalue:
    base = Eigenvalue(value, 1e-8, 0.01 * abs(value), True, {"fc1.weight": 0.75, "fc2.weight": 0.25})
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def sample(init: str = "ikun", scale: float = 1.0, **changes: object) -> SpectrumResult:
    def spectrum(low: tuple[float, ...]) -> Spectrum:
        return Spectrum(
            1e-7,
            100,
            tuple(pair(scale * v) for v in (3.0, 2.0)),
            tuple(pair(scale * v) for v in low),
            Trace(12 * scale, scale, (10 * scale, 14 * scale), 32, 0.5 * scale),
            4 * scale,
            7 * scale,
            Density(((3.0, 0.0), (3.0, 0.1)), ((0.1, 0.9), (0.1, 0.9)), 2, 60, 1),
        )

    base = SpectrumResult(
        SPECTRUM_SCHEMA,
        {"path": f"runs/{init}.pt", "sha256": "ab" * 32},
        {"name": "digits", "split": "train", "samples": 100, "sha256": "cd", "loss": "mse"},
        {
            "model": "csnn",
            "neuron": "if",
            "reset": "hard",
            "detach_reset": False,
            "surrogate": "atan:2",
            "timesteps": 4,
            "coding": "direct",
            "norm": "bn",
            "ties": "first",
        },
        {
            "init": init,
            "alpha": 1.0,
            "optimizer": "adam",
            "lr": 0.001,
            "schedule": "cosine",
            "weight_decay": 0.0,
            "batch_size": 64,
            "epochs_run": 20,
            "seed": 42,
            "failures": [],
        },
        {"spike1": {"firing_rate": 0.2, "dead": 0.01}},
        {"top": 2},
        10,
        {"fc1.weight": 6, "fc2.weight": 4},
        {"fc1.weight": 1.0, "fc2.weight": 2.0},
        0.5,
        0.9,
        1e-4,
        "float32",
        "cpu",
        0,
        {"slope x 1/2": 2.5 * scale, "slope x 2": 3.5 * scale, "ties reversed": NAN},
        {"hessian": spectrum((-1.0, -0.5)), "ggn": spectrum(())},
        {},
        (),
        1.5,
        {"torch": "2.6"},
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def full() -> SpectrumResult:
    """Every optional part present."""
    base = sample()
    search = Search(60, 0.02, 4, 60, 1.5, -0.4)
    part = Functional(3.5, 0.1, (3.2, 3.8), 4, 1e-3, 0.05)
    spectra = {
        name: dataclasses.replace(
            s,
            search=search if name == "hessian" else dataclasses.replace(search, smallest=0.0),
            gradient_share=0.25,
            effective_dimension=part,
            log_determinant=part,
            negative_share=dataclasses.replace(part, estimate=0.3, ci95=(0.28, 0.32), damping=NAN),
            vectors=np.eye(10, 4, dtype=np.float32),
        )
        for name, s in base.spectra.items()
    }
    return dataclasses.replace(base, spectra=spectra, samples_curve=(SamplePoint(1, True, ((5.0, 1.0),), (9.0,)),))
