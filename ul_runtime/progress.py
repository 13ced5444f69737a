"""Progress on stderr: a bar with rate and ETA on a terminal, a line every few seconds elsewhere."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ul_runtime.errors import StoppedError
from ul_runtime.loop import never

_QUIET_S = 2.0  # nothing is shown for work that is shorter
_LINE_EVERY_S = 10.0


def print_line(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[float], None]]:
    """Yields `advance(amount)`, amounts adding up to `total`; shown once it takes more than two seconds."""
    if sys.stderr.isatty():
        with _bar(what, total, unit) as advance:
            yield advance
        return
    start = last = time.monotonic()
    done = 0.0

    def advance_line(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last > (_LINE_EVERY_S if last > start else _QUIET_S):
            last = now
            rate = done / (now - start)
            left = (total - done) / rate if rate else 0.0
            text = f"{what} {done:.0f} of {total} {unit}, {rate:.2f} {unit}/s, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    yield advance_line


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.2f} {unit}/s" if task.speed else f"- {unit}/s")

    count = TextColumn("{task.completed:.0f} of {task.total:.0f}")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), count, Rate(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, speed_estimate_period=30.0,
    )  # fmt: skip
    task = bar.add_task(what, total=total)
    start = time.monotonic()

    def advance(amount: float) -> None:
        if not bar.live.is_started and time.monotonic() - start > _QUIET_S:
            bar.start()
        bar.advance(task, amount)

    try:
        yield advance
    finally:
        bar.stop()


def _ignore(images: float) -> None:
    pass


@dataclass(frozen=True)
class Control:
    """`stop` is asked before each step (True: StoppedError); `progress` gets the share of images just done."""

    stop: Callable[[], bool] = never
    progress: Callable[[float], None] = _ignore

    def check(self) -> None:
        """StoppedError if asked to stop."""
        if self.stop():
            raise StoppedError("stopped; nothing was written")


UNWATCHED = Control()

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
