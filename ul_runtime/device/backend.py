"""What all backends on a device share: they are a loop, and the graphs that it binds."""

from collections.abc import Callable

import numpy as np

from ul_runtime.device.loop import DeviceLoop
from ul_runtime.guidance import Inputs
from ul_runtime.manifest import GraphName
from ul_runtime.walk import Walk


class DeviceBackend:
    """A Backend and Walker over `loop`; subclasses make it, and have name, precision and threads."""

    loop: DeviceLoop

    def run(self, graph_name: GraphName, inputs: Inputs) -> Inputs:
        """See Backend.run. BadInputError: a graph cannot be loaded or built. ULError: it fails."""
        return self.loop.run(graph_name, inputs)

    def walk(self, walk: Walk, stop: Callable[[], bool], advance: Callable[[int], None]) -> np.ndarray:
        """See Walker.walk. Errors as for `run`."""
        bound = len(self.loop.bound)
        result = self.loop.walk(walk, stop, advance)
        self._walked(len(self.loop.bound) != bound)
        return result

    def walk_to_images(
        self, walk: Walk, stop: Callable[[], bool], advance: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Walker.walk_to_images. Errors as for `run`."""
        bound = len(self.loop.bound)
        result = self.loop.walk_to_images(walk, stop, advance)
        self._walked(len(self.loop.bound) != bound)
        return result

    def _walked(self, bound_more: bool) -> None:
        """After a loop; `bound_more`: it ran graphs in sizes that were not run before."""
