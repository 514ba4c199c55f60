"""Made-up training runs with their results, written in the files of a study."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import figure_tools
import numpy as np

from hessian_tools.analysis.flatness.settings import FlatnessSettings
from hessian_tools.io import json as results
from hessian_tools.io.json import clean
from hessian_tools.results import flatness, robustness
from hessian_tools.results.flatness import SURROGATE, TRUE, FlatnessResult, Metric
from hessian_tools.results.operator_spectrum import Spectrum
from hessian_tools.results.robustness import Accuracy, RobustnessResult
from hessian_tools.results.spectrum import SpectrumResult
from ikun_hessian.experiments.runs import TRAINING_SCHEMA, TrainingRun

EPOCHS = 12
# initializer -> (epochs that the loss takes to fall to 1/e, curvature over kaiming's)
INITS: dict[str, tuple[float, float]] = {"ikun": (1.2, 2.5), "kaiming": (2.0, 1.0), "xavier": (2.6, 1.6)}
SEEDS = tuple(range(6))
MOMENTS = ("", "loss0.02")
TRAINING: dict[str, Any] = {
    "init": "kaiming", "alpha": 1.0, "law": "empirical", "loss": "mse", "optimizer": "adam", "lr": 0.01,
    "schedule": "cosine", "weight_decay": 0.0, "momentum": 0.9, "epochs": EPOCHS, "batch_size": 64, "seed": 0,
    "patience": 0, "snapshots": 0,
}  # fmt: skip
NETWORK: dict[str, Any] = {
    "model": "csnn", "input_shape": [1, 8, 8], "classes": 10, "channels": 8, "hidden": [128, 128], "neuron": "if",
    "tau": 2.0, "threshold": 1.0, "v_reset": 0.0, "reset": "hard", "detach_reset": False, "surrogate": "atan:2",
    "timesteps": 4, "coding": "direct", "norm": "bn", "ties": "first", "depth": 2, "dropout": 0.0,
}  # fmt: skip
DATA: dict[str, Any] = {"name": "digits", "subset": None, "seed": 0, "held_out": 0, "sha256": "d" * 64, "samples": 1437}
LAYERS = ("conv1", "conv2", "fc1", "fc2")


def make_run(
    init: str = "kaiming",
    seed: int = 0,
    *,
    moments: Sequence[str] = MOMENTS,
    tags: Sequence[str] = (),
    diverged: bool = False,
    speed: float | None = None,
    curvature: float | None = None,
    training: Mapping[str, Any] | None = None,
    network: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """One run; seeds move every initializer alike, and each a little on its own. moments: keys of spectra and flatness.

    tags: keys of spectra of one sample, for instance "one-image". diverged: NaN in epoch 5, nothing measured.
    """
    known_speed, known_curvature = INITS.get(init, (2.0, 1.0))
    speed, curvature = speed or known_speed, curvature or known_curvature
    trained = {**TRAINING, "init": init, "seed": seed, **(training or {})}
    net, samples = {**NETWORK, **(network or {})}, {**DATA, "seed": seed, **(data or {})}
    shared = np.random.default_rng(seed).normal(size=2)
    own = np.random.default_rng([seed, *init.encode()])
    speed *= math.exp(0.15 * shared[0] + 0.08 * own.normal())
    curvature *= math.exp(0.3 * shared[1] + 0.1 * own.normal())
    log = _log(speed, int(trained["epochs"]), own, 5 if diverged else None)
    failures = tuple(dict.fromkeys(f for line in log for f in line["failures"]))
    spectra: dict[str, SpectrumResult] = {}
    sharpness: dict[str, FlatnessResult] = {}
    for key in () if diverged else (*moments, *tags):
        moment = next((m for m in moments if m and key.startswith(m)), "")
        stem = ".".join([_name(trained), *([moment] if moment else [])])
        part = {"checkpoint": {"path": f"runs/{stem}.pt", "sha256": stem}}
        part |= _measured(trained, net, samples, 1 if key in tags else None)
        line = _at(log, moment)
        size = curvature * (1.0 if not moment else 1.8) * (math.exp(own.normal()) if key in tags else 1.0)
        part |= {"loss": line["loss"], "accuracy": line["accuracy"]}
        spectra[key] = figure_tools.result(_spectra(size, own), seed=0, **part)
        if key in moments:
            sharpness[key] = _flatness(size, own, part)
    return TrainingRun(
        _name(trained), trained, net, samples, _start(own), log, spectra, sharpness,
        _robustness(curvature, own) if "" in sharpness else None, failures, True, log[-1]["epoch"],
    )  # fmt: skip


def _name(training: Mapping[str, Any]) -> str:
    return f"{training['init']}-{training['optimizer']}-s{training['seed']}"


def _log(speed: float, epochs: int, rng: np.random.Generator, nan_at: int | None) -> tuple[dict[str, Any], ...]:
    lines: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        done = math.exp(-epoch / speed)
        line: dict[str, Any] = {
            "epoch": epoch,
            "lr": 0.005 * (1 + math.cos(math.pi * (epoch - 1) / epochs)),
            "loss": 0.09 * done + 0.004 + 0.0005 * rng.uniform(),
            "accuracy": 0.985 - 0.88 * done + 0.005 * rng.uniform(),
            "gradient_norm": 0.1 * done + 0.01,
            "test_loss": 0.085 * done + 0.012 + 0.002 * rng.uniform(),
            "test_accuracy": 0.95 - 0.85 * done + 0.01 * rng.uniform(),
            "layers": {
                name: {
                    "firing_rate": 0.1 + 0.02 * i,
                    "derivative_square": 0.16 / (1 + (1 - done) * (i + 1)),
                    "distance": 1 - done,
                    "current_variance": 1.0 + i * (1 - done),
                    "gradient_square": 1e-6 * 2.0**-i * (0.1 + done),
                    "derivative_square_by_step": [0.2, 0.17, 0.15, 0.14],
                }
                for i, name in enumerate(LAYERS)
            },
            "failures": [],
        }
        if epoch == nan_at:
            wrong = dict.fromkeys(("loss", "accuracy", "gradient_norm", "test_loss", "test_accuracy"))
            return (*lines, {**line, **wrong, "failures": ["NaN: the loss is not finite"]})
        lines.append(line)
    return tuple(lines)


def _at(log: Sequence[Mapping[str, Any]], moment: str) -> Mapping[str, Any]:
    """The line of the log where a moment was: "loss0.02", "epoch0005", else the last."""
    if moment.startswith("loss"):
        return next((line for line in log if line["loss"] <= float(moment[4:])), log[-1])
    return log[int(moment[5:]) - 1] if moment.startswith("epoch") else log[-1]


def _measured(
    training: Mapping[str, Any], network: Mapping[str, Any], data: Mapping[str, Any], samples: int | None
) -> dict[str, Any]:
    count = samples or data["samples"]
    return {
        "data": {"name": data["name"], "split": "test" if samples else "train", "loss": training["loss"],
                 "samples": count, "sha256": f"{data['sha256'][:8]}{count}"},
        "network": {**network, "trained_surrogate": network["surrogate"]},
        "training": dict(training),
    }  # fmt: skip


def _spectra(size: float, rng: np.random.Generator) -> dict[str, Spectrum]:
    tops, low = size * np.array([0.06, 0.04, 0.03]), -size * np.array([0.05, 0.03])
    trace = size * 0.2 * math.exp(0.1 * rng.normal())
    scaled = 3 * math.sqrt(size) * tops[0] * math.exp(0.05 * rng.normal())
    hessian = figure_tools.ends(tops, low, -0.3 * trace)
    ggn = figure_tools.ends(1.8 * tops, [], trace)
    return {
        "hessian": dataclasses.replace(hessian, scale_free_lambda_max=scaled),
        "ggn": dataclasses.replace(ggn, scale_free_lambda_max=1.7 * scaled),
    }


def _flatness(size: float, rng: np.random.Generator, part: Mapping[str, Any]) -> FlatnessResult:
    def metric(value: float, valid: str) -> Metric:
        value *= math.exp(0.05 * rng.normal())
        return Metric(value, 0.05 * value, (0.9 * value, 1.1 * value), 0.05 * value, "draws", valid)

    main = {
        "ggn lambda_max": metric(0.1 * size, SURROGATE),
        "hessian lambda_max": metric(0.06 * size, SURROGATE),
        "adaptive average sharpness": metric(0.004 * size**0.5, TRUE),
        "LPF, the smoothed loss": metric(0.002 * size**0.3, TRUE),
    }
    base = figure_tools.result({}, **part)
    both = {f.name for f in dataclasses.fields(FlatnessResult)} & {f.name for f in dataclasses.fields(base)}
    fields = {name: getattr(base, name) for name in both}
    fields |= {
        "schema": flatness.FLATNESS_SCHEMA,
        "settings": clean(dataclasses.asdict(FlatnessSettings())),
        "main": main,
    }
    return FlatnessResult(**{**fields, "others": {"SAM sharpness": metric(0.01 * size, TRUE)}})


def _robustness(size: float, rng: np.random.Generator) -> RobustnessResult:
    drop = 0.05 * size**0.5 * math.exp(0.05 * rng.normal())
    disturbed = {
        "blur": {"1": Accuracy(0.9 - drop), "5": Accuracy(0.9 - 3 * drop)},
        "weight_noise": {"0.1": Accuracy(0.7 + drop, 0.01)},
    }
    return RobustnessResult(robustness.ROBUSTNESS_SCHEMA, {}, {}, {}, {}, {}, 0.9, disturbed, 1.0, {})


def _start(rng: np.random.Generator) -> dict[str, Any]:
    layers = [
        {
            "name": name,
            "neuron": f"spike{i + 1}",
            "fan_in": 9 * 8**i,
            "fan_out": 72,
            "weight_variance": 0.02,
            "input_square": 0.2,
            "derivative_square": 0.16,
            "firing_rate": 0.2 * 0.7**i,
            "dead": 0.0,
            "saturated": 0.0,
            "current_variance": 0.8**i * math.exp(0.1 * rng.normal()),
            "gradient_square": 1e-6 * 1.5**i * math.exp(0.1 * rng.normal()),
            "forward_gain": 0.8 if i else None,
            "backward_gain": 0.67 if i else None,
        }
        for i, name in enumerate(LAYERS)
    ]
    return {"seconds": 0.05, "forward_passes": 1, "layers": layers}


def write_run(run: TrainingRun, folder: Path) -> None:
    """NAME.train.json, NAME.train.jsonl, NAME[.KEY].spectrum.json and .flatness.json, and an empty NAME.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "schema": TRAINING_SCHEMA, "network": run.network, "data": run.data, "training": run.training,
        "finished": run.finished,
        "epochs_run": len(run.log) if run.epochs_run is None else run.epochs_run, "best_epoch": run.best_epoch,
        "failures": [f for f in run.failures if not f.startswith("failed: ")], "seconds": 1.0,
        "start": run.start, "versions": {},
    }  # fmt: skip
    (folder / f"{run.name}.pt").touch()
    (folder / f"{run.name}.train.json").write_text(json.dumps(clean(described)))
    (folder / f"{run.name}.train.jsonl").write_text("".join(json.dumps(clean(line)) + "\n" for line in run.log))
    for f in run.failures:
        if f.startswith("failed: "):
            _, step, error = f.split(": ", 2)
            failed = {"schema": "ikun-hessian/failed/1", "step": step, "error": error}
            (folder / f"{run.name}.failed.json").write_text(json.dumps(failed))
    if run.robustness:
        results.save_result(run.robustness, folder / f"{run.name}.robustness.json")
    for key, spectrum in run.spectra.items():
        results.save_result(spectrum, folder / f"{run.name}{'.' * bool(key)}{key}.spectrum.json")
    for key, sharpness in run.flatness.items():
        results.save_result(sharpness, folder / f"{run.name}{'.' * bool(key)}{key}.flatness.json")


def make_study(
    inits: Sequence[str] = tuple(INITS),
    seeds: Sequence[int] = SEEDS,
    diverged: Sequence[tuple[str, int]] = (("xavier", 3),),
    **changes: Any,
) -> list[TrainingRun]:
    """A run for every initializer and seed. diverged: the (initializer, seed) that end in NaN."""
    return [make_run(init, seed, diverged=(init, seed) in diverged, **changes) for init in inits for seed in seeds]


def write_study(folder: Path, runs: Sequence[TrainingRun] | None = None) -> list[TrainingRun]:
    """`make_study()`, or these runs, as files in FOLDER/runs; returns the runs, sorted by name."""
    runs = make_study() if runs is None else runs
    for run in runs:
        write_run(run, folder / "runs")
    return sorted(runs, key=lambda run: run.name)
