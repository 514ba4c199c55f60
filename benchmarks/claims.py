"""The numbers of docs/findings.md that no table of `compare` has: python benchmarks/claims.py FOLDER.

FOLDER holds the unpacked archives of docs/findings (paper/runs, stationarity/runs, ...). What is not there is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau, spearmanr

from ikun.training.health import overdriven
from ikun_hessian.experiments.comparison.comparison import compare_runs
from ikun_hessian.experiments.comparison.statistics import LEAST, Interval, kendall, paired_shift
from ikun_hessian.experiments.runs import gather

T = TypeVar("T")
Json = dict[str, Any]
Array = npt.NDArray[np.float64]
PAPER = ("paper", "paper-fashion")
CHANCE, LEARNED, GOOD, TINY = 0.2, 0.8, 0.9, 1e-300  # test accuracies: at chance below the first, learned from 0.8 on
MEASURED = {"E[f'^2]": "derivative_square", "current variance": "current_variance"}


@dataclass(frozen=True)
class Run:
    """stem: FOLDER/STUDY/runs/NAME. told: what NAME.train.json says. log: a dict an epoch."""

    stem: Path
    told: Json
    log: list[Json]

    def setting(self, name: str) -> Any:
        return {**self.told["network"], **self.told["training"]}[name]

    def start(self, what: str) -> list[Any]:
        return [layer[what] for layer in self.told["start"]["layers"]]

    def result(self, suffix: str) -> Json:
        """NAME.SUFFIX.json, {} if there is none."""
        path = self.stem.with_name(f"{self.stem.name}.{suffix}.json")
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def reached(self, accuracy: float) -> float:
        """The first epoch with that test accuracy, inf if there is none."""
        return next((float(line["epoch"]) for line in self.log if line["test_accuracy"] >= accuracy), math.inf)


def runs(folder: Path, study: str) -> list[Run]:
    found = []
    for path in sorted((folder / study / "runs").glob("*.train.json")):
        lines = path.with_suffix(".jsonl").read_text().splitlines()
        stem = path.with_name(path.name.removesuffix(".train.json"))
        found.append(Run(stem, json.loads(path.read_text()), [json.loads(line) for line in lines]))
    return found


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> list[tuple[Any, list[T]]]:
    found = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return sorted(found.items())


def by_optimizer(folder: Path) -> list[tuple[str, str, list[Run]]]:
    """Study, optimizer or "all", and the runs, of the studies of the paper's comparison."""
    parts = [(study, runs(folder, study)) for study in PAPER]
    each = [(s, name, of) for s, found in parts for name, of in grouped(found, lambda run: run.setting("optimizer"))]
    return [*each, *((study, "all", found) for study, found in parts if found)]


