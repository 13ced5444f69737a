"""Progress and cancellation: what a signal does to long work, and what is shown of it."""

import sys
import time

import pytest

from ul_runtime import progress as module
from ul_runtime.progress import progress, silent
from ul_runtime.signals import check_stopped, stop_on_signal


def test_without_a_signal_nothing_is_raised() -> None:
    with stop_on_signal(), progress("working", 2, "pieces") as tick:
        for _ in range(2):
            tick(1)
            tick(0)
            silent(1)
        check_stopped()


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
