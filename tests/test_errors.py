"""run_command: every way in which a command can end is one line and an exit code of the table."""

import errno
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from command import Runner

from ul_runtime.errors import BadInputError, NonFiniteError, run_command


def command_that(work: Callable[[], object]) -> Callable[[], None]:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def main(steps: int = 1) -> None:
        work()

    return lambda: run_command(app, "ul-test")


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BadInputError("bundle: broken; mend it"), 65, "ul-test: bundle: broken; mend it"),
        (NonFiniteError("NaN"), 76, "ul-test: NaN"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.png"),
            74,
            "ul-test: out.png: No space left on device",
        ),
        (KeyboardInterrupt(), 75, "ul-test: interrupted"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(command: Runner, error: BaseException, code: int, message: str) -> None:
    command.fails(command_that(raising(error)), code, message)


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), OSError(errno.ENOENT, "No such file")])
def test_an_error_that_nobody_foresaw_is_not_hidden(command: Runner, error: Exception) -> None:
    with pytest.raises(type(error)):
        command(command_that(raising(error)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], "--steps"),
        (["--nonsense"], "No such option: --nonsense"),
        (["extra"], "extra"),
    ],
)
def test_misuse_is_one_line_that_names_the_help(command: Runner, arguments: list[str], message: str) -> None:
    command.fails(command_that(lambda: None), 2, message, *arguments)
    assert command(command_that(lambda: None), *arguments).err.endswith("; see ul-test --help\n")


def test_help_and_success_end_with_0(command: Runner) -> None:
    assert "--steps" in command(command_that(lambda: None), "--help").out
    assert command(command_that(lambda: None)).code == 0


def ends(work: str, *redirection: str) -> "subprocess.CompletedProcess[str]":
    """A command that does `work`, in a process of its own; its exit code is that of the command."""
    code = f"""
import typer
from ul_runtime.errors import run_command
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
@app.command()
def main():
    {work}
run_command(app, "ul-test")
"""
    words = ["bash", "-c", 'set -o pipefail; "$@" ' + " ".join(redirection), "bash", sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("error", ["ValueError('a fault of ours')", "MemoryError", "OSError(22, 'Invalid argument')"])
def test_an_error_that_nobody_foresaw_ends_with_70_and_its_traceback(error: str) -> None:
    done = ends(f"raise {error}")
    assert done.returncode == 70
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert error.partition("(")[0] in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("work", ["print('result')", "print('much ' * 10**6)"])
def test_a_closed_pipe_ends_with_74_and_no_word(work: str) -> None:
    assert ends(work, "| cat").returncode == 0
    done = ends(f"import time; time.sleep(0.5); {work}", "| true")
    assert (done.returncode, done.stderr) == (74, "")


def test_help_into_a_closed_pipe_ends_with_74() -> None:
    code = "from ul_runtime.cli.generate import main; import time; time.sleep(0.5); main()"
    words = ["bash", "-c", 'set -o pipefail; "$@" --help | true', "bash", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (74, "")


UNWINDING = """
import signal, time, typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs and their children
from ul_runtime.errors import run_command
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
@app.command()
def main():
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("swept", flush=True)
run_command(app, "ul-test")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unwinds_so_that_temporary_files_go(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", UNWINDING], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (75, "swept\n", "ul-test: interrupted\n")
