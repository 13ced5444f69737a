"""Progress: long work calls `tick(amount)`, which shows how far it is and raises StoppedError after a signal.

Progress is a bar with rate and ETA on a terminal, a line every few seconds elsewhere; both on stderr.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from ul_runtime.errors import visible
from ul_runtime.signals import check_stopped

Tick: TypeAlias = Callable[[float], None]  # the amount just done, 0 = only look whether to stop; raises StoppedError

_QUIET_S = 2.0  # nothing is shown for work that is shorter
_LINE_EVERY_S = 10.0


def silent(amount: float) -> None:
    """The tick of work that nobody watches or stops."""


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Tick]:
    """Yields the tick of work whose amounts add up to `total`; shown once it takes more than two seconds.

    Within `stop_on_signal` it raises StoppedError after the first signal.
    """
    with _bar(what, total, unit) if sys.stderr.isatty() else _lines(what, total, unit) as show:

        def tick(amount: float) -> None:
            check_stopped()
            if amount:
                show(amount)

        yield tick


@contextmanager
def _lines(what: str, total: int, unit: str) -> Iterator[Tick]:
    start = last = time.monotonic()
    done = 0.0

    def show(amount: float) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last > (_LINE_EVERY_S if last > start else _QUIET_S):
            last = now
            rate = done / (now - start)
            left = (total - done) / rate if rate else 0.0
            text = f"{what} {done:.0f} of {total} {unit}, {rate:.2f} {unit}/s, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    yield show


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.2f} {unit}/s" if task.speed else f"- {unit}/s")

    count = TextColumn("{task.completed:.0f} of {task.total:.0f}")
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), count, Rate(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, speed_estimate_period=30.0,
    )  # fmt: skip
    task = bar.add_task(visible(what), total=total)
    start = time.monotonic()

    def show(amount: float) -> None:
        if not bar.live.is_started and time.monotonic() - start > _QUIET_S:
            bar.start()
        bar.advance(task, amount)

    try:
        yield show
    finally:
        bar.stop()
