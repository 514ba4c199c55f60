"""Classes that differ only in the times of their spikes: smooth random manifolds (randman).

Every class is a curve z -> (f_1(z), ..., f_C(z)), z in [0, 1], through the space of the firing times of C neurons. Each
f is a random Fourier series whose amplitudes fall as i^-SMOOTHNESS, scaled to [0, 1]. Each neuron fires once, at time
f_c(z) T. All samples therefore have the same spike counts, and only the spike times depend on the class.

Source: Zenke & Vogels 2021, The remarkable robustness of surrogate gradient learning for instilling complex function
in spiking neural networks, Neural Computation 33(4), and its code, https://github.com/fzenke/randman. The manifolds
here have one dimension.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ikun.data.arrays import Float64Array, Int64Array, UInt8Array

CLASSES, NEURONS, STEPS = 10, 40, 30
SAMPLES = {"train": 2000, "test": 500}
SMOOTHNESS = 2.0  # alpha
FREQUENCIES = 32  # the amplitudes of higher frequencies would be less than a thousandth
_SEED = 20210104


def generate(split: str) -> tuple[UInt8Array, Int64Array]:
    """Generate spike trains [N, T, C, 1, 1] of 0 and 1, and labels [N].

    The samples are the same in every call, and the classes have equally many.
    """
    times, labels = firing_times()
    part = slice(0, SAMPLES["train"]) if split == "train" else slice(SAMPLES["train"], None)
    steps = (times[part] * STEPS).astype(np.intp)
    trains = np.zeros((len(steps), STEPS, NEURONS, 1, 1), np.uint8)
    np.put_along_axis(trains[..., 0, 0], steps[:, None], 1, axis=1)
    return trains, labels[part]


def firing_times() -> tuple[Float64Array, Int64Array]:
    """Return firing times [N, C] in [0, 1) and labels [N] of both splits, the training samples first."""
    each = sum(SAMPLES.values()) // CLASSES
    frequency = np.arange(FREQUENCIES)
    uniform = _uniform(CLASSES * (each + 3 * NEURONS * FREQUENCIES))
    z, theta = np.split(uniform, [CLASSES * each])
    z = z.reshape(CLASSES, each, 1, 1)
    amplitude, pace, phase = theta.reshape(3, CLASSES, 1, NEURONS, FREQUENCIES)
    amplitude = amplitude * (frequency + 1.0) ** -SMOOTHNESS
    amplitude[..., 0] = 0  # the constant term
    f = (amplitude * np.sin(2 * np.pi * (frequency * pace * z + phase))).sum(-1)
    low, high = f.min(1, keepdims=True), f.max(1, keepdims=True)
    times = (f - low) / (high - low + 1e-7)
    # Interleave the classes, so that the first samples of each split have equally many of every class.
    return times.swapaxes(0, 1).reshape(-1, NEURONS), np.tile(np.arange(CLASSES, dtype=np.int64), each)


def _uniform(count: int) -> Float64Array:
    """Draw numbers [count] in [0, 1) from PCG64's raw stream, which NumPy guarantees not to change (NEP 19)."""
    raw: npt.NDArray[np.uint64] = np.random.PCG64(_SEED).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
