"""The numbers of docs/findings.md that no table of `compare` has: python benchmarks/claims.py FOLDER.

FOLDER holds the unpacked archives of docs/findings (paper/runs, stationarity/runs, ...).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from ikun.training import overdriven


def runs(folder: Path, study: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(description, log) of every run."""
    found = []
    for path in sorted((folder / study / "runs").glob("*.train.json")):
        lines = path.with_suffix(".jsonl").read_text().splitlines()
        found.append((json.loads(path.read_text()), [json.loads(line) for line in lines]))
    return found


def lambda_min(folder: Path) -> None:
    ends = defaultdict(list)
    for path in (folder / "paper" / "runs").glob("*.spectrum.json"):
        if ".published." not in path.name and ".loss" not in path.name:
            h = json.loads(path.read_text())["spectra"]["hessian"]
            values = [e["value"] for e in h["eigenvalues"] + h["smallest_eigenvalues"]]
            ends[path.name.partition("-")[0]].append((max(values), min(values)))
    for name, of in sorted(ends.items()):
        largest, smallest = (statistics.median(v) for v in zip(*of, strict=True))
        print(f"claim 3: {name}, {len(of)} runs: median lambda_max {largest:.3f}, lambda_min {smallest:.3f}")


def one_image(folder: Path) -> None:
    ratios = []
    for path in (folder / "paper" / "runs").glob("*.published.spectrum.json"):
        both = (path, path.with_name(path.name.replace(".published", "")))
        one, many = (json.loads(p.read_text())["spectra"]["hessian"]["eigenvalues"][0]["value"] for p in both)
        ratios.append(one / many)
    print("one image over 256: 5%, 50%, 95% quantiles", np.quantile(ratios, [0.05, 0.5, 0.95]).round(2))


def variances(folder: Path) -> None:
    found = defaultdict(list)
    for told, _ in runs(folder, "stationarity"):
        v = [layer["current_variance"] for layer in told["start"]["layers"]]
        found[told["network"]["model"], told["training"]["init"]].append((max(v) / max(min(v), 1e-300), min(v) < 1e-6))
    for key, of in sorted(found.items()):
        spread = f"largest over smallest at most {max(r for r, _ in of):.3g}; " if not any(z for _, z in of) else ""
        print(f"claim 7: {key}: {spread}zero in some layer in {sum(zero for _, zero in of)} of {len(of)} runs")


def drift(folder: Path) -> None:
    drifts, accuracies, last, hidden = [], [], defaultdict(list), defaultdict(list)
    for told, log in runs(folder, "stationarity"):
        first, end = ({k: s["derivative_square"] for k, s in log[i]["layers"].items()} for i in (0, -1))
        moves = [math.log(max(end[k], 1e-300) / max(first[k], 1e-300)) for k in end]
        drifts.append(math.exp(statistics.mean(map(abs, moves))))
        accuracies.append(log[-1]["test_accuracy"])
        if max(line["test_accuracy"] for line in log) >= 0.8:
            last[told["network"]["model"]].append(math.exp(-moves[-1]))
            hidden[told["network"]["model"]] += [math.exp(abs(m)) for m in moves[:-1]]
    for model in last:
        quantiles = np.quantile(hidden[model], [0.5, 0.9]).round(2)
        print(f"claim 8: {model}: last layer / {statistics.median(last[model]):.1f}; hidden: 50%, 90%", quantiles)
    tau = kendalltau(drifts, accuracies)
    chance = [d for d, a in zip(drifts, accuracies, strict=True) if a < 0.2]
    learned = [d for d, a in zip(drifts, accuracies, strict=True) if a >= 0.8]
    print(
        f"claim 8: tau {tau.statistic:.2f} (p {tau.pvalue:.2f}); at chance {min(chance):.1f} to {max(chance):.1f}, ",
        end="",
    )
    print(f"learned {min(learned):.1f} to {max(learned):.1f}")


def failures(folder: Path) -> None:
    """The archived runs are older than the signature of too large weights, which their start shows all the same."""
    for study in sorted(path.name for path in folder.iterdir() if (path / "runs").is_dir()):
        counts: dict[bool, list[int]] = {True: [0, 0, 0, 0], False: [0, 0, 0, 0]}  # by whether the run failed
        for told, log in runs(folder, study):
            failed = max(line["test_accuracy"] for line in log) < 0.8
            driven = bool(overdriven(told["start"]["layers"], told["network"]["threshold"]))
            logged = bool([f for f in told["failures"] if not f.startswith("overdriven")])
            counts[failed] = [a + b for a, b in zip(counts[failed], (1, driven, logged, driven or logged), strict=True)]
        for below, (count, started, later, flagged) in counts.items():
            print(
                f"claim 9: {study}: {count} runs {'below' if below else 'of at least'} 80%: {flagged} flagged, "
                f"{started} as overdriven, {later} by the log"
            )


def costs(folder: Path) -> None:
    found = defaultdict(list)
    for told, _ in runs(folder, "initializers"):
        start = told["start"]
        found[told["training"]["init"]].append((start["forward_passes"], start["seconds"], told["seconds"]))
    for name, of in sorted(found.items()):
        passes, begin, whole = (statistics.median(v) for v in zip(*of, strict=True))
        print(f"claim 10: {name}: {passes:g} forward passes, {begin:.3f} s of a training of {whole:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for part in (lambda_min, variances, drift, failures, costs, one_image):
        part(folder)


if __name__ == "__main__":
    main()
