"""Signals end a command: between two steps where work is watched, else by unwinding; never later than GRACE_S.

Ctrl-C, SIGTERM, SIGHUP (a terminal that closes) and SIGUSR1 (what cluster managers send) ask once. A second Ctrl-C or
SIGTERM ends the process at once. Python's handlers wait for long calls of a library; the thread of `end_on_signals`
does not.
"""

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from types import FrameType

from ul_runtime.errors import StoppedError

GRACE_S = 20.0  # from the first signal to the end, unless the work has heard of it and saves
_INSISTING = (signal.SIGINT, signal.SIGTERM)
STOPPING = (*_INSISTING, signal.SIGHUP, signal.SIGUSR1)
_LAST_WORDS = b"ended at once by a signal; files are whole or absent\n"


class _State:
    """Of this process: signals are of the process, and so is this."""

    watched = False  # within stop_on_signal
    asked = False  # a signal came there
    heard = False  # and the work stops for it
    waiting = False  # for a command in a process of its own, which stops by itself
    unwinding = False  # a signal came elsewhere


def check_stopped(amount: float = 0.0) -> None:
    """The tick that shows nothing: StoppedError after a signal within `stop_on_signal`."""
    if _State.asked:
        _State.heard = True
        raise StoppedError("stopped")


def asked_to_stop() -> bool:
    """Whether a signal has come within `stop_on_signal`."""
    return _State.asked


def unwinding() -> bool:
    """Whether a signal has interrupted work that was not watched; whatever fails then fails for that reason."""
    return _State.unwinding


def _end_at_once() -> None:
    with suppress(OSError):
        os.write(2, _LAST_WORDS)
    os._exit(StoppedError.exit_code)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _State.asked or _State.heard or _State.unwinding:
        if number in _INSISTING:
            _end_at_once()
    elif _State.watched:
        _State.asked = True
    else:
        _State.unwinding = True
        raise KeyboardInterrupt


def _insist(numbers: int) -> None:
    """The thread that ends the process: on a second signal, or when the first has had no effect in time."""
    until: float | None = None
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([numbers], [], [], left)[0]:
            if not (_State.heard or _State.waiting):
                _end_at_once()
            until = time.monotonic() + GRACE_S
            continue
        data = os.read(numbers, 1024)
        if not data:
            return
        came = [number for number in data if number in STOPPING]
        if until is None and came:
            until = time.monotonic() + GRACE_S
            del came[0]
        if any(number in _INSISTING for number in came):
            _end_at_once()


@contextmanager
def end_on_signals() -> Iterator[None]:
    """For a whole command: within the block a signal stops or unwinds the work, and in time. One that is ignored stays
    so (nohup). In the main thread.
    """
    _State.watched = _State.asked = _State.heard = _State.waiting = _State.unwinding = False
    taken = [each for each in STOPPING if signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, _on_signal) for each in taken}
    numbers, write = os.pipe()
    os.set_blocking(write, False)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = Thread(target=_insist, args=(numbers,), daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for each, old in before.items():
            signal.signal(each, old)
        os.close(write)
        thread.join()
        os.close(numbers)


@contextmanager
def stop_on_signal() -> Iterator[None]:
    """Within the block, every tick of `progress` raises StoppedError after the first signal.

    Within another such block it changes nothing.
    """
    if _State.watched:
        yield
        return
    taken = [each for each in STOPPING if each in _INSISTING or signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, _on_signal) for each in taken}
    _State.watched, _State.heard = True, False
    try:
        yield
    finally:
        _State.watched = _State.asked = False
        for each, old in before.items():
            signal.signal(each, old)


@contextmanager
def waiting_for_a_command() -> Iterator[None]:
    """Within the block a first signal may take longer than GRACE_S: the command that is waited for saves its work."""
    _State.waiting = True
    try:
        yield
    finally:
        _State.waiting = False
