"""What is evaluated: a bundle, real images in two halves, the feature spaces and the seeds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ul_export.evaluation.distances import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
    sliced_distance,
    streamed,
)
from ul_export.evaluation.features import FeatureSpace, features_of
from ul_runtime.errors import UsageError
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Control, progress
from ul_runtime.settings import Overrides
from ul_train.data.imageset import ImageSet, Splits, epoch_order

_POOL, _HALVES = 0, 1  # streams of the orders below


@dataclass(frozen=True)
class Subject:
    """Everything that the figures are computed from. `count` samples a seed stand against `count` real images."""

    pipeline: Pipeline
    splits: Splits
    spaces: Sequence[FeatureSpace]
    count: int
    seeds: tuple[int, ...]
    overrides: Overrides
    bits_samples: int
    stop: Callable[[], bool]

    @cached_property
    def part(self) -> str:
        """Where the real images come from: those held out if there are two halves of them, else those trained on."""
        return reference_part(self.splits, self.count)

    @property
    def reference(self) -> ImageSet:
        """The real images that samples are compared with."""
        return self.splits.heldout if self.part == "heldout" else self.splits.train

    @cached_property
    def pool(self) -> np.ndarray:
        """Indices of the 2 count real images in use."""
        return epoch_order(len(self.reference), 0, _POOL)[: 2 * self.count]

    @cached_property
    def pool_features(self) -> dict[str, np.ndarray]:
        """Features of the pool `2n d`, by space."""
        return self.features("features of real images", self.reference, self.pool, self.spaces)

    @cached_property
    def heldout_ids(self) -> np.ndarray:
        """Held-out images for reconstructions and bits: `count` of them, or as many as there are."""
        return epoch_order(len(self.splits.heldout), 0, _POOL)[: self.count]

    @cached_property
    def heldout_features(self) -> dict[str, np.ndarray]:
        """Features of these, by space."""
        return self.features("features of held-out images", self.splits.heldout, self.heldout_ids, self.spaces)

    def halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the pool in random order: two halves without a common image, divided anew for each seed.

        Each class is divided evenly: halves with other class counts would differ by more than the images do.
        """
        order = epoch_order(2 * self.count, seed, _HALVES)
        class_by_class = np.argsort(self.reference.labels[self.pool[order]], kind="stable")
        in_first = np.zeros(2 * self.count, bool)
        in_first[class_by_class[::2]] = True
        return order[in_first], order[~in_first]

    def labels(self, seed: int) -> list[int] | None:
        """The bundle's classes of the second half, in whose place the samples stand; None = all in turn."""
        names, classes = self.reference.class_names, self.pipeline.manifest.classes
        if not names or not set(names) <= set(classes):
            return None
        to_bundle = [classes.index(name) for name in names]
        return [to_bundle[label] for label in self.reference.labels[self.pool[self.halves(seed)[1]]]]

    def features(
        self, what: str, images: ImageSet, ids: np.ndarray, spaces: Sequence[FeatureSpace]
    ) -> dict[str, np.ndarray]:
        """Features `n d` of these images, by space."""
        with self.watched(what, len(ids) * len(spaces)) as control:
            return {space.name: features_of(space, images.images, ids, control) for space in spaces}

    @contextmanager
    def watched(self, what: str, total: int) -> Iterator[Control]:
        """A control with a progress bar over `total` images."""
        with progress(what, total, "images") as advance:
            yield Control(self.stop, advance)


def reference_part(splits: Splits, count: int) -> str:
    """heldout or train, whichever first has 2 count images; UsageError if neither."""
    sizes = {"heldout": len(splits.heldout), "train": len(splits.train)}
    for part, size in sizes.items():
        if size >= 2 * count:
            return part
    raise UsageError(
        f"--images {count}: needs {2 * count} real images, for two halves; there are {sizes['train']} to train on and "
        f"{sizes['heldout']} held out: give {max(sizes.values()) // 2} or less"
    )


@dataclass(frozen=True)
class Figure:
    """One value a seed, of the model and of real images; no `real` where there is nothing to put in its place."""

    count: int  # images on either side
    values: tuple[float, ...]
    real: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Means and standard deviations over the seeds, JSON-ready; None for what is not known."""
        return {
            "count": self.count,
            "value": _mean(self.values),
            "spread": _spread(self.values),
            "real": _mean(self.real),
            "real_spread": _spread(self.real),
        }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values and np.isfinite(values).all() else None


def _spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation."""
    return float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else None


def over_seeds(
    count: int, model: Sequence[Mapping[str, float]], real: Sequence[Mapping[str, float]]
) -> dict[str, Figure]:
    """Figures by name from one mapping a seed."""
    return {
        name: Figure(count, tuple(each[name] for each in model), tuple(each[name] for each in real if name in each))
        for name in model[0]
    }


def against(features: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """All distances of features `n d` to those of real images `m d`."""
    precision, recall = precision_recall(features, real)
    density, coverage = density_coverage(features, real)
    return {
        "frechet_distance": frechet_distance(streamed(features), streamed(real)),
        "kernel_distance": kernel_distance(features, real),
        "sliced_distance": sliced_distance(features, real),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }
