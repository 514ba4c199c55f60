"""Compare operators with the curvature of the spiking loss on many small networks of 21 architectures (hard_cases.py).

    python benchmarks/hard_networks.py FOLDER --half development    # or test, or all; resumes where it stopped
    python benchmarks/hard_networks.py FOLDER --predict             # only the operators, on the directions measured
    python benchmarks/hard_networks.py FOLDER --table               # the results, in Markdown
    python benchmarks/hard_networks.py FOLDER --fashion-mnist DIR --n-mnist DIR    # folders of the data files
    python benchmarks/hard_networks.py FOLDER --only NAME,NAME

Of every network, the curvature c of the smoothed loss at s = 0.1 is measured along about 50 directions as in
docs/calibration.md: eigenvectors of Hessian, GGN and `smoothed`, the gradient, and random directions. A second
measurement with other draws shows how well the truth predicts itself. FOLDER has, for every network, NAME.pt with the
directions and the truth, and NAME.json with the row.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hard_cases import Case, cases, halves, relabelled, trained
from torch import Tensor

from hessian_tools.analysis.agreement import agreement, correlation_within_kinds
from hessian_tools.analysis.calibration import CalibrationSettings, curvatures, directions
from hessian_tools.objective import Objective
from hessian_tools.operators.base import Operator
from hessian_tools.operators.curvature import ggn, hessian
from hessian_tools.perturbation import accuracy, outputs_at
from ikun.smoothed_operator import smoothed

SCALE, SEEDS, REPEAT = 0.1, (1, 2, 3), 1000  # noise, seeds of `smoothed`, seed of the repeat of the truth
SECOND = 64  # draws of `smoothed` with order=2, which needs more of them
WIDTH = "gaussian:0.3"  # the baseline: the GGN with one surrogate for all neurons
BARS = {"correlation": (0.95, math.inf), "within": (0.9, math.inf), "ratio": (0.7, 1.4)}
SETTINGS = CalibrationSettings(scales=(SCALE,), draws=48, eigenvectors=6, random=6)


def quiet(*_: Any) -> None:
    """Show no progress."""


def measured(case: Case, objective: Objective) -> dict[str, Any]:
    """Choose directions, and measure the curvature of the smoothed loss along them twice."""
    began = time.perf_counter()
    _, gradient = objective.value_and_gradient()
    operators: dict[str, Operator] = {"hessian": hessian(objective), "ggn": ggn(objective)}
    matched = smoothed(objective, scale=SCALE, seed=SEEDS[0])
    v, kinds = directions(objective, operators, matched, gradient, SETTINGS, quiet)
    truth = curvatures(objective, v, SCALE, SETTINGS, quiet)
    again = CalibrationSettings(**{**vars(SETTINGS), "seed": REPEAT})
    (outputs,) = outputs_at(objective, lambda _: objective.weights(), [0])
    return {
        "name": case.name,
        "half": halves()[case.name],
        "weights": objective.weights(),
        "vectors": v,
        "kinds": kinds,
        "truth": truth,
        "repeat": curvatures(objective, v, SCALE, again, quiet),
        "loss": objective.value_and_gradient()[0],
        "accuracy": accuracy(objective, outputs),
        "seconds": time.perf_counter() - began,
    }


def predicted(objective: Objective, v: Tensor) -> dict[str, list[float]]:
    """Return the forms v'Av of every operator along the columns of v [P, K]."""
    makers: dict[str, Callable[[], Operator]] = {
        "hessian": lambda: hessian(objective),
        "ggn": lambda: ggn(objective),
        "one width": lambda: ggn(relabelled(objective, WIDTH)),
    }
    for seed in SEEDS:
        makers[f"smoothed {seed}"] = lambda seed=seed: smoothed(objective, scale=SCALE, seed=seed)  # type: ignore[misc]
    makers["second"] = lambda: smoothed(objective, scale=SCALE, seed=SEEDS[0], order=2, draws=SECOND)
    return {name: ((make() @ v).double() * v.double()).sum(0).tolist() for name, make in makers.items()}


