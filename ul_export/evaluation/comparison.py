"""What is compared: images of a bundle and real ones, in which feature spaces and over which seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ul_export.evaluation.features import FeatureSpace, features_of
from ul_export.evaluation.options import EvalOptions
from ul_runtime.errors import UsageError
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import progress
from ul_runtime.settings import Overrides
from ul_train.data.imageset import ImageSet, Splits, epoch_order

_REAL, _HALVES = 0, 1  # streams of the orders below


@dataclass(frozen=True)
class Comparison:
    """Everything that the figures are computed from. `count` samples a seed stand against `count` real images."""

    pipeline: Pipeline
    splits: Splits
    spaces: Sequence[FeatureSpace]
    options: EvalOptions
    overrides: Overrides

    @property
    def count(self) -> int:
        """Samples of a seed."""
        return self.options.images

    @property
    def seeds(self) -> range:
        """Of sampling, encoding and decoding."""
        return range(self.options.seed, self.options.seed + self.options.seeds)

    @cached_property
    def reference_split(self) -> str:
        """Where the real images come from; see the function."""
        return reference_split(self.splits, self.count)

    @property
    def reference(self) -> ImageSet:
        """The real images that samples are compared with."""
        return self.splits.heldout if self.reference_split == "heldout" else self.splits.train

    @cached_property
    def real_ids(self) -> np.ndarray:
        """Indices of the 2 count real images in use."""
        return epoch_order(len(self.reference), 0, _REAL)[: 2 * self.count]

    @cached_property
    def real_features(self) -> dict[str, np.ndarray]:
        """Features of these `2n d`, by space."""
        return self._features("features of real images", self.reference, self.real_ids)

    @cached_property
    def heldout_ids(self) -> np.ndarray:
        """Held-out images for reconstructions and bits: `count` of them, or as many as there are."""
        return epoch_order(len(self.splits.heldout), 0, _REAL)[: self.count]

    @cached_property
    def heldout_features(self) -> dict[str, np.ndarray]:
        """Features of these, by space."""
        return self._features("features of held-out images", self.splits.heldout, self.heldout_ids)

    def halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in `real_ids` in random order: two halves without a common image, divided anew for each seed.

        Each class is divided evenly: halves with other class counts would differ by more than the images do.
        """
        order = epoch_order(2 * self.count, seed, _HALVES)
        class_by_class = np.argsort(self.reference.labels[self.real_ids[order]], kind="stable")
        in_first = np.zeros(2 * self.count, bool)
        in_first[class_by_class[::2]] = True
        return order[in_first], order[~in_first]

    def labels(self, seed: int) -> list[int] | None:
        """The bundle's classes of the second half, in whose place the samples stand; None = all in turn."""
        names, classes = self.reference.class_names, self.pipeline.manifest.classes
        if not names or not set(names) <= set(classes):
            return None
        to_bundle = [classes.index(name) for name in names]
        return [to_bundle[label] for label in self.reference.labels[self.real_ids[self.halves(seed)[1]]]]

    def _features(self, what: str, images: ImageSet, ids: np.ndarray) -> dict[str, np.ndarray]:
        with progress(what, len(ids) * len(self.spaces), "images") as tick:
            return {space.name: features_of(space, images.images, ids, tick) for space in self.spaces}


def reference_split(splits: Splits, count: int) -> str:
    """The split of the real images: heldout, or else train, if it has 2 count images; UsageError if neither has."""
    sizes = {"heldout": len(splits.heldout), "train": len(splits.train)}
    for split, size in sizes.items():
        if size >= 2 * count:
            return split
    raise UsageError(
        f"--images {count}: needs {2 * count} real images, for two halves; there are {sizes['train']} to train on and "
        f"{sizes['heldout']} held out: give {max(sizes.values()) // 2} or less"
    )
