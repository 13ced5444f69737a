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
