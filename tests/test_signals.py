"""Signals: they stop watched work at its next tick, unwind other work, and end the process in time whatever it does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ul_runtime.errors import StoppedError
from ul_runtime.progress import progress
from ul_runtime.signals import check_stopped, stop_on_signal


@pytest.mark.case("F23", "SIGHUP, of a terminal that goes away", "as SIGTERM: saves, exit code 75; nohup works")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_the_work_at_its_next_tick(number: signal.Signals) -> None:
    done = []
    outside = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP is ignored, and stays so
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
    assert signal.signal(number, outside) == before
    check_stopped()  # of the work before; the next is not stopped


def test_a_signal_reaches_the_work_around_the_block_that_it_came_in() -> None:
    with stop_on_signal():
        with stop_on_signal():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(StoppedError):
                check_stopped()
        with pytest.raises(StoppedError):
            check_stopped()


COMMAND = """
import hashlib, os, signal, sys, time, typer
for each in (signal.SIGINT, signal.SIGHUP):  # whatever this test's shell ignores
    signal.signal(each, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.default_int_handler)
from ul_runtime import signals
from ul_runtime.cli.command import run_command
from ul_runtime.progress import progress
from ul_runtime.signals import stop_on_signal
signals.GRACE_S = float(sys.argv[2])
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

def long_call():  # of a library: no handler of Python's runs before it returns
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def unwatched():
    print("working", flush=True)
    long_call()

def watched():
    with stop_on_signal():
        unwatched()

def short_steps():
    with stop_on_signal(), progress("work", 1, "steps") as tick:
        print("working", flush=True)
        while True:
            time.sleep(0.01)
            tick(0)

def saving():
    with stop_on_signal():
        try:
            short_steps()
        finally:
            time.sleep(1)  # longer than the time that is left to work that does not hear
            print("saved", flush=True)

def importing():  # as a module that is written in C turns an interrupt into an error of its own
    print("working", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("initialization failed")

CHILD = '''
import os, signal, sys, time
def end(*_):
    time.sleep(1)  # longer than the time that is left to work that does not hear
    print("saved", file=sys.stderr)
    sys.exit(75)
signal.signal(signal.SIGUSR1, end)
print("working", file=open(f"/proc/{os.getppid()}/fd/1", "w"), flush=True)
time.sleep(60)
'''

def waiting():  # for a command in a process of its own
    from ul_train.sweep import run_to_end
    run_to_end([sys.executable, "-c", CHILD])

@app.command()
def main():
    globals()[sys.argv_work]()

work = sys.argv[3]
sys.argv_work, sys.argv = work, ["ul-test"]
run_command(app, "ul-test")
"""


def signalled(work: str, *numbers: signal.Signals, grace: float = 60.0, nohup: bool = False) -> "tuple[int, str, str]":
    """Exit code, stdout after its first line, and stderr, of a command that gets these signals, one after the other."""
    words = [sys.executable, "-c", COMMAND, "nohup" if nohup else "", str(grace), work]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "working\n"
            for number in numbers:
                time.sleep(0.3)  # into the call; between two signals, which else are one
                process.send_signal(number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, out, err


AT_ONCE = "ended at once by a signal; files are whole or absent\n"


@pytest.mark.case("A4", "two signals, or one, within a long call of a library", "a second ends it at once, one in 20 s")
@pytest.mark.parametrize("work", ["watched", "unwatched"])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once_even_within_a_long_call(work: str, second: signal.Signals) -> None:
    assert signalled(work, signal.SIGTERM, second) == (75, "", AT_ONCE)


@pytest.mark.case("A4")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_first_signal_ends_the_process_in_time_even_within_a_long_call(number: signal.Signals) -> None:
    assert signalled("watched", number, grace=0.2) == (75, "", AT_ONCE)


@pytest.mark.case("A4")
def test_work_that_has_heard_of_the_signal_has_time_to_save() -> None:
    assert signalled("saving", signal.SIGTERM, grace=0.2) == (75, "saved\n", "ul-test: stopped\n")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_what_a_terminal_or_a_cluster_sends_twice_is_asked_once(number: signal.Signals) -> None:
    assert signalled("saving", signal.SIGTERM, number, number) == (75, "saved\n", "ul-test: stopped\n")


def test_a_command_that_is_waited_for_is_told_and_has_time_to_save() -> None:
    assert signalled("waiting", signal.SIGTERM, grace=0.2) == (75, "", "saved\nul-test: stopped\n")


@pytest.mark.case("A14", "SIGHUP; SIGTERM while libraries are imported", "exit code 75, no missing package")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_within_an_import_is_not_taken_for_a_missing_package(number: signal.Signals) -> None:
    assert signalled("importing", number) == (75, "", "ul-test: interrupted\n")


@pytest.mark.case("F23")
def test_under_nohup_a_terminal_that_goes_away_changes_nothing() -> None:
    assert signalled("short_steps", signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, nohup=True)[0] == 75
    assert signalled("saving", signal.SIGHUP, signal.SIGTERM, nohup=True)[1:] == ("saved\n", "ul-test: stopped\n")
