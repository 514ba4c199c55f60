"""The study behind docs/findings.md: networks of many kinds, trained and calibrated.

    python benchmarks/calibration.py FOLDER [--part I/N] [--fashion-mnist DIR]    goes on where it stopped
    python benchmarks/calibration.py FOLDER --collect FILE.json.gz                all results in one file
    python benchmarks/calibration.py --figure FILE.json.gz OUT                    its figure: OUT.png, OUT.pdf
    python benchmarks/calibration.py --table FILE.json.gz                         its numbers, in Markdown

Digits MLP: three surrogates, two slopes each, five training seeds, five initializers in turn (a Latin square). Digits
MLP with other neurons, resets, lengths and cross-entropy. Digits CSNN with BatchNorm and max-pooling, the tie rule
reversed. Fashion-MNIST MLP.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from hessian_tools.analysis.calibration import CalibrationSettings
from hessian_tools.io.json import clean, from_plain, load_result, save_result
from hessian_tools.plots.style import save_figure
from hessian_tools.results.calibration import CALIBRATION_SCHEMA, CalibrationResult
from hessian_tools.resume import Phases
from ikun_hessian.cli.main import run
from ikun_hessian.experiments.figures.calibration import study_figure, study_tables
from ikun_hessian.jobs.analyses.calibration import calibration_of
from ikun_hessian.jobs.open import open_job

SURROGATES = ("atan:2", "atan:5", "sigmoid:4", "sigmoid:10", "triangle:1", "triangle:0.4")
INITIALIZERS = ("ikun", "kaiming", "xavier", "lecun", "orthogonal")
MLP = "--model mlp --hidden 96,96 --norm none --alpha 0.1 --lr 2e-3 --epochs 30"
CSNN = "--model csnn --channels 6 --norm bn --lr 5e-3 --epochs 15"
OTHERS = {
    "lif": "--neuron lif",
    "plif": "--neuron plif",
    "soft": "--reset soft",
    "detached": "--detach-reset",
    "T16": "--timesteps 16",
    "T2": "--timesteps 2",
    "ce": "--loss ce",
    "deep": "--hidden 64,64,64,64",
}


def networks(fashion: Path | None) -> dict[str, str]:
    """Name -> options of `train`, in the order in which they are done."""
    found: dict[str, str] = {}

    def square(prefix: str, options: str, seed: int, chosen: range) -> None:
        for i in chosen:
            init, surrogate = INITIALIZERS[(i + seed) % 5], SURROGATES[i]
            name = f"{prefix}-{surrogate.replace(':', '_')}-{init}-{seed}"
            found[name] = f"{options} --surrogate {surrogate} --init {init} --seed {seed}"

    image = f"--data fashion-mnist --data-dir {fashion} --subset 1024"
    square("digits-mlp", MLP, 0, range(6))
    for seed in range(1, 5):
        square("digits-mlp", MLP, seed, range(6))
        if fashion and seed < 3:
            square("fashion-mlp", f"{image} {MLP}", seed, range(6))
        square("digits-csnn", CSNN, seed, range(seed - 1, 6, 4))
        for name, options in list(OTHERS.items())[2 * seed - 2 : 2 * seed]:
            found[f"digits-{name}"] = f"{MLP} {options} --seed {seed}"
    return found


def calibrated(name: str, options: str, folder: Path, fashion: Path | None) -> None:
    checkpoint, out = folder / f"{name}.pt", folder / f"{name}.calibration.json"
    if not checkpoint.exists() and run(["train", *options.split(), "--force", "--out", str(checkpoint)]):
        raise SystemExit(f"{name}: training failed")
    scales = (0.05, 0.1, 0.2) if "csnn" in name else (0.05, 0.1, 0.2, 0.4)
    settings = CalibrationSettings(scales=scales)
    job = open_job(
        checkpoint,
        samples="1024",
        split="train",
        batch_size=None,
        params="*",
        surrogate=None,
        dtype="float32",
        memory=settings.memory,
        data_dir=fashion if "fashion" in name else None,
        device="cpu",
    )
    state = folder / f"{name}.resume"
    save_result(calibration_of(job, settings, Phases(state, {"settings": clean(vars(settings))})), out)
    Phases.remove(state)
    print(name, "done", flush=True)


def collected(file: Path) -> dict[str, CalibrationResult]:
    """What --collect wrote."""
    found = json.loads(gzip.decompress(file.read_bytes()))
    return {name: from_plain(values, CalibrationResult, CALIBRATION_SCHEMA) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--fashion-mnist", type=Path)
    parser.add_argument("--collect", type=Path)
    parser.add_argument("--figure", type=Path, nargs=2)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.figure:
        file, out = arguments.figure
        print(*save_figure(study_figure(collected(file)), out))
    if arguments.table:
        print(study_tables(collected(arguments.table)), end="")
    if arguments.figure or arguments.table:
        return
    if arguments.folder is None:
        parser.error("FOLDER is missing")
    if arguments.collect:
        files = sorted(arguments.folder.glob("*.calibration.json"))
        for file in files:
            load_result(file, CalibrationResult, CALIBRATION_SCHEMA)
        text = json.dumps({f.name.split(".calibration")[0]: json.loads(f.read_text()) for f in files})
        arguments.collect.write_bytes(gzip.compress(text.encode(), mtime=0))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    index, parts = (int(n) for n in arguments.part.split("/"))
    for i, (name, options) in enumerate(networks(arguments.fashion_mnist).items()):
        if i % parts == index and not (arguments.folder / f"{name}.calibration.json").exists():
            calibrated(name, options, arguments.folder, arguments.fashion_mnist)


if __name__ == "__main__":
    main()
