"""Tests of the spike-time data set: classes differ in firing times and not in counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ikun.data import randman as spike_times
from ikun.data.datasets import Dataset, load_dataset
from ikun.data.download import DataError
from ikun.data.encoding import encode
from ikun.data.randman import CLASSES, NEURONS, STEPS


@pytest.fixture(scope="module")
def splits() -> tuple[Dataset, Dataset]:
    return load_dataset("spike-times"), load_dataset("spike-times", "test")


def test_shapes_are_those_asked_for_and_hashes_are_fixed(splits: tuple[Dataset, Dataset]) -> None:
    for found, count in zip(splits, (2000, 500), strict=True):
        assert found.images.shape == (count, STEPS, NEURONS, 1, 1)
        assert found.images[:].dtype == torch.float32
        assert (found.timesteps, found.input_shape, found.classes) == (STEPS, (NEURONS, 1, 1), CLASSES)
        assert found.labels.bincount().tolist() == [count // CLASSES] * CLASSES
        assert found.labels[:50].bincount().tolist() == [5] * CLASSES  # any first part is mixed
    # Part of every published number: these must never change.
    assert [found.sha256[:16] for found in splits] == ["513cf1dd9168db67", "6469781fc5fc2775"]
    small = load_dataset("spike-times", subset=7, seed=3)
    assert torch.equal(small.images[:], load_dataset("spike-times", subset=9, seed=3).images[:7])


def test_every_neuron_fires_once_at_its_time(splits: tuple[Dataset, Dataset]) -> None:
    times, labels = spike_times.firing_times()
    trains = torch.cat([found.images[:] for found in splits])[..., 0, 0]
    assert torch.equal(trains.sum(1), torch.ones(2500, NEURONS))  # so counts say nothing
    np.testing.assert_array_equal(trains.argmax(1).numpy(), np.floor(times * STEPS))
    np.testing.assert_array_equal(torch.cat([found.labels for found in splits]).numpy(), labels)
    assert times.min() >= 0
    assert times.max() < 1


def test_firing_times_are_smooth_random_curves() -> None:
    """The formula again, as its authors write it, one sample, neuron and frequency at a time."""
    count, f = CLASSES * (250 + 3 * NEURONS * 32), 32
    uniform = (np.random.PCG64(20210104).random_raw(count) >> np.uint64(11)) / 2**53
    z, theta = uniform[:2500].reshape(CLASSES, 250), uniform[2500:].reshape(3, CLASSES, NEURONS, f)
    times, labels = spike_times.firing_times()
    for k, c in ((0, 0), (3, 17), (9, 39)):
        curve = np.zeros(250)
        for i in range(1, f):
            a, b, phase = theta[:, k, c, i]
            curve += a / (i + 1) ** 2 * np.sin(2 * np.pi * (i * z[k] * b + phase))
        expected = (curve - curve.min()) / (curve.max() - curve.min() + 1e-7)
        np.testing.assert_allclose(times[labels == k, c], expected, atol=1e-12)
        # Smooth: neighbours on the curve fire at about the same time.
        along = expected[np.argsort(z[k])]
        assert np.abs(np.diff(along)).mean() < 0.02


def test_times_tell_the_class_and_counts_do_not(splits: tuple[Dataset, Dataset]) -> None:
    train, test = splits

    def accuracy(axes: tuple[int, ...], counts: bool) -> float:
        x, y = (found.images[:].sum(axes) if counts else found.images[:].flatten(1) for found in splits)
        fitted = LogisticRegression(max_iter=50).fit(x.flatten(1).numpy(), train.labels.numpy())
        return float(fitted.score(y.flatten(1).numpy(), test.labels.numpy()))

    assert accuracy((1,), True) == pytest.approx(0.1, abs=0.05)  # spikes of each neuron
    assert accuracy((2,), True) < 0.5  # spikes of all neurons at each time
    assert accuracy((), False) > 0.8


def test_spike_trains_are_used_as_they_are(splits: tuple[Dataset, Dataset]) -> None:
    trains = splits[0].images[:3]
    assert encode(trains, STEPS, "spikes") is trains
    with pytest.raises(DataError, match=r"have 30 time steps, the network 4: give timesteps=30"):
        encode(trains, 4, "spikes")
    for coding in ("direct", "poisson"):
        with pytest.raises(DataError, match="spike trains already: give coding='spikes'"):
            encode(trains, STEPS, coding)
    with pytest.raises(DataError, match="images, not spike trains: set coding= to direct or poisson"):
        encode(torch.zeros(2, 1, 4, 4), 4, "spikes")
