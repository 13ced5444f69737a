"""Finished images, batch by batch: halved where memory is short, made again in float32 where they are not finite."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from ul_runtime.errors import NonFiniteError, OutOfMemoryError, UsageError, one_line

_LOG = logging.getLogger(__name__)
_ARRAYS = ("indices", "labels", "images", "finite", "in_float32", "kept_x")  # of Images, an entry an image


@dataclass(frozen=True)
class Images:
    """A batch of images; all that a pipeline yields are finite."""

    indices: np.ndarray  # int64 b
    labels: np.ndarray  # int64 b; len(classes) = no label
    images: np.ndarray  # uint8 b h w c
    finite: np.ndarray  # bool b
    in_float32: np.ndarray  # bool b: made again, not finite before
    kept_x: np.ndarray | None = None  # see `x`
    computed_as: int | None = None  # a batch of so many; None: images do not depend on it

    @property
    def x(self) -> np.ndarray:
        """float32 `b c h w`, before clipping to [-1, 1]. UsageError: it was not asked for."""
        if self.kept_x is None:
            raise UsageError("these images were made with keep_x=False: there is no x, only images in uint8")
        return self.kept_x

    def at(self, rows: np.ndarray) -> "Images":
        """Some of them; `rows` bool b."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        taken: dict[str, Any] = {name: None if array is None else array[rows] for name, array in arrays.items()}
        return replace(self, **taken)

    def with_again(self, rows: np.ndarray, again: "Images") -> "Images":
        """`again`, made in float32, in place of these rows, bool b."""
        x = self.kept_x
        if x is not None:
            x = x.copy()
            x[rows] = again.x
        images, finite = self.images.copy(), self.finite.copy()
        images[rows], finite[rows] = again.images, again.finite
        return replace(self, images=images, finite=finite, in_float32=self.in_float32 | rows, kept_x=x)


def concatenated(a: Images, b: Images) -> Images:
    """The images of both."""
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in _ARRAYS}
    both: dict[str, Any] = {name: None if pair[0] is None else np.concatenate(pair) for name, pair in pairs.items()}
    return replace(a, **both)


# (positions in the indices, batch that they are computed as where a device depends on it) -> images, finite or not
Draw = Callable[[np.ndarray, int], Images]
Made = TypeVar("Made")


def halved_where_short(count: int, size: int, work: Callable[[np.ndarray, int], Made]) -> Iterator[Made]:
    """`work(positions, most)` of 0 to count - 1, `size` at a time, or half as many where memory is short.

    OutOfMemoryError: it is too short for one.
    """
    first, most = 0, size
    while first < count:
        part = np.arange(first, min(first + most, count))
        try:
            made = work(part, most)
        except (OutOfMemoryError, MemoryError) as error:
            if len(part) == 1:
                raise OutOfMemoryError(f"{one_line(error) or 'no memory is left'}; not even one image fits") from error
            most = len(part) // 2
            _LOG.warning("%s; going on with batches of %d", one_line(error) or "no memory is left", most)
            continue
        first += len(part)
        yield made


def in_batches(num_images: int, size: int, draw: Draw, again: Draw | None) -> Iterator[Images]:
    """The finite images of `draw`, `size` at a time and computed as so many, then NonFiniteError for the others.

    Those that are not finite are drawn by `again`, in float32, if there is that.
    """
    failed: list[int] = []
    for part, drawn in halved_where_short(num_images, size, lambda part, most: (part, draw(part, most))):
        if again is not None and not drawn.finite.all():
            drawn = drawn.with_again(~drawn.finite, _in_pieces(again, part[~drawn.finite]))
        failed += drawn.indices[~drawn.finite].tolist()
        if drawn.finite.any():
            yield drawn if drawn.finite.all() else drawn.at(drawn.finite)
    if failed:
        names = ", ".join(map(str, failed[:10])) + (" ..." if len(failed) > 10 else "")
        message = f"{len(failed)} of {num_images} images are not finite and were left out: {names}"
        raise NonFiniteError(f"{message}; lower the guidance, or check the bundle with ul-export")


def _in_pieces(again: Draw, part: np.ndarray) -> Images:
    """These images, in pieces where memory is short: there are two backends in it then."""
    try:
        return again(part, len(part))
    except (OutOfMemoryError, MemoryError):
        if len(part) == 1:
            raise
    a, b = (_in_pieces(again, piece) for piece in np.array_split(part, 2))
    return concatenated(a, b)