def outermost(spectrum: Json, operator: str = "hessian") -> tuple[Json, Json]:
    """The pairs of the largest and the smallest eigenvalue found."""
    of = spectrum["spectra"][operator]
    pairs = sorted(of["eigenvalues"] + of["smallest_eigenvalues"], key=lambda pair: pair["value"])
    return pairs[-1], pairs[0]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def interval(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def ratio(found: Interval) -> str:
    """Without an interval where there are too few pairs for one, nothing where a run that never gets there decides."""
    if not 0 < found.value < math.inf:
        return "-"
    return f"{found.value:.2f}" if math.isnan(found.low) else interval(found)


def minima(folder: Path) -> None:
    for study, optimizer, found in by_optimizer(folder):
        for level in ("", *sorted({level for run in found for level in run.told["saved_at_loss"]})):
            head = f"{study}, {optimizer}, {f'loss {level}' if level else 'end'}"
            suffix = f"loss{level}.spectrum" if level else "spectrum"
            there = [(run, spectrum) for run in found if (spectrum := run.result(suffix))]
            for init, of in grouped(there, lambda pair: pair[0].setting("init")):
                top, bottom = np.array([[pair["value"] for pair in outermost(spectrum)] for _, spectrum in of]).T
                medians = f"median lambda_max {np.median(top):.3f}, lambda_min {np.median(bottom):.3f}"
                print(f"claim 3: {head}: {init}: {medians}, the latter below 0 in {(bottom < 0).sum()} of ", end="")
                print(f"{len(of)} runs, at most {bottom.max():.3f} and {(bottom / top).max():.0%} of lambda_max")
            for operator in ("hessian", "ggn") if there else ():
                tops = [outermost(spectrum, operator)[0] for _, spectrum in there]
                share = np.median([pair["data_stderr"] / pair["value"] for pair in tops])
                print(f"claim 4: {head}: {operator}, data stderr over lambda_max {share:.0%} (median)")
            if level and there:
                epochs = [run.told["saved_at_loss"][level] for run, _ in there]
                loss = spread([run.log[epoch - 1]["loss"] for (run, _), epoch in zip(there, epochs, strict=True)])
                print(f"claim 4: {head}: {len(there)} of {len(found)} runs, loss {loss}, epoch {spread(epochs)}")
                lines = [run.log[epoch - 1] for (run, _), epoch in zip(there, epochs, strict=True)]
                gap = np.std([line["accuracy"] - line["test_accuracy"] for line in lines])
                print(f"claim 5: {head}: standard deviation of the accuracy gap over runs {gap:.3f}")


def ratios(folder: Path) -> None:
    """Tables of every form of the rule against every other initializer; * as in `compare`, p <= 0.05 after Holm."""
    for study, accuracy in (("paper", 0.9), ("paper-alpha", 0.9), ("paper-fashion", 0.8)):
        found = gather([folder / study / "runs"]) if (folder / study).is_dir() else []
        if study == "paper-alpha" and found:  # ikun alone, beside the other initializers of the paper's
            found += [run for run in gather([folder / "paper" / "runs"]) if run.value("init") != "ikun"]
        for optimizer, of in grouped(found, lambda run: run.value("optimizer")):
            print(f"claims 1 and 4: {study}, {optimizer}")
            for reference in ("kaiming", "xavier", "lecun", "normal"):
                rows = compare_runs(of, reference=reference, accuracy=accuracy).rows
                for init in sorted({row.level for row in rows if row.level.startswith("ikun")}):
                    at = {(row.measure, row.moment): row for row in rows if row.level == init}
                    (epochs,) = (row for (name, _), row in at.items() if name.startswith("epochs"))
                    losses = [m for name, m in at if name == "ggn lambda_max" and m.startswith("loss")]
                    curved = [at[f"ggn lambda_max{s}", m] for m in losses for s in ("", " scaled")]
                    cells = [ratio(row.shift) + "*" * (row.holm <= 0.05) for row in (epochs, *curved)]
                    print(f"| `{init}` / {reference} | {' | '.join(cells)} |")


def one_image(folder: Path) -> None:
    """lambda_max of the Hessian on one test image, and on the training samples, for the same networks."""
    for study, optimizer, found in by_optimizer(folder):
        head, both = f"one image: {study}, {optimizer}", []
        table: dict[str, dict[int, list[float]]] = defaultdict(dict)  # [init][seed]
        for run in found:
            if (one := run.result("published.spectrum")) and (many := run.result("spectrum")):
                both.append([outermost(spectrum)[0]["value"] for spectrum in (one, many)])
                table[run.setting("init")][run.setting("seed")] = both[-1]
        if not both:
            continue
        x, y = np.array(both).T
        quantiles, rho = np.quantile(x / y, [0.05, 0.5, 0.95]).round(2), spearmanr(x, y)
        print(f"{head}: over that of the training samples, 5%, 50%, 95% of {len(x)} networks: {quantiles}; ", end="")
        print(f"Spearman {rho.statistic:.2f} (p {rho.pvalue:.2f})")
        if optimizer == "all":
            continue
        seeds = sorted(set.intersection(*(set(of) for of in table.values())))
        level = "exact 95% interval of the ratio, paired over seeds" if len(seeds) >= LEAST else "too few seeds for any"
        turned, known, per_seed = [], [], []
        for a, b in combinations(table.values(), 2):
            first, second = (np.array([of[seed] for seed in seeds]) for of in (a, b))  # [seed, (one, many)]
            turned.append(bool(np.prod(np.median(first, 0) - np.median(second, 0)) < 0))
            per_seed.append(np.prod(first - second, 1) < 0)
            shift = paired_shift(np.log(first[:, 1] / second[:, 1]))
            known.append(shift.low > 0 or shift.high < 0)
        print(f"{head}: of {len(turned)} pairs of initializers {sum(turned)} change order between medians, ", end="")
        print(f"{np.sum(per_seed, 0).mean():.1f} per seed; {sum(known)} are resolved by the training samples ", end="")
        print(f"({level}), {sum(a and b for a, b in zip(known, turned, strict=True))} of which change")


def gain(folder: Path) -> None:
    """By the factor on the weight variance; before there was `gain`, alpha was scanned."""

    def condition(run: Run) -> tuple[str, float]:
        return run.setting("norm"), run.told["training"].get("gain", run.setting("alpha"))

    for (norm, factor), of in grouped(runs(folder, "gain"), condition):
        parts = grouped(of, lambda run: run.setting("surrogate"))
        each = ", ".join(f"{name} {sum(run.reached(GOOD) < math.inf for run in some)}" for name, some in parts)
        epochs = [run.reached(GOOD) for run in of]
        reach = f"{np.isfinite(epochs).sum()} of {len(of)} runs reach 90% ({each})"
        print(f"claim 6: norm {norm}, gain {factor:g}: {reach}, epochs {spread(epochs)}")


def variances(folder: Path) -> None:
    for key, of in grouped(runs(folder, "stationarity"), lambda run: (run.setting("model"), run.setting("init"))):
        v, g = ([run.start(what) for run in of] for what in ("current_variance", "gradient_square"))
        zero, good = sum(min(layers) < 1e-6 for layers in v), sum(run.reached(GOOD) < math.inf for run in of)
        most = "" if zero else f"at most {max(max(layers) / min(layers) for layers in v):.3g}, "
        gradient = spread([max(layers) / max(min(layers), TINY) for layers in g])
        print(
            f"claim 7: {' '.join(key)}: {good} of {len(of)} runs reach 90%; layers at the start, largest over ", end=""
        )
        print(f"smallest: variance {most}zero in some layer in {zero} runs; squared gradient {gradient}")


def deep(folder: Path) -> None:
    """Accuracies at the end without a norm, and whether the gains at the start go with them.

    Gains over the hidden layers: of the current's variance from the first to the last, and of the squared norm of the
    gradient from the last to the first. Layers of one width have the same ratio of mean squares.
    """
    for path in sorted(folder.glob("initialization*")):
        found = runs(folder, path.name)
        points: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for key, of in grouped(found, lambda run: (run.setting("model"), run.setting("neuron"), depth_of(run))):
            head = f"without a norm: {path.name}, {key[0]}, {key[1]}, depth {key[2]}, lr {of[0].setting('lr')}"
            tables = {}
            for init, some in grouped(of, lambda run: run.setting("init")):
                tables[init] = {run.setting("seed"): run.log[-1]["test_accuracy"] for run in some}
                accuracies = list(tables[init].values())
                v, g = ([run.start(what) for run in some] for what in ("current_variance", "gradient_square"))
                forward = [layers[-2] / max(layers[0], TINY) for layers in v]
                backward = [layers[0] / max(layers[-2], TINY) for layers in g]
                points[str(key)] += zip(accuracies, forward, backward, strict=True)
                gains = f"gain forward {spread(forward)}, backward {spread(backward)}"
                chance = sum(accuracy < CHANCE for accuracy in accuracies)
                print(f"{head}: {init}: accuracy {spread(accuracies)}, {chance} of {len(some)} at chance; {gains}")
            for init, others in tables.items():
                shared = sorted(set(tables.get("relay", {})) & set(others))
                if init != "relay" and len(shared) >= LEAST:
                    shift = paired_shift([tables["relay"][seed] - others[seed] for seed in shared])
                    print(f"{head}: relay minus {init}: {interval(shift)}")
            for name, place in (("forward", 1), ("backward", 2)):
                some_points = points[str(key)]
                away = [-abs(math.log(max(point[place], TINY))) for point in some_points]
                tau = interval(kendall(away, [point[0] for point in some_points]))
                print(f"{head}: tau of accuracy and closeness of the {name} gain to 1: {tau}, {len(away)} runs")


def depth_of(run: Run) -> int:
    """Hidden layers of an mlp, convolutions of a csnn, blocks of a resnet."""
    return len(run.setting("hidden")) if run.setting("model") == "mlp" else int(run.setting("depth"))


def ends(run: Run, what: str) -> Array:
    """[2, layers, ...]: what the log has of every layer after the first and the last epoch."""
    return np.array([[run.log[i]["layers"][name][what] for name in run.start("name")] for i in (0, -1)])


def moved(run: Run, what: str) -> float:
    """Mean factor over the layers from the first epoch to the last, up or down alike."""
    return float(np.exp(np.abs(np.diff(np.log(np.maximum(ends(run, what), TINY)), axis=0)).mean()))


def stationary(folder: Path) -> None:
    """E[f'^2] over the time steps, and it and the current's variance over layers and training, of runs that learn."""

    def quantiles(values: Array) -> str:
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
        return f"{middle:.3g} ({low:.3g} to {high:.3g})"

    learned = [run for run in runs(folder, "stationarity") if run.reached(LEARNED) < math.inf]
    for model, of in grouped(learned, lambda run: run.setting("model")):
        head = f"claim 8: {model}, {len(of)} runs that learn, median (10% to 90%)"
        steps = np.array([ends(run, "derivative_square_by_step") for run in of])[:, :, :-1]  # hidden layers
        for place, when in enumerate(("epoch 1", "the last epoch")):
            for name, some in (("", steps[:, place]), (", without t = 1", steps[:, place, :, 1:])):
                print(f"{head}: {when}: E[f'^2] in a hidden layer, largest over smallest t{name}: ", end="")
                print(quantiles(some.max(-1) / np.maximum(some.min(-1), TINY)))
        for name, what in MEASURED.items():
            values = np.array([ends(run, what) for run in of])  # [run, first and last, layer]
            for place, when in enumerate(("epoch 1", "the last epoch")):
                hidden = values[:, place, :-1]
                print(f"{head}: {when}: {name}, largest over smallest hidden layer: ", end="")
                print(quantiles(hidden.max(-1) / np.maximum(hidden.min(-1), TINY)))
            factors = values[:, 1] / np.maximum(values[:, 0], TINY)
            print(f"{head}: {name}, last epoch over the first: hidden layers {quantiles(factors[:, :-1])}, ", end="")
            print(f"last layer {quantiles(factors[:, -1])}")


def drift(folder: Path) -> None:
    """Of E[f'^2], and whether it and that of the current's variance go with failure: as factors, up or down alike."""
    found = runs(folder, "stationarity")
    hidden, falls = defaultdict(list), defaultdict(list)
    for run in (run for run in found if run.reached(LEARNED) < math.inf):
        model = run.setting("model")
        first, end = np.log(np.maximum(ends(run, "derivative_square")[:, :-1], TINY))
        start = np.log(np.maximum(run.start("derivative_square")[:-1], TINY))
        hidden[model, "the first epoch"].extend(np.exp(np.abs(end - first)).tolist())
        hidden[model, "initialization"].extend(np.exp(np.abs(end - start)).tolist())
        falls[model].extend((end < first).tolist())
    for model, of in sorted(falls.items()):
        print(f"claim 8: {model}: E[f'^2] of {sum(of)} of {len(of)} hidden layers falls since epoch 1")
    for (model, since), of in sorted(hidden.items()):
        print(f"claim 8: {model}: hidden layers since {since}, 50%, 90%: {np.quantile(of, [0.5, 0.9]).round(2)}")
    for what, key in MEASURED.items():
        points = [(moved(run, key), run.log[-1]["test_accuracy"], run) for run in found]
        for name in ("all", *sorted({run.setting("model") for run in found})) if points else ():
            some = [point for point in points if name in ("all", point[2].setting("model"))]
            x, y = [point[0] for point in some], [point[1] for point in some]
            inside = kendall(x, y, [(run.setting("model"), run.setting("init")) for *_, run in some])
            print(f"claim 8: {what}, {name}: tau of drift and final accuracy {interval(kendall(x, y))}, ", end="")
            print(f"p {kendalltau(x, y).pvalue:.2g}; within model and initializer {interval(inside)}")
        for name, low, high in (("at chance", 0.0, CHANCE), ("in between", CHANCE, LEARNED), ("learned", LEARNED, 1.1)):
            if of := sorted(size for size, accuracy, _ in points if low <= accuracy < high):
                each = spread(of) if len(of) > 9 else " ".join(f"{size:.3g}" for size in of)
                print(f"claim 8: {what}, {name} at the end, {len(of)} runs: drift {each}")


def failures(folder: Path) -> None:
    """The archived runs are older than the signature of too large weights, which their start shows all the same.

    Presets share runs: "all, once" counts those with the same losses and accuracies once. Without those on
    Fashion-MNIST, where 80% is what good runs reach, and without the deep networks of `deep`, most of which fail.
    """
    names = [path.name for path in sorted(folder.iterdir()) if (path / "runs").is_dir()]
    names = [name for name in names if not name.startswith("initialization")]
    digits = {
        name: [run for run in runs(folder, name) if run.told["data"]["name"] != "fashion-mnist"] for name in names
    }
    studies = {name: found for name, found in digits.items() if found}
    every = [run for found in studies.values() for run in found]
    once = {tuple((line["loss"], line["test_accuracy"]) for line in run.log): run for run in every}
    for study, found in (*studies.items(), ("all, once", list(once.values()))):
        counts = {True: np.zeros(4, int), False: np.zeros(4, int)}  # by whether the run failed
        for run in found:
            driven = bool(overdriven(run.told["start"]["layers"], run.setting("threshold")))
            logged = any(not name.startswith("overdriven") for name in run.told["failures"])
            counts[run.reached(LEARNED) == math.inf] += (1, driven, logged, driven or logged)
        for below, (count, started, later, flagged) in counts.items():
            print(
                f"claim 9: {study}: {count} runs {'below' if below else 'of at least'} 80%: {flagged} flagged, ", end=""
            )
            print(f"{started} as overdriven, {later} by the log")


def costs(folder: Path) -> None:
    every = [run for path in folder.iterdir() for run in runs(folder, path.name) if run.setting("init") == "ikun"]
    most = max(run.told["start"]["forward_passes"] for run in every)
    print(f"claim 10: ikun takes at most {most} forward passes in any study")
    for init, of in grouped(runs(folder, "initializers"), lambda run: run.setting("init")):
        starts = [(r.told["start"]["forward_passes"], r.told["start"]["seconds"], r.told["seconds"]) for r in of]
        passes, (_, begin, whole) = spread([count for count, *_ in starts]), np.median(starts, 0)
        print(f"claim 10: {init}: {passes} forward passes, {begin:.3f} s of a training of {whole:.1f} s")


def clustered(x: Sequence[float], y: Sequence[float], clusters: Sequence[Hashable], draws: int = 10_000) -> Interval:
    """Kendall's tau-a with the 95% interval of the bootstrap over clusters of runs; no run is paired with itself."""
    names = list(dict.fromkeys(clusters))
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    times = drawn[:, [names.index(cluster) for cluster in clusters]].astype(float)  # [draw, run]: how often it is there
    agree = np.sign(np.subtract.outer(x, x)) * np.sign(np.subtract.outer(y, y))
    taus = ((times @ agree) * times).sum(1) / (times.sum(1) ** 2 - (times**2).sum(1))
    low, high = np.quantile(taus, [0.025, 0.975])
    return Interval(kendall(x, y).value, float(low), float(high), len(x))


def robustness(folder: Path) -> None:
    """Runs of one initializer and seed start alike: a cluster. p is scipy's, as if all runs were independent."""
    triples = [(run, run.result("flatness"), run.result("robustness")) for run in runs(folder, "robustness")]
    triples = [triple for triple in triples if all(triple[1:])]
    clusters = [(run.setting("init"), run.setting("seed")) for run, _, _ in triples]
    for metric in triples[0][1]["main"] if triples else ():
        x = [flat["main"][metric]["value"] for _, flat, _ in triples]
        for kind in triples[0][2]["disturbed"]:
            left = [statistics.mean(at["value"] for at in of["disturbed"][kind].values()) for _, _, of in triples]
            lost = [of["accuracy"] - mean for (_, _, of), mean in zip(triples, left, strict=True)]
            y = np.round(lost, 9).tolist()  # equal ones stay ties
            tau, p = interval(clustered(x, y, clusters)), kendalltau(x, y).pvalue
            print(f"claim 11: {metric}, {kind}: tau {tau}, {len(set(clusters))} clusters of {len(x)} runs; p {p:.2g}")


def evolution(folder: Path) -> None:
    for init, of in grouped(runs(folder, "evolution"), lambda run: run.setting("init")):
        paths = of[0].stem.parent.glob(f"{of[0].stem.name}.epoch*.spectrum.json")
        epochs = sorted(path.name.split(".")[-3] for path in paths)
        series = [[run.result(f"{epoch}.spectrum") for epoch in epochs] for run in of]
        top = np.array([[outermost(spectrum, "ggn")[0]["value"] for spectrum in one] for one in series])
        trace = np.array([[spectrum["spectra"]["ggn"]["trace"]["estimate"] for spectrum in one] for one in series])
        share = spread([run.log[int(epochs[0][5:]) - 1]["loss"] / run.log[0]["loss"] for run in of])
        print(f"evolution: {init}: training loss, {epochs[0]} over epoch 1: {share}")
        for name, values in (("lambda_max", top), ("trace", trace)):
            somewhere = (np.diff(values, axis=1) > 0).any(1).sum()
            print(f"evolution: {init}: ggn {name} rises between some snapshots in {somewhere} of {len(of)} runs")
            for a, b in ((0, len(epochs) - 1), *((i, i + 1) for i in range(len(epochs) - 1))):
                ratios = values[:, a] / values[:, b]
                rises = f"rises in {(ratios < 1).sum()} of {len(of)} runs"
                print(f"evolution: {init}: ggn {name}, {epochs[a]} over {epochs[b]}: {spread(ratios)}, {rises}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not list(folder.glob("*/runs")):
        parser.error(f"{folder} holds no STUDY/runs: unpack the archives of docs/findings there")
    for part in (
        minima,
        ratios,
        one_image,
        gain,
        variances,
        deep,
        stationary,
        drift,
        failures,
        costs,
        robustness,
        evolution,
    ):
        part(folder)


if __name__ == "__main__":
    main()
