"""Ctrl-C and SIGTERM as a flag that loops ask between steps; a second one ends the process at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within the block, the first signal makes the yielded `stop()` true; the second has its default effect."""
    asked = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for each in _STOPPING:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, handler) for each in _STOPPING}
    try:
        yield lambda: asked
    finally:
        for each, old in before.items():
            signal.signal(each, old)
