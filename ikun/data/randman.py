"""Classes that differ in the times of spikes alone: smooth random manifolds (randman).

Every class is a curve z -> (f_1(z), ..., f_C(z)), z in [0, 1], through the space of the firing times of C neurons. Each
f is a random Fourier series whose amplitudes fall like i^-SMOOTHNESS, scaled to [0, 1]; each neuron fires once, at
f_c(z) T. So the counts of spikes are the same for all samples, and only their times say anything about the class.

Source: Zenke & Vogels 2021, The remarkable robustness of surrogate gradient learning for instilling complex function
in spiking neural networks, Neural Computation 33(4), and its code, https://github.com/fzenke/randman; here with
manifolds of one dimension.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CLASSES, NEURONS, STEPS = 10, 40, 30
SAMPLES = {"train": 2000, "test": 500}
SMOOTHNESS = 2.0  # alpha
FREQUENCIES = 32  # amplitudes beyond are under a thousandth
_SEED = 20210104
UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


def generate(split: str) -> tuple[UInt8Array, Int64Array]:
    """Spike trains [N,T,C,1,1], 0 or 1, and labels [N]: always the same ones, as many of every class."""
    times, labels = firing_times()
    part = slice(0, SAMPLES["train"]) if split == "train" else slice(SAMPLES["train"], None)
    steps = (times[part] * STEPS).astype(np.intp)
    trains = np.zeros((len(steps), STEPS, NEURONS, 1, 1), np.uint8)
    np.put_along_axis(trains[..., 0, 0], steps[:, None], 1, axis=1)
    return trains, labels[part]


def firing_times() -> tuple[Float64Array, Int64Array]:
    """(firing times [N,C] in [0, 1), labels [N]) of both splits, the training samples first."""
    each = sum(SAMPLES.values()) // CLASSES
    frequency = np.arange(FREQUENCIES)
    uniform = _uniform(CLASSES * (each + 3 * NEURONS * FREQUENCIES))
    z, theta = np.split(uniform, [CLASSES * each])
    z = z.reshape(CLASSES, each, 1, 1)
    amplitude, pace, phase = theta.reshape(3, CLASSES, 1, NEURONS, FREQUENCIES)
    amplitude = amplitude * (frequency + 1.0) ** -SMOOTHNESS
    amplitude[..., 0] = 0  # a constant
    f = (amplitude * np.sin(2 * np.pi * (frequency * pace * z + phase))).sum(-1)
    low, high = f.min(1, keepdims=True), f.max(1, keepdims=True)
    times = (f - low) / (high - low + 1e-7)
    # Sample by sample through the classes: any first part of both splits holds as many of each.
    return times.swapaxes(0, 1).reshape(-1, NEURONS), np.tile(np.arange(CLASSES, dtype=np.int64), each)


def _uniform(count: int) -> Float64Array:
    """Numbers [count] in [0, 1) from PCG64's raw stream, which numpy keeps the same for ever (NEP 19)."""
    raw: npt.NDArray[np.uint64] = np.random.PCG64(_SEED).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
