"""Finished images, batch by batch: halved where memory is short, made again in float32 where they are not finite."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ul_runtime.errors import NonFiniteError, OutOfMemoryError, UsageError
from ul_runtime.images import to_uint8

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """One batch of finished images, all finite."""

    indices: np.ndarray  # int64 b
    labels: np.ndarray  # int64 b; len(classes) = no label
    images: np.ndarray  # uint8 b h w c
    kept_x: np.ndarray | None  # see `x`
    computed_as: int | None = None  # a batch of so many; None: images do not depend on it

    @property
    def x(self) -> np.ndarray:
        """float32 `b c h w`, before clipping to [-1, 1]. UsageError: it was not asked for."""
        if self.kept_x is None:
            raise UsageError("these images were made with keep_x=False: there is no x, only images in uint8")
        return self.kept_x


@dataclass(frozen=True)
class Drawn:
    """Images of a batch, finite or not; x `b c h w` float32 only if it was asked for."""

    labels: np.ndarray  # int64 b
    images: np.ndarray  # uint8 b h w c
    finite: np.ndarray  # bool b
    x: np.ndarray | None
    computed_as: int | None = None  # see Images

    @classmethod
    def of(cls, labels: np.ndarray, x: np.ndarray) -> "Drawn":
        """From x, with its images."""
        good = finite(x)
        return cls(labels, to_uint8(np.where(good[:, None, None, None], x, np.float32(0.0))), good, x)

    def at(self, rows: np.ndarray) -> "Drawn":
        """Some of them; `rows` bool b."""
        x = None if self.x is None else self.x[rows]
        return Drawn(self.labels[rows], self.images[rows], self.finite[rows], x, self.computed_as)

    def with_rows(self, rows: np.ndarray, other: "Drawn") -> "Drawn":
        """`other` in place of these rows, bool b; x stays only where both have it."""
        images, good = self.images.copy(), self.finite.copy()
        images[rows], good[rows] = other.images, other.finite
        x = None
        if self.x is not None and other.x is not None:
            x = self.x.copy()
            x[rows] = other.x
        return Drawn(self.labels, images, good, x, self.computed_as)


# (whether in float32, positions in the indices, batch that they are computed as if a device depends on it) -> images
Draw = Callable[[bool, np.ndarray, int], Drawn]


def in_batches(indices: np.ndarray, size: int, draw: Draw, can_repeat: bool, remade: list[int]) -> Iterator[Images]:
    """The finite images of `draw`, `size` at a time and computed as so many, then NonFiniteError for the others.

    `can_repeat`: those that are not finite are drawn again in float32, and their indices added to `remade`.
    """
    failed: list[int] = []
    first, most = 0, size
    while first < len(indices):
        part = np.arange(first, min(first + most, len(indices)))
        try:
            drawn = draw(False, part, most)
        except OutOfMemoryError as error:
            if most == 1:
                raise
            most = max(1, min(most, len(part)) // 2)
            _LOG.warning("%s; going on with batches of %d, which make the same images", error, most)
            continue
        first += len(part)
        if can_repeat and not drawn.finite.all():
            again = ~drawn.finite
            remade += indices[part[again]].tolist()
            drawn = drawn.with_rows(again, _in_float32(draw, part[again]))
        failed += indices[part][~drawn.finite].tolist()
        if drawn.finite.any():
            good = drawn if drawn.finite.all() else drawn.at(drawn.finite)
            yield Images(indices[part][drawn.finite], good.labels, good.images, good.x, good.computed_as)
    if failed:
        names = ", ".join(map(str, failed[:10])) + (" ..." if len(failed) > 10 else "")
        message = f"{len(failed)} of {len(indices)} images are not finite and were left out: {names}"
        raise NonFiniteError(f"{message}; lower the guidance, or check the bundle with ul-export")


def _in_float32(draw: Draw, part: np.ndarray) -> Drawn:
    """These images, in pieces where memory is short: there are two backends in it then."""
    try:
        return draw(True, part, len(part))
    except OutOfMemoryError:
        if len(part) == 1:
            raise
    a, b = (_in_float32(draw, piece) for piece in np.array_split(part, 2))
    x = None if a.x is None or b.x is None else np.concatenate([a.x, b.x])
    labels, images = np.concatenate([a.labels, b.labels]), np.concatenate([a.images, b.images])
    return Drawn(labels, images, np.concatenate([a.finite, b.finite]), x)


def finite(array: np.ndarray) -> np.ndarray:
    """Which rows of `b ...` have no NaN or Inf."""
    return np.isfinite(array).reshape(len(array), -1).all(axis=1)
