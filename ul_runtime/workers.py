"""One process per GPU, fed with batches of indices.

Pipes of our own, not an executor: a process ends with its parent however that ends, and an error names its GPU.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from ul_runtime import loading
from ul_runtime.batches import Images
from ul_runtime.errors import NonFiniteError, ULError
from ul_runtime.machine import MachineOptions
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick

_ASK_S = 0.2  # between two questions whether to stop
_END_S = 10.0  # for a process to end by itself


class Opened(NamedTuple):
    """What a process opens: the arguments of loading.open_pipeline."""

    path: Path | None
    options: MachineOptions
    guide: Path | None = None


class _Part(NamedTuple):
    """What a process made of a part of the indices; what was not finite is left out and named."""

    batches: list[Images]
    not_finite: str | None


class Workers:
    """Processes that make images of one bundle; the block ends them. `opened` has their names."""

    def __init__(self, opened: Mapping[str, Opened]) -> None:
        self._opened = opened
        self._processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")  # a CUDA context does not live through a fork
        for name, opened in self._opened.items():
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, opened), name=name)
            process.start()
            there.close()
            self._processes[here] = process
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for connection, process in self._processes.items():
            connection.close()  # the process ends where it reads next
            if kind is not None:
                process.terminate()
        for process in self._processes.values():
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes.clear()

    def generate(self, indices: np.ndarray, batch_size: int, tick: Tick, **options: Any) -> Iterator[Images]:
        """Batches in no order; `options` as for Pipeline.generate, which says what is raised.

        ULError: a process has ended.
        """
        size = {"batch_size": batch_size}
        parts = deque(
            (indices[first : first + batch_size], size | options) for first in range(0, len(indices), batch_size)
        )
        busy = {connection for connection in self._processes if self._send_next(connection, parts)}
        failed: list[str] = []
        while busy:
            tick(0)
            for connection in busy.intersection(wait(list(busy), _ASK_S)):
                part = self._receive(connection)
                if not self._send_next(connection, parts):
                    busy.remove(connection)
                failed += [part.not_finite] if part.not_finite else []
                for batch in part.batches:
                    tick(len(batch.indices))
                    yield batch
        if failed:
            raise NonFiniteError("; ".join(failed))

    def _send_next(self, connection: Connection, parts: deque[tuple[np.ndarray, dict[str, Any]]]) -> bool:
        """Whether there was a part to send."""
        if not parts:
            return False
        try:
            connection.send(parts.popleft())
        except OSError:
            raise self._ended(connection) from None
        return True

    def _receive(self, connection: Connection) -> _Part:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            raise self._ended(connection) from None
        if isinstance(message, ULError):
            raise message
        return message

    def _ended(self, connection: Connection) -> ULError:
        process = self._processes[connection]
        process.join(_END_S)
        message = f"the process of {process.name} has ended with {process.exitcode}"
        return ULError(f"{message}; what is written is whole: run the same command again to go on")


def _work(connection: Connection, opened: Opened) -> None:
    """A process: parts of the work until there are no more; an error is sent, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    try:
        pipeline = loading.open_pipeline(*opened)
        while True:
            indices, options = connection.recv()
            batches: list[Images] = []
            not_finite = None
            try:
                batches.extend(pipeline.generate(indices, **options))
            except NonFiniteError as error:
                not_finite = str(error)
            connection.send(_Part(batches, not_finite))
    except (EOFError, BrokenPipeError):
        return
    except ULError as error:
        connection.send(error)


@contextmanager
def generate_on_gpus(
    pipeline: Pipeline, path: Path | None, options: MachineOptions, guide: Path | None
) -> Iterator[Callable[..., Iterator[Images]]]:
    """Yields what takes the arguments of Pipeline.generate: the pipeline's own, or by a process for each GPU."""
    if len(options.gpus) < 2:
        yield pipeline.generate
        return
    same = options.of_backend(pipeline.backend.name)
    opened = {f"GPU {gpu}": Opened(path, replace(same, devices=str(gpu)), guide) for gpu in options.gpus}
    with generate_by_workers(pipeline, opened) as generate:
        yield generate


@contextmanager
def generate_by_workers(pipeline: Pipeline, opened: Mapping[str, Opened]) -> Iterator[Callable[..., Iterator[Images]]]:
    """As above; the pipeline itself only checks what is asked for."""
    with Workers(opened) as workers:

        def generate(images: np.ndarray, *, batch_size: int | None, tick: Tick, **options: Any) -> Iterator[Images]:
            pipeline.generate(images, batch_size=batch_size, **options)
            return workers.generate(images, batch_size or pipeline.default_batch_size, tick, **options)

        yield generate
