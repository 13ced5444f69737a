"""Loops of step graphs as data: what a backend needs to run them from noise to images without coming back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ul_runtime import noise
from ul_runtime.guidance import Inputs
from ul_runtime.manifest import GraphName


@dataclass(frozen=True)
class Noise:
    """The noise of a loop, `b c h w`, by its keys (see noise.normals): a device can make it itself."""

    seed: int
    indices: np.ndarray  # int64 b
    shape: tuple[int, ...]  # c h w
    start: int  # its stream
    step: Callable[[int], int]  # row of the table -> stream

    def at_start(self) -> np.ndarray:
        """The first state."""
        return noise.normals(self.seed, self.indices, self.start, self.shape)

    def at_step(self, k: int) -> np.ndarray:
        """What row k of the table adds."""
        return noise.normals(self.seed, self.indices, self.step(k), self.shape)


@dataclass(frozen=True)
class Guide:
    """A lesser prior that is asked at rows where `asked(k)`: its prediction is then the graph's input `guide`."""

    walker: "Walker"
    condition: Inputs  # of its own step
    asked: Callable[[int], bool]


@dataclass(frozen=True)
class Walk:
    """A loop over the rows of `table` `[rows, 8]` from noise.

    `condition(k)` are the graph's other inputs at row k, the same object for all rows that share them; beside them, the
    input `takes` is the last state of the walk before.
    """

    graph: GraphName
    state: str  # its input; the output is {state}_next
    table: np.ndarray
    noise: Noise
    condition: Callable[[int], Inputs]
    takes: str | None = None
    batch: int = 0  # computed as so many images at least
    guide: Guide | None = None


@runtime_checkable
class Walker(Protocol):
    """A backend that runs whole loops on its device, one after the other, of the same images."""

    @property
    def likely_batch(self) -> int | None:
        """How many images at once suit the device; None: as many as a processor."""

    def computed_as(self, count: int) -> int | None:
        """How many images a batch of `count` is computed as, where images depend on it; None: they do not."""

    def can_ask(self, other: object) -> bool:
        """Whether another backend can be the walker of a Guide: it works on the same device, in the same order."""

    def walk(self, walks: Sequence[Walk], stop: Callable[[], bool], advance: Callable[[int], None]) -> list[np.ndarray]:
        """The states `b c h w` float32 after their last rows; `advance` gets images after each row. StoppedError."""

    def walk_to_images(
        self, walks: Sequence[Walk], stop: Callable[[], bool], advance: Callable[[int], None]
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """(States of all but the last, its images `b h w c` as batches.to_uint8 makes them, finite or not: bool b)."""
