"""From event files to a figure: train a spiking network on N-MNIST recordings, and draw its Hessian spectrum.

    python examples/events_to_figure.py OUT [FOLDER]

FOLDER holds Train.zip and Test.zip of N-MNIST, or their folders Train and Test. Without it, the script first writes
recordings of its own in the same format: an edge that moves in one of ten directions. The figure is written to the
folder OUT (default: the current folder), as events.spectrum.png and .pdf, beside the checkpoint and the numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hessian_tools import SpectrumSettings, make_objective, save_figure, save_spectrum, spectrum, spectrum_figure
from ikun import LOSSES, DataSpec, Spec, TrainingSpec, train

FRAMES = 4


def write_recordings(folder: Path) -> Path:
    """Write 200 training and 20 test recordings of a moving edge, five bytes per event."""
    random = np.random.default_rng(0)
    for split, count in (("Train", 200), ("Test", 20)):
        for i in range(count):
            label = i % 10
            angle = 2 * np.pi * label / 10
            time = np.sort(random.integers(0, 300_000, 1500))
            along = 16 * time / 150_000 - 16 + random.normal(0, 1, 1500)  # the edge crosses the centre after 150 ms
            across = random.uniform(-12, 12, 1500)
            x = np.clip(17 + along * np.cos(angle) - across * np.sin(angle), 0, 33).astype(np.int64)
            y = np.clip(17 + along * np.sin(angle) + across * np.cos(angle), 0, 33).astype(np.int64)
            last = random.integers(0, 2, 1500) << 23 | time  # one bit of polarity, 23 bits of microseconds
            events = np.stack([x, y, last >> 16, last >> 8 & 255, last & 255], 1).astype(np.uint8)
            path = folder / split / str(label) / f"{i:05}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(events.tobytes())
    return folder


def main(out: Path, folder: Path) -> None:
    # Recordings are read when they are used, so the data may be larger than memory.
    data = DataSpec("n-mnist", subset=200, frames=FRAMES)
    network = Spec(input_shape=(2, 34, 34), channels=2, timesteps=FRAMES, coding="spikes", neuron="lif")
    training = TrainingSpec(init="kaiming", epochs=4, batch_size=20, lr=0.01)
    checkpoint = train(network, data, training, out / "events.pt", data_dir=folder)
    print(f"test accuracy {checkpoint.kept['test_accuracy']:.0%}")

    samples = data.load("train", folder)
    pair = samples.images[:64], samples.labels[:64]
    objective = make_objective(checkpoint.build(), LOSSES[checkpoint.loss], pair, batch_size=64)
    result = spectrum(objective, SpectrumSettings(top=3, smallest=2, steps=30, probes=2))
    for name, found in result.spectra.items():
        print(f"{name}: lambda_max {found.eigenvalues[0].value:.3g}, data standard error "
              f"{found.eigenvalues[0].data_stderr:.1g}")  # fmt: skip
    stem = out / "events.spectrum"
    print("written:", *save_spectrum(result, stem), *save_figure(spectrum_figure(result), stem))


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    main(place, Path(sys.argv[2]) if len(sys.argv) > 2 else write_recordings(place / "recordings"))
