"""What all backends on a device share: they are a loop, and the graphs that it binds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ul_runtime.device.loop import DeviceLoop
from ul_runtime.device.steps import bucket_of
from ul_runtime.guidance import Inputs
from ul_runtime.manifest import GraphName
from ul_runtime.walk import Walk

_LIKELY_BATCH = 64  # fills a card; the batch is halved where its memory is short


class DeviceBackend:
    """A Backend and Walker over `loop`; subclasses make it, and have name, precision and threads."""

    loop: DeviceLoop

    def run(self, graph_name: GraphName, inputs: Inputs) -> Inputs:
        """See Backend.run. BadInputError: a graph cannot be loaded or built. ULError: it fails."""
        return self.loop.run(graph_name, inputs)

    @property
    def likely_batch(self) -> int | None:
        """See Walker.likely_batch."""
        return _LIKELY_BATCH if self.loop.memory.kind == "cuda" else None

    def computed_as(self, count: int) -> int | None:
        """See Walker.computed_as: a card's kernels for another size round otherwise."""
        return bucket_of(count) if self.loop.memory.kind == "cuda" else None

    def can_ask(self, other: object) -> bool:
        """See Walker.can_ask."""
        return isinstance(other, DeviceBackend) and other is not self and other.loop.memory is self.loop.memory

    def walk(self, walks: Sequence[Walk], stop: Callable[[], bool], advance: Callable[[int], None]) -> list[np.ndarray]:
        """See Walker.walk. Errors as for `run`."""
        with self._watched():
            return self.loop.walk(walks, stop, advance)

    def walk_to_images(
        self, walks: Sequence[Walk], stop: Callable[[], bool], advance: Callable[[int], None]
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """See Walker.walk_to_images. Errors as for `run`."""
        with self._watched():
            return self.loop.walk_to_images(walks, stop, advance)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        bound = len(self.loop.bound)
        yield
        self._walked(len(self.loop.bound) != bound)

    def _walked(self, bound_more: bool) -> None:
        """After a loop; `bound_more`: it ran graphs in sizes that were not run before."""
