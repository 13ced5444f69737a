"""One loop of a step graph as data: what a backend needs to run it from noise to its end without coming back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ul_runtime.guidance import Inputs
from ul_runtime.manifest import GraphName


@dataclass(frozen=True)
class Walk:
    """A loop over the rows of `table` `[rows, 8]` from `start` `b c h w`.

    `noise(k)` `b c h w` is asked only where row k draws noise; `condition(k)` are the graph's other inputs at row k,
    the same object for all rows that share them.
    """

    graph: GraphName
    state: str  # its input; the output is {state}_next
    table: np.ndarray
    start: np.ndarray
    noise: Callable[[int], np.ndarray]
    condition: Callable[[int], Inputs]


@runtime_checkable
class Walker(Protocol):
    """A backend that runs a whole loop on its device."""

    def walk(self, walk: Walk, stop: Callable[[], bool], advance: Callable[[int], None]) -> np.ndarray:
        """The state `b c h w` float32 after the last row; `advance` gets images after each. StoppedError."""

    def walk_to_images(
        self, walk: Walk, stop: Callable[[], bool], advance: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the decoder's walk: images `b h w c` as batches.to_uint8 makes them, and which are finite, bool b."""
