"""Several snapshots of one training run: that they are of one run, and the table that their figure shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hessian_tools.results.comparability import comparable
from hessian_tools.results.spectrum import Eigenvalue, SpectrumResult, Trace

RANKS = 5  # largest eigenvalues followed through training
# What makes two trainings different runs: key of the result's training, what the user knows it as.
RUN = (
    ("init", "initializer"),
    ("alpha", "alpha of the initializer"),
    ("law", "law of the initializer"),
    ("optimizer", "optimizer"),
    ("lr", "learning rate"),
    ("momentum", "momentum"),
    ("schedule", "schedule"),
    ("weight_decay", "weight decay"),
    ("batch_size", "training batch size"),
    ("epochs", "number of epochs asked for"),
    ("seed", "training seed"),
    ("data_sha256", "training data"),
)


def snapshots(results: list[SpectrumResult]) -> list[SpectrumResult]:
    """The results in the order of their epochs.

    One snapshot under two names (same epoch, loss and gradient norm: a run's last snapshot and its checkpoint) counts
    once. Raises ValueError, one line that says what differs, unless two or more are left, all of one run, measured
    alike, at different epochs.
    """
    for r in results:
        if not isinstance(r.training.get("epochs_run"), int):
            raise ValueError(f"{_file(r)} does not say after how many epochs it was saved: it is no snapshot of a run")
    ordered = list({(epoch(r), r.loss, r.gradient_norm): r for r in sorted(results, key=epoch)}.values())
    if len(ordered) < 2:
        raise ValueError("a trajectory needs the spectra of at least two snapshots of a run, at different epochs")
    for before, after in itertools.pairwise(ordered):
        if epoch(before) == epoch(after):
            raise ValueError(f"{_file(before)} and {_file(after)} are both of epoch {epoch(before)}: give one of them")
    one_run([(_file(r), r.training, r.network) for r in ordered])
    comparable([(_file(r), r) for r in ordered])
    return ordered


def one_run(snapshots: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Raises ValueError, naming what differs, unless all (name, training, network) are of one training run."""
    (first, training, network), *others = snapshots
    for other, its_training, its_network in others:
        differing = [(meaning, training.get(k), its_training.get(k)) for k, meaning in RUN]
        keys = dict.fromkeys((*network, *its_network))
        differing += [(f"{key} of the network", network.get(key), its_network.get(key)) for key in keys]
        for meaning, here, there in differing:
            if here != there:
                raise ValueError(
                    f"not one run: {meaning} differs, {str(here)[:40]} for {first} but {str(there)[:40]} for {other}"
                )


def trajectory_rows(results: list[SpectrumResult]) -> list[dict[str, Any]]:
    """One row a snapshot, in the order of epochs, all with the same keys; NaN for what a snapshot lacks.

    Of every operator the RANKS largest eigenvalues and the smallest one, each with its data stderr and whether it
    converged, and the trace; of every layer E[f'^2]. Raises ValueError as `snapshots`.
    """
    rows: list[dict[str, Any]] = []
    for r in snapshots(results):
        row: dict[str, Any] = {"epoch": epoch(r), "checkpoint": _file(r), "loss": r.loss, "accuracy": r.accuracy}
        for name, s in r.spectra.items():
            for rank, e in enumerate(s.eigenvalues[:RANKS], 1):
                row |= _pair(f"{name}.lambda_{rank}", e)
            for e in s.smallest_eigenvalues[:1]:
                row |= _pair(f"{name}.lambda_min", e)
            if s.trace is not None:
                row |= {f"{name}.trace": s.trace.estimate, f"{name}.trace.stderr": trace_error(s.trace)}
        for layer, values in r.activity.items():
            if isinstance(values, dict) and isinstance(values.get("derivative_square"), int | float):
                row[f"{layer}.derivative_square"] = float(values["derivative_square"])
        rows.append(row)
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, math.nan) for key in keys} for row in rows]


def epoch(result: SpectrumResult) -> int:
    """The epoch that the weights are of: an earlier one than the last after early stopping."""
    best = result.training.get("best_epoch")
    return int(result.training["epochs_run"] if best is None else best)


def trace_error(trace: Trace) -> float:
    """Standard error over data and probes together, as far as they are known."""
    known = [e for e in (trace.stderr, trace.data_stderr) if math.isfinite(e)]
    return math.hypot(*known) if known else math.nan


def stability_limit(training: dict[str, Any]) -> float:
    """2 (1 + b) / lr, NaN where the optimizer is not SGD.

    Above it gradient descent with heavy-ball momentum b diverges along an eigenvector of a quadratic (Cohen et al.
    2021, arXiv 2103.00065, section 2, for full batches). PyTorch's SGD, with the initial learning rate.
    """
    lr, momentum = training.get("lr"), training.get("momentum", 0.9)
    if training.get("optimizer") != "sgd" or not isinstance(lr, int | float) or not isinstance(momentum, int | float):
        return math.nan
    return 2 * (1 + momentum) / lr if 0 < lr < math.inf else math.nan


def _pair(key: str, e: Eigenvalue) -> dict[str, Any]:
    return {key: e.value, f"{key}.data_stderr": e.data_stderr, f"{key}.converged": e.converged}


def _file(result: SpectrumResult) -> str:
    return PurePath(str(result.checkpoint.get("path", "a result"))).name
