"""How every command runs and ends: its signals, its log on stderr, and any error as one line and an exit code."""

import errno
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ul_runtime.errors import (
    OutOfMemoryError,
    OutputError,
    StoppedError,
    ULError,
    UsageError,
    is_out_of_memory,
    one_line,
    visible,
)
from ul_runtime.signals import end_on_signals, unwinding

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM}


class _Lines(logging.Handler):
    """What the packages log, each message one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(visible(self.format(record)), file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    """Messages of INFO and above of our packages go to stderr as they are; once, however often it is called."""
    for package in ("ul_runtime", "ul_train", "ul_export"):
        logger = logging.getLogger(package)
        if not any(isinstance(handler, _Lines) for handler in logger.handlers):
            logger.addHandler(_Lines())
        logger.setLevel(logging.INFO)


class _NobodyMayRead(io.FileIO):
    """A stream whose reader may be gone, as a terminal's is that was closed: what is written is lost, work goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def _prepare_streams() -> None:
    """No name is unprintable, and nothing that becomes of stderr stops the work. OutputError: stdout is closed."""
    if sys.stderr is None:  # 2>&-: the next file that is opened would get the number, and what libraries write to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if sys.stderr is sys.__stderr__:
        encoding = None if sys.stderr is None else sys.stderr.encoding
        raw = io.BufferedWriter(_NobodyMayRead(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)
    if sys.stdout is None:
        raise OutputError("standard output is closed; redirect it to /dev/null to do without it")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(app: Callable[..., Any], name: str) -> NoReturn:
    """Run a typer app and end the process with an exit code of the table, any error as one line on stderr.

    An error that nobody foresaw ends with 70, and its traceback is in a file that the line names.
    """
    try:
        _prepare_streams()
        _log_to_stderr()
        sys.excepthook = partial(_end_unforeseen, name)
        with end_on_signals():
            _run(app, name)
            sys.stdout.flush()
    except ULError as error:
        fail(name, error)
    except KeyboardInterrupt:
        fail(name, StoppedError("interrupted"))
    except BrokenPipeError:
        sys.stdout = io.StringIO()  # or Python flushes the old one, and ends with 120
        sys.exit(OutputError.exit_code)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        fail(name, OutputError(f"{error.filename or 'output'}: {error.strerror}; free space or fix permissions"))
    sys.exit(0)


def _run(app: Callable[..., Any], name: str) -> None:
    """What typer's own main() does, which would end with 1 where a pipe is closed."""
    import typer

    misuse: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException: typer keeps click to itself
    command = typer.main.get_command(app)  # type: ignore[arg-type]
    try:
        with suppress(typer.Exit), command.make_context(name, sys.argv[1:]) as context:
            command.invoke(context)
    except misuse as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        raise UsageError(f"{' '.join(message.split()).removesuffix('.')}; see {name} --help") from error


def fail(name: str, error: ULError) -> NoReturn:
    """Print the error as one line, and end the process with its exit code."""
    if unwinding():
        error = StoppedError("interrupted")
    with suppress(OSError):
        print(f"{name}: {visible(str(error))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):
        sys.stdout = io.StringIO()  # as above
    sys.exit(error.exit_code)


def _end_unforeseen(name: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The excepthook of a command: 1, which Python would end with, means that two things differ."""
    if is_out_of_memory(error):
        smaller = "--set stages.joint.batch_size" if name.startswith("ul-train") else "--batch-size"
        detail = f" ({one_line(error)})" if str(error) else ""
        advice = f"give a smaller {smaller} or fewer --threads, or free memory"
        fail(name, OutOfMemoryError(f"out of memory{detail}; {advice}"))
    what = f"{kind.__name__}: {one_line(error)}" if str(error) else kind.__name__
    if unwinding():
        fail(name, StoppedError("interrupted"))
    import traceback

    text = f"{' '.join(sys.argv)}\n{''.join(traceback.format_exception(kind, error, trace))}"
    fail(name, ULError(f"an error that nobody foresaw, {what}; report it with {_kept(name, text)}"))


def _kept(name: str, text: str) -> str:
    """The file that the traceback was written to, in the user's cache or else the temporary folder."""
    import tempfile

    from ul_runtime.machine import cache_dir

    file = f"{name.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (lambda: cache_dir() / "errors", lambda: Path(tempfile.gettempdir())):
        with suppress(OSError, ULError):
            path = folder() / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text)
            return f"its traceback, {path}"
    return text  # nowhere to write: the line is long, and nothing is lost
