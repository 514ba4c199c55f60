"""The description of the samples that a checkpoint was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ikun.data.datasets import Dataset, load_dataset
from ikun.data.download import DataError
from ikun.data.lazy import taken


@dataclass(frozen=True)
class DataSpec:
    """The samples that a network is trained on.

    Attributes:
        name: Name of the data set.
        subset: Number of samples drawn from the training split; None for all of them.
        seed: Seed of the subset.
        held_out: Number of samples of the subset, its last ones, that are not trained on.
        image_size: Side in pixels of the images of an image folder; None for data sets of one size.
        frames: Number of frames of recordings of events; None for other data sets.
    """

    name: str = "digits"
    subset: int | None = None
    seed: int = 0
    held_out: int = 0
    image_size: int | None = None
    frames: int | None = None

    def load(self, split: str = "train", data_dir: str | Path | None = None) -> Dataset:
        """Load the training samples, or the whole test split of the data set.

        Raises:
            DataError: If the data cannot be loaded.
        """
        if split != "train":
            return self._read(data_dir)(split)
        return self.parts(data_dir)[0]

    def parts(self, data_dir: str | Path | None = None) -> tuple[Dataset, Dataset | None]:
        """Load the training samples and the held-out samples (None if there are none).

        Raises:
            DataError: If the data cannot be loaded, or no sample is left to train on.
        """
        read = self._read(data_dir)
        count = self.subset
        if count is None and self.held_out:
            count = len(read())  # a subset of full size is a random permutation, so the held-out samples are random
        whole = read(subset=count, seed=self.seed)
        if not self.held_out:
            return whole, None
        if self.held_out < 0:
            raise DataError(f"{self.held_out} held-out samples: give 0 or more")
        cut = len(whole) - self.held_out
        if cut < 1:
            raise DataError(f"{self.held_out} held-out samples of {len(whole)} leave none to train on: hold out fewer")
        return tuple(  # type: ignore[return-value]
            dataclasses.replace(
                whole,
                images=taken(whole.images, part),
                labels=whole.labels[part],
                sha256=hashlib.sha256(f"{whole.sha256} {part.start} {part.stop}".encode()).hexdigest(),
            )
            for part in (slice(0, cut), slice(cut, len(whole)))
        )

    def _read(self, data_dir: str | Path | None) -> partial[Dataset]:
        """Return the function that loads a split of the data set."""
        return partial(load_dataset, self.name, data_dir=data_dir, image_size=self.image_size, frames=self.frames)
