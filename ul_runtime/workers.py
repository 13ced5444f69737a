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
from typing import Any, Self, TypeAlias

import numpy as np

from ul_runtime import loading
from ul_runtime.batches import Images
from ul_runtime.errors import NonFiniteError, ULError
from ul_runtime.machine import MachineOptions
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick, silent
from ul_runtime.settings import as_indices

_ASK_S = 0.2  # between two questions whether to stop
_END_S = 10.0  # for a process to end by itself

Opened: TypeAlias = tuple[Path | None, MachineOptions, Path | None]
Part: TypeAlias = tuple[list[Images], str | None]  # the images of a part of the indices, and what was not finite


class Workers:
    """Processes that generate for `pipeline`, each with a pipeline of its own; the block ends them.

    `opened`: by name, the arguments of loading.open_pipeline.
    """

    def __init__(self, pipeline: Pipeline, opened: Mapping[str, Opened]) -> None:
        self._pipeline, self._opened = pipeline, opened
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

    def generate(
        self, images: int | np.ndarray, *, batch_size: int | None = None, tick: Tick = silent, **options: Any
    ) -> Iterator[Images]:
        """As Pipeline.generate, batches in no order. ULError: a process has ended."""
        self._pipeline.generate(images, batch_size=batch_size, **options)  # refuses what cannot be
        return self._generate(as_indices(images), batch_size or self._pipeline.default_batch_size, tick, options)

    def _generate(self, indices: np.ndarray, batch_size: int, tick: Tick, options: dict[str, Any]) -> Iterator[Images]:
        options = options | {"batch_size": batch_size}
        pieces = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
        parts = deque((piece, options) for piece in pieces)
        busy = {connection for connection in self._processes if self._send_next(connection, parts)}
        failed: list[str] = []
        while busy:
            tick(0)
            for connection in busy.intersection(wait(list(busy), _ASK_S)):
                batches, not_finite = self._receive(connection)
                if not self._send_next(connection, parts):
                    busy.remove(connection)
                failed += [not_finite] if not_finite else []
                for batch in batches:
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

    def _receive(self, connection: Connection) -> Part:
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
            connection.send((batches, not_finite))
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
    opened = {f"GPU {gpu}": (path, replace(same, devices=str(gpu)), guide) for gpu in options.gpus}
    with Workers(pipeline, opened) as workers:
        yield workers.generate
