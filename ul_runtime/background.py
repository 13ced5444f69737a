"""Work that one other thread does while this one goes on: in order, bounded, and no error of it is lost or late."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class Background(Generic[Item]):
    """A block in which `put(item)` has `work(item)` done; at most `most` items wait or are worked on.

    The first error of `work` is raised by the next `put` or `check`, or at the end of the block, and no later item is
    worked on. However the block ends, what was put before is done first.
    """

    def __init__(self, work: Callable[[Item], None], most: int) -> None:
        self._work = work
        self._most = most
        self._failed = False
        self._pending: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=1)

    def _do(self, item: Item) -> None:
        if not self._failed:
            self._failed = True  # until it has not
            self._work(item)
            self._failed = False

    def put(self, item: Item) -> None:
        """Hand an item over, as soon as fewer than `most` are unfinished. Raises the error of an earlier one."""
        while len(self._pending) >= self._most:
            self._pending.popleft().result()
        self.check()
        self._pending.append(self._pool.submit(self._do, item))

    def check(self) -> None:
        """Raise the error of an item, if one has failed; does not wait."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown()
