"""Table of several snapshots of one training run, after a check that they belong to one run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hessian_tools.results.comparability import comparable
from hessian_tools.results.operator_spectrum import Eigenvalue, Trace
from hessian_tools.results.spectrum import SpectrumResult

RANKS = 5  # number of largest eigenvalues in the table
# Settings that identify a training run: key in the result's `training`, name for the user.
RUN = (
    ("init", "initializer"),
    ("alpha", "alpha of the initializer"),
    ("law", "law of the initializer"),
    ("optimizer", "optimizer"),
    ("lr", "learning rate"),
    ("momentum", "momentum"),
    ("schedule", "schedule"),
    ("weight_decay", "weight decay"),
    ("sam", "radius of SAM"),
    ("asam", "adaptive SAM"),
    ("sam_forward", "forward pass of training"),
    ("batch_size", "training batch size"),
    ("epochs", "number of epochs asked for"),
    ("seed", "training seed"),
    ("data_sha256", "training data"),
)
OF_A_FILE = ("warnings",)  # parts of a network's description that depend on the file of its weights


def snapshots(results: list[SpectrumResult]) -> list[SpectrumResult]:
    """Sort results by epoch and check that they are snapshots of one run.

    One snapshot that was saved under two names is counted once. (The last snapshot of a run and its checkpoint have the
    same epoch, loss and gradient norm.) If no result records an epoch, as for networks trained elsewhere, the order is
    that of the arguments, and files with the same weights are counted once.

    Args:
        results: Spectra of snapshots, in any order, or in the order of training if they record no epoch.

    Returns:
        The results in the order of their epochs.

    Raises:
        ValueError: If fewer than two snapshots remain, if two are from the same epoch, if they come from different
            runs, or if they were not measured under the same conditions. The message names what differs.
    """
    ordered = _by_epoch(results) if any(map(_has_epoch, results)) else _by_order(results)
    one_run([(_file(r), r.training, r.network) for r in ordered])
    comparable([(_file(r), r) for r in ordered])
    return ordered


def _has_epoch(result: SpectrumResult) -> bool:
    return isinstance(result.training.get("epochs_run"), int)


def _by_order(results: list[SpectrumResult]) -> list[SpectrumResult]:
    """Return the results without later copies of the same weights."""
    ordered = list({r.checkpoint.get("sha256", i): r for i, r in reversed(list(enumerate(results)))}.values())[::-1]
    if len(ordered) < 2:
        raise ValueError("a trajectory needs the spectra of at least two snapshots of one run, with different weights")
    return ordered


def _by_epoch(results: list[SpectrumResult]) -> list[SpectrumResult]:
    for r in results:
        if not _has_epoch(r):
            raise ValueError(
                f"{_file(r)} does not say after how many epochs it was saved: it is not a snapshot of a run"
            )
    ordered = list({(epoch(r), r.loss, r.gradient_norm): r for r in sorted(results, key=epoch)}.values())
    if len(ordered) < 2:
        raise ValueError("a trajectory needs the spectra of at least two snapshots of one run, at different epochs")
    for before, after in itertools.pairwise(ordered):
        if epoch(before) == epoch(after):
            raise ValueError(
                f"{_file(before)} and {_file(after)} are both of epoch {epoch(before)}: use only one of them"
            )
    return ordered


def axis_of(ordered: Sequence[SpectrumResult]) -> tuple[str, list[int]]:
    """Return the positions of snapshots along a trajectory.

    Args:
        ordered: The results that `snapshots` returns.

    Returns:
        The name of the axis and the position of every result: "epoch" and its epoch, or "snapshot" and its number from
        1 if no epochs are known.
    """
    if all(map(_has_epoch, ordered)):
        return "epoch", [epoch(r) for r in ordered]
    return "snapshot", list(range(1, len(ordered) + 1))


def one_run(snapshots: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Check that snapshots belong to one training run.

    Args:
        snapshots: For each snapshot its name, training settings and network settings.

    Raises:
        ValueError: If a setting differs from that of the first snapshot. The message names the setting and both values.
    """
    (first, training, network), *others = snapshots
    for other, its_training, its_network in others:
        known = [(k, meaning) for k, meaning in RUN if k in training and k in its_training]  # older runs lack some
        differing = [(meaning, training[k], its_training[k]) for k, meaning in known]
        keys = [key for key in dict.fromkeys((*network, *its_network)) if key not in OF_A_FILE]
        differing += [(f"{key} of the network", network.get(key), its_network.get(key)) for key in keys]
        for meaning, here, there in differing:
            if here != there and (here, there) != (first, other):  # a .nir file is named in its network
                raise ValueError(
                    f"not one run: {meaning} differs, {str(here)[:40]} for {first} but {str(there)[:40]} for {other}"
                )


def trajectory_rows(results: list[SpectrumResult]) -> list[dict[str, Any]]:
    """Return one row for each snapshot, in the order of epochs.

    A row holds the `RANKS` largest eigenvalues and the smallest eigenvalue of every operator, each with its standard
    error over the data and whether it converged. It also holds the trace of every operator and E[f'^2] of every layer.

    Args:
        results: Spectra of snapshots, in any order, or in the order of training if they record no epoch.

    Returns:
        The rows, with the position in "epoch", or in "snapshot" if no epochs are known. All have the same keys; a value
        that a snapshot does not have is NaN.

    Raises:
        ValueError: If the results are not snapshots of one run (see `snapshots`).
    """
    rows: list[dict[str, Any]] = []
    ordered = snapshots(results)
    axis, positions = axis_of(ordered)
    for position, r in zip(positions, ordered, strict=True):
        row: dict[str, Any] = {axis: position, "checkpoint": _file(r), "loss": r.loss, "accuracy": r.accuracy}
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
    """Return the epoch of the weights.

    After early stopping it is earlier than the last epoch of the training.
    """
    best = result.training.get("best_epoch")
    return int(result.training["epochs_run"] if best is None else best)


def trace_error(trace: Trace) -> float:
    """Return the standard error over data and probes combined, as far as both are known.

    It is NaN if that over the data is only known from below.
    """
    if math.isfinite(trace.data_stderr_least):
        return math.nan
    known = [e for e in (trace.stderr, trace.data_stderr) if math.isfinite(e)]
    return math.hypot(*known) if known else math.nan


def stability_limit(training: dict[str, Any]) -> float:
    """Return 2 (1 + b) / lr, the largest stable curvature of SGD with learning rate lr and momentum b.

    On a quadratic, gradient descent with heavy-ball momentum diverges along an eigenvector whose eigenvalue is larger
    (Cohen et al. 2021, arXiv 2103.00065, section 2, for full batches). The formula is for PyTorch's SGD and the initial
    learning rate.

    Args:
        training: Training settings of a result.

    Returns:
        The limit; NaN if the optimizer is not SGD.
    """
    lr, momentum = training.get("lr"), training.get("momentum", 0.9)
    if training.get("optimizer") != "sgd" or not isinstance(lr, int | float) or not isinstance(momentum, int | float):
        return math.nan
    return 2 * (1 + momentum) / lr if 0 < lr < math.inf else math.nan


def _pair(key: str, e: Eigenvalue) -> dict[str, Any]:
    return {key: e.value, f"{key}.data_stderr": e.data_stderr, f"{key}.converged": e.converged}


def _file(result: SpectrumResult) -> str:
    return PurePath(str(result.checkpoint.get("path", "a result"))).name
