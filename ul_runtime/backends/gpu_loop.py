"""How a GPU runs the loops of loop.py, from noise to images: one step is enqueued, or replayed, row after row.

The host reads nothing before the last step of the last loop is done. Table, noise, labels and guidance are data, so
that no step is captured anew for them; noise is made on the device, and what one loop ends with the next one takes.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from ul_runtime.backends.gpu import Memory, Scratch
from ul_runtime.errors import OutOfMemoryError, ULError
from ul_runtime.loop import NO_NOISE, Guide, Inputs, Loop, run_on_host
from ul_runtime.manifest import Graph, GraphName
from ul_runtime.progress import Tick

_LOG = logging.getLogger(__name__)

Dims = dict[str, int]  # size of each dynamic dimension


class Engine(Protocol):
    """A step graph on the device, for one set of sizes."""

    def enqueue(self) -> None:
        """Run it on the tensors it was bound to, in the device's order of work. ULError."""


# (graph, sizes, tensor name -> address) -> the graph bound to these addresses
Bind = Callable[[GraphName, Dims, dict[str, int]], Engine]


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
    """The graphs of one bundle, bound as they are asked for.

    `captures`: whether steps are captured here; engines that do it themselves want False. A capture that fails is
    logged, and its step enqueued as before, or with `require_graphs` ends the work. `captured` counts the others.
    """

    memory: Memory
    graphs: Mapping[GraphName, Graph]
    bind: Bind
    captures: bool = True
    require_graphs: bool = False
    captured: int = 0
    on_release: Callable[[], None] = lambda: None  # the engines give back what they hold beside their tensors
    scratch: Scratch = field(init=False)
    bound: dict[tuple[str, str | None, int, int], Bound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Engines take from `scratch` what they need on their way."""
        self.scratch = Scratch(self.memory)

    def run(self, graph: GraphName, inputs: Inputs) -> Inputs:
        """One call of a graph: its outputs by name. Errors are those of the engine."""
        with self.memory.lock:
            try:
                return self._run(graph, inputs)
            except OutOfMemoryError:
                self.release()
                raise

    def _run(self, graph: GraphName, inputs: Inputs) -> Inputs:
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

    def bound_for(self, graph: GraphName, state: str | None, bucket: int, inputs: Inputs) -> Bound:
        """The graph bound for these sizes; with a `state`, its step ends by making outputs the next inputs."""
        dims: Dims = {"b": bucket}
        for tensor in self.graphs[graph].inputs:
            if tensor.name in inputs and "g" in tensor.shape:
                dims["g"] = inputs[tensor.name].shape[tensor.shape.index("g")]
        key = graph, state, dims.get("g", 0), bucket
        if key not in self.bound:
            self.bound[key] = self._make(graph, state, dims)
        return self.bound[key]

    def _make(self, name: GraphName, state: str | None, dims: Dims) -> Bound:
        tensors = [*self.graphs[name].inputs, *self.graphs[name].outputs]
        shapes = {t.name: tuple(d if isinstance(d, int) else dims[d] for d in t.shape) for t in tensors}
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
                    _LOG.warning("%s is enqueued step by step, it could not be captured: %s", what, error)
            replay()

        return run


def _shift(
    memory: Memory, state: str, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]
) -> Callable[[], None]:
    """What makes the outputs of a step the inputs of the next: state and history."""

    def shift() -> None:
        for name in (state, "history"):
            memory.copy(addresses[name], addresses[f"{name}_next"], size_of(shapes[name], np.float32))

    return shift


def size_of(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def padded_to(bucket: int, array: np.ndarray) -> np.ndarray:
    """The batch of a bucket: the last image again for those that are missing, so that nothing is not finite there."""
    missing = bucket - len(array)
    filled = array if missing == 0 else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
    return np.ascontiguousarray(filled)


@dataclass
class _Batch:
    """The images of one run through all loops; addresses are the device's."""

    count: int
    bucket: int
    indices: int  # address
    seeds: list[int]
    sent: list[np.ndarray]  # what is uploaded, until it is there
    tick: Tick
    asked: Bound | None = None  # the guide's step


class _End(NamedTuple):
    """Where a loop ended: the tensor `state` of its last step."""

    step: Bound
    state: str


class DeviceLoop(DeviceSteps):
    """Loops over bound steps."""

    def run_loops(self, loops: Sequence[Loop], tick: Tick, *, pixels: bool = False) -> list[np.ndarray]:
        """See Backend.run_loops."""
        keys = loops[0].noise
        bucket = bucket_of(max(len(keys.indices), loops[0].batch))
        sent = [padded_to(bucket, keys.indices)]
        sent += [padded_to(bucket, loop.rows.swapaxes(0, 1)).swapaxes(0, 1).copy() for loop in loops]  # calls bucket 8
        ends: list[_End] = []
        with self.memory.lock, self._region(sum(array.nbytes for array in sent), loops) as region:
            places = [region + sum(array.nbytes for array in sent[:n]) for n in range(len(sent))]
            for place, array in zip(places, sent, strict=True):
                self.memory.upload(place, array)
            seeds = padded_to(bucket, keys.seeds).tolist()
            batch = _Batch(len(keys.indices), bucket, places[0], seeds, sent, tick)
            for loop, rows in zip(loops, places[1:], strict=True):
                ends.append(self._steps(loop, rows, batch, ends[-1] if ends else None))
            # only now: what leaves for pageable memory is waited for
            made = self._pixels(ends.pop(), bucket) if pixels else []
            results = [*[self.leaving(end.step, end.state) for end in ends], *made]
        return [result[: len(keys.indices)] for result in results]

    def _steps(self, loop: Loop, rows: int, batch: _Batch, before: _End | None) -> _End:
        """All calls of one loop, enqueued. `rows` is an address, `before` where the loop before ended."""
        last: Bound | None = None
        condition: object = None
        quiet = False
        for k, streams in enumerate(loop.streams):
            batch.tick(0)
            inputs = loop.condition(k)
            bound = self.bound_for(loop.graph, loop.state, batch.bucket, inputs)
            if inputs is not condition:
                batch.sent += self.upload(bound, inputs, batch.bucket)
                condition = inputs
            if bound is not last:
                self._enter(loop, batch, bound, last, before)
                last, quiet = bound, False
            drawing = bool((streams != NO_NOISE).any())
            if drawing or not quiet:
                self._draw(loop, batch, bound, "noise", streams)
            quiet = not drawing
            row = rows + k * bound.size("row")
            if loop.guide is not None and loop.guide.asked[k]:
                self._ask(loop, loop.guide, bound, batch, row)
            self.memory.copy(bound.addresses["row"], row, bound.size("row"))
            bound.step()
            batch.tick(batch.count)
        assert last is not None
        return _End(last, loop.state)

    def _ask(self, loop: Loop, guide: Guide, bound: Bound, batch: _Batch, row: int) -> None:
        """The guide's prediction for the state of a step, into that step's `guide`; `row` is an address."""
        theirs = _loop_of(guide).bound_for(loop.graph, loop.state, batch.bucket, guide.condition)
        if theirs is not batch.asked:
            batch.sent += self.upload(theirs, guide.condition, batch.bucket)
            for name in ("history", "noise"):  # which its prediction does not depend on
                self.memory.clear(theirs.addresses[name], theirs.size(name))
            batch.asked = theirs
        self.memory.copy(theirs.addresses[loop.state], bound.addresses[loop.state], bound.size(loop.state))
        self.memory.copy(theirs.addresses["row"], row, bound.size("row"))
        theirs.step()
        self.memory.copy(bound.addresses["guide"], theirs.addresses["pred"], bound.size("guide"))

    def _enter(self, loop: Loop, batch: _Batch, bound: Bound, last: Bound | None, before: _End | None) -> None:
        """Fill what a step goes on from: noise in a loop's first step, else what `last`, of other sizes, left."""
        if last is None:
            self._draw(loop, batch, bound, loop.state, np.full_like(loop.streams[0], loop.start))
            self.memory.clear(bound.addresses["history"], bound.size("history"))
        else:
            for name in (loop.state, "history"):
                self.memory.copy(bound.addresses[name], last.addresses[name], bound.size(name))
        if loop.takes is not None and before is not None:
            self.memory.copy(bound.addresses[loop.takes], before.step.addresses[before.state], bound.size(loop.takes))

    def _draw(self, loop: Loop, batch: _Batch, bound: Bound, name: str, streams: np.ndarray) -> None:
        """Noise into a tensor, a launch for each run of images of one seed and stream."""
        values = math.prod(loop.noise.shape)
        keys = list(zip(batch.seeds, padded_to(batch.bucket, streams).tolist(), strict=True))
        first = 0
        for (seed, stream), run in groupby(keys):
            count = len(list(run))
            to, indices = bound.addresses[name] + 4 * values * first, batch.indices + 8 * first
            if stream == NO_NOISE:
                self.memory.clear(to, 4 * values * count)
            else:
                self.memory.normals(to, seed, indices, count, stream, values)
            first += count

    def _pixels(self, end: _End, bucket: int) -> list[np.ndarray]:
        """(Images, sums of magnitudes) of a state, on their way."""
        source = self.bound_for("pixels", None, bucket, {})
        self.memory.copy(source.addresses["x"], end.step.addresses[end.state], source.size("x"))
        source.step()
        return [self.leaving(source, tensor.name, tensor.dtype) for tensor in self.graphs["pixels"].outputs]

    @contextmanager
    def _region(self, size: int, loops: Sequence[Loop]) -> Iterator[int]:
        """Memory for these loops, given back when their work is done. Where memory is short, all steps are released."""
        memory, failed = self.memory, True
        memory.use()
        try:
            region = memory.allocate(size)
        except OutOfMemoryError:
            self._release_all(loops)
            raise
        try:
            yield region
            memory.wait()
            failed = False
        except OutOfMemoryError:
            self._release_all(loops)
            raise
        finally:
            # a device that failed may fail here again: the first error says why
            with suppress(ULError) if failed else nullcontext():
                if failed:
                    memory.wait()
                memory.free(region)

    def _release_all(self, loops: Sequence[Loop]) -> None:
        """Of the guides as well."""
        self.release()
        for loop in loops:
            if loop.guide is not None:
                _loop_of(loop.guide).release()


def _loop_of(guide: Guide) -> DeviceLoop:
    """Of a backend that `shares_order` took."""
    assert isinstance(guide.backend, DeviceBackend)
    return guide.backend.loop


_LIKELY_BATCH = 64  # fills a GPU; the batch is halved where its memory is short


class DeviceBackend:
    """A Backend over `loop`; subclasses make it, and have name, precision and threads."""

    loop: DeviceLoop

    def run(self, graph_name: GraphName, inputs: Inputs) -> Inputs:
        """See Backend.run. BadInputError: a graph cannot be loaded or built. ULError: it fails."""
        return self.loop.run(graph_name, inputs)

    @property
    def likely_batch(self) -> int | None:
        """See Backend.likely_batch."""
        return _LIKELY_BATCH if self.loop.memory.kind == "cuda" else None

    def computed_as(self, count: int) -> int | None:
        """See Backend.computed_as: a GPU's kernels for another size round otherwise."""
        return bucket_of(count) if self.loop.memory.kind == "cuda" else None

    def shares_order(self, other: object) -> bool:
        """Whether another backend can be asked within these loops: it works in the same memory, in the same order."""
        return isinstance(other, DeviceBackend) and other is not self and other.loop.memory is self.loop.memory

    def run_loops(self, loops: Sequence[Loop], tick: Tick, *, pixels: bool = False) -> list[np.ndarray]:
        """See Backend.run_loops; the host runs them where a guide works in another order. Errors as for `run`."""
        if any(loop.guide is not None and not self.shares_order(loop.guide.backend) for loop in loops):
            return run_on_host(self, loops, tick, pixels=pixels)
        bound = len(self.loop.bound)
        results = self.loop.run_loops(loops, tick, pixels=pixels)
        self._ran(len(self.loop.bound) != bound)
        return results

    def _ran(self, bound_more: bool) -> None:
        """After a loop; `bound_more`: it ran graphs in sizes that were not run before."""
