"""Which samples a checkpoint was trained on."""

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
    """The samples: `subset` of data set `name` drawn with `seed`, of which the last `held_out` were not trained on.

    image_size: pixels a side of an image folder's images; None for data sets of one size.
    """

    name: str = "digits"
    subset: int | None = None
    seed: int = 0
    held_out: int = 0
    image_size: int | None = None

    def load(self, split: str = "train", data_dir: str | Path | None = None) -> Dataset:
        """The training samples, or the data set's whole test split. Raises DataError."""
        if split != "train":
            return load_dataset(self.name, split, data_dir=data_dir, image_size=self.image_size)
        return self.parts(data_dir)[0]

    def parts(self, data_dir: str | Path | None = None) -> tuple[Dataset, Dataset | None]:
        """(training samples, held-out samples or None). Raises DataError."""
        read = partial(load_dataset, self.name, data_dir=data_dir, image_size=self.image_size)
        count = self.subset
        if count is None and self.held_out:
            count = len(read())  # a full permutation: what is held out is random
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
