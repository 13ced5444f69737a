"""Step graphs bound to a device's memory: each for some sizes, enqueued once, then captured and replayed.

A batch is padded to its bucket, a power of two, so that few steps are ever captured.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from ul_runtime.device.interface import Interface, Tensor
from ul_runtime.device.memory import Memory, Scratch
from ul_runtime.errors import OutOfMemoryError, ULError
from ul_runtime.guidance import Inputs

Dims = dict[str, int]  # size of each dynamic dimension


class Engine(Protocol):
    """A step graph on the device, for one set of sizes."""

    def enqueue(self) -> None:
        """Run it on the tensors it was bound to, in the device's order of work. ULError."""


# (graph, sizes, tensor name -> address) -> the graph bound to these addresses
Bind = Callable[[str, Dims, dict[str, int]], Engine]


def bucket_of(batch: int) -> int:
    """The smallest power of two that holds a batch."""
    return 1 << (batch - 1).bit_length()


@dataclass
class Bound:
    """A graph of some sizes: its tensors on the device, and what runs a step and moves its results to its inputs."""

    addresses: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    step: Callable[[], None]

    def size(self, name: str) -> int:
        """Bytes of a float32 tensor."""
        return size_of(self.shapes[name], np.float32)


@dataclass
class DeviceSteps:
    """The graphs of one bundle, and pixels.NAME, which `graphs` holds as well, bound as they are asked for.

    `captures`: whether steps are captured here; engines that do it themselves want False. A capture that fails is said,
    and its step enqueued as before, or with `require_graphs` ends the work. `captured` counts the others.
    """

    memory: Memory
    graphs: Mapping[str, Interface]
    bind: Bind
    say: Callable[[str], None]
    captures: bool = True
    require_graphs: bool = False
    captured: int = 0
    on_release: Callable[[], None] = lambda: None  # the engines give back what they hold beside their tensors
    scratch: Scratch = field(init=False)
    bound: dict[tuple[str, str | None, int, int], Bound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Engines take from `scratch` what they need on their way."""
        self.scratch = Scratch(self.memory)

    def run(self, graph: str, inputs: Inputs) -> Inputs:
        """One call of a graph: its outputs by name. Errors are those of the engine."""
        with self.memory.lock:
            try:
                return self._run(graph, inputs)
            except OutOfMemoryError:
                self.release()
                raise

    def _run(self, graph: str, inputs: Inputs) -> Inputs:
        self.memory.use()
        batch = len(next(iter(inputs.values())))
        bound = self.bound_for(graph, None, bucket_of(batch), inputs)
        held = self.upload(bound, inputs, bucket_of(batch))
        bound.step()
        outputs = {tensor.name: self.leaving(bound, tensor.name, tensor.dtype) for tensor in self.graphs[graph].outputs}
        self.memory.wait()
        del held
        return {name: array[:batch] for name, array in outputs.items()}

    def leaving(self, source: Bound, name: str, dtype: DTypeLike = "float32") -> np.ndarray:
        """A tensor on its way from the device."""
        result = np.empty(source.shapes[name], dtype)
        self.memory.download(source.addresses[name], result)
        return result

    def upload(self, bound: Bound, inputs: Inputs, bucket: int) -> list[np.ndarray]:
        """Inputs, which have to live until they are there; what is all zero is made there."""
        padded = {name: padded_to(bucket, array) for name, array in inputs.items()}
        for name, array in padded.items():
            assert array.shape == bound.shapes[name], name
            if array.any():
                self.memory.upload(bound.addresses[name], array)
            else:
                self.memory.clear(bound.addresses[name], array.nbytes)
        return list(padded.values())

    def release(self) -> None:
        """Give back the memory of all steps: a batch that does not fit leaves room for a smaller one."""
        with self.memory.lock:
            self.memory.use()
            self.memory.wait()
            for bound in self.bound.values():
                for address in bound.addresses.values():
                    self.memory.free(address)
            self.bound.clear()
            self.scratch.release()
            self.on_release()

    def bound_for(self, graph: str, state: str | None, bucket: int, inputs: Inputs) -> Bound:
        """The graph bound for these sizes; with a `state`, its step ends by making outputs the next inputs."""
        dims: Dims = {"b": bucket}
        for tensor in self.graphs[graph].inputs:
            if tensor.name in inputs and "g" in tensor.shape:
                dims["g"] = inputs[tensor.name].shape[tensor.shape.index("g")]
        key = graph, state, dims.get("g", 0), bucket
        if key not in self.bound:
            self.bound[key] = self._make(graph, state, dims)
        return self.bound[key]

    def _make(self, name: str, state: str | None, dims: Dims) -> Bound:
        tensors = [*self.graphs[name].inputs, *self.graphs[name].outputs]
        shapes = {tensor.name: _shape(tensor, dims) for tensor in tensors}
        addresses: dict[str, int] = {}
        try:
            for tensor in tensors:
                addresses[tensor.name] = self.memory.allocate(size_of(shapes[tensor.name], tensor.dtype))
            engine = self.bind(name, dims, addresses)
        except ULError:
            for address in addresses.values():
                self.memory.free(address)
            raise
        if state is None:
            return Bound(addresses, shapes, engine.enqueue)
        shift = _shift(self.memory, state, addresses, shapes)

        def step() -> None:
            engine.enqueue()
            shift()

        return Bound(addresses, shapes, self._captured(f"{name} {dims}", step) if self.captures else step)

    def _captured(self, what: str, step: Callable[[], None]) -> Callable[[], None]:
        """The step as it is in its first run, in which engines may set themselves up; then by one launch."""
        runs = 0
        replay = step

        def run() -> None:
            nonlocal replay, runs
            runs += 1
            if runs == 2:
                try:
                    replay = self.memory.capture(step)
                    self.captured += 1
                except OutOfMemoryError:
                    raise
                except ULError as error:
                    if self.require_graphs:
                        raise
                    self.say(f"{what} is enqueued step by step, it could not be captured: {error}")
            replay()

        return run


def _shift(
    memory: Memory, state: str, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]
) -> Callable[[], None]:
    """What makes the outputs of a step the inputs of the next: state, and history = [pred, history[:, 0]]."""
    batch = shapes[state][0]
    one = size_of(shapes[state][1:], np.float32)  # of one image
    history, both = addresses["history"], 2 * one

    def shift() -> None:
        memory.copy(history + one, history, one, rows=batch, to_pitch=both, pitch=both)
        memory.copy(history, addresses["pred"], one, rows=batch, to_pitch=both, pitch=one)
        memory.copy(addresses[state], addresses[f"{state}_next"], batch * one)

    return shift


def _shape(tensor: Tensor, dims: Dims) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else dims[d] for d in tensor.shape)


def size_of(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def padded_to(bucket: int, array: np.ndarray) -> np.ndarray:
    """The batch of a bucket: the last image again for those that are missing, so that nothing is not finite there."""
    missing = bucket - len(array)
    filled = array if missing == 0 else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
    return np.ascontiguousarray(filled)
