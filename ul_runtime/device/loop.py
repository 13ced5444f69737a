"""The loop of every sampler on a device: one step is enqueued, or captured once and replayed, row after row.

The host reads nothing before the last step is done. A batch is padded to its bucket, a power of two, so that few
steps are ever captured; table, noise, labels and guidance are data, so that none is captured anew for them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from ul_runtime.device.interface import Interface, Tensor
from ul_runtime.device.memory import Memory, Scratch
from ul_runtime.device.pixels import NAME as PIXELS
from ul_runtime.errors import OutOfMemoryError, StoppedError, ULError
from ul_runtime.guidance import Inputs
from ul_runtime.samplers import S
from ul_runtime.walk import Walk

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
class _Bound:
    """A graph of some sizes: its tensors on the device, and what runs a step and moves its results to its inputs."""

    addresses: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    step: Callable[[], None]


@dataclass
class DeviceLoop:
    """Loops over the graphs of one bundle, and over pixels.NAME, which `graphs` holds as well.

    `captures`: whether steps are captured here; engines that do it themselves want False. A capture that fails is said,
    and its step enqueued as before, or with `require_graphs` ends the loop. `captured` counts the others.
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
    bound: dict[tuple[str, str | None, int, int], _Bound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Engines take from `scratch` what they need on their way."""
        self.scratch = Scratch(self.memory)

    def walk(self, walk: Walk, stop: Callable[[], bool], advance: Callable[[int], None]) -> np.ndarray:
        """See Walker.walk."""
        (result,) = self._walk(walk, stop, advance, pixels=False)
        return result

    def walk_to_images(
        self, walk: Walk, stop: Callable[[], bool], advance: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Walker.walk_to_images."""
        images, total = self._walk(walk, stop, advance, pixels=True)
        return images, np.isfinite(total)

    def _walk(
        self, walk: Walk, stop: Callable[[], bool], advance: Callable[[int], None], pixels: bool
    ) -> list[np.ndarray]:
        """The last state, or its pixels and the sums of its magnitudes."""
        batch = len(walk.start)
        bucket = bucket_of(batch)
        rows = walk.table.astype(np.float32)
        memory, held = self.memory, [_padded(walk.start, bucket)]
        tables = np.repeat(rows[:, None], bucket, axis=1)  # rows bucket 8
        noisy = [k for k in range(len(rows)) if rows[k, S] != 0.0]
        with self._region(tables.nbytes + len(noisy) * held[0].nbytes) as region:
            memory.upload(region, tables)
            noise_at = {k: region + tables.nbytes + n * held[0].nbytes for n, k in enumerate(noisy)}
            for k, at in noise_at.items():
                held.append(_padded(walk.noise(k), bucket))
                memory.upload(at, held[-1])
            last: _Bound | None = None
            condition: object = None
            for k in range(len(rows)):
                if stop():
                    raise StoppedError(
                        f"stopped before step {k + 1} of {len(rows)}; run the same command again to go on"
                    )
                inputs = walk.condition(k)
                bound = self._bound_for(walk.graph, walk.state, bucket, inputs)
                if inputs is not condition:
                    held += self._upload(bound, inputs, bucket)
                    condition = inputs
                if bound is not last:
                    self._begin(bound, last, walk.state, held)
                    last = bound
                if k in noise_at:
                    memory.copy(bound.addresses["noise"], noise_at[k], held[0].nbytes)
                elif k - 1 in noise_at:
                    held.append(np.zeros_like(held[0]))
                    memory.upload(bound.addresses["noise"], held[-1])
                memory.copy(bound.addresses["row"], region + k * tables[0].nbytes, tables[0].nbytes)
                bound.step()
                advance(batch)
            assert last is not None
            results = self._results(last, walk.state, bucket, pixels)
        return [result[:batch] for result in results]

    @contextmanager
    def _region(self, size: int) -> Iterator[int]:
        """Memory for one loop, given back when its work is done. Where memory is short, all steps are released."""
        memory, failed = self.memory, True
        memory.use()
        try:
            region = memory.allocate(size)
        except OutOfMemoryError:
            self.release()
            raise
        try:
            yield region
            memory.wait()
            failed = False
        except OutOfMemoryError:
            self.release()
            raise
        finally:
            # a device that failed may fail here again: the first error says why
            with suppress(ULError) if failed else nullcontext():
                if failed:
                    memory.wait()
                memory.free(region)

    def _results(self, last: _Bound, state: str, bucket: int, pixels: bool) -> list[np.ndarray]:
        """What leaves the device, on its way."""
        source, names = last, [state]
        if pixels:
            source = self._bound_for(PIXELS, None, bucket, {})
            names = [tensor.name for tensor in self.graphs[PIXELS].outputs]
            size = _bytes(last.shapes[state], np.float32)
            self.memory.copy(source.addresses["x"], last.addresses[state], size)
            source.step()
        dtypes = {tensor.name: tensor.dtype for tensor in self.graphs[PIXELS].outputs} if pixels else {}
        results = [np.empty(source.shapes[name], dtypes.get(name, "float32")) for name in names]
        for name, result in zip(names, results, strict=True):
            self.memory.download(source.addresses[name], result)
        return results

    def release(self) -> None:
        """Give back the memory of all steps: a batch that does not fit leaves room for a smaller one."""
        self.memory.use()
        self.memory.wait()
        for bound in self.bound.values():
            for address in bound.addresses.values():
                self.memory.free(address)
        self.bound.clear()
        self.scratch.release()
        self.on_release()

    def _begin(self, bound: _Bound, last: _Bound | None, state: str, held: list[np.ndarray]) -> None:
        """State, history and noise of the first step; or of the step before, where that had other sizes."""
        if last is not None:
            for name in (state, "history"):
                self.memory.copy(bound.addresses[name], last.addresses[name], _bytes(bound.shapes[name], np.float32))
        else:
            self.memory.upload(bound.addresses[state], held[0])
            held.append(np.zeros(bound.shapes["history"], np.float32))
            self.memory.upload(bound.addresses["history"], held[-1])
        held.append(np.zeros(bound.shapes["noise"], np.float32))
        self.memory.upload(bound.addresses["noise"], held[-1])

    def _upload(self, bound: _Bound, inputs: Inputs, bucket: int) -> list[np.ndarray]:
        padded = {name: _padded(array, bucket) for name, array in inputs.items()}
        for name, array in padded.items():
            assert array.shape == bound.shapes[name], name
            self.memory.upload(bound.addresses[name], array)
        return list(padded.values())

    def run(self, graph: str, inputs: Inputs) -> Inputs:
        """One call of a graph: its outputs by name. Errors are those of the engine."""
        try:
            return self._run(graph, inputs)
        except OutOfMemoryError:
            self.release()
            raise

    def _run(self, graph: str, inputs: Inputs) -> Inputs:
        self.memory.use()
        batch = len(next(iter(inputs.values())))
        bound = self._bound_for(graph, None, bucket_of(batch), inputs)
        held = self._upload(bound, inputs, bucket_of(batch))
        bound.step()
        outputs = {
            tensor.name: np.empty(bound.shapes[tensor.name], tensor.dtype) for tensor in self.graphs[graph].outputs
        }
        for name, array in outputs.items():
            self.memory.download(bound.addresses[name], array)
        self.memory.wait()
        del held
        return {name: array[:batch] for name, array in outputs.items()}

    def _bound_for(self, graph: str, state: str | None, bucket: int, inputs: Inputs) -> _Bound:
        """The graph bound for these sizes; with a `state`, its step ends by making outputs the next inputs."""
        dims: Dims = {"b": bucket}
        for tensor in self.graphs[graph].inputs:
            if tensor.name in inputs and "g" in tensor.shape:
                dims["g"] = inputs[tensor.name].shape[tensor.shape.index("g")]
        key = graph, state, dims.get("g", 0), bucket
        if key not in self.bound:
            self.bound[key] = self._make(graph, state, dims)
        return self.bound[key]

    def _make(self, name: str, state: str | None, dims: Dims) -> _Bound:
        tensors = [*self.graphs[name].inputs, *self.graphs[name].outputs]
        shapes = {tensor.name: _shape(tensor, dims) for tensor in tensors}
        addresses: dict[str, int] = {}
        try:
            for tensor in tensors:
                addresses[tensor.name] = self.memory.allocate(_bytes(shapes[tensor.name], tensor.dtype))
            engine = self.bind(name, dims, addresses)
        except ULError:
            for address in addresses.values():
                self.memory.free(address)
            raise
        if state is None:
            return _Bound(addresses, shapes, engine.enqueue)
        shift = _shift(self.memory, state, addresses, shapes)

        def step() -> None:
            engine.enqueue()
            shift()

        return _Bound(addresses, shapes, self._captured(f"{name} {dims}", step) if self.captures else step)

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
    one = _bytes(shapes[state][1:], np.float32)  # of one image
    history, both = addresses["history"], 2 * one

    def shift() -> None:
        memory.copy(history + one, history, one, rows=batch, to_pitch=both, pitch=both)
        memory.copy(history, addresses["pred"], one, rows=batch, to_pitch=both, pitch=one)
        memory.copy(addresses[state], addresses[f"{state}_next"], batch * one)

    return shift


def _shape(tensor: Tensor, dims: Dims) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else dims[d] for d in tensor.shape)


def _bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _padded(array: np.ndarray, bucket: int) -> np.ndarray:
    """The batch of a bucket: the last image again for those that are missing, so that nothing is not finite there."""
    missing = bucket - len(array)
    filled = array if missing == 0 else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
    return np.ascontiguousarray(filled)
