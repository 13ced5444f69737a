"""What is compared: images of a bundle and real ones, in which feature spaces and over which seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ul_export.evaluation.features import FeatureSpace, features_of
from ul_export.options import EvalOptions
from ul_runtime.errors import UsageError
from ul_runtime.machine import cache_dir
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick, progress
from ul_runtime.settings import Overrides
from ul_train.config import ImageConfig
from ul_train.data.imageset import Images, ImageSet, Splits, epoch_order
from ul_train.data.prepare import open_splits

_REAL, _HALVES = 0, 1  # streams of the orders below


@dataclass(frozen=True)
class Comparison:
    """Everything that the figures are computed from. `reference_split` is where the real images come from."""

    pipeline: Pipeline
    splits: Splits
    reference_split: str
    spaces: Sequence[FeatureSpace]
    options: EvalOptions
    overrides: Overrides

    @property
    def seeds(self) -> range:
        """Of sampling, encoding and decoding."""
        return range(self.options.seed, self.options.seed + self.options.seeds)

    @property
    def reference(self) -> ImageSet:
        """The real images that samples are compared with."""
        return self.splits.heldout if self.reference_split == "heldout" else self.splits.train

    @cached_property
    def real_ids(self) -> np.ndarray:
        """Indices of the real images in use, twice as many as samples of a seed."""
        return epoch_order(len(self.reference), 0, _REAL)[: 2 * self.options.images]

    @cached_property
    def real_features(self) -> dict[str, np.ndarray]:
        """Features of these `2n d`, by space."""
        with progress("features of real images", len(self.real_ids) * len(self.spaces), "images") as tick:
            return self.features(self.reference.images, self.real_ids, tick)

    @cached_property
    def heldout_ids(self) -> np.ndarray:
        """Held-out images for reconstructions and bits: `options.images` of them, or as many as there are."""
        return epoch_order(len(self.splits.heldout), 0, _REAL)[: self.options.images]

    @cached_property
    def heldout_features(self) -> dict[str, np.ndarray]:
        """Features of these, by space."""
        with progress("features of held-out images", len(self.heldout_ids) * len(self.spaces), "images") as tick:
            return self.features(self.splits.heldout.images, self.heldout_ids, tick)

    def features(self, images: Images, ids: np.ndarray, tick: Tick) -> dict[str, np.ndarray]:
        """Features `n d` of the images uint8 `n c h w` with these indices, by space."""
        return {space.name: features_of(space, images, ids, tick) for space in self.spaces}

    def sampled(
        self, seed: int, count: int, overrides: Overrides, tick: Tick
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Samples of a seed, uint8 `n c h w`, and their features `n d` by space. NonFiniteError."""
        batches = self.pipeline.generate(count, seed=seed, labels=self.labels(seed), tick=tick, **overrides)
        images = np.ascontiguousarray(np.concatenate([batch.images for batch in batches]).transpose(0, 3, 1, 2))
        return images, self.features(images, np.arange(count), lambda _: tick(0))

    def halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in `real_ids` in random order: two halves without a common image, divided anew for each seed.

        Each class is divided evenly: halves with other class counts would differ by more than the images do.
        """
        order = epoch_order(len(self.real_ids), seed, _HALVES)
        class_by_class = np.argsort(self.reference.labels[self.real_ids[order]], kind="stable")
        in_first = np.zeros(len(order), bool)
        in_first[class_by_class[::2]] = True
        return order[in_first], order[~in_first]

    def labels(self, seed: int) -> list[str] | None:
        """The bundle's classes of the second half, in whose place the samples stand; None = all in turn."""
        names, classes = self.reference.class_names, self.pipeline.manifest.classes
        if not names or not set(names) <= set(classes):
            return None
        return [names[label] for label in self.reference.labels[self.real_ids[self.halves(seed)[1]]]]


def real_images(
    pipeline: Pipeline, data: str, heldout: str | None, cache: Path | None, count: int
) -> tuple[Splits, str]:
    """A source's images as the bundle sees them, and the split that `reference_split` chooses."""
    image = pipeline.manifest.image
    asked = ImageConfig.model_validate(image.model_dump(include={"size", "channels", "background", "fit"}))
    splits = open_splits(asked, data, heldout, cache_dir(cache))
    return splits, reference_split(splits, count)


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
