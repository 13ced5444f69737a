"""Several devices at work on one job: a process for each, which gets batches of indices as it is done with others."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from ul_runtime.batches import Images
from ul_runtime.errors import NonFiniteError, StoppedError, ULError
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Control

_ASK_S = 0.2  # between two questions whether to stop
_END_S = 10.0  # for a process to end by itself


class _Done(NamedTuple):
    """What a process says after the last images of a part: what was not finite."""

    not_finite: str | None


class Workers:
    """Processes that make images of one bundle; the block ends them.

    `opened`: for each process the arguments of ul_runtime.loading.load, and under "name" what errors call it.
    """

    def __init__(self, opened: Sequence[Mapping[str, Any]]) -> None:
        self._opened = opened
        self._processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")  # a CUDA context does not live through a fork
        for arguments in self._opened:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, dict(arguments)), name=str(arguments["name"]))
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

    def generate(self, indices: np.ndarray, batch_size: int, control: Control, **options: Any) -> Iterator[Images]:
        """Batches in no order; `options` as for Pipeline.generate, which says what is raised.

        ULError: a process has ended.
        """
        parts = deque(indices[first : first + batch_size] for first in range(0, len(indices), batch_size))
        busy: set[Connection] = set()
        failed: list[str] = []
        for connection in self._processes:
            if parts:
                self._send(connection, (parts.popleft(), {"batch_size": batch_size, **options}))
                busy.add(connection)
        while busy:
            if control.stop():
                raise StoppedError("stopped while its devices worked; run the same command again to go on")
            ready = wait(list(busy), _ASK_S)
            for connection in [each for each in busy if each in ready]:
                message = self._receive(connection)
                if isinstance(message, Images):
                    control.progress(len(message.indices))
                    yield message
                    continue
                failed += [message.not_finite] if message.not_finite else []
                busy.remove(connection)
                if parts:
                    self._send(connection, (parts.popleft(), {"batch_size": batch_size, **options}))
                    busy.add(connection)
        if failed:
            raise NonFiniteError("; ".join(failed))

    def _send(self, connection: Connection, work: object) -> None:
        try:
            connection.send(work)
        except OSError:
            raise self._ended(connection) from None

    def _receive(self, connection: Connection) -> Images | _Done:
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
        return ULError(
            f"the process of {process.name} has ended with {process.exitcode}; what is written is whole: "
            "run the same command again to go on"
        )


def _work(connection: Connection, opened: dict[str, Any]) -> None:
    """A process: parts of the work until there are no more; an error is told, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    import ul_runtime

    del opened["name"]
    try:
        pipeline = ul_runtime.load(**opened)
        while True:
            indices, options = connection.recv()
            not_finite = None
            try:
                for batch in pipeline.generate(indices, **options):
                    connection.send(batch)
            except NonFiniteError as error:
                not_finite = str(error)
            connection.send(_Done(not_finite))
    except (EOFError, BrokenPipeError):
        return
    except ULError as error:
        connection.send(error)


@contextmanager
def several_devices(
    pipeline: Pipeline, bundle: Path | None, cards: Sequence[int], **machine: Any
) -> Iterator[Callable[..., Iterator[Images]]]:
    """Yields what takes the arguments of Pipeline.generate. `machine`: arguments of ul_runtime.loading.load."""
    if len(cards) < 2:
        yield pipeline.generate
        return
    opened = [{"name": f"card {card}", "path": bundle, **machine, "device": card} for card in cards]
    with by_workers(pipeline, opened) as generate:
        yield generate


@contextmanager
def by_workers(pipeline: Pipeline, opened: Sequence[dict[str, Any]]) -> Iterator[Callable[..., Iterator[Images]]]:
    """As above, by a process for each of `opened`; the pipeline itself only checks what is asked for."""
    with Workers(opened) as workers:

        def generate(
            images: np.ndarray, *, batch_size: int | None, control: Control, **options: Any
        ) -> Iterator[Images]:
            pipeline.generate(images, batch_size=batch_size, control=control, **options)
            size = batch_size or pipeline.default_batch_size
            return workers.generate(images, size, control, **options)

        yield generate
