"""Progress and cancellation: what a signal does to long work, and what is shown of it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ul_runtime import progress as module
from ul_runtime.errors import StoppedError
from ul_runtime.progress import check_stopped, progress, silent, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_work_at_its_next_tick(number: signal.Signals) -> None:
    done = []
    before = signal.getsignal(number)
    with stop_on_signal(), progress("working", 5, "pieces") as tick:
        for k in range(5):
            if k == 2:
                os.kill(os.getpid(), number)
                with pytest.raises(StoppedError, match=r"^stopped$"):
                    tick(1)
                break
            tick(1)
            done.append(k)
        with pytest.raises(StoppedError):
            tick(0)
        with pytest.raises(StoppedError):
            check_stopped()
    assert done == [0, 1]
    assert signal.getsignal(number) == before
    check_stopped()  # of the work before; the next is not stopped


def test_without_a_signal_nothing_is_raised() -> None:
    with stop_on_signal(), progress("working", 2, "pieces") as tick:
        for _ in range(2):
            tick(1)
            tick(0)
            silent(1)
        check_stopped()


def test_a_signal_reaches_the_work_around_the_block_that_it_came_in() -> None:
    with stop_on_signal():
        with stop_on_signal():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(StoppedError):
                check_stopped()
        with pytest.raises(StoppedError):
            check_stopped()


TWICE = """
import os, signal, sys
from ul_runtime.progress import stop_on_signal
with stop_on_signal():
    os.kill(os.getpid(), signal.SIGINT)
    print("first", flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    print("second", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_second_signal_ends_the_process_at_once(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", TWICE, name], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (-getattr(signal, name), "first\n")


def test_progress_is_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress("working", 100, "pieces") as tick:
        for _ in range(100):
            now[0] += 0.5
            tick(1)
            tick(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working 5 of 100 pieces, 2.00 pieces/s, 48 s left"
    assert len(lines) == 5, "the first after two seconds, then one every ten"


def test_nothing_is_shown_of_short_work(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working", 3, "pieces") as tick:
        for _ in range(3):
            tick(1)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_shows_the_rate_and_is_gone_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(module, "_QUIET_S", 0.0)
    with progress("working", 3, "pieces") as tick:
        for _ in range(3):
            tick(1)
            time.sleep(0.15)
    text = capsys.readouterr().err
    assert "working" in text
    assert "pieces/s" in text
