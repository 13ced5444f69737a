"""The loops of every sampler on a device, from noise to images: one step is enqueued, or replayed, row after row.

The host reads nothing before the last step of the last loop is done. Table, noise, labels and guidance are data, so
that no step is captured anew for them; noise is made on the device, and what one loop ends with the next one takes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from ul_runtime.device.pixels import NAME as PIXELS
from ul_runtime.device.steps import Bound, DeviceSteps, bucket_of, padded_to
from ul_runtime.errors import OutOfMemoryError, StoppedError, ULError
from ul_runtime.samplers import S
from ul_runtime.walk import Guide, Walk

Stop = Callable[[], bool]
Advance = Callable[[int], None]


@dataclass
class _Batch:
    """The images of one run through all loops; addresses are the device's."""

    count: int
    bucket: int
    indices: int  # address
    sent: list[np.ndarray]  # what is uploaded, until it is there
    stop: Stop
    advance: Advance
    asked: Bound | None = None  # the guide's step


@dataclass
class _End:
    """Where a loop ended: the tensor `state` of its last step."""

    step: Bound
    state: str

    @property
    def address(self) -> int:
        """Of the state."""
        return self.step.addresses[self.state]


class DeviceLoop(DeviceSteps):
    """Loops over bound steps."""

    def walk(self, walks: Sequence[Walk], stop: Stop, advance: Advance) -> list[np.ndarray]:
        """See Walker.walk."""
        return self._walk(walks, stop, advance, pixels=False)

    def walk_to_images(
        self, walks: Sequence[Walk], stop: Stop, advance: Advance
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """See Walker.walk_to_images."""
        *states, images, total = self._walk(walks, stop, advance, pixels=True)
        return states, images, np.isfinite(total)

    def _walk(self, walks: Sequence[Walk], stop: Stop, advance: Advance, pixels: bool) -> list[np.ndarray]:
        """The last states; of the last walk with `pixels` its pixels and the sums of its magnitudes instead."""
        with self.memory.lock:
            return self._locked_walk(walks, stop, advance, pixels)

    def _locked_walk(self, walks: Sequence[Walk], stop: Stop, advance: Advance, pixels: bool) -> list[np.ndarray]:
        indices = walks[0].noise.indices
        bucket = bucket_of(max(len(indices), walks[0].batch))
        sent = [padded_to(bucket, indices)]
        sent += [np.repeat(walk.table.astype(np.float32)[:, None], bucket, axis=1) for walk in walks]  # rows bucket 8
        ends: list[_End] = []
        with self._region(sum(array.nbytes for array in sent), walks) as region:
            places = [region + sum(array.nbytes for array in sent[:n]) for n in range(len(sent))]
            for place, array in zip(places, sent, strict=True):
                self.memory.upload(place, array)
            batch = _Batch(len(indices), bucket, places[0], sent, stop, advance)
            for walk, table in zip(walks, places[1:], strict=True):
                ends.append(self._steps(walk, table, batch, ends[-1] if ends else None))
            # only now: what leaves for pageable memory is waited for
            made = self._pixels(ends.pop(), bucket) if pixels else []
            results = [*[self.leaving(end.step, end.state) for end in ends], *made]
        return [result[: len(indices)] for result in results]

    def _steps(self, walk: Walk, table: int, batch: _Batch, before: _End | None) -> _End:
        """All rows of one walk, enqueued. `table` is an address, `before` where the walk before ended."""
        last: Bound | None = None
        condition: object = None
        quiet = False
        for k in range(len(walk.table)):
            if batch.stop():
                raise StoppedError(
                    f"stopped before step {k + 1} of {len(walk.table)}; run the same command again to go on"
                )
            inputs = walk.condition(k)
            bound = self.bound_for(walk.graph, walk.state, batch.bucket, inputs)
            if inputs is not condition:
                batch.sent += self.upload(bound, inputs, batch.bucket)
                condition = inputs
            if bound is not last:
                self._enter(walk, batch, bound, last, before)
                last, quiet = bound, False
            if walk.table[k, S] != 0.0:
                self._draw(walk, batch, bound, "noise", walk.noise.step(k))
                quiet = False
            elif not quiet:
                self.memory.clear(bound.addresses["noise"], bound.size("noise"))
                quiet = True
            row = table + k * bound.size("row")
            if walk.guide is not None and walk.guide.asked(k):
                self._ask(walk, walk.guide, bound, batch, row)
            self.memory.copy(bound.addresses["row"], row, bound.size("row"))
            bound.step()
            batch.advance(batch.count)
        assert last is not None
        return _End(last, walk.state)

    def _ask(self, walk: Walk, guide: Guide, bound: Bound, batch: _Batch, row: int) -> None:
        """The guide's prediction for the state of a step, into that step's `guide`; `row` is an address."""
        theirs = _loop_of(guide).bound_for(walk.graph, walk.state, batch.bucket, guide.condition)
        if theirs is not batch.asked:
            batch.sent += self.upload(theirs, guide.condition, batch.bucket)
            for name in ("history", "noise"):  # which its prediction does not depend on
                self.memory.clear(theirs.addresses[name], theirs.size(name))
            batch.asked = theirs
        self.memory.copy(theirs.addresses[walk.state], bound.addresses[walk.state], bound.size(walk.state))
        self.memory.copy(theirs.addresses["row"], row, bound.size("row"))
        theirs.step()
        self.memory.copy(bound.addresses["guide"], theirs.addresses["pred"], bound.size("guide"))

    def _enter(self, walk: Walk, batch: _Batch, bound: Bound, last: Bound | None, before: _End | None) -> None:
        """Fill what a step goes on from: noise in a walk's first step, else what `last`, of other sizes, left."""
        if last is None:
            self._draw(walk, batch, bound, walk.state, walk.noise.start)
            self.memory.clear(bound.addresses["history"], bound.size("history"))
        else:
            for name in (walk.state, "history"):
                self.memory.copy(bound.addresses[name], last.addresses[name], bound.size(name))
        if walk.takes is not None and before is not None:
            self.memory.copy(bound.addresses[walk.takes], before.address, bound.size(walk.takes))

    def _draw(self, walk: Walk, batch: _Batch, bound: Bound, name: str, stream: int) -> None:
        """Noise into a tensor."""
        values = math.prod(walk.noise.shape)
        self.memory.normals(bound.addresses[name], walk.noise.seed, batch.indices, batch.bucket, stream, values)

    def _pixels(self, end: _End, bucket: int) -> list[np.ndarray]:
        """(Images, sums of magnitudes) of a state, on their way."""
        source = self.bound_for(PIXELS, None, bucket, {})
        self.memory.copy(source.addresses["x"], end.address, source.size("x"))
        source.step()
        return [self.leaving(source, tensor.name, tensor.dtype) for tensor in self.graphs[PIXELS].outputs]

    @contextmanager
    def _region(self, size: int, walks: Sequence[Walk]) -> Iterator[int]:
        """Memory for these walks, given back when their work is done. Where memory is short, all steps are released."""
        memory, failed = self.memory, True
        memory.use()
        try:
            region = memory.allocate(size)
        except OutOfMemoryError:
            self._release_all(walks)
            raise
        try:
            yield region
            memory.wait()
            failed = False
        except OutOfMemoryError:
            self._release_all(walks)
            raise
        finally:
            # a device that failed may fail here again: the first error says why
            with suppress(ULError) if failed else nullcontext():
                if failed:
                    memory.wait()
                memory.free(region)

    def _release_all(self, walks: Sequence[Walk]) -> None:
        """Of the guides as well."""
        self.release()
        for walk in walks:
            if walk.guide is not None:
                _loop_of(walk.guide).release()


class _OnDevice(Protocol):
    loop: DeviceLoop


def _loop_of(guide: Guide) -> DeviceLoop:
    """Of a walker that `can_ask` took."""
    return cast(_OnDevice, guide.walker).loop