def compared(prediction: Sequence[float], truth: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """Compare predicted curvatures with measured ones: rank correlation, the same within kinds, and median ratio."""
    found = agreement(np.array(prediction), np.array(truth), resamples=0)
    inner = correlation_within_kinds(prediction, truth, kinds)
    return {"correlation": found.correlation, "within": inner, "ratio": found.ratio}


def passes(found: dict[str, float]) -> bool:
    """Whether a comparison passes all bars."""
    return all(low <= found[name] <= high for name, (low, high) in BARS.items())


def row(data: dict[str, Any], objective: Objective) -> dict[str, Any]:
    """Return the comparisons of one network."""
    forms, kinds = predicted(objective, data["vectors"]), data["kinds"]
    c = data["truth"]["curvature"]
    found = {name: compared(values, c, kinds) for name, values in forms.items()}
    found["repeat"] = compared(data["repeat"]["curvature"], c, kinds)
    return {
        **{name: data[name] for name in ("name", "half", "loss", "accuracy", "seconds")},
        "parameters": objective.size,
        "smoothed_loss": data["truth"]["loss"],
        "found": found,
        "forms": forms,
        "kinds": kinds,
        "curvature": c,
        "repeat": data["repeat"]["curvature"],
        "stderr": data["truth"]["stderr"],
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the results in Markdown: correlation / within kinds / ratio of every network, and a summary.

    Those of `smoothed` have the range over the seeds. An asterisk: the first seed passes all bars.
    """

    def one(found: dict[str, float]) -> str:
        return f"{found['correlation']:.2f} / {found['within']:.2f} / {found['ratio']:.2f}"

    def spread(each: Sequence[dict[str, float]]) -> str:
        ends = {name: sorted(found[name] for found in each) for name in BARS}
        return " / ".join(f"{values[0]:.2f}..{values[-1]:.2f}" for values in ends.values())

    names = {"smoothed 1": "smoothed", "one width": "one width", "ggn": "GGN", "hessian": "Hessian"}
    if all("second" in r["found"] for r in rows):
        names["second"] = "second order"
    heads = ["network", "loss, accuracy", "repeat of the truth", *names.values()]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    passed = {name: [0, 0, 0] for name in names}
    fair = [r for r in rows if passes(r["found"]["repeat"])]
    for r in rows:
        found = r["found"]
        cells = [spread([found[f"smoothed {seed}"] for seed in SEEDS])]
        cells += [one(found[name]) for name in list(names)[1:]]
        for i, name in enumerate(names if r in fair else ()):
            values = found[name]
            whole, ranks = passes(values), passes({**values, "ratio": 1.0})
            size = passes({"correlation": 1.0, "within": 1.0, "ratio": values["ratio"]})
            passed[name] = [a + b for a, b in zip(passed[name], (whole, ranks, size), strict=True)]
            cells[i] += " *" if whole else ""
        noisy = "" if r in fair else " (too noisy)"
        about = f"{r['name']} | {r['loss']:.3f}, {r['accuracy']:.0%} | {one(found['repeat'])}{noisy}"
        lines.append(f"| {about} | {' | '.join(cells)} |")
    lines += ["", f"{len(rows)} networks. The repeat of the truth passes on {len(fair)}. Of these, passed by:", ""]
    lines += ["| operator | all bars | both correlations | ratio |", "| --- | --- | --- | --- |"]
    return lines + [f"| {title} | {' | '.join(map(str, passed[name]))} |" for name, title in names.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", choices=("development", "test", "all"), default="development")
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--fashion-mnist", type=Path)
    parser.add_argument("--n-mnist", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in cases() if arguments.half in ("all", halves()[case.name])]
    wanted = [case for case in wanted if arguments.only is None or case.name in arguments.only]
    files = {case.name: arguments.folder / f"{case.name}.json" for case in wanted}
    for case in wanted:
        file, kept = files[case.name], arguments.folder / f"{case.name}.pt"
        if arguments.table or (file.exists() and not arguments.predict):
            continue
        objective = trained(case, (arguments.fashion_mnist, arguments.n_mnist))
        if not kept.exists():
            torch.save(measured(case, objective), kept)
        data = torch.load(kept, weights_only=False)
        if not torch.equal(data["weights"], objective.weights()):
            parser.error(f"{kept} was measured at other weights: remove it")
        found = row(data, objective)
        file.write_text(json.dumps(found))
        each = {name: {k: round(x, 2) for k, x in values.items()} for name, values in found["found"].items()}
        print(case.name, f"{data['seconds']:.0f} s", {n: each[n] for n in ("repeat", "smoothed 1", "ggn")}, flush=True)
    rows = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
