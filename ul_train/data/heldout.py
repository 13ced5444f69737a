"""Which images are held out when the source does not say: a hash of each name decides."""

import hashlib
import heapq
from pathlib import Path

import numpy as np

from ul_train.data.rows import Rows

SHARE = 0.05
MAX_HELDOUT = 1000


def rank(name: str) -> int:
    """Uniform in 0..2^64-1, a function of the name alone."""
    return int.from_bytes(hashlib.sha256(b"heldout\0" + name.encode()).digest()[:8], "big")


def in_share(value: int) -> bool:
    """Whether a rank lies in the held-out share."""
    return value < int(SHARE * 2**64)


class SplitRows:
    """Writes train and heldout: about `SHARE` of the images is held out, at most `MAX_HELDOUT`, at least one.

    Below the maximum an image's side depends on its name alone, so images added later move none; above it,
    they can only return held-out images to training. Holds `MAX_HELDOUT` numbers in memory, no images.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self._folder, self._shape = folder, shape
        self._train = Rows(folder, "train")
        self._candidates = Rows(folder, "candidates")
        self._kept: list[tuple[int, int]] = []  # heap of (-rank, row of candidates): the highest rank first
        self._least = (2**64, -1)  # lowest rank outside the share and its row of train

    @property
    def count(self) -> int:
        """Images appended so far."""
        return self._train.count + len(self._kept)

    def append(self, name: str, pixels: np.ndarray, label: int) -> None:
        """One image uint8 c h w with its provisional class number. OutputError."""
        value = rank(name)
        if in_share(value):
            heapq.heappush(self._kept, (-value, self._candidates.count))
            self._candidates.append(pixels, label)
        else:
            self._least = min(self._least, (value, self._train.count))
            self._train.append(pixels, label)
        if len(self._kept) > MAX_HELDOUT:
            self._return_one()

    def _return_one(self) -> None:
        _, row = heapq.heappop(self._kept)
        self._train.append(*self._candidates.read(row, self._shape))

    def finish(self) -> tuple[Rows, Rows]:
        """-> training and held-out rows; at least two images must have been appended. OutputError."""
        if self._train.count == 0:
            self._return_one()
        heldout = Rows(self._folder, "heldout")
        for row in sorted(row for _, row in self._kept):
            heldout.append(*self._candidates.read(row, self._shape))
        self._candidates.remove()
        if heldout.count == 0:  # then there are few images: none of them is in the share
            self._move_least(heldout)
        return self._train, heldout

    def _move_least(self, heldout: Rows) -> None:
        rest = Rows(self._folder, "rest")
        for row in range(self._train.count):
            to = heldout if row == self._least[1] else rest
            to.append(*self._train.read(row, self._shape))
        self._train.remove()
        rest.rename("train")
        self._train = rest
