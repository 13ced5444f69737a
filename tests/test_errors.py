"""run_command: every way in which a command can end is one line and an exit code of the table."""

import ast
import errno
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from command import Runner

from ul_runtime.cli.command import run_command
from ul_runtime.errors import EXIT_CODES, BadInputError, NonFiniteError, ULError, is_out_of_memory, one_line, visible

ROOT = Path(__file__).parent.parent


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


TABLE = "from ul_runtime.cli.options import print_table; from rich.table import Table; print_table(Table('x'))"


def ends(work: str, *redirection: str) -> "subprocess.CompletedProcess[str]":
    """A command that does `work`, in a process of its own; its exit code is that of the command."""
    code = f"""
import typer
from ul_runtime.cli.command import run_command
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
@app.command()
def main():
    {work}
run_command(app, "ul-test")
"""
    words = ["bash", "-c", 'set -o pipefail; "$@" ' + " ".join(redirection), "bash", sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.case(
    "F14",
    "errors that nobody foresaw",
    "one line that names a file with the traceback, and exit code 70; 1 only where two things differ",
)
@pytest.mark.parametrize("error", ["ValueError('a fault of ours')", "OSError(22, 'Invalid argument')", "KeyError('x')"])
def test_an_error_that_nobody_foresaw_is_one_line_and_a_file_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    monkeypatch.setenv("UL_CACHE", str(tmp_path))
    done = ends(f"raise {error}")
    assert done.returncode == 70
    (log,) = (tmp_path / "errors").iterdir()
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ul-test: an error that nobody foresaw, {error.partition('(')[0]}")
    assert line.endswith(f"its traceback, {log}")
    text = log.read_text()
    assert "Traceback (most recent call last):" in text
    assert error.partition("(")[0] in text.splitlines()[-1]


@pytest.mark.case("F14")
def test_where_the_cache_cannot_be_written_the_traceback_is_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("UL_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert ends("raise ValueError").returncode == 70
    assert len(list(tmp_path.glob("ul-test-*.log"))) == 1


@pytest.mark.case(
    "F15",
    "too little memory, for Python, torch, numpy, ONNX Runtime and threads",
    "exit code 71 and a line that names --batch-size; a batch is halved first, on a CPU as on a GPU",
)
@pytest.mark.parametrize(
    "error",
    [
        "MemoryError",
        'RuntimeError("can\'t start new thread")',
        'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 8 bytes")',
        "OSError(12, 'Cannot allocate memory')",
        "ImportError('libtorch_cpu.so: failed to map segment from shared object')",
        "RuntimeError('std::bad_alloc')",
    ],
)
def test_too_little_memory_ends_with_71_and_names_the_batch_size(error: str) -> None:
    done = ends(f"raise {error}")
    assert done.returncode == 71
    (line,) = done.stderr.splitlines()
    assert line.startswith("ul-test: out of memory")
    assert "--batch-size" in line


@pytest.mark.case("F15")
def test_numpy_s_refusal_is_too_little_memory() -> None:
    done = ends("import numpy; numpy.zeros(2**60, numpy.uint8)")
    assert (done.returncode, done.stderr.count("\n")) == (71, 1)


@pytest.mark.parametrize("error", [None, ValueError("no room"), BadInputError("out of memory"), OSError(2, "No file")])
def test_what_is_no_want_of_memory_is_not_taken_for_it(error: BaseException | None) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.case("F14")
@pytest.mark.parametrize("work", ["print('cat\\u65e5')", "print('cat\\udcff')"])
def test_a_name_that_stdout_has_no_character_for_is_printed_as_an_escape(
    monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = ends(work)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("cat\\u")


@pytest.mark.case("F14")
@pytest.mark.parametrize("gone", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_whatever_becomes_of_stderr_the_work_is_done(gone: str) -> None:
    work = "import sys, time; time.sleep(0.5); print('note ' * 9999, file=sys.stderr); print('result')"
    done = ends(work, gone)
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "")
    assert ends("raise ValueError", gone).returncode == 70


@pytest.mark.case("F14")
def test_a_closed_stdout_is_said_before_the_work() -> None:
    done = ends("print('result'); raise SystemExit(3)", ">&-")
    assert (done.returncode, done.stderr.count("standard output is closed")) == (74, 1)


@pytest.mark.case("F14")
def test_a_result_that_a_full_disk_cannot_take_is_74() -> None:
    done = ends("print('result')", ">/dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (74, 1)


@pytest.mark.case("A8", "control characters in names from files", "shown as escapes, in errors, log lines and tables")
def test_what_a_terminal_would_obey_is_shown_as_an_escape(command: Runner) -> None:
    name = "cat\x1b]0;owned\x07\x9b31m\u202etac\n"
    shown = r"cat\x1b]0;owned\x07\x9b31m\u202etac\n"
    assert visible(name) == shown
    command.fails(command_that(raising(BadInputError(name))), 65, f"ul-test: {shown}")
    logged = command(command_that(lambda: logging.getLogger("ul_runtime.test").info("opens %s", name)))
    assert logged.err == f"opens {shown}\n"
    assert one_line(name * 2).startswith(r"cat\x1b]0;owned\x07")


def test_the_table_of_exit_codes_in_the_docs_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "exit-codes.md").read_text(), re.M)
    assert [int(row) for row in rows] == list(EXIT_CODES)


def test_every_exit_code_in_the_code_is_in_the_table() -> None:
    used = {each.exit_code for each in subclasses(ULError)}
    for path in (
        path for package in ("ul_runtime", "ul_train", "ul_export") for path in (ROOT / package).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "exit_code":
                used.add(ast.literal_eval(node.value))
    assert used <= set(EXIT_CODES)
    assert set(EXIT_CODES) - used == {0}


def subclasses(kind: type[ULError]) -> set[type[ULError]]:
    return {kind, *(each for below in kind.__subclasses__() for each in subclasses(below))}


@pytest.mark.case("A2", "a pipe that is closed, in any command", "exit code 74, never 1, which means different")
@pytest.mark.parametrize("work", ["print('result')", "print('much ' * 10**6)", TABLE])
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
from ul_runtime.cli.command import run_command
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
